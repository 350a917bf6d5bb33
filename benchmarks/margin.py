"""Does CRISP forget more where gradients flow through its margin, as in its authors' code, or where the margin is a constant, as in saenb's?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/margin.py

judges dictionaries under CRISP both ways on the second edition of the embedded world, with the authors' margin of 10 and one of 50; held-out scores go to results/margin.json, one after
another, and page 4_evaluation/76_crisp shows them. Stopped, it goes on where it was."""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from saenb.evals.evaluation import encoded
from saenb.evals.exam import feature_stats
from saenb.evals.halves import held_out_fields, levels_from
from saenb.evals.interventions import crisp
from saenb.evals.unlearning import answers_in, run_settings
from saenb.lab.intervention_table import training_alone
from saenb.lab.preset_files import find_preset
from saenb.lab.runner import exam_of, run

HERE = Path(__file__).resolve().parent
constant = crisp.feature_loss


def attached(sae, features, edited, original, keep, margin):
    "The same loss with gradients through the margin."
    now = crisp.before_threshold(sae, edited)
    slack = (margin * now.mean(-1, keepdim=True)).abs() * (encoded(sae, original)[..., features] > 0)
    raised = F.relu(now.index_add(-1, torch.as_tensor(features), slack))
    raised = sae.architecture.select(sae, raised, raised)[..., features]
    counted = (raised > 0) & keep[..., None]
    return (raised * counted).sum() / counted.sum().clamp_min(1)


def held_out(exam, sae) -> dict:
    "What CRISP's settings remove, chosen on one half and reported on the other."
    intervention = crisp.CRISP()
    worked, known = intervention.prepare(exam, sae, feature_stats(exam, sae))
    rows, _ = run_settings(exam, worked, intervention.settings(exam.setup.grid, known), known, intervention)
    found = held_out_fields(answers_in(rows, exam), exam.setup.retain_floor, levels_from(exam.setup.lowest_retain))
    return {name: found[name] for name in ("held_out", "held_out_interval")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", default="orthogonality/0,contrastive/3", help="whose dictionaries")
    parser.add_argument("--preset", default="tiny-cues-full", help="by which they are trained and judged")
    parser.add_argument("--out", default="runs", help="where records are")
    parser.add_argument("--results", type=Path, default=HERE/"results"/"margin.json", help="where figures go")
    given = parser.parse_args()
    torch.set_num_threads(1)
    preset, found = find_preset(given.preset), json.loads(given.results.read_text()) if given.results.exists() else {}
    exam = exam_of(preset, given.out)
    exam.need_questions()
    for name in given.runs.split(","):
        sae = run(name, training_alone(preset), 0, given.out, progress=False).sae
        for way, loss in dict(constant=constant, attached=attached).items():
            for margin in (10, 50):
                if f"{way} {margin}" in found.get(name, {}): continue
                crisp.feature_loss, crisp.MARGIN = loss, margin
                found.setdefault(name, {})[f"{way} {margin}"] = held_out(exam, sae)
                print(name, way, margin, found[name][f"{way} {margin}"], flush=True)
                given.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
