"""What does a run's training step cost, as a multiple of the baseline's, measured in turn in one process?

    .venv/bin/python benchmarks/step_cost.py orthogonality

measures every run of an experiment at the logs' widths (2,304 on 2,304, batches of 2,048) over as many steps as its slowest part takes to come round."""
import argparse
import sys

import torch
from bench import Stream

from saenb.lab.analyses import step_cost
from saenb.base.errors import SaenbError, lookup
from saenb.evals.evaluation import as_text
from saenb.ideas.run import all_runs, experiments


def main(args):
    if args.threads: torch.set_num_threads(args.threads)
    lookup(args.experiment, experiments(), "experiment")
    stream, rows = Stream(args.d_in, args.batch), []
    for run in (r for r in all_runs().values() if r.experiment == args.experiment):
        ratios = step_cost([run], stream, args.d_sae, args.batch, args.steps, args.repeats)[run.id]
        rows.append({"run": run.id, "title": run.title, "times the baseline's": sum(ratios) / len(ratios), "least": min(ratios), "most": max(ratios)})
        print(as_text(rows[-1:]), flush=True)
    print(f"\n{args.d_in} wide, {args.d_sae} features, batches of {args.batch}, {torch.get_num_threads()} threads\n{as_text(rows)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare what training steps cost.")
    parser.add_argument("experiment", help="orthogonality, positional, contrastive or dual_objective")
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--d-sae", type=int, default=2304)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10, help="steps to measure at least")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each run")
    parser.add_argument("--threads", type=int, default=0, help="threads to compute with; 0 leaves it to torch")
    try: main(parser.parse_args())
    except SaenbError as e: sys.exit(f"step_cost: {e}")
