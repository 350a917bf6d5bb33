"""Is saenb's unlearning SAEBench's, question by question, and how much faster? And its sparse probing, accuracy by accuracy?

    .venv/bin/python benchmarks/parity.py

makes an environment with SAEBench in benchmarks/.reference (once), lets both sides judge the same dictionaries on the embedded world in
turn, prints theirs beside ours, and writes what they agree on to tests/parity.json."""
import argparse
import copy
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from saenb import lab
from saenb.base.errors import SaenbError, lookup
from saenb.base.files import fingerprint, write_text
from saenb.evals import sparse_probing, unlearning
from saenb.evals.evaluation import Readings, as_text
from saenb.evals.controls import untrained
from saenb.evals.probing_texts import SETS, SparseProbingSetup
from saenb.lab.runner import evaluate_sae
from saenb.evals.exam import REFERENCE, Exam, UnlearningSetup, FeatureStats, feature_stats
from saenb.evals.interventions.clamp import Clamp
from saenb.evals.unlearning import run_settings
from saenb.lab.preset_files import find_preset
from saenb.sae.sae import SAE, SAEConfig
from saenb.data.world import World

HERE = Path(__file__).resolve().parent
UNLEARNING = dict(dataset_size=1024, seq_len=128, random_seed=42)
PROBING = dict(probe_train_set_size=400, probe_test_set_size=200, context_length=128, k_values=(1, 2, 5, 10, 20, 50), random_seed=42)


