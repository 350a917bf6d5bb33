"""Do SAELens, dictionary_learning and sparsify load saenb's dictionaries of every architecture, and do they take the same training step?

    .venv/bin/python benchmarks/agreement.py

exports a dictionary of every architecture by `saenb export` for every package that has a class for it, lets that class load it, and compares activations and reconstructions.
Then both sides take one training step from the same weights on the same batch, and losses and gradients are compared. What was agreed on, and the packages' gradients at a small
width, become tests/agreement/. The environment is that of parity.py, made if it is not there."""
import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from interchange import BOUND, apart, cell, fits, ours
from parity import HERE, Theirs, environment, say, yes
from safetensors.torch import load_file, save_file

from saenb.base.errors import SaenbError
from saenb.cli import main as command
from saenb.data.store import Batch
from saenb.evals.evaluation import as_text
from saenb.sae.architectures import LOGS_WIDTH
from saenb.sae.jumprelu import STEEP, UNIT
from saenb.sae.sae import SAE, SAEConfig, load_sae
from saenb.train.config import TrainConfig
from saenb.train.trainer import Trainer

FIGURES = HERE.parent/"tests"/"agreement"
WIDTHS = dict(small=(16, 64, 256), real=(2304, 4096, 64)) # d_in, d_sae, rows
KINDS = {"relu": "relu", "topk": "topk,k={k}", "batchtopk": "batchtopk,k={k}", "jumprelu": "jumprelu", "gated": "gated", "matryoshka": "matryoshka,k={k},prefixes=3"}
EXPORTS = [(kind, to) for kind in KINDS for to in ("saelens", "dictionary_learning", "sparsify") if to != "sparsify" or kind == "topk"]
K, AUX = 6, 1 / 32
# kinds whose training step a package has, and which parts are another's by design
MORE = {"jumprelu, tanh": "jumprelu,penalty=tanh", "topk, no AuxK": "topk,k={k},aux=0.0"}
STEPS = [("SAELens", kind) for kind in (*KINDS, "jumprelu, tanh")] + [("dictionary_learning", kind) for kind in KINDS] + [("sparsify", "topk"), ("sparsify", "topk, no AuxK")]
DESIGN = {("SAELens", "gated"): ("the gate's own error moves the decoder, too, which the paper freezes", ("W_dec", "b_dec")),
          ("sparsify", "topk"): ("AuxK moves the decoder alone, since its encoder has gradients of kept activations only", ("W_enc", "b_enc", "b_dec")),
          ("dictionary_learning", "jumprelu"): ("a squared penalty for another number of active features than is aimed at, left out on both sides", ())}


def spec(kind: str) -> str: return (KINDS | MORE)[kind].format(k=K)


@torch.no_grad()
def dictionary(kind: str, width: str, seed: int = 0) -> SAE:
    "A dictionary whose weights are drawn at random, rows of length one, and so that what decides is decided clearly: dead features have small positive activations."
    d_in, d_sae, _ = WIDTHS[width]
    sae, draw = SAE(SAEConfig(d_in, d_sae, hook_name="blocks.19.hook_resid_post", hook_layer=19, model_name="gemma-2-2b", architecture=spec(kind))), torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=draw)
    sae.W_dec.copy_(randn(d_sae, d_in))
    sae.unit_rows()
    sae.W_enc.copy_(sae.W_dec.T + randn(d_in, d_sae) * 0.1 / d_in**0.5)
    sae.b_dec.copy_(randn(d_in) * 0.3)
    sae.b_enc.copy_(randn(d_sae) * 0.3)
    dead = dead_of(d_sae)
    sae.W_enc[:, dead] *= 0.02
    sae.b_enc[dead] = 0.2
    for name, of in dict(threshold=lambda p: 0.03 + 0.1 * torch.rand(p.shape, generator=draw), r_mag=lambda p: randn(d_sae) * 0.2, b_mag=lambda p: randn(d_sae) * 0.2).items():
        if hasattr(sae, name): getattr(sae, name).copy_(of(getattr(sae, name)))
    return sae


