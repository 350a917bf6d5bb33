import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT

RECORD = "tiny/orthogonality/run_0/seed_0"


def start(*arguments, cwd, **options):
    """Start the command line as a process that can be killed; Ctrl-C reaches it even where the tests run in the background."""
    return subprocess.Popen([sys.executable, "-m", "saenb", *map(str, arguments)], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options)


def stop(process, when, how):
    """Send a signal at the moment that `when` becomes true."""
    ends = time.time() + 400
    while not when():
        assert process.poll() is None, "it ended before it could be stopped"
        if time.time() > ends:
            process.kill()
            raise AssertionError("that moment never came")
        time.sleep(0.005)
    process.send_signal(how)
    return process.wait(60)


@pytest.fixture(scope="module")
def first(work, small):
    """A folder with one short record, its store and the list of known questions, and what the command that made it printed."""
    out = work()
    process = start("run", "orthogonality/0", "--preset", small, "--steps", 40, "--out", out, "--json", cwd=out, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    printed, complaints = process.communicate()
    assert process.returncode == 0, complaints
    return out, json.loads(printed)


@pytest.fixture
def beside(first, tmp_path):
    """Another folder of records, with the same store and list of known questions."""
    out = tmp_path/"beside"
    (out/"tiny").mkdir(parents=True)
    for name in ("store", "cache"): (out/"tiny"/name).symlink_to(first[0]/"tiny"/name)
    return out


@pytest.fixture
def sae(first, tmp_path):
    """A copy of the short record's dictionary."""
    return shutil.copytree(first[0]/RECORD/"sae", tmp_path/"sae")


def test_help_comes_at_once(saenb):
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        done = saenb("--help")
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ") and line[4] != " "}
    assert {"runs", "run", "reproduce", "check", "eval", "autopsy", "explore", "export", "compare", "figures", "world"} <= listed
    assert min(seconds) < 0.5


def test_the_grammar_does_without_torch():
    code = "import sys, saenb.cli; saenb.cli.parser().format_help(); print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == "[]\n", done.stderr


def test_every_run_is_listed(saenb):
    from saenb.ideas.run import all_runs
    lines = saenb("runs").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(all_runs())
    assert all(run.title in line for run, line in zip(all_runs().values(), lines))
    assert json.loads(saenb("runs", "--json").stdout) == json.loads(json.dumps([run.as_dict() for run in all_runs().values()]))


def test_a_run_prints_its_record(called, first, small):
    out, printed = first
    assert printed == json.loads((out/RECORD/"final_info.json").read_text())
    assert printed["training_steps"] == 40 and printed["run"] == "orthogonality/0"
    stamps = {p: p.stat().st_mtime_ns for p in (out/RECORD).rglob("*")}
    again = called("run", "orthogonality/0", "--preset", small, "--steps", 40, "--out", out)
    assert again.returncode == 0, again.stderr
    assert f"score {printed['eval_result_metrics']['unlearning']['unlearning_score']:.3f}" in again.stdout and str(out/RECORD/"notes.md") in again.stdout
    assert {p: p.stat().st_mtime_ns for p in (out/RECORD).rglob("*")} == stamps


def test_a_dictionary_is_judged_once(called, first, sae, small):
    kept = sae/"evals"/"unlearning.json"
    results, stamps = [], []
    for flags in ([], [], ["--force"]):
        done = called("eval", sae, "--preset", small, "--evals", "unlearning", "--out", first[0], "--json", *flags)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout)["unlearning"])
        stamps.append(kept.stat().st_mtime_ns)
        assert json.loads(kept.read_text()) == results[-1]
    assert results[0] == results[1] and stamps[0] == stamps[1] < stamps[2]
    assert results[2]["datetime_epoch_millis"] > results[1]["datetime_epoch_millis"]
    scores = [r["eval_result_metrics"]["unlearning"]["unlearning_score"] for r in results]
    assert scores[0] == scores[2] == first[1]["eval_result_metrics"]["unlearning"]["unlearning_score"]
    shown = called("eval", sae, "--preset", small, "--evals", "unlearning", "--out", first[0]).stdout
    assert f"{scores[0]:.4g}" in next(line for line in shown.splitlines() if line.startswith("score"))
    assert (sae/"evals"/"unlearning.txt").read_text().strip() in shown and (sae/"evals"/"unlearning.png").read_bytes().startswith(b"\x89PNG")


