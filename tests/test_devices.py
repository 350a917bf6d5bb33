"""One notion of a device: how it is found and asked for, what is done when its memory ends, and what is known of it before."""
import os
import re
import runpy
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from saenb.base.devices import (checked_device, device_name, devices_to_share, find_device, free_memory, halve_on_memory_error, in_parts,
                                use_device)
from saenb.base.errors import SaenbError, warn_once
from saenb.base.files import need_memory
from saenb.data.store import Batch
from saenb.lab.check import check
from saenb.lab.engines import run_parallel
from saenb.lab.estimates import (Held, device_need, estimate_memory, listed_features, model_cost, plan_needs, planned_stages,
                                 training_held)
from saenb.lab.preset_files import find_preset, preset_from
from saenb.lab.ray_engine import _shares
from saenb.lab.reproduction import _engine
from saenb.lab.training import need_training_memory
from saenb.sae.architectures import ARCHITECTURES, ReLU
from saenb.sae.listed_step import Listing
from saenb.sae.sae import SAE, SAEConfig
from saenb.sae.topk import TopKArchitecture
from saenb.train.config import TrainConfig
from saenb.train.trainer import Trainer


@pytest.fixture
def machine(monkeypatch):
    """A machine that has so many GPUs of each kind, as far as torch counts them."""
    monkeypatch.delenv("SAENB_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def has(cuda=0, mps=0):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.mps, "device_count", lambda: mps)
    has()
    return has


@pytest.fixture
def mine(small):
    """The preset of a small world."""
    return find_preset(small)


# ------------------------------------------------------------------------------------------------ finding one

def test_auto_takes_the_best_there_is(machine):
    for counts, best in ((dict(), "cpu"), (dict(mps=1), "mps"), (dict(cuda=2, mps=1), "cuda:0")):
        machine(**counts)
        assert str(find_device()) == str(find_device("auto")) == best


def test_the_variable_comes_before_the_preset_and_a_name_before_both(machine, monkeypatch, mine):
    machine(cuda=2)
    assert str(find_device(otherwise="cuda:1")) == "cuda:1" == str(replace(mine, device="cuda:1").where())
    monkeypatch.setenv("SAENB_DEVICE", "cpu")
    assert str(find_device(otherwise="cuda:1")) == "cpu" == str(replace(mine, device="cuda:1").where())
    assert str(find_device("cuda:1")) == "cuda:1"
    with use_device("cuda"): assert str(find_device()) == "cuda:0" and os.environ["SAENB_DEVICE"] == "cuda"
    assert os.environ["SAENB_DEVICE"] == "cpu"
    with pytest.raises(SaenbError), use_device("cuda:2"): pass
    assert os.environ["SAENB_DEVICE"] == "cpu"


def test_a_process_of_torchrun_takes_its_own(machine, monkeypatch):
    machine(cuda=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(find_device()) == str(find_device("cuda")) == "cuda:1" and str(find_device("cuda:0")) == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SaenbError, match="does not have the device cuda:2"): find_device()


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:-1", "cuda:x", "cuda:²", "cpu:0", "meta", "CUDA", "cuda:0:1", "a\nb"])
def test_an_unknown_device_is_one_sentence(machine, monkeypatch, name):
    with pytest.raises(SaenbError, match="no kind of device called .*give auto, cpu, mps, cuda or the number") as e: checked_device(name)
    assert "\n" not in str(e.value)
    if not name: return # as if nobody had asked
    monkeypatch.setenv("SAENB_DEVICE", name)
    with pytest.raises(SaenbError, match="that SAENB_DEVICE names"): find_device()


def test_an_absent_device_says_who_asked_and_what_there_is(machine, monkeypatch, mine):
    machine(cuda=1)
    with pytest.raises(SaenbError, match="device cuda:1, that was asked for; it has cuda:0, cpu"): find_device("cuda:1")
    machine()
    with pytest.raises(SaenbError, match="device cuda:0, that the preset names; it has cpu"): replace(mine, device="cuda").where()
    monkeypatch.setenv("SAENB_DEVICE", "mps")
    with pytest.raises(SaenbError, match="device mps, that SAENB_DEVICE names; it has cpu"): find_device()


@pytest.mark.parametrize("built", [True, False])
def test_an_absent_gpu_may_be_for_want_of_cuda(machine, monkeypatch, built):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    with pytest.raises(SaenbError, match="it has cpu") as e: find_device("cuda")
    assert ("torch was installed without CUDA" in str(e.value)) is not built
    with pytest.raises(SaenbError) as e: find_device("mps")
    assert "CUDA" not in str(e.value)


def test_a_preset_names_its_device(tmp_path, standin_free):
    assert find_preset("tiny").device == "auto"
    assert preset_from(standin_free(tmp_path, 'device = "cuda:3"')).device == "cuda:3"
    with pytest.raises(SaenbError, match="no kind of device called 'tpu', that the preset names"):
        preset_from(standin_free(tmp_path, 'device = "tpu"'))


@pytest.fixture
def standin_free():
    """A preset's file that begins from tiny."""
    def write(folder, line):
        (folder/"mine.toml").write_text(f'base = "tiny"\n{line}\n')
        return folder/"mine.toml"
    return write


def test_memory_is_asked_of_the_device(monkeypatch):
    assert free_memory(torch.device("cpu")) > 2**20 and device_name(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**10))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**9)
    assert free_memory(torch.device("cuda", 0)) == 3 * 10**9
    need_memory(3 * 10**9, "This", torch.device("cuda", 0))
    with pytest.raises(SaenbError, match=r"needs 3.1 GB of memory and 3.0 GB are free on cuda:0"):
        need_memory(31 * 10**8, "This", torch.device("cuda", 0))


