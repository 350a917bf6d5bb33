"""Gradients written by hand are autograd's, whether products are dense or sums over what is active."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saenb.base.errors import SaenbError
from saenb.data.store import Batch
from saenb.ideas.run import Run, all_runs
from saenb.sae.gates import MECHANISMS, make_mechanism
from saenb.sae import sparse_step
from saenb.sae.sparse_step import Active, Autoencode
from saenb.train.config import TrainConfig
from saenb.train.mechanism import Mechanism
from saenb.train.trainer import Trainer


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 9), features=st.integers(1, 12), width=st.integers(1, 7),
       density=st.floats(0, 1), seed=st.integers(0, 99))
def test_sums_over_what_is_active_are_products(tokens, features, width, density, seed):
    draw = torch.Generator().manual_seed(seed)
    f = (torch.rand(tokens, features, generator=draw)
         * (torch.rand(tokens, features, generator=draw) < density))
    W, g = torch.randn(features, width, generator=draw), torch.randn(tokens, width, generator=draw)
    active = Active(f)
    torch.testing.assert_close(active.by_token(f, W), f @ W)
    torch.testing.assert_close(active.by_feature(active.of(f), g), f.T @ g)
    torch.testing.assert_close(active.products(W, g), (W @ g.T)[f.T > 0])
    assert torch.equal(active.spread(active.of(f)), f)
    assert (active.features.tolist() == (f > 0).sum(0).tolist()
            and active.tokens.tolist() == (f > 0).sum(1).tolist())


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
    def loss(f, sums, out):
        return (out - x).pow(2).sum() + 0.3 * sums.mean() + (f.pow(3).sum() if penalty else 0)
    f, sums, out, counts = Autoencode.apply(x, *by_hand, torch.float32)
    assert (counts == (f > 0).sum(0)).all()
    loss(f, sums, out).backward()
    W_enc, b_enc, W_dec, b_dec = plain
    f = torch.relu((x - b_dec) @ W_enc + b_enc)
    loss(f, f.sum(1, keepdim=True), f @ W_dec + b_dec).backward()
    for ours, theirs in zip(by_hand, plain):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4,
                                   atol=1e-4 * float(theirs.grad.abs().max() + 1e-6))
        assert ours.grad.is_contiguous()


def test_a_step_is_sparse_only_where_that_pays(layers):
    for density, dtype, expected in ((0.01, torch.float32, True), (0.3, torch.float32, False),
                                     (0.09, torch.float32, True), (0.09, torch.bfloat16, False)):
        x, parameters = layers(density)
        f = torch.relu((x - parameters[3]) @ parameters[0] + parameters[1])
        assert sparse_step.pays(f, dtype) == expected, (density, dtype)


@pytest.mark.parametrize("precision, close", [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_a_training_is_the_same_either_way(store, fresh, monkeypatch, precision, close):
    def curve(limit):
        monkeypatch.setattr(sparse_step, "SPARSE_BELOW", {torch.float32: limit, torch.bfloat16: limit})
        trainer = Trainer(fresh(), store, cfg=TrainConfig(steps=60, warmup=10, batch=512, lr=1e-3,
                                                          log_every=10, precision=precision))
        trainer.fit(progress=False)
        return torch.tensor([line["loss"] for line in trainer.history]), trainer.history[-1]
    (summed, last), (dense, _) = curve(2.0), curve(-1.0)
    torch.testing.assert_close(summed, dense, rtol=close, atol=0)
    assert last["l0"] > 1


GATES = {run.id: run for run in all_runs().values()
         if any(MECHANISMS[name].gate or MECHANISMS[name].after_backward for name, _ in run.mechanisms)}
GATES |= {name: Run(f"gates/{name}", "", "", ((name, settings),))
          for name, settings in (("TopK", dict(k=8)), ("JumpReLU", {}))}


def trainer_of(id, store, sae, **config):
    "A trainer of a run, whose gates have moved."
    torch.manual_seed(0)
    trainer = Trainer(sae, store,
                      [make_mechanism(name, settings, sae.cfg) for name, settings in GATES[id].mechanisms],
                      TrainConfig(**dict(steps=1, batch=512) | GATES[id].training | config))
    with torch.no_grad():
        for p in trainer.mechanisms.parameters(): p += 0.3 * torch.rand_like(p)
        for m in trainer.mechanisms:
            if hasattr(m, "kept"): m.kept[::3] = 0
            if hasattr(m, "threshold") and torch.is_tensor(m.threshold):
                m.threshold.fill_(0.1)
            if type(m).__name__ == "SideBlocks": m.n_active = 192
    return trainer


def forth_and_back(trainer, batch):
    "What a step computes, and all gradients."
    f, sums, out, _ = trainer.forward(batch)
    f.retain_grad()
    ((out - batch.x).pow(2).sum() + 0.3 * sums.mean() + f.pow(3).mean()).backward()
    return (dict(f=f, sums=sums, out=out)
            | {name: p.grad for name, p in trainer.sae.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("limit", [-1.0, 2.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("id", GATES)
def test_gates_learn_what_autograd_says(store, fresh, monkeypatch, id, limit):
    monkeypatch.setattr(sparse_step, "SPARSE_BELOW", {torch.float32: limit})
    batch = next(store.batches(512, balanced=GATES[id].training.get("balanced", False)))
    trainer, plain = (trainer_of(id, store, fresh()) for _ in range(2))
    for m in plain.mechanisms: m.gradient_support = "all"
    with torch.no_grad():
        before = (batch.x - plain.sae.b_dec) @ plain.sae.W_enc + plain.sae.b_enc
    # others, rounded otherwise, may be on one side of zero or on the other
    batch = Batch(*(t[before.abs().amin(1) > 1e-6 * before.abs().amax()] for t in vars(batch).values()))
    assert len(batch) > 400
    found, expected = forth_and_back(trainer, batch), forth_and_back(plain, batch)
    assert found.keys() == expected.keys()
    for name in found:
        # some of a gate's gradients are zero but for rounding
        of_one_kind = [t.detach().abs().max().item()
                       for other, t in expected.items() if other == name or other[:6] == name[:6] == "gates."]
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5 * max(of_one_kind),
                                   msg=lambda m: f"{name}: {m}")
    for m in trainer.with_hook("after_backward"): # what it is shown of the activations' gradient
        ours, theirs = found["f"].grad, expected["f"].grad
        shown = (trainer.sae.ungated(batch.x) > 0
                 if m.gradient_support == "active" else torch.ones_like(ours, dtype=torch.bool))
        torch.testing.assert_close(ours[shown], theirs[shown], rtol=1e-4,
                                   atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("id", ["positional/1", "positional/4", "contrastive/3", "dual_objective/2"])
def test_a_gated_training_is_the_same_either_way(store, fresh, id):
    def curve(by_hand):
        trainer = trainer_of(id, store, fresh(), steps=40, warmup=10, lr=1e-3, log_every=10)
        if not by_hand:
            for m in trainer.mechanisms: m.gradient_support = "all"
        trainer.fit(progress=False)
        return torch.tensor([line["loss"] for line in trainer.history])
    # what lies on the border of a choice may be chosen otherwise
    torch.testing.assert_close(curve(True), curve(False), rtol=1e-3, atol=0)


def test_a_gate_that_wakes_features_is_taken_at_its_word(store, fresh):
    class Wakes(Mechanism):
        def __init__(self, d_in, d_sae):
            super().__init__(d_in, d_sae)
            self.added = torch.nn.Parameter(torch.zeros(d_sae))
        def gate(self, x, f, positions): return f + self.added
    sae = fresh()
    gate = Wakes(sae.cfg.d_in, sae.cfg.d_sae)
    try:
        found = forth_and_back(Trainer(sae, store, [gate], TrainConfig(steps=1)), next(store.batches(64)))
        assert (gate.added.grad != 0).all() # also where all of the batch is silent
        assert torch.equal(found["f"], sae.encode(next(store.batches(64)).x))
    finally: del MECHANISMS["Wakes"]


def test_what_a_mechanism_concerns_is_one_of_three(store, fresh):
    sae = fresh()
    gate = make_mechanism("HardMask", {}, sae.cfg)
    gate.gradient_support = "activ"
    with pytest.raises(
            SaenbError,
            match="no kind of activations for HardMask to concern called 'activ'; did you mean active"):
        Trainer(sae, store, [gate], TrainConfig(steps=1))
