"Training on a stream that the model reads meanwhile: the dictionary of a store that is read in the same order."
import itertools

import pytest
import torch
from pretended import DEVICE, Pretended

from saenb.base.errors import SaenbError
from saenb.data import harvest as harvest_module
from saenb.data.harvest import harvest
from saenb.data.live import InOrder, LiveStore
from saenb.data.store import COLUMNS
from saenb.sae.sae import SAE, SAEConfig
from saenb.train.config import TrainConfig
from saenb.train.trainer import Trainer

SHAPE, WINDOW = dict(seq_len=32, batch=10), 60


@pytest.fixture(scope="module")
def texts(world): return list(world.texts("train", 150))


@pytest.fixture(scope="module")
def ordered(world, model, texts, tmp_path_factory):
    store = harvest(model, texts, 1, tmp_path_factory.mktemp("ordered"), shard_bytes=2**19, **SHAPE)
    assert len(store.shards) > 2 and store.shards[-1]["rows"] % 10
    return InOrder(store, WINDOW)


@pytest.fixture(scope="module")
def live(model, texts): return LiveStore(model, texts, 1, window=WINDOW + 3, **SHAPE)


def same(one, other):
    for column in COLUMNS: assert torch.equal(getattr(one, column), getattr(other, column))


@pytest.mark.parametrize("options", [dict(size=128), dict(size=300, seed=4, start=7), dict(size=64, balanced=True),
                                     dict(size=500, start=90)])
def test_batches_are_those_of_the_store(ordered, live, options):
    """The last of these begin in another epoch."""
    for one, other in zip(itertools.islice(live.batches(**options), 6), ordered.batches(**options)):
        same(one, other)


def test_what_a_store_can_say(ordered, live, model):
    assert len(live) == len(ordered) and live.hook_name == ordered.hook_name and live.d_in == ordered.d_in
    same(live.rows(0, 1000), ordered.rows(0, 1000))
    same(live.rows(), ordered.rows())
    with pytest.raises(SaenbError, match="No window of .* fills a batch of 5000"): next(live.batches(5000))
    with pytest.raises(SaenbError, match="do not fill one row"): LiveStore(model, ["The host"], 1).rows()
    with pytest.raises(SaenbError, match="layers 0 to 3"): LiveStore(model, [], 9)
    few = LiveStore(model, ["The host of the river is sifi."] * 40, 1, max_tokens=100, **SHAPE)
    assert len(few.rows().sequence.unique()) == 4


def test_the_model_reads_no_more_than_is_asked_for(model, texts, monkeypatch):
    """Dictionaries of one pass begin from the same rows, which are read once, and dropped when training begins."""
    live, read = LiveStore(model, texts, 1, window=WINDOW, **SHAPE), []
    original = harvest_module.read_streams
    monkeypatch.setattr("saenb.data.live.read_streams",
                        lambda model, tokens, *rest: (read.append(len(tokens)), original(model, tokens, *rest))[1])
    wanted = live.rows(0, 400)
    assert len(wanted.x) == 400 and sum(read) == 20 # rows of at most 31 tokens, ten at a time
    assert live.rows(0, 400) is wanted and sum(read) == 20
    next(live.batches(128))
    same(live.rows(0, 400), wanted)
    assert sum(read) == 20 + WINDOW + 20


def start(store, device="cpu", out=None):
    sae = SAE(SAEConfig(192, 64)).initialise(store.rows(0, 2000).x)
    return Trainer(sae.to(device), store, (), TrainConfig(steps=12, batch=256, warmup=3, checkpoint_every=5,
                                                          precision="float32"), out)


def test_the_same_dictionary(ordered, live, tmp_path):
    wanted = start(ordered).fit(progress=False).fingerprint()
    assert start(live).fit(progress=False).fingerprint() == wanted
    stopped = start(live, out=tmp_path)
    stopped.begin()
    for batch in itertools.islice(stopped.reading(0), 7): stopped.take(batch)
    assert start(live, out=tmp_path).fit(progress=False).fingerprint() == wanted
    with pytest.raises(SaenbError, match="other settings, data"):
        start(ordered, out=tmp_path).fit(progress=False)


def test_on_a_device(world, texts, ordered):
    """Windows stay where the model computes."""
    live = LiveStore(world.model().to(DEVICE), texts, 1, window=WINDOW, **SHAPE)
    batch = next(live.batches(128))
    assert all(isinstance(column, Pretended) for column in vars(batch).values())
    found, wanted = start(live, DEVICE).fit(progress=False), start(ordered).fit(progress=False)
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value.inside, wanted.state_dict()[name], rtol=1e-4, atol=1e-4)


def test_by_a_command(called, small, tmp_path):
    done = called("train", small, "made", "--live", "--steps", "2", "--batch", "64", "--d-sae", "32")
    assert done.returncode == 0, done.stderr
    assert (tmp_path/"made"/"sae"/"cfg.json").exists() and "judges it" in done.stdout
    assert not list(tmp_path.rglob("shard_*"))