# ------------------------------------------------------------------------------------------------ memory that ends

@pytest.fixture
def limited():
    """Work that has room for so many at a time, and notes what it was asked for."""
    def make(room, error=torch.OutOfMemoryError):
        asked = []

        def work(size):
            asked.append(size)
            if size > room: raise error("no room for that")
            return size
        return work, asked
    return make


def test_a_size_is_halved_until_it_fits_and_remembered(limited, capsys):
    warn_once.cache_clear()
    work, asked = limited(10)
    assert halve_on_memory_error(work, 64, "this test") == 8 and asked == [64, 32, 16, 8]
    assert halve_on_memory_error(work, 64, "this test") == 8 and asked[4:] == [8]
    assert halve_on_memory_error(work, 5, "this test") == 5 # less was asked for
    assert halve_on_memory_error(work, 9, "another test") == 9
    said = capsys.readouterr().err.splitlines()
    assert said == [f"saenb: The device's memory is full; this test goes on with {n} at a time." for n in (32, 16, 8)]


def test_a_limit_of_long_rows_does_not_bind_short_ones(limited):
    """It is one of tokens: rows of a quarter of the length are tried four times as many at a time."""
    def asked_of(rows, length, room=1000):
        asked = []
        def work(part):
            asked.append(len(part))
            if len(part) * length > room: raise torch.OutOfMemoryError("no room for that")
        for _ in in_parts(work, range(rows), 64, "a test of lengths", length): pass
        return asked
    assert asked_of(8, 400) == [8, 4, 2, 2, 2, 2]
    assert asked_of(40, 100) == [8, 8, 8, 8, 8]
    assert asked_of(20, 10) == [20] # all of them
    assert asked_of(2, 900) == [1, 1] # and long ones are not tried again
    assert asked_of(20, 100, room=300) == [8, 4, 2, *[2] * 9] # less memory than before
    with pytest.raises(SaenbError, match="even one at a time"): asked_of(2, 2000)


def test_below_one_is_one_sentence(limited):
    work, asked = limited(0)
    with pytest.raises(SaenbError, match="not enough memory on the device for a test of nothing, even one at a time"):
        halve_on_memory_error(work, 4, "a test of nothing")
    assert asked == [4, 2, 1]


def test_only_memory_is_halved(limited):
    work, asked = limited(1, RuntimeError)
    with pytest.raises(RuntimeError, match="no room"): halve_on_memory_error(work, 4, "a test of errors")
    assert asked == [4]


def test_the_processor_runs_out_of_memory_too():
    def work(size): return len(torch.empty(size << 48, dtype=torch.uint8)) if size > 1 else 1
    assert halve_on_memory_error(work, 4, "a test of the processor") == 1


def test_parts_that_are_done_stay_done():
    done, room = [], [8]

    def work(rows):
        if len(rows) > room[0]: raise torch.OutOfMemoryError("no room")
        done.extend(rows)
        if len(done) >= 8: room[0] = 3 # somebody else has come
        return list(rows)
    assert sum(in_parts(work, list(range(19)), 8, "a test of parts"), []) == list(range(19)) == done
    assert list(in_parts(work, [], 8, "a test of parts")) == []


