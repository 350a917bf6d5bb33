"""Whatever is typed or written into a preset: one sentence, exit code 2, no traceback."""
import contextlib
import io
import string
from collections import Counter

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from saenb.cli import main
from saenb.base.errors import SaenbError
from saenb.evals.evaluation import evaluations
from saenb.lab.preset_files import preset_from
from saenb.lab.presets import PRESETS
from saenb.ideas.run import experiments as all_experiments
from saenb.ideas.run import all_runs

tried = Counter()
deterministic = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much])


def refused(arguments, cwd, monkeypatch):
    "Call the command line and check how it ends."
    monkeypatch.chdir(cwd)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try: code = main(list(arguments))
        except SystemExit as e: code = e.code
    assert code == 2, (arguments, said.getvalue())
    lines = said.getvalue().strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("saenb: ") and lines[0][-1] in ".?", (arguments, lines)
    tried[arguments[0]] += 1


word = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=300)
plain = st.text(string.ascii_letters + string.digits + "/.-_@=", min_size=1, max_size=40)
name = (word | plain | st.sampled_from(["../../etc", "/etc/passwd", "orthogonality/../../x", "orthogonality/99", "x" * 5000, "a/" * 200, "~root", "%s", "tiny/", "Tiny"])).filter(lambda s: not s.startswith("-"))
number = st.sampled_from(["-1", "1.5", "1e3", "nan", "inf", "½", "٣٤x", "0x10", "", " ", "one", "9" * 400 + "x"])


@deterministic
@given(id=name)
def test_ids_of_runs(id, tmp_path, monkeypatch):
    assume(id not in all_runs())
    refused(["run", id], tmp_path, monkeypatch)
    assert not list(tmp_path.iterdir())


@deterministic
@given(preset=name, command=st.sampled_from([["run", "orthogonality/0"], ["reproduce"], ["check"]]))
def test_names_of_presets(preset, command, tmp_path, monkeypatch):
    assume(preset not in PRESETS)
    refused([*command, "--preset", preset], tmp_path, monkeypatch)
    assert not list(tmp_path.iterdir())


@deterministic
@given(value=number, flag=st.sampled_from([["run", "orthogonality/0", "--steps"], ["run", "orthogonality/0", "--seed"], ["reproduce", "--seeds"], ["reproduce", "--jobs"], ["explore", ".", "--contexts"],
                                           ["world", "build", "w", "--overlap"], ["world", "build", "w", "--seed"]]))
def test_numbers(value, flag, tmp_path, monkeypatch):
    assume(not (flag[-1] == "--overlap" and value in ("1e3", "1.5", "nan", "inf", "-1")) or flag[-1] == "--overlap")
    assume(not (flag[0] == "world" and flag[-1] == "--seed" and value == "-1")) # a world may have any whole number for its seed
    refused([*flag, value], tmp_path, monkeypatch)


@deterministic
@given(asked=name, evals=name)
def test_dictionaries_and_evaluations(asked, evals, tmp_path, monkeypatch):
    assume(not set(evals.split(",")) <= evaluations().keys())
    refused(["eval", asked, "--evals", evals], tmp_path, monkeypatch)
    refused(["eval", asked, "--evals", "core"], tmp_path, monkeypatch)
    refused(["autopsy", asked], tmp_path, monkeypatch)


@deterministic
@given(experiments=st.lists(name, min_size=1, max_size=3), unknown=word)
def test_experiments_and_commands(experiments, unknown, tmp_path, monkeypatch):
    assume(not set(experiments) <= set(all_experiments()))
    refused(["reproduce", *experiments], tmp_path, monkeypatch)
    refused(["compare", *experiments], tmp_path, monkeypatch)
    refused(["figures", "--preset", experiments[0]], tmp_path, monkeypatch)
    if not unknown.startswith("-"): refused([f"{unknown} ", unknown], tmp_path, monkeypatch)


GOOD = '''base = "tiny"
layer = 0
d_sae = 64
recorded = ["unlearning", "core"]
[training]
steps = 20
lr = 1e-3
batch = 256
[evals.unlearning]
retain_floor = 0.99
[evals.unlearning.grid]
n_features = [1, 10]
[[texts]]
path = "texts.txt"
side = "forget"
'''
keys = st.sampled_from([line.split(" = ")[0] for line in GOOD.splitlines() if " = " in line])
bad_value = st.sampled_from(['"no such thing"', "-1", "-0.5", "nan", "inf", "[[]]", "{a = 1}", "true", "[-3]", '["x"]', "1979-05-27", '"../../x"', "99999999999999999999999999", '"\\u0000"', "''"])


@settings(deterministic, max_examples=120)
@given(key=keys, value=bad_value, cut=st.integers(0, len(GOOD)), how=st.sampled_from(["value", "key", "cut", "noise"]), noise=word)
def test_presets_from_files(key, value, cut, how, noise, tmp_path, monkeypatch):
    lines = GOOD.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{key} = "))
    lines[at] = f"{key} = {value}" if how == "value" else f"{noise!r}{key} = 1" if how == "key" else lines[at]
    text = "\n".join(lines)[:cut if how == "cut" else None]
    if how == "noise": text = text[:cut] + noise + text[cut:]
    (tmp_path/"mine.toml").write_text(text)
    (tmp_path/"texts.txt").write_text("A text.\n")
    try: preset_from(tmp_path/"mine.toml")
    except SaenbError: refused(["run", "orthogonality/0", "--preset", "mine.toml"], tmp_path, monkeypatch)
    else: tried["presets that were altered and still are presets"] += 1
    assert {p.name for p in tmp_path.iterdir()} == {"mine.toml", "texts.txt"}


def test_enough_was_tried():
    bad = sum(n for kind, n in tried.items() if "still" not in kind)
    print(f"{bad} bad inputs, each ended in one sentence and code 2:", dict(tried))
    assert bad >= 200