def tokens(model) -> SAE:
    "A dictionary that needs no training and is the same everywhere: one feature a token of the vocabulary, looking along its embedding."
    embedding = model.original_model.get_input_embeddings().weight.detach().double()
    sae = SAE(SAEConfig(d_in=embedding.shape[1], d_sae=len(embedding), hook_name=f"blocks.{World.layer}.hook_resid_post", hook_layer=World.layer, model_name="embedded world"))
    with torch.no_grad():
        sae.W_dec.copy_(embedding / embedding.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.fill_(-8.0) # few other tokens' streams reach this far along it
    return sae.eval()


def dictionaries() -> dict:
    "What is compared; each is made when it is called."
    sparse = lambda: lab.run("orthogonality/0", "tiny", 0, lab.workspace(), change=dict(sparsity_penalty=0.16)).sae
    return dict(tokens=lambda: tokens(World.default().model()), baseline=lab.tiny_sae, sparse=sparse,
                untrained=lambda: untrained(lab.tiny_sae().cfg, lab.tiny_store().rows(0, 2**15).x.float()))


def unlearning_setup(world: World) -> UnlearningSetup:
    "The reference's 16 settings, on rows of the tiny model's length; only the score is asked for, so a setting is out once it cannot count."
    return UnlearningSetup(lowest_retain=0.99, questions=world.question_sources(), forget=world.text_sources("forget")[0], retain=world.text_sources("retain")[0],
                           grid=REFERENCE, **UNLEARNING)


def all_answers(exam: Exam, sae: SAE, theirs: list[list[int]] = ()) -> list[dict]:
    "Every setting's features and right answers, hopeless settings included; of features that are equally dense those that SAEBench chose, where it chose."
    exam = copy.copy(exam)
    exam.setup = replace(exam.setup, lowest_retain=0.0)
    use = feature_stats(exam, sae)
    settings = Clamp().settings(exam.setup.grid, use)
    for s in settings: s["features"], s["own"] = among_equals(s, use, theirs), s["features"]
    return [row | dict(own=s["own"]) for row, s in zip(run_settings(exam, sae, settings, use, Clamp())[0], settings)]


def among_equals(setting: dict, use: FeatureStats, theirs: list[list[int]]) -> np.ndarray:
    "SAEBench's choice where it differs from ours in equally dense features alone: numpy sorts those in an order that changes with its version and the processor."
    def fits(features): return len(features) == len(setting["features"]) and (use.forget[features] == use.forget[setting["features"]]).all() and (use.retain[features] < setting["retain_threshold"]).all()
    choices = [np.array(features, int) for features in theirs if fits(features)]
    return setting["features"] if not choices or any((c == setting["features"]).all() for c in choices) else choices[0]


def packed(right) -> str:
    "Right and wrong answers as hexadecimal digits."
    bits = "".join("01"[int(r)] for r in right)
    return f"{int(bits, 2):0{-(-len(bits) // 4)}x}"


def environment(folder: Path) -> Path:
    "The Python of an environment with SAEBench, made if it is not there."
    python, ready, own = folder/"bin"/"python", folder/".ready", folder == HERE/".reference"
    if ready.exists() or (python.exists() and not own): return python
    if folder.exists() and not own: raise SaenbError(f"{folder} is there and is no environment (it has no bin/python); name another folder with --env.")
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        raise SaenbError(f"SAEBench's packages install on Python 3.10 to 3.12 and this is {platform.python_version()}; make an environment with one of those "
                         f"and `pip install -r {HERE/'requirements.txt'}`, and name its folder with --env.")
    print(f"Making an environment with SAEBench in {folder}; this takes some minutes.", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # torchvision comes along for nothing, and where torch is built for CPUs alone it does not match and cannot be imported
    for step in ([sys.executable, "-m", "venv", folder], [*pip, "install", "-r", HERE/"requirements.txt"], [*pip, "uninstall", "-y", "torchvision"]):
        done = subprocess.run(list(map(str, step)), capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SaenbError(f"The environment with SAEBench cannot be made: `{' '.join(map(str, step[1:]))}` ended with '{last}'; correct that and try again, "
                             "or name a ready one with --env.")
    ready.touch()
    return python


class Theirs:
    "Other packages in an environment and a process of their own, asked one thing at a time."
    def __init__(self, python: Path, work: Path, threads: int, script: str = "reference.py"):
        self.script, self.log = script, work/"log.txt"
        env = os.environ | dict(OMP_NUM_THREADS=str(threads), HF_HOME=str(work/"hub"), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONWARNINGS="ignore", PYTHONHASHSEED="0")
        for name in ("PYTHONPATH", "PYTHONHOME"): env.pop(name, None)
        self.process = subprocess.Popen([python, HERE/script], cwd=work, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"))

    def ask(self, do: str, **what) -> dict:
        "One answer of the script's."
        try: print(json.dumps(dict(do=do, **what)), file=self.process.stdin, flush=True)
        except BrokenPipeError: pass
        answer = self.process.stdout.readline()
        if answer: return json.loads(answer)
        end = "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-12:])
        raise SaenbError(f"{self.script} stopped at {do!r}; the end of what it printed:\n{end}")

    def __enter__(self): return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def say(text: str): print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def timed(make):
    "What `make` gives, and the seconds it took, on the wall and of the processor."
    wall, cpu = time.perf_counter(), time.process_time()
    made = make()
    return made, dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def spent(theirs: dict, ours: dict) -> dict:
    "The times of both sides, for the file."
    return {f"{side} {clock}": round(seconds[clock], 2) for side, seconds in (("theirs", theirs), ("ours", ours)) for clock in ("wall", "cpu")}


def ratio(theirs: list[dict], ours: list[dict], clock: str = "wall") -> float:
    "How many times as long SAEBench takes."
    return sum(t[clock] for t in theirs) / sum(o[clock] for o in ours)


def compare_unlearning(theirs: Theirs, saes: dict, folders: dict, world: World, model) -> tuple[dict, list[dict], dict]:
    "Both sides' scores, answers and times; the figures to keep, the table to print, and our results."
    setup = unlearning_setup(world)
    say("SAEBench finds the questions that the model knows")
    known = theirs.ask("known", **UNLEARNING)
    say("saenb finds them, and reads the corpora")
    def prepare():
        exam = Exam(model, setup, world.layer)
        for side in ("forget", "retain"): list(exam.corpus(side))
        return exam
    exam, once = timed(prepare)
    same_known = exam.known == known["known"]
    rows = [{"unlearning": "once a model: which questions are known", "theirs": None, "ours": None, "answers": None, "equal answers": None, "equal": yes(same_known), "ties": None,
             "seconds theirs": known["wall"], "seconds ours": once["wall"], "ratio": ratio([known], [once]), "of processor time": ratio([known], [once], "cpu"), "with the first row": None}]
    found, results = {}, {}
    for name, sae in saes.items():
        say(f"SAEBench judges {name}")
        their = theirs.ask("unlearning", name=name, folder=str(folders[name]))
        say(f"saenb judges {name}")
        results[name], took = timed(lambda: unlearning.evaluate(model, sae, setup, exam))
        score = results[name]["eval_result_unstructured"]["score"]
        # theirs by the features that were clamped and to what; where two settings choose the same features SAEBench asks once
        right = {(*row["features"], -row["multiplier"]): [bool(r) for q in setup.questions for r in row["right"][q.subject]] for row in their["settings"]}
        ours, total, equal = all_answers(exam, sae, [row["features"] for row in their["settings"]]), 0, 0
        for row in ours:
            there = right.get((*row["features"], -row["multiplier"]), [None] * len(exam.answer))
            total += len(exam.answer)
            equal += sum(a == b for a, b in zip(there, row["right"].tolist()))
        agreed = same_known and score == their["score"] and equal == total
        found[name] = dict(fingerprint=sae.fingerprint(), score=score, equal=agreed, seconds=spent(their, took), settings=[
            dict(retain_threshold=r["retain_threshold"], n_features=r["n_features"], multiplier=r["multiplier"],
                 features=" ".join(map(str, r["features"])), right=packed(r["right"])) for r in ours])
        rows.append({"unlearning": name, "theirs": their["score"], "ours": score, "answers": total, "equal answers": equal, "equal": yes(agreed), "ties": sum(list(r["own"]) != r["features"] for r in ours),
                     "seconds theirs": their["wall"], "seconds ours": took["wall"], "ratio": ratio([their], [took]), "of processor time": ratio([their], [took], "cpu"),
                     "with the first row": ratio([known, their], [once, took])})
        print(as_text(rows[-1:]), flush=True)
    return dict(setup=UNLEARNING, known={s: " ".join(map(str, k)) for s, k in exam.known.items()}, equal_known=same_known,
                seconds_known=spent(known, once), dictionaries=found), rows, results


def compare_probing(theirs: Theirs, saes: dict, folders: dict, world: World, model) -> tuple[dict, list[dict], dict]:
    "The same for sparse probing, one data set after the other."
    readings, found, rows, results = Readings(model, world.layer), {}, [], {}
    for name, sae in saes.items():
        found[name] = dict(fingerprint=sae.fingerprint(), accuracies={})
        count = equal = columns = same_columns = apart = 0
        their_times, our_times = [], []
        for dataset in SETS:
            say(f"SAEBench, then saenb, probes {name} on {dataset}")
            their = theirs.ask("sparse_probing", name=name, folder=str(folders[name]), dataset=dataset, **PROBING)
            setup = probing_setup(world, dataset)
            results[name], took = timed(lambda: sparse_probing.evaluate(model, sae, setup, readings))
            ours = results[name]["eval_result_unstructured"]
            their_times.append(their); our_times.append(took)
            for metric, classes in their["accuracies"].items():
                for c, accuracy in classes.items():
                    count, equal = count + 1, equal + (accuracy == ours[f"{dataset}_results"][metric][c])
                    apart = max(apart, abs(accuracy - ours[f"{dataset}_results"][metric][c]))
            for k, classes in their["features"].items():
                for c, features in classes.items():
                    columns, same_columns = columns + 1, same_columns + (features == sorted(ours["ours"]["features"][dataset][k][c]))
            found[name]["accuracies"][dataset] = {m: " ".join(map(str, f.values())) for m, f in ours[f"{dataset}_results"].items()}
        their_time, our_time = ({clock: sum(t[clock] for t in times) for clock in ("wall", "cpu")} for times in (their_times, our_times))
        found[name] |= dict(compared=count, equal=equal, largest_difference=round(apart, 6), choices_compared=columns, choices_equal=same_columns, seconds=spent(their_time, our_time))
        rows.append({"sparse probing": name, "accuracies": count, "equal accuracies": equal, "largest difference": apart, "choices of features": columns,
                     "equal choices": same_columns, "seconds theirs": their_time["wall"], "seconds ours": our_time["wall"], "ratio": ratio([their_time], [our_time]),
                     "of processor time": ratio([their_time], [our_time], "cpu")})
        print(as_text(rows[-1:]), flush=True)
    return dict(setup=PROBING, dictionaries=found), rows, results


def probing_setup(world: World, *datasets: str) -> SparseProbingSetup:
    "What both sides ask of these data sets."
    return SparseProbingSetup(root=str(world.path/"probing"), dataset_names=datasets, **PROBING)


def other_results(sae: SAE) -> dict:
    "Results of the evaluations whose shape alone is compared."
    setting = find_preset("tiny")
    return evaluate_sae(sae, setting, names=[name for name in ("core", "absorption") if name in setting.evals], out=lab.workspace())


def about(world: World) -> str:
    "A mark of everything in the world that the figures depend on."
    return fingerprint({name: digest for name, digest in world.about["files"].items() if name.split("/")[0] in ("model", "mmlu", "wmdp", "texts", "probing")})


def yes(value: bool) -> str: return "yes" if value else "NO"


def main(args) -> bool:
    torch.set_num_threads(args.threads)
    threadpool_limits(args.threads) # scikit-learn's and numpy's own threads
    world, made = World.default(), dictionaries()
    chosen = {name: lookup(name, made, "dictionary to compare") for name in args.dictionaries.split(",")}
    comparisons = {name: lookup(name, dict(unlearning=compare_unlearning, sparse_probing=compare_probing), "comparison") for name in args.evals.split(",")}
    python = environment(Path(args.env).absolute())
    say(f"Making {', '.join(chosen)}")
    saes, model = {name: make() for name, make in chosen.items()}, world.model()
    with tempfile.TemporaryDirectory() as work, Theirs(python, Path(work), args.threads) as theirs:
        folders = {name: sae.save(Path(work)/"dictionaries"/name) for name, sae in saes.items()}
        say("SAEBench makes the same model")
        versions = theirs.ask("prepare", model=str(world.path/"model"), world=str(world.path), threads=args.threads)
        kept, tables, files = {}, [], {}
        for evaluation, compare in comparisons.items():
            kept[evaluation], rows, files[evaluation] = compare(theirs, saes, folders, world, model)
            tables.append(rows)
        say("SAEBench reads saenb's result files")
        files |= {evaluation: dict(first=result) for evaluation, result in other_results(next(iter(saes.values()))).items()}
        verdicts = {evaluation: [theirs.ask("validate", result=result) for result in results.values()] for evaluation, results in files.items()}
    shapes = [{"result files": evaluation, "given": len(found), "taken by SAEBench": sum(v["accepted"] for v in found),
               "what it does not take": "; ".join(sorted({v["why"] for v in found if v["why"]}))} for evaluation, found in verdicts.items()]
    print()
    for rows in (*tables, shapes): print(as_text(rows), end="\n\n")
    ours = {p: importlib.metadata.version(p) for p in ("saenb", "transformer-lens", "transformers", "datasets", "torch", "numpy", "scikit-learn")}
    kept = dict(command="python benchmarks/parity.py", versions=dict(theirs=versions, ours=ours), python=platform.python_version(), threads=args.threads,
                world=about(world), **kept, taken_by_saebench={s["result files"]: s["given"] == s["taken by SAEBench"] for s in shapes})
    if args.out:
        write_text(args.out, json.dumps(kept, indent=1) + "\n")
        print(f"What both sides agree on is in {args.out}.")
    answers = all(d["equal"] for d in kept.get("unlearning", {}).get("dictionaries", {}).values())
    print("Every answer of every setting is the same on both sides." if answers else "There are differences in the answers; the table shows where.")
    return answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare saenb with SAEBench on the embedded world.")
    parser.add_argument("--env", default=HERE/".reference", help="folder of an environment with SAEBench; made if it is not there")
    parser.add_argument("--dictionaries", default="tokens,untrained,baseline,sparse", help="which dictionaries to compare, by comma")
    parser.add_argument("--evals", default="unlearning,sparse_probing", help="which evaluations to compare, by comma")
    parser.add_argument("--threads", type=int, default=1, help="threads that each side computes with")
    parser.add_argument("--out", default=HERE.parent/"tests"/"parity.json", help="where the agreed figures go; empty for nowhere")
    try: sys.exit(not main(parser.parse_args()))
    except SaenbError as e: sys.exit(f"parity: {e}")
