"""A model of one's own, with and without questions: from the first command to the feature page, by commands alone."""
import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from saenb.base.errors import SaenbError
from saenb.base.files import as_size, need_memory, read_json, write_json, write_tensors
from saenb.cli import main
from saenb.data.continuation import Examiner
from saenb.data.sources import QuestionSource, TextSource, boot
from saenb.data.store import Store
from saenb.evals.autopsy import _reason
from saenb.evals.dominant import directions_in
from saenb.evals.evaluation import evaluations
from saenb.evals.exam import Exam, Grid, UnlearningSetup
from saenb.evals.reconstruction import tally, unexplained, unexplained_apart
from saenb.lab.feature_commands import usual_evals
from saenb.lab.preset_files import find_preset
from saenb.lab.records import Record
from saenb.lab.reproduction import _chosen
from saenb.sae.sae import SAE, SAEConfig, load_sae

@pytest.fixture(scope="module")
def home(once):
    """A folder with a small model of random weights, two files of texts and two of questions."""
    def fill(folder):
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        from saenb.data.world import World
        world, draw = World.default(), random.Random(0)
        tokenizer = AutoTokenizer.from_pretrained(world.path/"model")
        torch.manual_seed(0)
        marks = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                                     num_key_value_heads=2, max_position_embeddings=512, **marks)).save_pretrained(folder/"model")
        tokenizer.save_pretrained(folder/"model")
        for side in ("forget", "retain"):
            (folder/f"{side}.txt").write_text(text := "\n".join(text for text, _ in world.texts(side, 200)))
            words = sorted({word for word in text.replace(".", " ").split() if word.isalpha()})
            rows = [dict(question=" ".join(draw.choices(words, k=5)), choices=draw.sample(words, 4), answer=draw.randrange(4)) for _ in range(6)]
            (folder/f"ask_{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            say_what_it_answers(folder, side, rows)

    def say_what_it_answers(folder, side, rows):
        """The same questions in another file, right where the model gives an answer in all wordings."""
        said, examiner = folder/f"said_{side}.jsonl", Examiner(boot(folder/"model"))
        asked = QuestionSource("said", str(said), asked="continuation")
        for answer in range(4):
            for row in rows: row["answer"] = row.get("said", answer)
            said.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "said"}) + "\n" for row in rows))
            for i in examiner.find_known((asked,))["said"]: rows[i]["said"] = rows[i]["answer"]
    return once("own-model", fill)


