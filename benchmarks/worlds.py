"""Do other worlds of the second edition rank the runs alike?

    .venv/bin/python benchmarks/worlds.py --world 2

trains and judges every run in the world of another seed by the full budget, judges the controls there, and adds to results/worlds.json, of each run and seed, the scores that page 4_evaluation/86_instrument lays beside the
records of the world that ships. The world itself lies in benchmarks/worlds; one that is not there is built first, in about an hour of a processor, and its model may take longer to learn than the one that ships. `--world first`
takes the first edition, by the quick budget of `make reproduce`. Stopped, it goes on where it was."""
import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from saenb.base.files import write_json
from saenb.data.world import EDITIONS, ENOUGH_KNOWN, World
from saenb.ideas.run import all_runs
from saenb.lab.engines import run_parallel
from saenb.lab.intervention_table import main_evaluation
from saenb.lab.preset_files import find_preset
from saenb.lab.reproduction import controls
from saenb.lab.runner import run

HERE = Path(__file__).resolve().parent
KEPT = ("score", "held_out", "held_out_selectivity")


def preset_of(place: str):
    "The preset of a world, with the one evaluation that is asked for."
    return replace(find_preset(place), recorded=(main_evaluation(),))


def judge(place: str, name: str, seed: int, out: Path) -> dict:
    "The scores of one run, or of all controls, by their names."
    found = controls(preset_of(place), seed, out) if name == "controls" else {
        name: run(name, preset_of(place), seed, out, progress=False).result(main_evaluation())["eval_result_unstructured"]}
    return {one: {field: result.get(field) for field in KEPT} for one, result in found.items()}


def build(folder: Path, seed: int, steps: int):
    "Build the world of a seed, or find it, and say what its model knows."
    world = World(folder) if (folder/"world.json").exists() else World.build(folder, EDITIONS[2].config(seed=seed, steps=steps))
    print(f"{world}: {world.about['known']:.1%} of its questions are known", flush=True)
    if world.about["known"] < ENOUGH_KNOWN: sys.exit(f"worlds: that is too few to judge by; delete {folder} and give it more --steps.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", default="2", help="seed of the world, or `first` for the first edition (default: 2)")
    parser.add_argument("--steps", type=int, default=3000, help="most steps in which its model is taught all facts (default: 3000)")
    parser.add_argument("--runs", help="ids with commas between (default: all)")
    parser.add_argument("--seeds", type=int, default=2, help="of each run (default: 2)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--worlds", type=Path, default=HERE/"worlds", help="where worlds are")
    parser.add_argument("--out", type=Path, default=HERE/".worlds", help="where records go")
    parser.add_argument("--results", type=Path, default=HERE/"results"/"worlds.json", help="where figures go")
    given = parser.parse_args()
    if not (given.world == "first" or given.world.isdigit()): parser.error(f"--world is {given.world}; give a seed, or `first`.")
    if given.world == "first": place = "tiny"
    else:
        build(given.worlds/f"cues-{given.world}", int(given.world), given.steps)
        place = f"{given.worlds/f'cues-{given.world}'}-full"

    def whole() -> dict:
        return json.loads(given.results.read_text()) if given.results.exists() else {}

    there = whole().get(given.world, {})
    names = given.runs.split(",") if given.runs else [*all_runs(), "controls"]
    wanted = [(place, name, seed, given.out) for seed in range(given.seeds) for name in names
              if str(seed) not in there.get("untrained" if name == "controls" else name, {})]
    if not wanted: return
    for at, found in run_parallel(judge, wanted, given.jobs):
        table = whole()
        for name, kept in found.items(): table.setdefault(given.world, {}).setdefault(name, {})[str(wanted[at][2])] = kept
        write_json(given.results, table, 1)
        print(found, flush=True)


if __name__ == "__main__": main()
