"""Presets from files: what they say counts, what is wrong in them is said, and one in small goes all the
way."""
import json
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from saenb.base.errors import SaenbError
from saenb.lab.preset_files import find_preset, preset_from
from saenb.lab.presets import PRESETS


@pytest.fixture
def wrote(tmp_path):
    """Write a preset's file; gives its path."""
    def write(text, name="mine.toml"):
        (tmp_path/name).write_text(textwrap.dedent(text))
        return str(tmp_path/name)
    return write


@pytest.mark.parametrize("base", PRESETS)
def test_a_file_that_says_nothing_is_its_base_by_another_name(wrote, base):
    assert find_preset(wrote(f'base = "{base}"')) == replace(PRESETS[base](), name="mine")


def test_only_what_a_file_says_is_changed(wrote):
    found, base = find_preset(wrote("""
        base = "tiny"
        d_sae = 100
        recorded = ["unlearning", "core"]
        [training]
        lr = 1e-3
        [evals.unlearning]
        retain_floor = 0.95
        [evals.unlearning.grid]
        n_features = [1, 5]
        """)), find_preset("tiny")
    grid = replace(base.exam.grid, n_features=(1, 5))
    assert found == replace(base, name="mine", d_sae=100, recorded=("unlearning", "core"),
                            training=replace(base.training, lr=1e-3), evals=base.evals
                                | dict(unlearning=replace(base.exam, retain_floor=0.95, grid=grid)))


def test_one_training_length_counts(wrote):
    assert find_preset(wrote('base = "tiny"\n[training]\ntokens = 4096')).training.count() == 4
    assert find_preset(wrote('base = "gemma-2-2b"\n[training]\nsteps = 7')).training.count() == 7
    assert find_preset(wrote('base = "gemma-2-2b"\nharvest_tokens = "none"')).harvest_tokens is None


def test_corpora_change_wherever_they_are_read(wrote, tmp_path):
    (tmp_path/"mine.txt").write_text("A text.\n")
    found = find_preset(wrote('base = "gemma-2-2b"\n[corpora]\nforget = {path = "mine.txt"}\nretain = {min_chars = 9}'))
    for name in ("unlearning", "core", "positional", "separation", "entanglement"):
        setup, before = found.evals[name], find_preset("gemma-2-2b").evals[name]
        assert (setup.forget.path == str(tmp_path/"mine.txt") and setup.forget.side == "forget"
                and setup.forget.min_chars == 1)
        assert setup.retain == replace(before.retain, min_chars=9)
    assert found.evals["positional"].order[0].source == found.exam.retain
    assert found.texts == find_preset("gemma-2-2b").texts


def test_things_are_looked_for_beside_the_file_and_in_the_folder_of_copies(wrote, tmp_path, monkeypatch):
    for name in ("models/mine", "copies/google/gemma-2-2b-it", "copies/cais/wmdp"):
        (tmp_path/name).mkdir(parents=True)
    elsewhere = tmp_path/"elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found = find_preset(wrote('base = "gemma-2-2b"\nmodel = "models/mine"\nroot = "copies"'))
    assert (found.model, found.answer_model) == (str(tmp_path/"models/mine"),
                                                 str(tmp_path/"copies/google/gemma-2-2b-it"))
    assert {q.path for q in found.exam.questions} == {str(tmp_path/"copies/cais/wmdp"), "cais/mmlu"}
    assert found.evals["sparse_probing"].root == str(tmp_path/"copies")