SMALL = {"200_000": "8_000", "steps = 1000": "steps = 30", "batch = 1024": "batch = 128", "= 128 # rows": "= 12 # rows", "= 128 # tokens": "= 64 # tokens"}


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """An empty folder to work in, and a function that calls the command line there: its code, what it printed and what it complained of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAENB_USE", raising=False)
    for name in os.listdir(home): (tmp_path/name).symlink_to(home/name)

    def call(line, *more):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*line.split(), *map(str, more)])
        return code, out.getvalue(), err.getvalue()
    return call


@pytest.fixture
def preset(here, tmp_path):
    """A preset for the model, at a tiny budget."""
    assert here("preset new my.toml --model model")[0] == 0
    text = (tmp_path/"my.toml").read_text()
    for old, new in SMALL.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path/"my.toml").write_text(text)
    return "my.toml"


def refused(found, *words):
    code, _, err = found
    said = [line for line in err.splitlines() if line.startswith("saenb: ")]
    assert code == 2 and len(said) == 1 and said[0].endswith((".", "?")), found
    for word in words: assert word in said[0], (word, said[0])


def test_a_preset_is_written_and_never_over_another(here, tmp_path):
    code, out, _ = here("preset new my.toml --model model --layer 2 --ask-forget ask_forget.jsonl --ask-retain ask_retain.jsonl --asked continuation")
    assert code == 0 and "saenb check --preset my.toml" in out
    found = find_preset("my.toml")
    assert (found.layer, found.d_sae, found.asks, found.model) == (2, 128, True, str(tmp_path/"model"))
    assert [(q.subject, q.asked) for q in found.exam.questions] == [("ask_forget", "continuation"), ("ask_retain", "continuation")]
    before = (tmp_path/"my.toml").read_bytes()
    refused(here("preset new my.toml --model model"), "my.toml is there already")
    refused(here("preset new other.toml --model model --layer 3"), "layer is 3", "0 to 2")
    refused(here("preset new other.toml --model nowhere"), "nowhere cannot be looked at")
    refused(here("preset new other.txt --model model"), "has to end with .toml")
    refused(here("preset new other.toml --model model --ask-forget ask_forget.jsonl"), "both sides")
    assert (tmp_path/"my.toml").read_bytes() == before and not list(tmp_path.glob("other*"))
    refused(here("run orthogonality/0 --preset model"), "is not a preset yet", "saenb preset new my.toml --model model")


def test_a_small_file_inherits_nothing_large(here, preset, tmp_path):
    (tmp_path/"bare.toml").write_text('model = "model"\nlayer = 1\n[corpora]\nforget = "forget.txt"\nretain = "retain.txt"')
    bare = find_preset("bare.toml")
    assert bare.training.count() * bare.training.batch <= 2**21 and bare.harvest_tokens <= 200_000 and bare.seeds == 1
    assert {s.dataset_size * s.seq_len for s in bare.evals.values()} == {128 * 128} and not bare.asks
    assert [(Path(s.path).name, s.side) for s in bare.texts] == [("forget.txt", "forget"), ("retain.txt", "retain")]
    assert bare.answer_model == bare.model == str(tmp_path/"model")
    for line, said in {"": "lacks model, layer, corpora.forget, corpora.retain", 'model = "model"': "saenb preset new", "modl = 3": "did you mean model",
                       'model = "model"\nlayer = 1\n[corpora]\nforget = "nothing.txt"\nretain = "retain.txt"': "There is no nothing.txt beside the preset",
                       'model = "model"\nlayer = 1\n[corpora]\nforget = "forget.txt"\nretain = "retain.txt"\n[questions]\nforget = "ask_forget.jsonl"': "one side only",
                       'model = "model"\nlayer = 100000000000000000000\n[corpora]\nforget = "forget.txt"\nretain = "retain.txt"': "has to be smaller",
                       'base = "tiny"\n[evals.unlearning.grid]\nmultipliers = [1e300]': "has to be smaller"}.items():
        (tmp_path/"wrong.toml").write_text(line)
        with pytest.raises(SaenbError, match=said): find_preset("wrong.toml")


def test_sizes_are_said_once_for_all_evaluations(here, preset, tmp_path):
    (tmp_path/"my.toml").write_text((tmp_path/"my.toml").read_text() + "\n[evals.core]\nreconstruction_rows = 2\n[evals.sparse_probing]\nk_values = [1]\n")
    found = find_preset("my.toml")
    assert {(s.dataset_size, s.seq_len) for name, s in found.evals.items() if name != "sparse_probing"} == {(12, 64)}
    assert found.evals["core"].reconstruction_rows == 2 and found.evals["sparse_probing"].k_values == (1,)


def test_from_a_model_to_the_feature_page_without_a_question(here, preset, tmp_path):
    code, out, _ = here("check --preset my.toml")
    assert code == 0 and "saenb run orthogonality/0 --preset my.toml" in out
    assert not [word for word in ("questions", "ag_news", "sparse") if word in out] and "largest direction holds" in out
    code, out, err = here("harvest --preset my.toml")
    assert code == 0 and "saenb run orthogonality/0 --preset my.toml" in out and " tokens/s" in err
    code, out, err = here("run orthogonality/0 --preset my.toml")
    assert code == 0 and "unexplained variance" in out, err
    record = Record(tmp_path/"runs/my/orthogonality/run_0/seed_0")
    assert record.finished and not record.scored and set(record.evaluations) == {"core", "entanglement"}
    assert "no score" in (record.path/"notes.md").read_text() and "score" not in record.info["headlines"]
    code, out, _ = here("eval --preset my.toml --evals core --json", record.path)
    assert code == 0 and json.loads(out)["core"] == read_json(record.path/"evals"/"core.json", "result")
    code, out, _ = here("explore --preset my.toml --contexts 2 --json", record.path)
    assert code == 0 and json.loads(out) == dict(page="features.html", features=128, clamped=[])
    assert '"features": 128' in (tmp_path/"features.html").read_text(encoding="utf-8")
    refused(here("autopsy --preset my.toml", record.path), "has no questions to ask")
    code, out, _ = here("compare runs/my")
    assert code == 0 and "unexplained variance" in out and "score" not in out


def test_a_preset_may_leave_its_questions_out_of_records(here, preset, tmp_path):
    text = (tmp_path/"my.toml").read_text()
    for old in ("# [questions]", "# forget = ", "# retain = "): text = text.replace(old, old[2:])
    (tmp_path/"my.toml").write_text('recorded = ["core"]\n' + text.replace("questions_", "ask_"))
    code, out, _ = here("check --preset my.toml")
    assert code == 0 and "ask_" not in out and "questions" not in out
    assert here("run orthogonality/0 --preset my.toml --steps 4")[0] == 0
    record, found = Record(tmp_path/"runs/my/orthogonality/run_0/seed_0"), find_preset("my.toml")
    assert set(record.evaluations) == {"core"} and not record.scored and "no score" in (record.path/"notes.md").read_text()
    assert "unlearning" in found.evals and "core" in usual_evals(found) and not {"unlearning", "random_choice"} & set(usual_evals(found))
    assert usual_evals(replace(found, recorded=())) == [name for name in evaluations() if name in found.evals]
    assert here("explore --preset my.toml --contexts 1 --effects 1", record.path)[0] == 0


def test_all_records_of_an_experiment_without_a_question(here, preset, tmp_path):
    code, out, err = here("reproduce contrastive --preset my.toml --steps 4 --jobs 1 --json")
    assert code == 0, err
    made = json.loads(out)
    assert len(made["records"]) == 5 and not (tmp_path/"runs/my/controls").exists()
    assert any(name.endswith("training_losses.png") for name in made["figures"]) and any(name.endswith("explorer/baseline.html") for name in made["figures"])
    assert "there is no score" in (tmp_path/"runs/my/contrastive/run_3/notes.md").read_text()
    shutil.rmtree(tmp_path/"runs/my/contrastive/run_0")
    refused(here("compare runs/my/contrastive/run_3"), "`saenb run contrastive/0 --preset my.toml --seed 0 --steps 4`")


def test_a_store_by_options_and_a_dictionary_on_it(here, preset, tmp_path):
    code, out, err = here("harvest store --model model --layer 1 --texts forget.txt:forget retain.txt:retain --tokens 4000 --seq-len 64")
    assert code == 0 and "saenb train store FOLDER" in out and "tokens/s" in err
    store = Store.open(tmp_path/"store")
    assert store.layer == 1 and min(store.side_counts()[1:]) > 1000 and store.side_counts()[0] == 0 and "preset" not in store.about
    code, out, _ = here("train store mine --steps 5 --batch 64")
    assert code == 0 and "saenb preset new my.toml --model" in out and "saenb eval mine --preset my.toml" in out
    assert load_sae("mine/sae").cfg.model_name == store.about["texts"]["model"] != store.about["model"]
    code, out, err = here("eval mine --preset my.toml --evals core")
    assert code == 0 and "unexplained" in out, err
    for line, said in {"harvest": "needs a folder", "harvest s --model model --layer 1": "nothing to read", "harvest s --preset my.toml --layer 2": "leave these options out",
                       "harvest s --model model --layer 7 --texts forget.txt": "layers 0 to 2", "harvest s --model model --layer 1 --texts forget.txt:forgt": "did you mean forget",
                       "harvest s --model model --layer 1 --texts nothing.txt": "nothing.txt"}.items():
        refused(here(line), said)


def test_stores_of_several_layers_are_made_side_by_side_in_one_pass(here, preset, tmp_path, monkeypatch):
    read, texts = [], "--texts forget.txt:forget retain.txt:retain --tokens 2000 --seq-len 64"
    from saenb.data import harvest
    rows = harvest.token_rows
    monkeypatch.setattr(harvest, "token_rows", lambda *args: (read.append(row) or row for row in rows(*args)))
    code, out, _ = here(f"harvest stores --model model --layer 2,0 {texts}")
    first, second = out.splitlines()
    assert code == 0 and "stores/layer_2 holds" in first and "at layer 2" in first and "stores/layer_0 holds" in second
    assert "saenb train stores/layer_2 FOLDER" in second and len(read) == -(-2000 // 63)
    for layer in (2, 0):
        assert here(f"harvest alone_{layer} --model model --layer {layer} {texts}")[0] == 0
        both, alone = Store.open(tmp_path/"stores"/f"layer_{layer}"), Store.open(tmp_path/f"alone_{layer}")
        assert both.layer == layer and both.about == alone.about # with the checksums of all shards
    count = len(read)
    code, out, _ = here(f"harvest stores --model model --layer 2,0 {texts} --json")
    assert code == 0 and [row["layer"] for row in json.loads(out)] == [2, 0] and len(read) == count # found, not made again
    refused(here(f"harvest others --model model --layer 0,7 {texts}"), "layers 0 to 2")
    for layers, said in {"1,1": "layer 1 stands there twice", "0,x": "'x' is not a whole number", "0,": "'' is not a whole number"}.items():
        with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as ended:
            main(f"harvest others --model model --layer {layers} {texts}".split())
        refused((ended.value.code, "", err.getvalue()), said)
    assert not (tmp_path/"others").exists()


def test_commands_name_the_preset_that_fits(here, preset, tmp_path):
    assert here("harvest --preset my.toml --out elsewhere")[0] == 0
    code, out, _ = here("train elsewhere/my/store mine --steps 5 --batch 64")
    assert code == 0 and "`saenb eval mine --preset my.toml` judges it" in out
    refused(here("eval mine"), "it explains layer 1, and the preset reads layer 0", "--preset my.toml", "--anyway")


def test_a_dictionary_with_a_gate_of_ones_own_is_trained_and_judged(here, preset, tmp_path, monkeypatch):
    (tmp_path/"my_gates.py").write_text("""
