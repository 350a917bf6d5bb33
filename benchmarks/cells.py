"""What does one cell of dictionaries x interventions cost? Seconds of one processor, as multiples of the clamp's.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/cells.py

judges a preset's baseline under every intervention, from the densities to the last setting's answers, on one thread; reading questions and texts is
done before, since all cells share it. Of those that train weights one training is done, twice, since the first makes what all share, and counted as
often as settings ask for one. Figures go to results/cells.json by preset, one intervention after another; --only names some, and --preset another
edition than the first."""
import argparse
import json
import time
from pathlib import Path

import torch

from saenb.evals.exam import feature_stats
from saenb.evals.interventions.intervention import INTERVENTIONS
from saenb.evals.interventions.rmu import Trained
from saenb.evals.unlearning import run_settings
from saenb.ideas.run import baseline_run
from saenb.lab.preset_files import find_preset
from saenb.lab.runner import exam_of, run
from saenb.lab.workspace import workspace

HERE = Path(__file__).resolve().parent
NAMES = ("clamp", "zero_ablation", "mean_ablation", "conditional_clamp", "raw_direction", "guardrail", "guardrail_window", "guardrail_gate",
         "orthogonal_edit", "orthogonal_weights", "rmu", "rmu_apart", "crisp")


def cost(exam, sae, name: str) -> dict:
    "Processor seconds of one cell, in what is done once and in what is done for each setting."
    began, intervention = time.process_time(), INTERVENTIONS.named(name)()
    worked, known = intervention.prepare(exam, sae, feature_stats(exam, sae))
    settings, times = intervention.settings(exam.setup.grid, known), 1
    once, training_seconds, asked = time.process_time() - began, 0.0, len(settings)
    if isinstance(intervention, Trained):
        training = lambda s: {k: v for k, v in intervention.rule(s, known).items() if k != "steps"} | dict(features=s["features"].tolist())
        settings = [s for s in settings if training(s) == training(settings[0])]
        times, taken = asked // len(settings), []
        for _ in range(2): # the first makes what all share
            began, intervention.kept = time.process_time(), None
            intervention.weights(exam, worked, *intervention.asked(settings[0], known)[:2], **intervention.rule(settings[0], known))
            taken.append(time.process_time() - began)
        once, training_seconds = once + taken[0] - taken[1], taken[1]
    began = time.process_time()
    rows, batch = run_settings(exam, worked, settings, known, intervention)
    seconds = once + times * (training_seconds + time.process_time() - began)
    return dict(settings=asked, counted_times=times, seconds=seconds, once=once, tokens_read=times * batch.read)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(NAMES), help="names of interventions")
    parser.add_argument("--preset", default="tiny", help="whose questions and dictionary")
    parser.add_argument("--out", type=Path, default=HERE/"results"/"cells.json", help="where figures go")
    given = parser.parse_args()
    torch.set_num_threads(1)
    exam, sae = exam_of(find_preset(given.preset), workspace()), run(baseline_run(), given.preset, 0, workspace(), progress=False).sae
    for side in ("forget", "retain"): list(exam.corpus(side))
    exam.need_questions()
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name in given.only.split(","):
        found.setdefault(given.preset, {})[name] = cost(exam, sae, name)
        print(name, json.dumps(found[given.preset][name]), flush=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
