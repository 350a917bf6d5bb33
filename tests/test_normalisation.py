"""A stream normalised dimension by dimension in training; the dictionary that is saved reads the stream as it is."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saenb.base.errors import SaenbError
from saenb.data.store import Batch
from saenb.lab.one_pass import train_each
from saenb.lab.training import train
from saenb.sae.sae import SAE, SAEConfig
from saenb.train.config import TrainConfig
from saenb.train.normalisation import NormalisedStore, fold_back, store_for


class Few:
    """A store of random streams with very different deviations."""
    def __init__(self, deviation, count=512):
        noise = torch.randn(count, len(deviation), generator=torch.Generator().manual_seed(0))
        self.x, self.d_in = noise * torch.tensor(deviation) + 3, len(deviation)

    def __len__(self): return len(self.x)
    def rows(self, start=0, stop=None): return Batch(self.x[start:stop], *[torch.zeros(len(self.x[start:stop]), dtype=torch.long)] * 4)
    def batches(self, size, *_): yield self.rows(0, size)


@pytest.fixture(params=["relu", "topk,k=4", "batchtopk,k=4", "jumprelu", "gated", "matryoshka,k=4"])
def kind(request): return request.param


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=8))
def test_every_dimension_has_the_same_variance_unless_it_has_next_to_none(deviation):
    store = Few(deviation)
    read, given_out = NormalisedStore(store), store.x.std(0)
    normal = given_out > 0.02 * given_out.mean()
    assert torch.allclose(read.rows().x.std(0)[normal], torch.ones(int(normal.sum())), rtol=1e-2)
    assert (read.rows().x.std(0) <= 1.01).all()
    assert torch.equal(next(iter(read.batches(16))).x, read.rows(0, 16).x)


@pytest.mark.parametrize("deviation", [[1.0] * 8, [50.0, 1, 1, 1, 0.2, 1, 1, 3]])
def test_a_folded_dictionary_does_on_the_stream_what_the_trained_one_did_on_the_divided_one(kind, deviation):
    store = Few(deviation)
    read = NormalisedStore(store)
    trained = SAE(SAEConfig(8, 32, architecture=kind)).initialise(read.rows().x, 0)
    f, rebuilt = trained.encode(read.rows().x), trained(read.rows().x)
    folded = fold_back(trained, read)
    g = folded.encode(store.x)
    assert torch.equal(f > 0, g > 0)
    assert torch.allclose(rebuilt * read.deviation, folded.decode(g), rtol=1e-3, atol=1e-3)
    assert folded.cfg.scale == pytest.approx((store.x - store.x.mean(0)).pow(2).sum(1).mean().sqrt().item(), rel=1e-3)


def test_a_store_that_is_not_normalised_is_handed_on_as_it_is():
    store, sae = Few([1.0] * 8), SAE(SAEConfig(8, 16))
    assert store_for(store, TrainConfig(steps=1)) is store
    assert fold_back(sae, store) is sae


@pytest.fixture
def length(): return dict(steps=30, batch=256, d_sae=128, checkpoint_every=10, lr=0.02, progress=False)


def test_what_is_saved_reads_the_stream_as_it_is(store, tmp_path, length):
    made = train(store.path, tmp_path, normalise="dimension", **length)
    x = store.rows(0, 4096).x.float()
    saved = SAE.load(tmp_path/"sae")
    left = ((saved(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()
    assert left < 0.9 and saved.fingerprint() == made.sae.fingerprint()
    assert torch.allclose(saved.W_dec.norm(dim=1), torch.ones(128), atol=1e-4)
    plain = train(store.path, tmp_path/"plain", **length)
    assert plain.sae.fingerprint() != made.sae.fingerprint()


def test_a_training_that_has_ended_gives_the_same_dictionary_again(store, tmp_path, length):
    first = train(store.path, tmp_path, normalise="dimension", **length).sae.fingerprint()
    assert train(store.path, tmp_path, normalise="dimension", **length).sae.fingerprint() == first


def test_a_checkpoint_of_the_other_way_is_refused(store, tmp_path, length):
    train(store.path, tmp_path, **length)
    with pytest.raises(SaenbError): train(store.path, tmp_path, normalise="dimension", **length)


def test_dictionaries_of_one_pass_are_folded_too(store, tmp_path, length):
    alone = train(store.path, tmp_path/"alone", normalise="dimension", sparsity_penalty=0.1, **length)
    both = train_each(store.path, tmp_path/"both", "sparsity_penalty=0.05,0.1", normalise="dimension", **length)
    assert SAE.load(tmp_path/"both"/"sparsity_penalty=0.1"/"sae").fingerprint() == alone.sae.fingerprint() == both["sparsity_penalty=0.1"].sae.fingerprint()


@pytest.mark.parametrize("run", ["positional/6", "dual_objective/4"])
def test_a_gate_that_reads_the_stream_is_refused(store, tmp_path, length, run):
    with pytest.raises(SaenbError, match="reads the stream itself.*choose another run"):
        train(store.path, tmp_path, run=run, normalise="dimension", **length)


def test_an_unknown_way_is_one_sentence():
    with pytest.raises(SaenbError, match="way to normalise"): TrainConfig(steps=1, normalise="dimensions")


def test_older_records_name_the_same_training():
    assert "normalise" not in TrainConfig(steps=1).as_dict()
    assert TrainConfig(steps=1, normalise="dimension").as_dict()["normalise"] == "dimension"