from saenb import Experiment, Mechanism, Run

class HalvedGate(Mechanism):
    "Halves activations."
    def gate(self, x, f, positions=None): return f / 2

MINE = Experiment("mine", "Mine", runs=(Run("mine/9", "Halved", "Activations are halved.", (("HalvedGate", {}),)), Run("mine/0", "Plain", "Nothing.")))
""")
    assert here("harvest --preset my.toml")[0] == 0
    code, _, err = here("train runs/my/store mine --run mine/9 --steps 5 --batch 64 --use my_gates.py")
    assert code == 0 and load_sae("mine/sae").cfg.gates == [dict(name="HalvedGate", settings={})], err
    code, out, err = here("eval mine --preset my.toml --evals core --use my_gates.py")
    assert code == 0 and "unexplained" in out, err
    assert "mine/9" in here("list runs --use my_gates.py")[1]
    # its record, which the other commands find by the same option; what is used is forgotten after each, as in a process of its own
    def alone(line):
        monkeypatch.delenv("SAENB_USE", raising=False)
        return here(line)
    refused(alone("run mine/9 --preset my.toml --steps 5"), "no run called 'mine/9'")
    assert alone("run mine/9 --preset my.toml --steps 5 --use my_gates.py")[0] == 0
    refused(alone("compare runs/my/mine"), "the file that declares the experiment mine")
    refused(alone("compare runs/my/mine --use my_gates.py"), "`saenb run mine/0 --preset my.toml --seed 0 --steps 5 --use ", "my_gates.py`")
    assert alone("run mine/0 --preset my.toml --steps 5 --use my_gates.py")[0] == 0
    code, out, _ = alone("compare runs/my/mine --use my_gates.py")
    assert code == 0 and out.index("mine/0") < out.index("mine/9")
    assert alone("explore runs/my/mine/run_9/seed_0 --preset my.toml --contexts 1 --effects 0 --use my_gates.py")[0] == 0
    code, out, _ = alone("export runs/my/mine/run_9/seed_0 exported --to saelens --use my_gates.py")
    assert code == 0 and "Without HalvedGate" in out and load_sae("exported").cfg.gates[0]["name"] == "HalvedGate"


@pytest.mark.parametrize("text, said", [(None, "no file"), ("1 / 0", "ZeroDivisionError")])
def test_a_file_that_cannot_be_used_is_named_and_forgotten(here, tmp_path, text, said):
    if text: (tmp_path/"broken.py").write_text(text)
    refused(here("list runs --use broken.py"), "broken.py", said)
    assert here("list runs")[0] == 0


@pytest.mark.parametrize("change, said", [
    (dict(hook_layer=0, hook_name="blocks.0.hook_resid_post"), "explains layer 0, and the preset reads layer 1"),
    (dict(hook_name="blocks.1.hook_mlp_out"), "explains blocks.1.hook_mlp_out"),
    (dict(model_name="gpt2"), "explains the model gpt2"), (dict(model_name="model 0123abcd"), "explains the model model 0123abcd")])
def test_another_place_or_model_is_refused_unless_somebody_insists(here, preset, tmp_path, change, said):
    sae = SAE(SAEConfig(32, 16, "blocks.1.hook_resid_post", 1)).initialise(torch.randn(300, 32))
    sae.save(tmp_path/"mine")
    assert here("eval mine --preset my.toml --evals core")[0] == 0
    sae.cfg = replace(sae.cfg, **change)
    sae.save(tmp_path/"mine")
    for command in ("eval mine --preset my.toml --evals core", "explore mine --preset my.toml", "autopsy mine --preset my.toml"):
        refused(here(command), said)
    code, out, _ = here("eval mine --preset my.toml --evals core --force --anyway --json")
    assert code == 0 and said in json.loads(out)["core"]["judged_anyway"] and said in (tmp_path/"mine/evals/core.json").read_text()


def test_check_says_how_many_questions_are_known(here, preset, tmp_path):
    text = (tmp_path/"my.toml").read_text()
    for old in ("# [questions]", "# forget = ", "# retain = ", "# asked = "): text = text.replace(old, old[2:])
    (tmp_path/"my.toml").write_text(text.replace("questions_", "ask_"))
    code, out, err = here("check --preset my.toml")
    assert code == 0, err
    line = next(line for line in out.splitlines() if "known by the model" in line)
    assert line.startswith("?") and " of 6 to forget and " in line
    refused(here("run orthogonality/0 --preset my.toml --steps 3"), "knows no question of")


def test_check_asks_the_sample_as_the_exam_does(here, preset, tmp_path):
    """The answers are those that the model gives by continuation, so what it says the same in all wordings is known."""
    examiner, known = Examiner(boot("model")), {}
    for side in ("forget", "retain"):
        known[side] = len(examiner.find_known((QuestionSource("said", f"said_{side}.jsonl", asked="continuation"),))["said"])
    assert min(known.values()) > 0
    text = (tmp_path/"my.toml").read_text()
    for old in ("# [questions]", "# forget = ", "# retain = ", "# asked = "): text = text.replace(old, old[2:])
    (tmp_path/"my.toml").write_text(text.replace("questions_", "said_"))
    out = here("check --preset my.toml")[1]
    assert f"{known['forget']} of 6 to forget and {known['retain']} of 6 to retain" in out


def test_known_questions_are_named_by_what_the_model_holds(home, tmp_path):
    """Not by where its folder lies, nor by a part of its weights; a list that an earlier version named is still read."""
    for name in ("one", "two", "later"): shutil.copytree(home/"model", tmp_path/name)
    weights = load_file(tmp_path/"later"/"model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] *= 1.5
    save_file(weights, tmp_path/"later"/"model.safetensors", metadata=dict(format="pt"))
    corpora = {side: TextSource(str(home/f"{side}.txt"), side=side) for side in ("forget", "retain")}
    asked = tuple(QuestionSource(f"ask_{side}", str(home/f"ask_{side}.jsonl"), asked="continuation") for side in ("forget", "retain"))
    setup = UnlearningSetup(questions=asked, seq_len=32, dataset_size=2, **corpora)
    def lists(): return sorted((tmp_path/"cache").glob("known_*.json"))
    exams = {}
    for name, count in (("one", 1), ("two", 1), ("later", 2)):
        exams[name] = Exam(boot(tmp_path/name), setup, 1, cache=tmp_path/"cache")
        assert len(lists()) == count
    old = exams["one"]._list_of_known(tmp_path/"cache", "as it was").with_name("known_old.json")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("saenb.evals.exam.fingerprint", lambda value: "old" if value[0] == str(tmp_path/"one") else "new")
        write_json(old, dict(model="one", known=dict(ask_forget=[0, 5], ask_retain=[1])))
        assert exams["one"]._known(tmp_path/"cache") == dict(ask_forget=[0, 5], ask_retain=[1])
        assert exams["two"]._list_of_known(tmp_path/"cache", "as it was").name == "known_new.json"


# ------------------------------------------------------------------------------------------------ stopping

@pytest.mark.parametrize("how, command, folder", [
    (signal.SIGINT, "train store mine --steps 1000000 --batch 64", "mine"), (signal.SIGTERM, "run orthogonality/0 --preset my.toml --steps 1000000", "runs/my/orthogonality/run_0/seed_0"),
    (signal.SIGHUP, "train store many --steps 1000000 --batch 64 --each lr=0.001,0.002", "many/lr=0.001")])
def test_whoever_stops_a_training_finds_it_saved(here, preset, tmp_path, how, command, folder):
    here("harvest --preset my.toml" if command.startswith("run") else "harvest store --model model --layer 1 --texts forget.txt:forget --tokens 4000 --seq-len 64")
    process = subprocess.Popen([sys.executable, "-m", "saenb", *command.split()], stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=lambda: [signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)])
    log, ends = tmp_path/folder/"train_log.jsonl", time.time() + 120
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None and time.time() < ends
        time.sleep(0.01)
    began = time.time()
    process.send_signal(how)
    assert process.wait(30) == 128 + how
    assert time.time() - began < 2 * max(1, os.getloadavg()[0] / os.cpu_count())
    said = process.stderr.read().splitlines()[-1]
    assert said.startswith("saenb: Stopped after step ") and f"the checkpoint is in {folder}" in said
    step = int(said.split()[4].replace(",", ""))
    assert step > 0 and (tmp_path/folder/"checkpoint.safetensors").exists()
    from safetensors import safe_open
    with safe_open(tmp_path/folder/"checkpoint.safetensors", "pt") as f: assert json.loads(f.metadata()["saenb"])["step"] == step


# ------------------------------------------------------------------------------------------------ hostile use

def test_memory_is_estimated_before_it_is_asked_for(here, preset):
    assert here("harvest store --model model --layer 1 --texts forget.txt:forget --tokens 4000 --seq-len 64")[0] == 0
    refused(here("train store mine --d-sae 400000000000 --steps 1"), "needs", "of memory")
    with pytest.raises(SaenbError, match="needs 1,000,000.0 GB of memory"): need_memory(10**15, "This")
    text = Path("my.toml").read_text()
    for wide in (text.replace("batch = 64", f"batch = {10**14}"), text.replace("d_sae = 128", f"d_sae = {10**14}")):
        assert wide != text
        Path("wide.toml").write_text(wide)
        code, out, err = here("check --preset wide.toml")
        assert code == 2 and "models, training and evaluations" in err and "000.0 GB" in out
    assert [as_size(n) for n in (0, 999, 2_000_000, 3e9)] == ["0 bytes", "1.0 kB", "2.0 MB", "3.0 GB"]


def test_half_a_character_is_noticed_when_it_is_read(here, preset, tmp_path):
    SAE(SAEConfig(32, 16, "blocks.1.hook_resid_post", 1)).initialise(torch.randn(300, 32)).save(tmp_path/"mine")
    config = tmp_path/"mine"/"cfg.json"
    config.write_text(config.read_text().replace('"model_name": ""', '"model_name": "\\ud800"'))
    refused(here("eval mine --preset my.toml --evals core"), "cfg.json", "surrogates")


def test_a_score_whose_interval_touches_zero_is_not_called_real():
    for low, said in ((0.0, "not told apart from zero"), (0.1, "is real")):
        assert said in _reason(dict(score=0.3, interval=[low, 0.5]), [], [], {}, None)


@pytest.mark.parametrize("kind", [torch.complex64, torch.bool])
def test_weights_are_real_numbers(tmp_path, kind):
    sae = SAE(SAEConfig(8, 16)).initialise(torch.randn(300, 8))
    sae.save(tmp_path)
    write_tensors(tmp_path/"sae_weights.safetensors", {k: v.to(kind) if k == "W_enc" else v for k, v in sae.state_dict().items()})
    with pytest.raises(SaenbError, match="holds a W_enc of (complex64|bool) numbers"): load_sae(tmp_path)


@pytest.mark.parametrize("field, value, said", [
    ("score", 1.5, "score is 1.5"), ("score", -0.2, "score is -0.2"), ("selectivity", 7, "selectivity is 7"), ("reference_score", 2.0, "reference_score is 2.0"),
    ("held_out", 1.01, "held_out is 1.01"), ("interval", [0.6, 0.4], "interval is an interval from 0.6 to 0.4"), ("interval", [0.2, 1.4], r"interval\[1\] is 1.4"),
    ("held_out_interval", [-0.5, 0.4], r"held_out_interval\[0\] is -0.5"), ("selectivity_interval", [1, 0], "selectivity_interval is an interval from 1 to 0"),
    ("best_at", {"0.99": 3.0}, "best_at.0.99 is 3.0"), ("best", dict(retain_threshold=0.01, multiplier=2, chosen=3, features=[1], retain_share=1.2, forget_share=0.5),
                                                        "retain_share is 1.2")])
def test_a_score_cannot_say_what_cannot_be(tmp_path, field, value, said):
    folder = ROOT/"runs"/"tiny-full"/"orthogonality"/"run_1"/"seed_0"
    shutil.copy(folder/"config.json", tmp_path)
    result = read_json(folder/"evals"/"unlearning.json", "result")
    (tmp_path/"evals").mkdir()
    write_json(tmp_path/"evals"/"unlearning.json", dict(result, eval_result_unstructured=result["eval_result_unstructured"]))
    assert Record(tmp_path).result()["eval_result_unstructured"]["score"] <= 1
    result["eval_result_unstructured"][field] = value
    write_json(tmp_path/"evals"/"unlearning.json", result)
    with pytest.raises(SaenbError, match=f"unlearning.json.*{said}"): Record(tmp_path).result()


@pytest.mark.parametrize("field, value", [("multipliers", 1e300), ("multipliers", 10**400), ("thresholds", 1e30), ("n_features", 2**60)])
def test_a_grid_takes_nothing_that_its_record_would_refuse(field, value):
    with pytest.raises(SaenbError, match=f"^{field} is [0-9e+.…]*; it has to be smaller.$"): Grid(**{field: (value,)})


@pytest.mark.parametrize("field, value, said", [("interval", [0.9, 0.1], "interval from 0.9 to 0.1"), ("training_seconds", -1.0, "training_seconds is -1.0"),
                                                ("held_out", 1.5, "held_out is 1.5")])
def test_a_record_cannot_say_what_cannot_be(tmp_path, field, value, said):
    write_json(tmp_path/"final_info.json", {field: value})
    with pytest.raises(SaenbError, match=said): Record(tmp_path).info


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path/"a.safetensors", dict(a=torch.zeros(2)))
        write_json(tmp_path/"a.json", {})
    finally: os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o640}


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="this system has no limit on file sizes")
def test_a_limit_on_file_sizes_is_one_sentence(saenb, one_sentence, home, tmp_path):
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); from saenb.cli import main;"
            f"sys.exit(main(['harvest', 'store', '--model', '{home}/model', '--layer', '1', '--texts', '{home}/forget.txt']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    one_sentence(done, "larger than files may be here")


# ------------------------------------------------------------------------------------------------ streams as they are

def test_what_is_unexplained_apart_from_a_direction_that_dominates(fresh):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 12, generator=draw)
    assert not directions_in(x)
    along = torch.nn.functional.normalize(torch.randn(12, generator=draw), dim=0)
    x += 30 * torch.randn(4000, 1, generator=draw) * along
    found = directions_in(x)
    assert len(found) == 1 and found.shares[0] > 0.9 and abs(found.rows[0] @ along) > 0.999
    sae = SAE(SAEConfig(12, 24)).initialise(x, 0)
    rows = [(None, part[None], torch.ones(1, len(part), dtype=torch.bool)) for part in x.split(400)]
    seen, out = tally(sae, rows, found), sae(x).detach()
    rest = torch.eye(12) - torch.outer(found.rows[0], found.rows[0])
    centred = x - x.mean(0)
    assert unexplained_apart(seen)[0] == pytest.approx((((x - out) @ rest).pow(2).sum() / (centred @ rest).pow(2).sum()).item(), rel=1e-3)
    assert unexplained(seen)[0] == pytest.approx(((x - out).pow(2).sum() / centred.pow(2).sum()).item(), rel=1e-3)
    assert unexplained_apart(tally(sae, rows)) is None


def test_check_warns_of_a_stream_that_one_direction_dominates(here, preset, tmp_path):
    (tmp_path/"model").unlink()
    shutil.copytree(Path(os.path.realpath(tmp_path/"forget.txt")).parent/"model", tmp_path/"model")
    weights = load_file(tmp_path/"model"/"model.safetensors")
    weights["model.embed_tokens.weight"][:, 5] *= 300
    save_file(weights, tmp_path/"model"/"model.safetensors", metadata=dict(format="pt"))
    code, out, _ = here("check --preset my.toml")
    line = next(line for line in out.splitlines() if "one direction holds" in line)
    assert code == 0 and line.startswith("?") and "apart from it" in line and 'normalise = "dimension"' in line


def test_a_preset_can_count_all_dimensions_alike(here, preset, tmp_path):
    """What is saved is a plain dictionary of the stream as it is, in SAELens' form too; gates that read the stream are refused before any work."""
    text = (tmp_path/"my.toml").read_text()
    assert '# normalise = "dimension"' in text
    (tmp_path/"my.toml").write_text(text.replace("# normalise", "normalise"))
    refused(here("run positional/6 --preset my.toml"), "reads the stream itself", "choose another run")
    assert not (tmp_path/"runs").exists()
    assert "positional/6" in {r.id for r in _chosen({"contrastive", "positional/6"}, find_preset("my.toml"))} # it is named, so it is refused then
    left = {r.id for r in _chosen({"positional"}, find_preset("my.toml"))} # of an experiment that is named as a whole
    assert {"positional/0", "positional/1"} <= left and not {"positional/4", "positional/6"} & left
    assert here("run orthogonality/0 --preset my.toml")[0] == 0
    record, store = Record(tmp_path/"runs/my/orthogonality/run_0/seed_0"), Store.open(tmp_path/"runs/my/store")
    assert record.config["training"]["normalise"] == "dimension" and "of the normalised stream" in (record.path/"notes.md").read_text()
    assert here(f"export {record.path} --to saelens saelens")[0] == 0 and here("train runs/my/store mine --normalise dimension --steps 30 --batch 64")[0] == 0
    x = store.rows(0, 2000).x.float()
    for folder in (record.path/"sae", tmp_path/"saelens", tmp_path/"mine"/"sae"):
        w, cfg = load_file(folder/"sae_weights.safetensors"), json.loads((folder/"cfg.json").read_text())
        assert (cfg["architecture"], cfg["normalize_activations"], cfg["apply_b_dec_to_input"]) == ("standard", "none", True)
        f = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        torch.testing.assert_close(load_sae(folder)(x).detach(), out := f @ w["W_dec"] + w["b_dec"])
        assert (x - out).pow(2).sum() < 0.9 * (x - x.mean(0)).pow(2).sum()