@pytest.mark.parametrize("text, said", [
    ("layr = 3", "did you mean layer"),
    ('layer = "three"', "layer is 'three'; it has to be a whole number"),
    ("layer = true", "layer is 'True'; it has to be a whole number"),
    ("layer = 3.5", "has to be a whole number"),
    ("layer = -1", "layer is -1"),
    ("d_sae = 0", "d_sae is 0"),
    ("seeds = 0", "seeds is 0"),
    ("seq_len = 1", "seq_len is 1"),
    ("harvest_tokens = 0", "harvest_tokens is 0"),
    ('store_dtype = "int8"', "type of numbers called 'int8'"),
    ("texts = []", "no texts to train on"),
    ('texts = ["a.txt"]', r"texts\[0\] is 'a.txt'; it has to be a table"),
    ('[[texts]]\nside = "forget"', r"texts\[0\] lacks path"),
    ('[[texts]]\npath = "./a.txt"', "no ./a.txt beside the preset"),
    ('model = "/nowhere/at/all"', "no /nowhere/at/all"),
    ('name = "../../elsewhere"', "give it one of its own"),
    ('name = "tiny"', "give it one of its own"),
    ('name = "gemma-2-2b-full"', "give it one of its own"),
    ('name = ""', "give it one of its own"),
    ('base = "gemma"', "did you mean gemma-2-2b"),
    ("base = 3", "base is '3'; it has to be a text"),
    ('root = "nothing"', "is not a folder"),
    ('recorded = ["unlerning"]', "did you mean unlearning"),
    ("sweep = [{stepz = 3}]", "did you mean steps"),
    ("training = 3", "training is '3'; it has to be a table"),
    ('[training]\nlr = "fast"', "training.lr is 'fast'; it has to be a number"),
    ("[training]\nlr = nan", "lr is nan"),
    ("[training]\nlr = inf", "lr is inf"),
    ("[training]\nbatch = 0", "batch is 0"),
    ("[training]\ndecay = 2.0", "decay is 2.0; it has to be a number from 0.0 to 1.0"),
    ('[training]\nprecision = "int4"', "no precision called 'int4'"),
    ("[evals.unlerning]\nseq_len = 3", "did you mean unlearning"),
    ("[evals.unlearning]\nretain_flor = 0.9", "did you mean retain_floor"),
    ("[evals.unlearning]\nquestions = []", "has no questions"),
    ("[evals.unlearning]\nretain_floor = 1.5", "retain_floor is 1.5"),
    ("[evals.unlearning.grid]\nn_features = []", "grid has no n_features"),
    ("[evals.unlearning.grid]\nn_features = [0]", "n_features is 0"),
    ("[evals.absorption]\ntrain_share = 1.0", "train_share is 1.0"),
    ("evals = 3", "evals is '3'; it has to be a table"),
    ("[evals]\ncore = 3", "evals.core is '3'; it has to be a table"),
    ("[corpora]\nneither = {}", "no corpus called 'neither'"),
    ("[corpora]\nforget = 3", "corpora.forget is '3'"),
    ("[training", "not readable as TOML"),
    ("a = " + "[" * 3000, "not readable as TOML"),
])
def test_what_is_wrong_is_said_with_its_place(wrote, text, said):
    if not text.startswith(("base", "[training", "a = ")) or text.startswith("[training]"):
        text = f'base = "gemma-2-2b"\n{text}'
    with pytest.raises(SaenbError, match=said) as told:
        find_preset(wrote(text))
    assert (str(told.value).startswith(str(Path(wrote(text)))) and "\n" not in str(told.value)
            and str(told.value)[-1] in ".?")