def test_several_evaluations_at_once(called, first, sae, small):
    done = called("eval", sae, "--preset", small, "--evals", "core,separation,absorption", "--out", first[0], "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert list(results) == ["core", "separation", "absorption"]
    assert {p.stem for p in (sae/"evals").glob("*.json")} >= set(results)


def test_a_records_dictionary_is_judged_into_the_record(saenb, called, first, small):
    stamps = {p: p.stat().st_mtime_ns for p in (first[0]/RECORD).rglob("*.json")}
    for call, place in ((saenb, first[0]/RECORD), (called, first[0]/RECORD/"sae")):
        done = call("eval", place, "--preset", small, "--evals", "core", "--out", first[0], "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["core"] == json.loads((first[0]/RECORD/"evals"/"core.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in (first[0]/RECORD).rglob("*.json")} == stamps # found, not made again


def test_another_dictionary_in_the_same_folder_is_judged_again(called, first, sae, small):
    from saenb.evals.controls import as_logged
    from saenb.sae.sae import load_sae
    before = json.loads(called("eval", sae, "--preset", small, "--evals", "unlearning", "--out", first[0], "--json").stdout)["unlearning"]
    other = as_logged(load_sae(sae).cfg)
    other.save(sae)
    after = json.loads(called("eval", sae, "--preset", small, "--evals", "unlearning", "--out", first[0], "--json").stdout)["unlearning"]
    assert before["eval_result_unstructured"]["alive"] > 0 == after["eval_result_unstructured"]["alive"]


def test_an_autopsy_tells_an_untrained_dictionary(called, beside, small):
    done = called("run", "orthogonality/0", "--preset", small, "--steps", 0, "--out", beside, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["training_steps"] == 0
    found = json.loads(called("autopsy", beside/RECORD/"sae", "--preset", small, "--out", beside, "--json").stdout)
    assert (found["score"], found["reason"], found["counts"]["training_steps"]) == (0.0, "no training step was taken", 0)


def test_an_autopsy_in_words(called, first, sae, small):
    done = called("autopsy", sae, "--preset", small, "--out", first[0])
    assert done.returncode == 0, done.stderr
    score = first[1]["eval_result_metrics"]["unlearning"]["unlearning_score"]
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"Score {score:.3f}: ") and (score == 0 or "the score is" in lines[0])
    assert "  training steps: 40" in lines


def test_a_page_shows_every_feature(called, first, sae, tmp_path, small):
    done = called("explore", sae, "--preset", small, "--records", first[0], "--out", tmp_path/"pages"/"features.html", "--effects", 2, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["page"] == str(tmp_path/"pages"/"features.html") and made["features"] == 768
    text = (tmp_path/"pages"/"features.html").read_text(encoding="utf-8")
    assert "<title>Features of orthogonality/0</title>" in text and '"features": 768' in text


def test_figures_are_drawn_from_records(called, first, tmp_path):
    done = called("figures", "--out", first[0], "--figures", tmp_path/"figures", "--json")
    assert done.returncode == 0, done.stderr
    drawn = json.loads(done.stdout)
    assert {f"{tmp_path}/figures/orthogonality/{name}.png" for name in ("unlearning_scores", "training_metrics")} <= set(drawn)
    assert sorted(drawn) == sorted(str(p) for p in (tmp_path/"figures").rglob("*") if p.is_file())


def test_the_world_shows_itself(called, world):
    assert json.loads(called("world", "show").stdout) == world.about


@pytest.mark.parametrize("command, words", [
    ("run orthogonalty/0", ["orthogonalty/0", "did you mean orthogonality/0"]),
    ("run orthogonality/0 --preset tinny", ["'tinny'", "did you mean tiny"]),
    ("run orthogonality/0 --steps -5", ["--steps", "'-5'"]),
    ("run orthogonality/0 --steps many", ["--steps", "'many'"]),
    ("run orthogonality/0 --seed -1", ["seed"]),
    ("reproduce orthogonalty", ["no experiment or run called 'orthogonalty'", "did you mean orthogonality"]),
    ("reproduce --preset gemma-2-2b --seeds 0", ["seeds"]),
    ("eval . --evals unlerning", ["no evaluation called 'unlerning'", "did you mean unlearning"]),
    ("eval .", ["holds no dictionary", "cfg.json"]),
    ("autopsy nowhere", ["nowhere holds no dictionary"]),
    ("explore nowhere", ["nowhere holds no dictionary"]),
    ("explore . --contexts none", ["--contexts", "'none'"]),
    ("figures", ["no finished record below runs/tiny"]),
    ("figures --preset tny", ["tny"]),
    ("world build . --overlap 2", ["overlap", "between 0 and 1"]),
    ("frobnicate", ["frobnicate"]),
    ("", ["COMMAND"]),
])
def test_bad_input_is_one_sentence(called, one_sentence, tmp_path, command, words):
    done = called(*command.split())
    one_sentence(done, *words)
    assert done.stdout == "" and not (tmp_path/"runs").exists()


def test_a_world_is_not_built_over_another(called, one_sentence, world):
    one_sentence(called("world", "build", world.path), "holds a world already")


def test_a_dictionary_of_another_width(called, one_sentence, first, tmp_path, small):
    from saenb.sae.sae import SAE, SAEConfig
    SAE(SAEConfig(d_in=64, d_sae=8)).save(tmp_path/"narrow")
    one_sentence(called("eval", tmp_path/"narrow", "--preset", small, "--out", first[0]), "width 64", "192 wide")
    assert not (tmp_path/"narrow"/"evals").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_a_folder_that_may_not_be_written(called, one_sentence, tmp_path, small):
    (tmp_path/"closed").mkdir(mode=0o555)
    one_sentence(called("run", "orthogonality/0", "--preset", small, "--steps", 40, "--out", tmp_path/"closed"), "closed", "cannot be written")


def test_a_folder_that_is_a_file(called, one_sentence, tmp_path, small):
    (tmp_path/"file").write_text("not a folder")
    one_sentence(called("run", "orthogonality/0", "--preset", small, "--steps", 40, "--out", tmp_path/"file"), str(tmp_path/"file"))


def test_ctrl_c_is_one_sentence(beside, tmp_path, small):
    log = beside/RECORD/"train_log.jsonl"
    process = start("run", "orthogonality/0", "--preset", small, "--steps", 100000, "--out", beside, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert stop(process, lambda: log.exists() and log.stat().st_size, signal.SIGINT) == 130
    said = process.stderr.read()
    assert "Traceback" not in said and said.splitlines()[-1].startswith("saenb: Stopped after step ") and said.endswith("and the same command goes on from there.\n")


MADE = (0, 1, 3)
BRIEF = """\
import os
from dataclasses import replace
from saenb.evals.exam import Grid
from saenb.lab.preset_files import find_preset
small = find_preset(os.environ["SMALL"])
asked = replace(small.exam, grid=Grid(thresholds=(0.01,), n_features=(10, 30), multipliers=(8,), typical=True))
BRIEF = replace(small, name="brief", shares="tiny", recorded=("unlearning", "entanglement"), d_sae=192, evals=small.evals | dict(unlearning=asked))
"""


def test_everything_is_made_by_several_processes_and_made_once(saenb, work, small, tmp_path, monkeypatch):
    """kill -9 in the middle; the same command goes on, a third call finds everything, and no process is left."""
    out = work()
    (out/"brief"/"controls").mkdir(parents=True)
    shutil.copy(ROOT/"runs"/"tiny-full"/"controls"/"seed_0.json", out/"brief"/"controls") # so that they are found; making them takes a minute
    (tmp_path/"brief.py").write_text(BRIEF)
    monkeypatch.setenv("SMALL", small)
    command = ("--use", tmp_path/"brief.py", "reproduce", *(f"contrastive/{n}" for n in MADE), "--preset", "brief", "--steps", 20, "--seeds", 1, "--out", out, "--jobs", 2,
               "--json")
    def finished(): return sorted(p.parent.relative_to(out/"brief").as_posix() for p in out.rglob("final_info.json"))
    assert stop(start(*command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), finished, signal.SIGKILL) == -signal.SIGKILL
    before = finished()
    done = saenb(*command)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert [Path(p).relative_to(out/"brief").as_posix() for p in made["records"]] == [f"contrastive/run_{n}/seed_0" for n in MADE]
    assert set(before) < set(finished()) == {f"contrastive/run_{n}/seed_0" for n in MADE}
    assert (out/"brief"/"contrastive"/"run_3"/"notes.md").read_text().startswith("# contrastive 3: ")
    shown = {Path(p).relative_to(out/"brief"/"figures").as_posix() for p in made["figures"]}
    assert {"contrastive/unlearning_scores.png", "contrastive/feature_groups.png", "explorer/baseline.html", "explorer/best.html"} <= shown
    assert all(Path(p).stat().st_size for p in made["figures"])
    kept = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    again = saenb(*command)
    assert json.loads(again.stdout) == made and {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == kept


@pytest.mark.parametrize("option", ["--jobs", "--seeds"])
def test_nothing_at_all_cannot_be_made(called, one_sentence, tmp_path, option):
    one_sentence(called("reproduce", "contrastive", option, 0), f"0 {option[2:]}")
    assert not (tmp_path/"runs").exists()
