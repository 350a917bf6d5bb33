"""How much do SAELens' own trained dictionaries explain and unlearn at as many active features as saenb's?

    .venv/bin/python benchmarks/frontier.py

trains SAELens' TopK, BatchTopK and JumpReLU dictionaries in SAELens' own loop, on the very batches that saenb's frontier records (page 2_dictionary/36_frontier) were trained on, as wide
and for as many steps, lets saenb judge them, and writes runs/architectures-full/saelens.json, which that page draws beside the records. Each is trained at two learning rates, saenb's
and three times it (--rates names others), and all points are kept. Stopped, it goes on where it was. The environment is that of parity.py, made if it is not there."""
import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
COUNTS, COEFFICIENTS = (5, 10, 20, 40, 80, 160), (1024.0, 256.0, 64.0, 32.0, 16.0, 8.0)
POINTS = [("TopK", dict(k=k)) for k in COUNTS] + [("BatchTopK", dict(k=k)) for k in COUNTS] + [("JumpReLU", dict(l0_coefficient=c)) for c in COEFFICIENTS]
EVALS = ("unlearning", "core")


def theirs(job: dict):
    "Train one dictionary on the batches that come in, and save it as SAELens does; runs in SAELens' environment."
    import torch
    from sae_lens import saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    size = job["batch"] * job["d_in"] * 4

    def batches():
        while len(data := sys.stdin.buffer.read(size)) == size: yield torch.frombuffer(bytearray(data), dtype=torch.float32).view(job["batch"], job["d_in"]) * job["scale"]

    kind, own = job["kind"], job["own"] | (dict(l0_warm_up_steps=job["warmup"]) if job["kind"] == "JumpReLU" else {})
    sae = getattr(saes, f"{kind}TrainingSAE")(getattr(saes, f"{kind}TrainingSAEConfig")(d_in=job["d_in"], d_sae=job["d_sae"], **own))
    SAETrainer(SAETrainerConfig(total_training_samples=job["steps"] * job["batch"], train_batch_size_samples=job["batch"], lr=job["lr"], lr_end=job["lr"] / 10,
                                lr_warm_up_steps=job["warmup"], lr_decay_steps=job["decay"], dead_feature_window=job["dead"]), sae, batches()).fit()
    sae.fold_activation_norm_scaling_factor(job["scale"])
    sae.save_inference_model(job["save"])


def train_there(python: Path, job: dict, batches):
    "Have SAELens train on these batches."
    env = os.environ | dict(JAXTYPING_DISABLE="1", WANDB_MODE="disabled", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", TQDM_DISABLE="1")
    for name in ("PYTHONPATH", "PYTHONHOME"): env.pop(name, None)
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([python, __file__, "theirs", json.dumps(job)], cwd=tempfile.gettempdir(), env=env, stdin=subprocess.PIPE, stdout=said, stderr=said)
        try:
            for x in batches: process.stdin.write(x.numpy().tobytes())
            process.stdin.close()
        except BrokenPipeError: pass
        if process.wait():
            from saenb.base.errors import SaenbError
            said.seek(0)
            raise SaenbError(f"SAELens stopped; the end of what it printed:\n{''.join(said.readlines()[-12:])}")


def main(args):
    import torch
    from parity import environment, say

    from saenb.base.files import write_json
    from saenb.lab.preset_files import find_preset
    from saenb.evals.evaluation import evaluation
    from saenb.lab.runner import evaluate_sae, store_of
    from saenb.sae.sae import load_sae
    torch.set_num_threads(1)
    python, preset, file = environment(Path(args.env).absolute()), find_preset(args.preset), Path(args.results)
    store, training = store_of(preset, args.out), preset.training
    settings = dict(preset=preset.name, steps=args.steps, seed=args.seed, d_sae=preset.d_sae, batch=training.batch)
    kept = json.loads(file.read_text()) if file.exists() else dict(command="python benchmarks/frontier.py", settings=settings, points=[])
    if kept["settings"] != settings: sys.exit(f"frontier: {file} holds points of other settings; name another file with --results, or delete it.")
    # as its normalize_activations="expected_average_only_in" has it, estimated beforehand since batches come once
    scale = store.d_in**0.5 / store.rows(0, 2**15).x.float().norm(dim=1).mean().item()
    for (kind, own), lr in itertools.product(POINTS, args.rates or (training.lr, 3 * training.lr)):
        point = dict(kind=kind, **own, lr=lr)
        if any(point.items() <= p.items() for p in kept["points"]): continue
        with tempfile.TemporaryDirectory() as work:
            job = dict(kind=kind, own=own, lr=lr, seed=args.seed, steps=args.steps, batch=training.batch, scale=scale, d_in=store.d_in, d_sae=preset.d_sae, warmup=args.steps // 10,
                       decay=int(args.steps * training.decay), dead=max(1, min(500, args.steps // 4)), save=f"{work}/sae")
            batches = itertools.islice(store.batches(training.batch, args.seed), args.steps)
            train_there(python, job, (b.x.float() for b in batches))
            sae = load_sae(Path(work)/"sae")
            found = evaluate_sae(sae, preset, None, list(EVALS), args.out)
        kept["points"].append(point | {m: v[0] for name, result in found.items() for m, v in evaluation(name).headline(result).items()})
        write_json(file, kept)
        say(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in kept["points"][-1].items()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["theirs"]: theirs(json.loads(sys.argv[2]))
    else:
        parser = argparse.ArgumentParser(description="Train SAELens' dictionaries beside saenb's frontier records.")
        parser.add_argument("--preset", default="tiny-cues-full", help="whose stream, width and exam")
        parser.add_argument("--steps", type=int, default=1000, help="of each training")
        parser.add_argument("--rates", type=float, nargs="+", help="learning rates, if not the preset's and three times it")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--out", default="runs", help="folder of stores and records")
        parser.add_argument("--results", default=HERE.parent/"runs"/"architectures-full"/"saelens.json", help="where the points go")
        parser.add_argument("--env", default=HERE/".reference", help="folder of an environment with the other packages; made if it is not there")
        main(parser.parse_args())