def dead_of(d_sae: int) -> torch.Tensor: return torch.arange(d_sae) % 5 == 0


def batch_of(width: str) -> torch.Tensor:
    d_in, _, rows = WIDTHS[width]
    return torch.randn(rows, d_in, generator=torch.Generator().manual_seed(1)) + 0.2


def exports(theirs: Theirs, width: str, work: Path) -> list[dict]:
    "Rows for dictionaries that `saenb export` wrote: what the package's class makes of them, and what we make of them once they are read again."
    found, x = [], batch_of(width)
    for kind, to in EXPORTS:
        sae, folder = dictionary(kind, width).eval(), work/width/f"{kind}_{to}"
        with contextlib.redirect_stdout(io.StringIO()): code = command(["export", str(sae.save(folder/"ours")), str(folder/"theirs"), "--to", to])
        if code: raise SaenbError(f"`saenb export --to {to}` ended with {code} for {kind}.")
        save_file(dict(x=x), folder/"there.safetensors")
        loaded = theirs.ask("load", to=to, folder=str(folder/"theirs"), file=str(folder/"there.safetensors"))["loaded"]
        there = load_file(folder/"there.safetensors")
        with torch.no_grad(): here = apart(sae, x, sae.encode(x), there)
        again = apart(sae, x, ours(load_sae(folder/"theirs"), x)["f"], there)
        found.append({"exported": kind, "to": to, "width": " x ".join(map(str, WIDTHS[width][:2])), "loaded as": loaded, "there": cell(here), "read here again": cell(again),
                      "largest": max(here["activations"], here["reconstructions"]), "equal": fits(here) and fits(again) and bool((there["f"] > 0).any())})
        shutil.rmtree(folder)
    return found


class Once:
    "A store with one batch."
    path = "made up"

    def __init__(self, x: torch.Tensor): self.x, self.d_in = x, x.shape[1]
    def check_batch(self, size, balanced): pass