def test_nothing_of_a_failed_attempt_is_held():
    """What the first attempt had made is free when the second begins."""
    import weakref
    left = []

    def work(size):
        if size == 1: return left[0]() is None
        big = torch.zeros(1000)
        left.append(weakref.ref(big))
        raise torch.OutOfMemoryError("no room")
    assert halve_on_memory_error(work, 2, "a test of what is held")


# ------------------------------------------------------------------------------------------------ several at once

def test_processes_take_gpus_in_turn(monkeypatch):
    monkeypatch.setenv("SAENB_DEVICE", "auto") # children have it as well
    command = ["sh", "-c", "sleep 1; echo $CUDA_VISIBLE_DEVICES $SAENB_DEVICE"]
    found = {said for _, said in run_parallel(subprocess.check_output, [(command,)] * 4, 2, ["4", "7"])}
    assert found == {b"4 auto\n", b"7 auto\n"}


def test_gpus_are_shared_unless_one_is_named(machine, monkeypatch, mine):
    machine(cuda=3)
    assert devices_to_share() == devices_to_share("cuda") == ["0", "1", "2"]
    assert devices_to_share("cuda:1") == devices_to_share("cpu") == []
    made = _engine("processes", mine, None, "runs", None)
    assert made.keywords["devices"] == ["0", "1", "2"] and made.keywords["processes"] >= 3
    assert _engine("processes", replace(mine, device="cpu", max_jobs=1), None, "runs", None) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2,9")
    assert devices_to_share() == ["5", "2", "9"]
    machine(cuda=1)
    assert devices_to_share() == [] and _engine("processes", replace(mine, max_jobs=1), None, "runs", None) is None


def test_ray_asks_for_gpus_only_where_one_is_used():
    machines = [dict(Resources=dict(CPU=16.0, GPU=2.0))]
    assert [_shares(machines, 4, device)[0]["num_gpus"] for device in ("auto", "cuda", "cpu", "mps")] == [0.5, 0.5, 0, 0]


# ------------------------------------------------------------------------------------------------ commands

MODELS = {"run", "reproduce", "train", "check", "eval", "autopsy", "unlearn", "harvest", "name", "explore", "export"}


def test_commands_that_run_a_model_take_a_device():
    from saenb.cli import COMMANDS
    having = {name for name, (_, options) in COMMANDS.items() for flags, _ in options if "--device" in flags}
    assert having >= MODELS and not having & {"runs", "list", "compare", "figures", "fetch", "world", "preset"}


def test_a_device_that_is_not_there_ends_a_command_at_once(called, one_sentence):
    one_sentence(called("run", "orthogonality/0", "--device", "cuda:99"), "does not have the device cuda:99")
    one_sentence(called("train", "store", "out", "--device", "gpu"), "no kind of device called 'gpu'")


def test_a_command_leaves_the_environment_as_it_was(tmp_path, monkeypatch, capsys):
    from saenb.cli import main
    monkeypatch.setenv("SAENB_DEVICE", "mps")
    assert main(["autopsy", str(tmp_path), "--device", "cpu"]) == 2 and os.environ["SAENB_DEVICE"] == "mps"


# ------------------------------------------------------------------------------------------------ estimates

class Ready:
    """A store whose batches lie in memory."""
    path, about = Path("memory"), dict(shards=[])
    def __init__(self, d_in): self.d_in = d_in
    def check_batch(self, *_): pass


KINDS = ["relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"]
NARROW, WIDE = (192, 768, 512), (512, 2048, 512) # products of the wide one are in bfloat16 where the processor has it


def really_held(start, batches, **training):
    """The most bytes that tensors of a training hold on the processor, at each step."""
    found = []
    with Held() as held:
        sae = SAE(start.cfg)
        sae.load_state_dict(start.state_dict())
        trainer = Trainer(sae, Ready(start.cfg.d_in), cfg=TrainConfig(**dict(steps=100, batch=len(batches[0])) | training))
        for x in batches:
            held.most = held.now
            zeros = torch.zeros(len(x), dtype=torch.long)
            trainer.one_step(Batch(x.clone(), zeros, zeros, zeros, zeros))
            found.append(held.most)
    return found[1:] # the first step makes Adam's moments


def begun(d_in, d_sae, batch, kind, monkeypatch, active=None):
    """A dictionary, some share of whose features is active on a token, and two batches."""
    if active: monkeypatch.setattr("saenb.sae.sae.FIRST_DENSITY", active)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1000, d_in, generator=draw)
    return SAE(SAEConfig(d_in, d_sae, architecture=kind)).initialise(x, 0), [torch.randn(batch, d_in, generator=draw) for _ in range(2)]


