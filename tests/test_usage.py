"""Features that are hardly used are reset: which, where, and with nothing left of what they were."""
import pytest
import torch

from saenb.base.errors import SaenbError
from saenb.sae.gates import make_mechanism
from saenb.train.config import TrainConfig
from saenb.train.mechanism import Mechanism
from saenb.train.trainer import Trainer
from saenb.ideas.resets import UsageResets

LENGTH = TrainConfig(steps=120, lr=1e-3, warmup=10, batch=512)


@pytest.fixture
def trainer(fresh, store):
    """Make a trainer that has taken some steps, so that its optimiser remembers something."""
    def make(*mechanisms, d_sae=64, silent=(), length=LENGTH):
        sae = fresh(d_sae=d_sae)
        with torch.no_grad(): sae.b_enc[list(silent)] = -1e4
        return Trainer(sae, store, mechanisms, length)
    return make


def silent_at_last(trainer, batch):
    return (trainer.sae.encode(batch.x.float(), batch.position) == 0).all(0)


def test_silent_features_restart_and_speak(trainer, store):
    gone, batch = [3, 10, 40], next(store.batches(4096, 77))
    plain, reset = trainer(silent=gone), trainer(UsageResets(192, 64, every=20, memory=0.9), silent=gone)
    for t in (plain, reset): t.fit(progress=False)
    assert silent_at_last(plain, batch)[gone].all() and not silent_at_last(reset, batch).any()
    assert reset.history[-1]["UsageResets.begun"] >= 3 and reset.history[-1]["UsageResets.idle"] == 0
    assert reset.history[-1]["reconstruction"] < plain.history[-1]["reconstruction"]


def test_everything_of_a_renewed_feature_is_new_and_nothing_of_the_others(trainer, store):
    t = trainer(mechanism := UsageResets(192, 64))
    t.fit(progress=False)
    which, others = torch.tensor([5, 60]), torch.tensor([i for i in range(64) if i not in (5, 60)])
    parts = dict(enc=(t.sae.W_enc, 1), dec=(t.sae.W_dec, 0), bias=(t.sae.b_enc, 0))
    moments = lambda p: [v for k, v in t.optimizer.state[p].items() if k != "step"]
    before = {name: [v.detach().clone().index_select(dim, others) for v in (p, *moments(p))]
              for name, (p, dim) in parts.items()}
    centre, use = [v.clone() for v in moments(t.sae.b_dec)], mechanism.use.clone()
    t.since_fired.fill_(7)
    rows, x = torch.randn(2, 192), next(store.batches(2048, 3)).x.float()
    t.reset_features(which, rows, x)
    for name, (p, dim) in parts.items():
        for now, then in zip((p, *moments(p)), before[name]):
            assert torch.equal(now.index_select(dim, others), then)
        for v in moments(p): assert not v.index_select(dim, which).any()
    for now, then in zip(moments(t.sae.b_dec), centre):
        assert torch.equal(now, then)
    torch.testing.assert_close(t.sae.W_dec[which].detach(), rows / rows.norm(dim=1, keepdim=True))
    assert torch.equal(t.sae.W_enc[:, which].T, t.sae.W_dec[which])
    assert ((t.sae.encode(x)[:, which] > 0).float().mean(0) - 0.05).abs().max() < 0.005
    assert (t.since_fired[which] == 0).all() and (t.since_fired[others] == 7).all()
    assert torch.equal(mechanism.use[others], use[others]) and (mechanism.use[which] == use.mean()).all()


def test_use_is_a_moving_average_of_the_share_of_tokens(trainer):
    seen = []
    class Watch(Mechanism):
        def after_step(self, step): seen.append((step.f > 0).float().mean(0))
    t = trainer(mechanism := UsageResets(192, 64, every=10**6, memory=0.9), Watch(192, 64))
    t.fit(progress=False)
    expected = seen[0]
    for density in seen[1:]: expected = 0.9 * expected + 0.1 * density
    torch.testing.assert_close(mechanism.use, expected)


def test_what_is_reset_points_to_what_was_missing(trainer, store):
    """One token has all of the error: every renewed feature writes what is missing on it."""
    t = trainer(mechanism := UsageResets(192, 64))
    t.fit(progress=False)
    mechanism.use[:4] = 0
    x = next(store.batches(256, 3)).x.float()
    reconstruction = x.clone()
    reconstruction[17] += torch.arange(192.0)
    step = type("Step", (), dict(x=x, reconstruction=reconstruction, trainer=t))
    mechanism.restart(step)
    direction = -torch.arange(192.0) / torch.arange(192.0).norm()
    torch.testing.assert_close(t.sae.W_dec[:4].detach(), direction.expand(4, -1), rtol=0, atol=1e-4)
    mechanism.use[:4], rows = 0, t.sae.W_dec.detach().clone()
    step.reconstruction = x
    mechanism.restart(step) # nothing is missing anywhere, so there is nowhere to begin
    assert torch.equal(t.sae.W_dec, rows)


def test_the_threshold_is_a_share_of_the_mean_or_of_tokens():
    for relative, expected in ((True, [True, False, False, False]), (False, [True, True, True, False])):
        mechanism = UsageResets(8, 4, least=0.01, relative=relative)
        mechanism.use.copy_(torch.tensor([1e-5, 1e-3, 9e-3, 2e-2]))
        assert mechanism.idle().tolist() == expected


def test_nothing_is_reset_once_the_learning_rate_falls(trainer):
    begun = []
    mechanism = UsageResets(192, 64, every=10)
    mechanism.restart = lambda step: begun.append(step.index)
    trainer(mechanism, length=TrainConfig(steps=60, warmup=5, decay=0.5, batch=256)).fit(progress=False)
    assert begun == [9, 19, 29]


def test_features_change_places_with_their_use(trainer):
    t = trainer(mechanism := UsageResets(192, 64),
                make_mechanism("SideBlocks", dict(block=8, rest=0.0), trainer().sae.cfg))
    mechanism.use.copy_(torch.arange(64.0))
    t.reorder(torch.arange(63, -1, -1))
    with torch.no_grad(): t._change_places()
    assert torch.equal(mechanism.use, torch.arange(63.0, -1, -1))


def test_stopped_and_resumed_it_ends_with_the_same_bytes(fresh, ends_the_same):
    def parts():
        sae = fresh(d_sae=64)
        with torch.no_grad(): sae.b_enc[:8] = -1e4
        return sae, [UsageResets(192, 64, every=6, memory=0.5)]
    ends_the_same(parts)


@pytest.mark.parametrize("settings, said",
                         [(dict(least=1.0), "least use is 1.0"), (dict(least=-0.1), "least use is -0.1"),
                          (dict(memory=1.0), "remembered with 1.0"), (dict(every=0), "every 0 steps")])
def test_settings_that_make_no_sense(settings, said):
    with pytest.raises(SaenbError, match=said): UsageResets(8, 16, **settings)