# ------------------------------------------------------------------------------------------------ commands only

CLIENT = """
import json, os, socket, sys
with socket.create_connection(("127.0.0.1", int(os.environ["SERVED_AT"]))) as s, s.makefile("rw") as f:
    print(json.dumps([os.getcwd(), sys.argv[1:]]), file=f, flush=True)
    code, out, err = json.loads(f.readline())
print(out, end=""), print(err, end="", file=sys.stderr)
sys.exit(code)
"""


def test_a_newcomer_needs_commands_only(home, here, tmp_path, monkeypatch):
    """The script that goes from an empty folder to the feature page; its commands are run by this process, since starting one for each would take most of the time."""
    command, at = tmp_path/"saenb", tmp_path/"empty"
    command.write_text(f"#!{sys.executable} -SE{CLIENT}")
    command.chmod(0o755)
    at.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server, open(tmp_path/"said", "w") as said:
        server.settimeout(0.1)
        own = dict(SAENB=command, SERVED_AT=server.getsockname()[1], TOKENS=6000, STEPS=20, ROWS=12, ASK_FORGET=home/"said_forget.jsonl", ASK_RETAIN=home/"said_retain.jsonl")
        script = subprocess.Popen(["sh", ROOT/"tests"/"newcomer.sh", home/"model"], cwd=at, stdout=said, stderr=said, env=os.environ | {k: str(v) for k, v in own.items()})
        while script.poll() is None:
            with contextlib.suppress(TimeoutError):
                with server.accept()[0] as asking, asking.makefile("rw") as f:
                    folder, arguments = json.loads(f.readline())
                    monkeypatch.chdir(folder)
                    print(json.dumps(here("", *arguments)), file=f, flush=True)
    told = (tmp_path/"said").read_text()
    assert script.returncode == 0, told[-2000:]
    commands = [line.split()[2] for line in told.splitlines() if line.startswith("$ saenb ")]
    assert commands == "harvest train train preset check eval eval run run compare explore".split()
    assert "questions" in told and "held-out score" in told and "unexplained variance" in told and (at/"features.html").stat().st_size > 10_000
    assert (at/"alike/sae/cfg.json").exists() and (at/"runs/my/contrastive/run_1/seed_0/notes.md").exists()
