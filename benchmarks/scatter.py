"""Where does the scatter between seeds come from: the first weights, the order of the data, or the way of judging?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/scatter.py

trains the plain dictionary of the second edition of the embedded world from some first weights on some orders of the data, each with each, and judges all of them by the same questions;
results/scatter.json has their answers' shares, one after another, and page 4_evaluation/86_instrument takes their variance apart. Stopped, it goes on where it was."""
import argparse
import json
from pathlib import Path

import torch

from saenb.lab.intervention_table import main_evaluation, training_alone
from saenb.lab.preset_files import find_preset
from saenb.lab.runner import evaluate_sae, run

HERE = Path(__file__).resolve().parent


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
    found = json.loads(given.results.read_text()) if given.results.exists() else {}
    for weights in range(given.seeds):
        for order in range(given.seeds):
            key = f"weights {weights}, order {order}"
            if key in found: continue
            sae = run(given.run, training_alone(preset), weights, given.out, change=dict(seed=order), progress=False).sae
            result = evaluate_sae(sae, preset, None, [name], given.out)[name]["eval_result_unstructured"]
            found[key] = {field: result[field] for field in ("held_out", "held_out_selectivity")}
            print(key, found[key], flush=True)
            given.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
