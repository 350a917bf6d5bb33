"Training and harvesting on a device that is not the processor: the same numbers, and the host waits for none."

import itertools
import threading

import pytest
import torch
from pretended import DEVICE, Pretended, waits

from saenb.base import devices
from saenb.base.errors import SaenbError
from saenb.base.files import write_json
from saenb.data.harvest import _enter, harvest, token_rows
from saenb.data.store import FORMAT, Store, ahead
from saenb.ideas.run import all_runs
from saenb.sae.architectures import ARCHITECTURES, Architecture
from saenb.sae.gates import make_mechanism
from saenb.sae.sae import SAE, SAEConfig
from saenb.train.config import TrainConfig
from saenb.train.mechanism import Mechanism
from saenb.train.trainer import Trainer

D_IN, D_SAE, BATCH, STEPS = 16, 64, 128, 8
CFG = TrainConfig(steps=STEPS, warmup=2, batch=BATCH, log_every=STEPS, lr=1e-3, precision="float32")
ARCHITECTURES.load()
KINDS = sorted(ARCHITECTURES)


@pytest.fixture(scope="module")
def random_store(tmp_path_factory):
    out, draw = tmp_path_factory.mktemp("store"), torch.Generator().manual_seed(0)
    n, seq_len = 1024, 128
    journal = dict(format=FORMAT, model="none", layer=0, d_in=D_IN, seq_len=seq_len, dtype="float32",
                   max_tokens=None, texts={}, shards=[], finished=False)
    place = torch.arange(n)
    mixed = torch.randn(4, D_IN, generator=draw)
    x = torch.randn(n, 4, generator=draw).exp() @ mixed + 0.1 * torch.randn(n, D_IN, generator=draw)
    shard = dict(x=x, position=(place % seq_len).short(), side=(1 + place // seq_len % 2).to(torch.int8),
                 token=place.int(), sequence=(place // seq_len).int())
    _enter(out, journal, n // seq_len, shard)
    write_json(out/"store.json", journal | dict(finished=True))
    return Store.open(out)


def make_trainer(store, device, architecture="relu", mechanisms=(), out=None, **changes):
    about = SAEConfig(D_IN, D_SAE, architecture=architecture)
    sae = SAE(about).initialise(store.rows(0, 512).x).to(device)
    made = [make_mechanism(name, dict(settings), about) for name, settings in mechanisms]
    cfg = TrainConfig(**vars(CFG) | changes)
    return Trainer(sae, store, made, cfg, out)


def state(trainer):
    return {k: getattr(v, "inside", v) for k, v in trainer._tensors().items() if torch.is_tensor(v)}


def often(name, settings):
    "A mechanism's settings, with what it does every few steps done every third."
    return name, settings | {k: 3 for k in RARELY.get(name, ())}


RARELY = dict.fromkeys(("ContrastiveGroups", "ImportantFeatures", "UsageResets", "EvolvingMask", "SideBlocks",
                        "ClusterGates"), ("every",)) | dict(OrthogonalPairs=("refresh",))


def same_steps(store, monkeypatch, architecture="relu", mechanisms=()):
    """Some steps in both places end with the same numbers; returns what the host waited for in plain steps,
    which are those in which no mechanism does what it does rarely."""
    for cls in (Architecture, *ARCHITECTURES.values()):
        monkeypatch.setattr(cls, "fast_step", None) # what is written by hand is for the processor alone
    rarely = [often(*m) if dict(m[1]).get("refresh", 50) >= 50 else m for m in mechanisms]
    here, there = (make_trainer(store, device, architecture, rarely) for device in ("cpu", DEVICE))
    found = set()
    for index, batch in enumerate(itertools.islice(store.batches(BATCH, balanced=True), STEPS)):
        here.one_step(here.ready(batch))
        waits.clear()
        there.one_step(there.ready(batch))
        if index % 3 == 1: found |= set(waits)
    for name, value in state(there).items():
        torch.testing.assert_close(value, state(here)[name], rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")
    here.flush(), there.flush()
    for term, value in here.history[-1].items():
        assert there.history[-1][term] == pytest.approx(value, rel=1e-5, abs=1e-6), term
    return found


def test_what_the_device_refuses_and_what_is_waited_for():
    x, here = torch.randn(3, 4).to(DEVICE, non_blocking=True), torch.randn(3, 4)
    waits.clear()
    y = x.clone().requires_grad_()
    (torch.relu(y @ x.T) * 2.0 + torch.zeros(()) + x.new_ones(3)).sum().backward()
    assert isinstance(y.grad, Pretended) and y.grad.device == DEVICE and not waits
    torch.testing.assert_close(y.grad.inside, 2 * (x.inside @ x.inside.T > 0).float() @ x.inside)
    for mixed in (lambda: x + here, lambda: here.mul_(x), lambda: torch.cat([x, here]),
                  lambda: torch.stack([x[0, 0], torch.zeros(())]), lambda: here.add_(x[0, 0])):
        with pytest.raises(RuntimeError, match="device"): mixed()
    with pytest.raises(TypeError): x.numpy()
    for asks in (lambda: x[0, 0].item(), lambda: bool(x[0, 0] > 0), lambda: x.tolist(), lambda: x.cpu(),
                 lambda: x[x > 0], lambda: x.nonzero(), lambda: x.unique(), lambda: here.copy_(x),
                 lambda: x[torch.tensor([1, 2])], lambda: x.copy_(here), lambda: here.to(DEVICE),
                 lambda: torch.tensor([1.0, 2.0], device=DEVICE), lambda: torch.tensor([x[0, 0], 1.0])):
        waits.clear()
        asks()
        assert waits
    waits.clear()
    x[torch.tensor([1, 2]).to(DEVICE, non_blocking=True)], torch.zeros(3, device=DEVICE), x[1:].square().sum()
    assert not waits


@pytest.mark.parametrize("kind", [*KINDS, "topk,k=4", "batchtopk,k=4", "jumprelu,penalty=tanh"])
def test_an_architecture(random_store, monkeypatch, kind):
    assert not same_steps(random_store, monkeypatch, kind)


@pytest.mark.parametrize("id", [*all_runs()])
def test_a_run(random_store, monkeypatch, id):
    run = all_runs()[id]
    assert not same_steps(random_store, monkeypatch, run.architecture, run.mechanisms)


def test_from_texts_to_a_dictionary(world, tmp_path):
    """A harvest, a training that is stopped and goes on, and the dictionary on disk."""
    stores, found = {}, {}
    model = world.model()
    for device in ("cpu", DEVICE):
        name = str(device)
        stores[name] = harvest(model.to(device), world.texts("train", 60), 1, tmp_path/name, seq_len=64, batch=7)
        def start(out, steps=6):
            sae = SAE(SAEConfig(192, 64, architecture="topk,k=8")).initialise(stores[name].rows(0, 512).x)
            return Trainer(sae.to(device), stores[name], (),
                           TrainConfig(steps=6, batch=64, warmup=2, log_every=2, checkpoint_every=3, precision="float32"),
                           tmp_path/f"{name}_{out}")
        whole, first = start("whole"), start("parts")
        found[name] = whole.fit(progress=False)
        first.begin()
        for batch in itertools.islice(first.reading(first.index), 4): first.take(batch)
        again = start("parts").fit(progress=False)
        assert again.fingerprint() == found[name].fingerprint()
    assert stores["cpu"].shards == stores["lazy"].shards
    found["lazy"].save(tmp_path/"sae")
    for name, value in SAE.load(tmp_path/"sae").state_dict().items():
        torch.testing.assert_close(value, found["cpu"].state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_harvest_that_finds_too_little_memory(world, store, tmp_path, monkeypatch):
    """Smaller batches are read, and once a size fits, it is kept."""
    monkeypatch.setattr(devices, "_smaller", {})
    model, asked = world.model(), []
    def limited(module, args, out):
        asked.append(len(args[0]))
        if len(args[0]) > 6: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    model.original_model.get_input_embeddings().register_forward_hook(limited)
    texts = world.texts("train", 100)
    little = harvest(model, texts, 1, tmp_path/"little", seq_len=32, batch=20, shard_bytes=2**19)
    assert asked[:3] == [20, 10, 5] and max(asked[3:]) == 5 and len(little.shards) > 1
    plain = harvest(world.model(), texts, 1, tmp_path/"plain", seq_len=32, batch=20, shard_bytes=2**19)
    for column, value in vars(plain.rows()).items():
        torch.testing.assert_close(getattr(little.rows(), column), value, rtol=1e-4, atol=1e-3)


def test_tokenising_reading_and_writing_at_the_same_time(world, model, tmp_path, monkeypatch):
    """The model begins a shard while the last is being written, and goes on while the next is being tokenised."""
    from saenb.data import harvest as module
    rows, streams, enter = module.row_groups, module.read_streams, module._enter
    tokenised, read = ([threading.Event() for _ in range(9)] for _ in range(2))
    reading, writing = itertools.count(), itertools.count()
    def row_groups(*args):
        for k, group in enumerate(rows(*args)):
            if k: assert read[k - 1].wait(20) # which has begun
            tokenised[k].set()
            yield group
    def read_streams(*args):
        k = next(reading)
        read[k].set()
        assert tokenised[k + 1].wait(20)
        return streams(*args)
    def _enter(*args):
        assert read[next(writing) + 1].wait(20)
        enter(*args)
    for function in (row_groups, read_streams, _enter): monkeypatch.setattr(module, function.__name__, function)
    texts = world.texts("train", 200)
    count = len(list(rows(iter(token_rows(texts, model.tokenizer, 32)), 64, 0, model.tokenizer)))
    for events in (tokenised, read): events[count].set() # after the last there is none to wait for
    made = harvest(model, texts, 1, tmp_path, seq_len=32, batch=64, shard_bytes=2**14)
    assert len(made.shards) == count > 2


def test_a_training_that_finds_too_little_memory(random_store, monkeypatch):
    class Greedy(Mechanism):
        def penalty(self, step):
            if step.index == 2: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return {}
    trainer = make_trainer(random_store, "cpu", mechanisms=[("Greedy", {})])
    with pytest.raises(SaenbError, match="with 128 tokens and 64 features; train with a smaller --batch or --d-sae"):
        trainer.fit(progress=False)


def test_reading_ahead_is_reading():
    def broken():
        yield from range(3)
        raise KeyError("here")
    assert list(ahead(range(50))) == list(range(50)) and list(ahead(())) == []
    assert list(itertools.islice(ahead(itertools.count()), 3)) == [0, 1, 2]
    with pytest.raises(KeyError):
        for item in ahead(broken()): assert item < 3