@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_is_what_a_training_on_the_processor_holds(monkeypatch, shape, kind):
    """By steps of its own, from lists of what is active, where that is as many as the estimate assumes."""
    listed = listed_features(SAEConfig(*shape[:2], architecture=kind))[0] / shape[1]
    exact = kind + ",start=0.01" * (kind == "jumprelu") # whatever is above zero is listed
    found = really_held(*begun(*shape, exact, monkeypatch, listed))[-1]
    assert training_held(*shape, kind, "cpu").all == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_is_what_a_training_by_autograd_holds(monkeypatch, shape, kind):
    """As on a GPU, whose way of finding the strongest activations and of AuxK is taken as well."""
    monkeypatch.setattr(TopKArchitecture, "losses", lambda self, step: dict(auxk=self.auxiliary_on_device(step)))
    monkeypatch.setattr("saenb.sae.batchtopk.weakest", lambda f, count: f.flatten().topk(count, sorted=False).values.min())
    start, batches = begun(*shape, kind, monkeypatch)
    for cls in (Listing, ReLU): monkeypatch.setattr(cls, "fast_step", None)
    found = really_held(start, batches, precision="float32", steps=1)[-1] # after one step all that were silent are dead
    assert training_held(*shape, kind).all == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_an_estimate_is_the_most_that_a_whole_training_holds(store, kind):
    """On the stream of a model, over the steps on which the penalty rises and beyond."""
    d_sae, x = 4 * store.d_in, store.rows().x.float()
    start = SAE(SAEConfig(store.d_in, d_sae, architecture=kind)).initialise(x, 0)
    order = torch.randint(len(x), (80, 512), generator=torch.Generator().manual_seed(0))
    found = really_held(start, [x[i] for i in order], steps=len(order), warmup=60, lr=8e-4)
    assert training_held(store.d_in, d_sae, 512, kind, "cpu").all == pytest.approx(max(found), rel=0.1)


def test_an_estimate_of_features_that_nobody_lists_is_that_of_tables(monkeypatch):
    """With too many of them the processor takes dense steps."""
    for kind in ("relu", "topk,k=48"):
        found = really_held(*begun(192, 192, 512, kind, monkeypatch, 0.4))[-1]
        monkeypatch.setattr("saenb.lab.estimates.FIRST_DENSITY", 0.4)
        assert training_held(192, 192, 512, kind, "cpu").all == pytest.approx(found, rel=0.1)


def test_a_training_is_not_begun_with_less_memory_than_it_holds(monkeypatch):
    """Nor with less than its weights, gradients and moments, if its architecture looks at numbers."""
    class Looking(ReLU):
        name = "looking"
        fast_step = None
        def losses(self, step): return dict(odd=step.f.sum() * float(step.f.detach().numpy().max()))
    try:
        known = {"relu": training_held(192, 768, 1024, "relu", "cpu").all, "looking": 16 * 2 * 192 * 768}
        for kind, held in known.items():
            monkeypatch.setattr("saenb.base.files.free_memory", lambda device: held)
            need_training_memory(192, 768, 1024, kind, torch.device("cpu"))
            monkeypatch.setattr("saenb.base.files.free_memory", lambda device: held - 1)
            with pytest.raises(SaenbError, match="Training this dictionary needs .* of memory"):
                need_training_memory(192, 768, 1024, kind, torch.device("cpu"))
    finally: ARCHITECTURES.pop("looking", None)


def test_a_models_cost_is_that_of_its_weights(world, mine):
    cost = model_cost(mine, mine.model)
    weights = sum(p.numel() for p in world.model().original_model.parameters())
    assert cost.weights == 4 * weights and cost.batch > 2**20
    blocks = world.model().cfg.n_layers
    assert 0.5 < cost.read * blocks / (mine.layer + 1) / (cost.read + cost.answer) < 1.5