def test_a_preset_that_is_not_there_or_not_text(tmp_path, called, one_sentence):
    with pytest.raises(SaenbError, match="There is no preset in"):
        find_preset(str(tmp_path/"nothing.toml"))
    (tmp_path/"bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SaenbError, match="not readable as TOML"):
        preset_from(tmp_path/"bytes.toml")
    (tmp_path/"folder.toml").mkdir()
    one_sentence(called("run", "orthogonality/0", "--preset", tmp_path/"folder.toml"), "folder.toml")
    one_sentence(called("reproduce", "--preset", tmp_path/"bytes.toml", "--full"), "one length only")


@pytest.fixture(scope="module")
def standin(once):
    """A stand-in for gemma-2-2b and all of its data, and the preset's file."""
    from standin import make
    return once("standin", make)/"standin.toml"


def test_everything_of_the_standin_is_found(called, standin, tmp_path):
    done = called("check", "--preset", standin, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ready"] and {n["kind"] for n in told["needs"]} == {
        "device", "model", "texts", "questions", "evaluation", "disk", "memory", "stream", "time"}
    assert sum("probing" in n["what"] for n in told["needs"]) == 8
    assert not list(tmp_path.iterdir())


def changed(standin, tmp_path, extra="", without=()):
    "The stand-in in another folder, with more said and some of it taken away."
    (tmp_path/"hub").mkdir()
    for path in (standin.parent/"hub").glob("*/*"):
        (tmp_path/"hub"/path.parent.name).mkdir(exist_ok=True)
        if f"{path.parent.name}/{path.name}" not in without:
            (tmp_path/"hub"/path.parent.name/path.name).symlink_to(path)
    (tmp_path/"standin.toml").write_text(extra + standin.read_text())
    return tmp_path/"standin.toml"


def test_what_is_missing_is_said_before_any_work(called, one_sentence, standin, tmp_path):
    without = ("google/gemma-2-2b-it", "cais/wmdp", "fancyzhx/ag_news")
    done = called("check", "--preset", changed(standin, tmp_path, without=without))
    one_sentence(done, *without, "are not there")
    lines = {line[2:].split()[1]: line for line in done.stdout.splitlines()[1:] if line}
    assert ([name for name, line in lines.items() if line.startswith("!")]
            and lines["google/gemma-2-2b-it"].startswith("!"))
    assert ("trial" not in done.stdout
            and "time" not in {line[2:].split()[0] for line in done.stdout.splitlines()[1:] if line})


@pytest.mark.parametrize("extra, said", [
    ("layer = 26\n", "layer 26"),
    ("harvest_tokens = 100_000_000_000_000\n", "runs: a store of"),
    ("d_sae = 400_000_000\n", "models, training"),
])
def test_what_does_not_fit_is_said_before_any_work(called, one_sentence, standin, tmp_path, extra, said):
    text = (standin.read_text().replace("d_sae = 96\n", "" if "d_sae" in extra else "d_sae = 96\n")
            .replace("harvest_tokens = 30_000\n", ""))
    preset_file = changed(standin, tmp_path)
    preset_file.write_text(extra + text)
    done = called("check", "--preset", preset_file)
    one_sentence(done, "are not there")
    assert said in done.stdout


def test_the_standin_goes_all_the_way(called, standin, tmp_path):
    done = called("reproduce", "contrastive/0", "contrastive/3", "--preset", standin, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert len(made["records"]) == 2 and any("contrastive" in p for p in made["figures"])
    for folder in made["records"]:
        info = json.loads((tmp_path/folder/"final_info.json").read_text())
        assert (info["training_steps"] == 20 and info["layer"] == 19 and info["preset"] == "standin"
                and len(info["headlines"]) == 8)
        assert {p.stem for p in (tmp_path/folder/"evals").glob("*.json")} == {
            "unlearning", "random_choice", "sparse_probing", "core", "absorption", "positional", "separation",
            "entanglement"}
    known = json.loads(next((tmp_path/"runs"/"standin"/"cache").glob("known_*.json")).read_text())["known"]
    assert known["wmdp-bio"] and known["human_aging"]
    again = called("reproduce", "contrastive/0", "contrastive/3", "--preset", standin, "--json")
    assert json.loads(again.stdout)["records"] == made["records"]
    assert "train:" not in again.stderr and "known" not in again.stderr


def test_a_model_that_knows_nothing_is_found_out_before_training(called, one_sentence, standin, tmp_path):
    done = called("run", "orthogonality/0", "--preset",
                 changed(standin, tmp_path, 'answer_model = "google/gemma-2-2b"\n'))
    one_sentence(done, "knows no question", "wmdp-bio")
    assert not list(tmp_path.rglob("train_log.jsonl"))


def test_other_chats_than_gemmas(standin):
    from transformers import AutoTokenizer
    from saenb.data.questions import GEMMA_CHAT, chat_form, question_prompt
    tokenizer = AutoTokenizer.from_pretrained(standin.parent/"hub"/"google"/"gemma-2-2b-it")
    assert chat_form(tokenizer) == GEMMA_CHAT
    tokenizer.chat_template = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor "
                               "%}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    asked = question_prompt("human aging", "Why?", list("wxyz"), chat_form(tokenizer))
    assert asked.startswith("<|user|>The following") and asked.endswith("D. z</s><|assistant|>Answer: (")
    tokenizer.chat_template = None
    assert question_prompt("human aging", "Why?", list("wxyz"),
                           chat_form(tokenizer)).endswith("D. z\nAnswer: (")