def our_step(sae: SAE, x: torch.Tensor, dead: torch.Tensor) -> tuple[dict, dict]:
    "The terms of saenb's loss and its gradients, of one step from a dictionary's weights."
    trainer = Trainer(sae.train(), Once(x), (), TrainConfig(steps=400, batch=len(x), warmup=0, lr=1e-9, precision="float32"))
    trainer.since_fired[dead] = 1000
    found, terms, after = {}, {}, sae.architecture.after_step
    trainer.optimizer.register_step_pre_hook(lambda *_: found.update({n: p.grad.clone() for n, p in sae.named_parameters()}))
    sae.architecture.after_step = lambda step: (terms.update({n: v.item() for n, v in step.losses.items()}), after(step))
    ids = torch.arange(len(x))
    trainer.one_step(Batch(x, ids % 128, ids % 3, torch.zeros_like(ids), ids // 128))
    return terms, found


def settings(sae: SAE) -> dict:
    "What both sides are told of their losses."
    d_in, d_sae = sae.cfg.d_in, sae.cfg.d_sae
    l1 = TrainConfig(steps=1).sparsity_penalty * (LOGS_WIDTH / d_in)**0.5
    return dict(k=K, aux=getattr(sae.architecture, "aux", AUX), l1=l1, l0=l1 * UNIT, band=0.02, tanh=STEEP * d_in**0.5, ends=[d_sae >> i for i in (3, 2, 1, 0)])


def compared(package: str, kind: str, there: dict) -> dict:
    "The largest differences of the loss and of each gradient that a package found, in units of the largest value of each."
    x, start, apart = there["x"], {n.removeprefix("start."): t for n, t in there.items() if n.startswith("start.")}, {}
    sae = SAE(SAEConfig(*start["W_enc"].shape, architecture=spec(kind)))
    with torch.no_grad():
        for name, value in start.items(): getattr(sae, name).copy_(value)
    if (package, kind) == ("dictionary_learning", "jumprelu"): sae.architecture.losses = lambda step: {}
    terms, gradients = our_step(sae, x, there["dead"].bool())
    theirs = {name.removeprefix("gradient."): g for name, g in there.items() if name.startswith("gradient.")}
    if (package, kind) == ("dictionary_learning", "jumprelu"): # which does not centre its input: the same function of other parameters
        theirs["b_dec"] = theirs["b_dec"] - start["W_enc"] @ theirs["b_enc"]
        theirs["W_enc"] = theirs["W_enc"] - torch.outer(start["b_dec"], theirs["b_enc"])
    theirs["W_dec"] = theirs["W_dec"] - (theirs["W_dec"] * start["W_dec"]).sum(1, keepdim=True) * start["W_dec"] # as is left of it
    for name in theirs.keys() - set(DESIGN.get((package, kind), ("", ()))[1]):
        apart[name] = ((gradients[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item()
    return dict(loss=abs(sum(terms.values()) / there["loss"].item() - 1), gradients=max(apart.values()), worst=max(apart, key=apart.get), compared=sorted(apart), terms=sorted(terms))


def steps(theirs: Theirs, width: str, work: Path, keep: Path | None) -> list[dict]:
    "Rows for one training step of both sides from the same weights."
    found = []
    for package, kind in STEPS:
        file, x = work/f"{package}_{''.join(c for c in kind if c.isalnum())}.safetensors", batch_of(width)
        sae = dictionary(kind, width)
        save_file(dict(x=x, dead=dead_of(sae.cfg.d_sae).to(torch.uint8)) | {f"start.{n}": p.detach().contiguous().clone() for n, p in sae.named_parameters()}, file)
        said = theirs.ask("step", package=package, kind=kind, file=str(file), **settings(sae))
        there = load_file(file) | dict(loss=torch.tensor(said["loss"], dtype=torch.float64))
        row = compared(package, kind, there)
        found.append({"one step": kind, "beside": package, "of": said["by"], "width": " x ".join(map(str, WIDTHS[width][:2])), "terms": ", ".join(row["terms"]), "loss": row["loss"],
                      "gradients": row["gradients"], "worst": row["worst"], "other by design": DESIGN.get((package, kind), ("",))[0] or None, "file": file.name, "equal": max(row["loss"], row["gradients"]) <= BOUND})
        if keep: save_file(there, keep/file.name)
    return found


def main(args) -> bool:
    torch.set_num_threads(args.threads)
    python, out = environment(Path(args.env).absolute()), Path(args.out) if args.out else None
    if out:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
    tables = dict(exports=[], steps=[])
    with tempfile.TemporaryDirectory() as work, Theirs(python, Path(work), args.threads, "formats.py") as theirs:
        versions = theirs.ask("versions")
        for width in WIDTHS:
            say(f"{' x '.join(map(str, WIDTHS[width][:2]))}: every architecture is exported and loaded, and takes a step")
            tables["exports"] += exports(theirs, width, Path(work))
            tables["steps"] += steps(theirs, width, Path(work), out if width == "small" else None)
    print()
    for rows in tables.values(): print(as_text([{k: yes(v) if k == "equal" else v for k, v in row.items()} for row in rows]), end="\n\n")
    print(f"The bound is {BOUND:.0e}, in units of the largest value. Made with {', '.join(f'{p} {v}' for p, v in versions.items())}.")
    if out:
        (out/"figures.json").write_text(json.dumps(dict(command="python benchmarks/agreement.py", bound=BOUND, versions=versions, **tables), indent=1) + "\n")
        print(f"Figures, and the packages' steps at the small width, are in {out}.")
    equal = all(row["equal"] for rows in tables.values() for row in rows)
    print("All sides agree." if equal else "There are differences; the tables show where.")
    return equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Load saenb's dictionaries in other packages, and compare one training step.")
    parser.add_argument("--env", default=HERE/".reference", help="folder of an environment with the other packages; made if it is not there")
    parser.add_argument("--threads", type=int, default=1, help="threads that each side computes with")
    parser.add_argument("--out", default=FIGURES, help="where the figures go; empty for nowhere")
    try: sys.exit(not main(parser.parse_args()))
    except SaenbError as e: sys.exit(f"agreement: {e}")
