"""Gradients written by hand are autograd's, whether products are dense or sums over what is active."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saenb import sparse
from saenb.sae import SAE, SAEConfig
from saenb.sparse import Active, Autoencode
from saenb.train import TrainConfig, Trainer


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 9), features=st.integers(1, 12), width=st.integers(1, 7), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_sums_over_what_is_active_are_products(tokens, features, width, density, seed):
    draw = torch.Generator().manual_seed(seed)
    f = torch.rand(tokens, features, generator=draw) * (torch.rand(tokens, features, generator=draw) < density)
    W, g = torch.randn(features, width, generator=draw), torch.randn(tokens, width, generator=draw)
    active = Active(f)
    torch.testing.assert_close(active.by_token(active.value, W), f @ W)
    torch.testing.assert_close(active.by_feature(active.value[active.order], g), f.T @ g)
    torch.testing.assert_close(active.products(W, g), (W @ g.T)[f.T > 0])
    assert active.features.tolist() == (f > 0).sum(0).tolist() and active.tokens.tolist() == (f > 0).sum(1).tolist()


@pytest.fixture
def layers():
    "A dictionary's parameters, whose features are active on some share of the tokens, and tokens."
    def make(density, seed=0):
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(80, 12, generator=draw) + 1
        W_enc, W_dec, b_dec = (torch.randn(*shape, generator=draw) for shape in ((12, 30), (30, 12), (12,)))
        b_enc = -torch.quantile((x - b_dec) @ W_enc, 1 - density, dim=0)
        return x, [p.requires_grad_() for p in (W_enc, b_enc, W_dec, b_dec)]
    return make


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.6])
@pytest.mark.parametrize("penalty", [False, True])
def test_gradients_are_autograds(layers, density, penalty):
    x, by_hand = layers(density)
    _, plain = layers(density)
    def loss(f, sums, out): return (out - x).pow(2).sum() + 0.3 * sums.mean() + (f.pow(3).sum() if penalty else 0)
    f, sums, out, counts = Autoencode.apply(x, *by_hand, torch.float32)
    assert (counts == (f > 0).sum(0)).all()
    loss(f, sums, out).backward()
    W_enc, b_enc, W_dec, b_dec = plain
    f = torch.relu((x - b_dec) @ W_enc + b_enc)
    loss(f, f.sum(1, keepdim=True), f @ W_dec + b_dec).backward()
    for ours, theirs in zip(by_hand, plain):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * float(theirs.grad.abs().max() + 1e-6))
        assert ours.grad.is_contiguous()


def test_a_step_is_sparse_only_where_that_pays(layers):
    for density, dtype, expected in ((0.01, torch.float32, True), (0.3, torch.float32, False), (0.09, torch.float32, True), (0.09, torch.bfloat16, False)):
        x, parameters = layers(density)
        f = torch.relu((x - parameters[3]) @ parameters[0] + parameters[1])
        assert sparse.pays(f, dtype) == expected, (density, dtype)


@pytest.mark.parametrize("precision, close", [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_a_training_is_the_same_either_way(store, fresh, monkeypatch, precision, close):
    def curve(limit):
        monkeypatch.setattr(sparse, "SPARSE_BELOW", {torch.float32: limit, torch.bfloat16: limit})
        trainer = Trainer(fresh(), store, cfg=TrainConfig(steps=60, warmup=10, batch=512, lr=1e-3, log_every=10, precision=precision))
        trainer.fit(progress=False)
        return torch.tensor([line["loss"] for line in trainer.history]), trainer.history[-1]
    (summed, last), (dense, _) = curve(2.0), curve(-1.0)
    torch.testing.assert_close(summed, dense, rtol=close, atol=0)
    assert last["l0"] > 1


def test_resting_features_and_gates_take_the_plain_way(store, fresh):
    from saenb.sae import make_mechanism
    sae = fresh()
    trainer = Trainer(sae, store, [make_mechanism("HardMask", {}, sae.cfg)], TrainConfig(steps=1))
    batch = next(store.batches(64))
    f, sums, out, active = trainer.forward(batch)
    torch.testing.assert_close(f, sae.encode(batch.x, batch.position))
    torch.testing.assert_close(sums, f.sum(1, keepdim=True))
    assert active is None