def test_the_plan_of_gemma_rests_on_what_it_says():
    gemma = find_preset("gemma-2-2b")
    cost = model_cost(gemma, gemma.model)
    assert cost.weights == 2 * 2_614_341_888 # its published size, in bfloat16
    costs = {name: cost for name in (gemma.model, gemma.answer_model)}
    stages = {s.name: s.seconds for s in planned_stages(gemma, costs)}
    assert stages["the store, once"] == pytest.approx(50e6 * cost.read / 0.5 / 794.5e12)
    assert stages["training, a record"] == pytest.approx(50e6 * (2304 * 2 + 11) / 2e9)
    records = next(name for name in stages if name.startswith("all "))
    parts = int(records.split()[1]) * (stages["training, a record"] + stages["the exam, a record, at most"])
    assert stages[records] == pytest.approx(parts + stages["the store, once"] + stages["known questions, once, at most"])
    rows = {r["what"]: r["bytes"] for r in estimate_memory(gemma, costs)}
    assert rows["weights of the models"] == 2 * cost.weights and rows["Adam's two moments"] == 8 * (2 * 2304**2 + 2 * 2304)
    said = plan_needs(gemma)
    assert all(n.ok for n in said) and "estimate" in said[-1].what and "7.94e+14" in said[-1].found


def test_check_plans_for_a_device_that_is_not_here(machine, mine):
    needs = check(mine, "runs", "cuda")
    assert needs[0].kind == "device" and needs[0].doubt and "not on this machine" in needs[0].found
    assert {"model", "texts", "questions", "disk", "plan"} <= {n.kind for n in needs} and not any(n.kind == "time" for n in needs)
    with pytest.raises(SaenbError, match="no kind of device"): check(mine, "runs", "gpu")


def test_check_says_that_an_asked_device_is_absent(machine, mine, monkeypatch):
    monkeypatch.setenv("SAENB_DEVICE", "cuda")
    here, need = device_need(mine)
    assert here is None and not need.ok and "SAENB_DEVICE" in need.found
    here, need = device_need(mine, "cpu")
    assert here == torch.device("cpu") and need.ok and "free" in need.found


# ------------------------------------------------------------------------------------------------ another device

@pytest.mark.parametrize("first", [True, False], ids=["from the processor", "to the processor"])
def test_a_training_goes_on_on_another_device(tmp_path, monkeypatch, first):
    """From a checkpoint, with the numbers of a training that stayed where it was."""
    from pretended import DEVICE
    monkeypatch.setattr(ReLU, "fast_step", None) # what is written by hand is for the processor alone
    draw, zeros = torch.Generator().manual_seed(0), torch.zeros(64, dtype=torch.long)
    batches = [Batch(torch.randn(64, 8, generator=draw), zeros, zeros, zeros, zeros) for _ in range(6)]
    cfg = TrainConfig(steps=6, batch=64, warmup=2, lr=1e-2, log_every=1, checkpoint_every=3, precision="float32")

    def trained(device, out, steps):
        sae = SAE(SAEConfig(8, 32)).initialise(batches[0].x, 0).to(device)
        trainer = Trainer(sae, Ready(8), cfg=cfg, out=out)
        trainer.begin()
        for batch in batches[trainer.index:steps]: trainer.take(trainer.ready(batch))
        return trainer
    places = ("cpu", DEVICE) if first else (DEVICE, "cpu")
    trained(places[0], tmp_path/"moved", 3)
    moved, stayed = trained(places[1], tmp_path/"moved", 6), trained("cpu", tmp_path/"stayed", 6)
    assert moved.sae.device == torch.device(places[1]) and [line["step"] for line in moved.history] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(moved.history, stayed.history): assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ the benchmark

def test_the_gpus_benchmark_runs_dry(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    program = runpy.run_path(str(ROOT/"benchmarks"/"gpu.py"))
    report = program["main"](["--device", "cpu", "--tiny", "--out", str(tmp_path/"gpu.md")]).read_text()
    assert report.startswith("# saenb on a GPU\n") and "tiny" in report and "| failed |" not in report and "left out" not in report
    rows = [line.split(" | ") for line in report.splitlines() if line.startswith("| ")][1:]
    assert {row[0].removeprefix("| ") for row in rows} == {
        "device", "equal results", "harvest", "training", "exam", "plan of gemma-2-2b"}
    assert all("| yes |" in line for line in report.splitlines() if line.startswith("| equal results") and "took" not in line)
    assert "16 settings" in report and "relu, 48 x 96" in report and "topk, 48 x 96" in report
    # tiny sizes tell nothing of hours; that they come of what was measured in the same run does
    told = re.search(r"rests on \| ([\d.]+)% of the rate of products while reading, ([\d.]+) ms a step", report)
    step = re.search(r"relu, 48 x 96, 128 tokens a step \| ([\d.]+) ms", report)
    assert float(told[1]) > 0 and told[2] == step[1] and "all 102 records" in report
    with pytest.raises(SaenbError, match="no GPU here"): program["main"](["--device", "cpu"])
