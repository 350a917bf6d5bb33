"""Do other worlds of the second edition rank the runs alike?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/worlds.py --world 2

builds the world of another seed, whose model may take longer to learn than the one that ships, trains and judges every run in it by the full budget, judges the controls, and writes results/worlds.json: of each run and seed the held-out score and
the selectivity, to be laid beside the records of the world that ships. Stopped, it goes on where it was; one world takes about 40 minutes of a processor, and a seed of all runs about as
long."""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from saenb.data.world import EDITIONS, ENOUGH_KNOWN, World
from saenb.ideas.run import all_runs
from saenb.lab.intervention_table import main_evaluation
from saenb.lab.preset_files import find_preset
from saenb.lab.reproduction import controls
from saenb.lab.runner import run

HERE = Path(__file__).resolve().parent
KEPT = ("held_out", "held_out_selectivity")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", type=int, default=2, help="seed of the world (default: 2)")
    parser.add_argument("--steps", type=int, default=3000, help="most steps in which its model is taught all facts (default: 3000)")
    parser.add_argument("--runs", help="ids with commas between (default: all)")
    parser.add_argument("--seeds", type=int, default=2, help="of each run (default: 2)")
    parser.add_argument("--out", type=Path, default=HERE/".worlds", help="where the world and its records go")
    parser.add_argument("--results", type=Path, default=HERE/"results"/"worlds.json", help="where figures go")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder, edition = given.out/f"cues-{given.world}", EDITIONS[2]
    world = World(folder) if (folder/"world.json").exists() else World.build(folder, edition.config(seed=given.world, steps=given.steps))
    print(f"{world}: {world.about['known']:.1%} of its questions are known", flush=True)
    if world.about["known"] < ENOUGH_KNOWN: sys.exit(f"worlds: that is too few to judge by; delete {folder} and give it more --steps.")
    preset = find_preset(f"{folder}-full")
    preset = replace(preset, recorded=(main_evaluation(),))

    def whole() -> dict:
        return json.loads(given.results.read_text()) if given.results.exists() else {}

    def here(kind) -> dict: return whole().get(str(given.world), {}).get(kind, {})

    def note(kind, name, seed, result):
        "Keep what was found; another world's figures may have come in meanwhile."
        table, kept = whole(), {field: result.get(field) for field in KEPT}
        table.setdefault(str(given.world), {}).setdefault(kind, {}).setdefault(name, {})[str(seed)] = kept
        given.results.write_text(json.dumps(table, indent=1) + "\n")
        print(name, seed, kept, flush=True)

    for seed in range(given.seeds):
        for one in given.runs.split(",") if given.runs else all_runs():
            if str(seed) in here("runs").get(one, {}): continue
            record = run(one, preset, seed, given.out/"runs", progress=False)
            note("runs", one, seed, record.result(main_evaluation())["eval_result_unstructured"])
        if not here("controls"):
            for name, result in controls(preset, 0, given.out/"runs").items(): note("controls", name, 0, result)


if __name__ == "__main__": main()
