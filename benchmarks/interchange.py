"""Does saenb make of a foreign dictionary what its own package makes of it, and SAELens of ours what we do?

    .venv/bin/python benchmarks/interchange.py

has SAELens, dictionary_learning and sparsify write dictionaries with random weights in every format, reads them with saenb, exports them, has SAELens read those, and prints the
largest differences as a matrix of formats by packages. The small ones among them become tests/interchange/. The environment is that of parity.py, made if it is not there."""
import argparse
import json
import shutil
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch
from parity import HERE, Theirs, environment, say, yes
from safetensors.torch import load_file, save_file

from saenb.base.errors import SaenbError
from saenb.evals.evaluation import as_text, encoded
from saenb.data.harvest import is_text, stream_at, token_rows
from saenb.sae.formats.saelens import export
from saenb.ideas.run import all_runs
from saenb.sae.sae import SAE, SAEConfig, load_sae
from saenb.data.world import World

# A number here is a sum of up to 4,096 products in float32, whose rounding errors of 2^-24 add up to some 64 times that in the worst of random cases, 4e-6 of the largest value.
# Folding adds a few roundings more; anything else that is done differently is orders of magnitude above.
BOUND = 1e-5
WIDTHS = dict(small=(8, 16, 12), real=(2304, 4096, 64)) # d_in, d_sae, rows
FIXTURES = HERE.parent/"tests"/"interchange"


def apart(sae: SAE, x, f, there: dict) -> dict:
    "The largest differences, in units of the largest value. Features on the edge, within the bound of their threshold or of the k-th strongest, are counted and left out, with what they write."
    edge = (f > 0) != (there["f"] > 0)
    f_unit, x_unit = there["f"].max(), there["reconstruction"].abs().max()
    far = (f - there["f"]).abs() / f_unit
    gate = next((g for g in (*sae.gates, sae, sae.architecture) if hasattr(g, "threshold") or hasattr(g, "k")), None)
    limit = gate.threshold if hasattr(gate, "threshold") else sae.ungated(x).topk(gate.k).values[..., -1:] if gate else torch.zeros(1)
    edge &= (sae.ungated(x) - limit).abs() <= BOUND * f_unit
    same = ~edge.any(-1)
    written = (sae.decode(f) - there["reconstruction"]).abs() / x_unit
    return dict(activations=far[~edge].max().item(), reconstructions=written[same].max().item(), edge=edge.sum().item())


def cell(found: dict | None) -> str | None: return found and f"{found['activations']:.0e} {found['reconstructions']:.0e}" + f" ({found['edge']} on the edge)" * bool(found["edge"])


def fits(found: dict) -> bool: return max(found["activations"], found["reconstructions"]) <= BOUND


def ours(sae: SAE, x, positions=None) -> dict:
    "What saenb makes of these inputs."
    with torch.no_grad():
        f = sae.encode(x, positions)
        return dict(x=x, f=f, reconstruction=sae.decode(f))


def to_saelens(theirs: Theirs, sae: SAE, x, folder: Path, positions=None) -> tuple[dict, dict]:
    "The differences once SAELens has read what we exported, and what it says that is; then once we have."
    export(sae, folder)
    save_file(dict(x=x), folder/"there.safetensors")
    said = theirs.ask("read", folder=str(folder), out=str(folder/"there.safetensors"))
    if "refused" in said: return said, {}
    here = ours(load_sae(folder), x, positions)
    if not torch.equal(here["f"], ours(sae, x, positions)["f"]): raise SaenbError(f"An exported dictionary is another one when saenb reads it back: {sae}.")
    with torch.no_grad(): return said, apart(sae, x, here["f"], load_file(folder/"there.safetensors"))


def with_gates(d_in: int, d_sae: int) -> dict[str, SAE]:
    "A dictionary of ours for every gate that a run has, all of whose weights are drawn at random."
    made = {}
    for name, settings in ((n, s) for run in all_runs().values() for n, s in run.mechanisms):
        sae = SAE(SAEConfig(d_in=d_in, d_sae=d_sae, hook_name="blocks.0.hook_resid_post", gates=[dict(name=name, settings=settings)])).eval()
        if not sae.gates[0].gate or name in made: continue
        draw = torch.Generator().manual_seed(len(made))
        with torch.no_grad():
            for p in sae.parameters(): p.copy_(torch.randn(p.shape, generator=draw) / (1 if p.ndim < 2 else p.shape[0] ** 0.5))
        if sae.gates[0].n_active is not None: sae.gates[0].n_active = d_sae // 2
        made[name] = sae
    return made


def foreign(theirs: Theirs, width: str, fixtures: Path | None, work: Path) -> list[dict]:
    "The matrix's rows for one width: every format read by us, exported by us, and read by SAELens."
    d_in, d_sae, rows = WIDTHS[width]
    found = []
    for i, (package, case) in enumerate(theirs.ask("cases")):
        folder = work/width/{"Gemma Scope": "gemma-scope-2b-pt-res/layer_19/width_4k/average_l0_1", "sparsify": "layers.19"}.get(package, case) # which name the layer
        active = theirs.ask("write", package=package, case=case, folder=str(folder), d_in=d_in, d_sae=d_sae, rows=rows, seed=i)["active"]
        there, sae = load_file(folder/"expected.safetensors"), load_sae(folder)
        with torch.no_grad(): read = apart(sae, there["x"], sae.encode(there["x"]), there)
        said, again = to_saelens(theirs, sae, there["x"], work/width/f"{case}_exported")
        found.append({"written by": package, "case": case, "width": f"{d_in} x {d_sae}", "active": active, "read by saenb": cell(read), "exported, read by SAELens": cell(again),
                      "there": said.get("architecture"), "equal": fits(read) and fits(again) and sae.cfg.hook_layer == 19})
        if fixtures: shutil.copytree(folder, fixtures/folder.relative_to(work/width))
        shutil.rmtree(work/width)
    return found


