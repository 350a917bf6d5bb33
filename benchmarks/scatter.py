"""Where does the scatter between seeds come from: the first weights, the order of the data, or the way of judging?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/scatter.py

trains the plain dictionary of the second edition of the embedded world from some first weights on some orders of the data, each with each, and judges all of them by the same questions;
then from first weights that are tokens of the store instead of random directions, one order each. results/scatter.json has their shares, one after another, and page
4_evaluation/86_instrument takes their variance apart. Stopped, it goes on where it was."""
import argparse
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from saenb.lab.intervention_table import main_evaluation, training_alone
from saenb.lab.preset_files import find_preset
from saenb.lab.runner import evaluate_sae, run
from saenb.sae.sae import SAE

HERE = Path(__file__).resolve().parent


@contextmanager
def from_data():
    "First decoder rows are what the store holds of tokens drawn at random, centred."
    own = SAE.initialise
    def initialise(self, x, seed=0):
        drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:self.cfg.d_sae]
        self.directions = lambda seed: x[drawn].float() - x.float().mean(0)
        return own(self, x, seed)
    SAE.initialise = initialise
    try: yield
    finally: SAE.initialise = own


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", default="orthogonality/0", help="whose dictionary")
    parser.add_argument("--preset", default="tiny-cues-full", help="by which it is trained and judged")
    parser.add_argument("--seeds", type=int, default=4, help="of first weights, and of orders")
    parser.add_argument("--out", default="runs", help="where records are")
    parser.add_argument("--results", type=Path, default=HERE/"results"/"scatter.json", help="where figures go")
    given = parser.parse_args()
    torch.set_num_threads(1)
    preset, name = find_preset(given.preset), main_evaluation()
    trained_by, found = training_alone(preset), json.loads(given.results.read_text()) if given.results.exists() else {}

    def judge(key, trained_by, weights, **change):
        if key in found: return
        sae = run(given.run, trained_by, weights, given.out, change=change, progress=False).sae
        result = evaluate_sae(sae, preset, None, [name], given.out)[name]["eval_result_unstructured"]
        found[key] = {field: result[field] for field in ("held_out", "held_out_selectivity")}
        print(key, found[key], flush=True)
        given.results.write_text(json.dumps(found, indent=1) + "\n")

    for weights in range(given.seeds):
        for order in range(given.seeds):
            judge(f"weights {weights}, order {order}", trained_by, weights, seed=order)
    with from_data():
        for seed in range(given.seeds):
            judge(f"from data {seed}", replace(trained_by, name=f"{trained_by.name}-from-data"), seed)


if __name__ == "__main__": main()