def gated(theirs: Theirs, work: Path) -> list[dict]:
    "Rows for dictionaries whose gates only saenb has: SAELens refuses them, and has them once saenb.saelens is imported; positions are known of texts and unknown of single vectors."
    made = with_gates(32, 128)
    texts = torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(1))
    alone = {name: "refused" in to_saelens(theirs, sae, texts, work/"alone"/name)[0] for name, sae in made.items()}
    theirs.ask("register", saenb=str(HERE.parent))
    found = []
    for name, sae in made.items():
        shown = {}
        for title, x, positions in (("read by SAELens with saenb.saelens: texts", texts, torch.arange(40).expand(3, 40)), ("vectors", texts.flatten(0, 1), None)):
            said, again = to_saelens(theirs, sae, x, work/"registered"/f"{name}_{title}", positions)
            shown |= {title: cell(again)}
            alone[name] &= fits(again)
        found.append({"gates of saenb": name, "refused by SAELens alone": yes(alone[name]), **shown, "equal": alone[name]})
    return found


def saebench(theirs: Theirs, work: Path) -> list[dict]:
    "Rows for SAEBench's own code on exported dictionaries: how often each feature is active on the embedded world's texts, theirs against ours."
    world = World.default()
    model = world.model()
    rows = torch.tensor([row for row, _ in islice(token_rows(world.texts("train", 120), model.tokenizer, 128), 32)])
    stream, text = stream_at(model, rows, world.layer).float(), is_text(rows, model.tokenizer)
    begin, (rows, stream, text) = stream[:16][text[:16]], (t[16:] for t in (rows, stream, text))
    found = []
    for name, settings in {"standard": None, "JumpReLU": {}, "TopK": dict(k=20), "HardMask": dict(parts=8)}.items():
        sae = SAE(SAEConfig(d_in=stream.shape[-1], d_sae=512, hook_name=f"blocks.{world.layer}.hook_resid_post", hook_layer=world.layer, model_name="gemma-2-2b-it",
                            gates=[] if settings is None else [dict(name=name, settings=settings)])).initialise(begin).eval()
        with torch.no_grad(): sae.b_enc *= 1.001 # beginnings put thresholds on tokens, and the same token in the same place is there again
        if name == "JumpReLU": sae.gates[0].threshold.fill_(sae.ungated(begin).quantile(0.97, dim=0).median().item())
        export(sae, work/"saebench"/name)
        with torch.no_grad(): mine = (encoded(sae, stream)[text] > 0).float().mean(0)
        there = torch.tensor(theirs.ask("density", folder=str(work/"saebench"/name), model=str(world.path/"model"), tokens=rows.tolist())["density"])
        tokens = round(((mine - there).abs().max() * text.sum()).item()) # a feature's count may differ by one on the edge, since the two models' streams differ in rounding
        found.append({"SAEBench counts active tokens": name, "mean theirs": there.mean().item(), "mean ours": mine.mean().item(), "largest difference in tokens": tokens,
                      "of": int(text.sum()), "equal": tokens <= 1 and mine.mean() > 0})
    return found


def main(args) -> bool:
    torch.set_num_threads(args.threads)
    python = environment(Path(args.env).absolute())
    fixtures = Path(args.out) if args.out else None
    if fixtures: shutil.rmtree(fixtures, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work, Theirs(python, Path(work), args.threads, "formats.py") as theirs:
        versions, tables = theirs.ask("versions"), []
        for width in WIDTHS:
            say(f"{' x '.join(map(str, WIDTHS[width][:2]))}: every format is written, read, exported and read again")
            tables.append(foreign(theirs, width, fixtures if width == "small" else None, Path(work)))
        say("Dictionaries with gates of saenb's go to SAELens")
        tables.append(gated(theirs, Path(work)))
        say("SAEBench judges exported dictionaries")
        tables.append(saebench(theirs, Path(work)))
    print()
    for rows in tables: print(as_text([{k: yes(v) if k == "equal" else v for k, v in row.items()} for row in rows]), end="\n\n")
    print(f"Each cell: the largest difference of an activation and of a reconstructed number, in units of the largest; the bound is {BOUND:.0e}. "
          f"Made with {', '.join(f'{p} {v}' for p, v in versions.items())}.")
    if fixtures:
        (fixtures/"versions.json").write_text(json.dumps(dict(command="python benchmarks/interchange.py", **versions), indent=1) + "\n")
        print(f"The small ones are in {fixtures}.")
    equal = all(row["equal"] for rows in tables for row in rows)
    print("All sides agree." if equal else "There are differences; the tables show where.")
    return equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Exchange dictionaries with SAELens, dictionary_learning and Gemma Scope, and compare what comes of them.")
    parser.add_argument("--env", default=HERE/".reference", help="folder of an environment with SAEBench; made if it is not there")
    parser.add_argument("--threads", type=int, default=1, help="threads that each side computes with")
    parser.add_argument("--out", default=FIXTURES, help="where the small dictionaries go; empty for nowhere")
    try: sys.exit(not main(parser.parse_args()))
    except SaenbError as e: sys.exit(f"interchange: {e}")
