"""The ten positional runs and static slicing: their constants, their parts, and that each does what it
is for."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from saenb.base.errors import SaenbError
from saenb.evals.exam import feature_stats
from saenb.data.store import Batch
from saenb.ideas.positional import EvolvingMask, HardMask, HybridMask, Lookup, SoftMask
from saenb.ideas.routing import FeatureRouter, PositionContrast, normal_information
from saenb.ideas.run import find_run
from saenb.sae.gates import make_mechanism
from saenb.sae.sae import SAE, SAEConfig, load_sae
from saenb.train.config import TrainConfig
from saenb.train.trainer import Trainer

ROUTER, RESETS = dict(heads=8, memory=0.99), dict(least=0.01, memory=0.99)
TABLE = { # what the logs and the spec give, and what the run builds on
    1: ("0", dict(HardMask={})),
    2: ("1", dict(SoftMask=dict(temperature=0.1))),
    3: ("2", dict(SoftMask=dict(temperature=0.5))),
    4: ("3", dict(HybridMask=dict(temperature=0.5))),
    5: ("4", dict(EvolvingMask={}, UsageResets=dict(least=0.01))),
    6: ("0", dict(FeatureRouter=ROUTER, UsageResets=RESETS)),
    7: ("6", dict(FeatureRouter=ROUTER, UsageResets=RESETS, PositionContrast=dict(memory=0.95))),
    8: ("6", dict(FeatureRouter=ROUTER | dict(groups=16, competition=0.1),
                  UsageResets=RESETS, PositionContrast={})),
    9: ("6",
        dict(FeatureRouter=ROUTER | dict(groups=32, learned=True), UsageResets=RESETS, PositionContrast={})),
    10: ("9", dict(FeatureRouter=ROUTER | dict(groups=32, learned=True),
                   UsageResets=RESETS, PositionContrast={}, FeatureInformation={})),
    "static": ("1", dict(HardMask=dict(masked_gradient=False))),
}
LENGTH = TrainConfig(steps=250, lr=1e-3, warmup=20, batch=1024)


def mechanisms_of(number, without=(), **change):
    """A run's mechanisms, some left out or changed, with decisions often enough for a short training."""
    return tuple((name, settings | (dict(every=50) if name in ("EvolvingMask", "UsageResets") else {})
                      | change.get(name, {}))
                 for name, settings in find_run(f"positional/{number}").mechanisms if name not in without)


@pytest.fixture(scope="module")
def unseen(store): return next(store.batches(2**13, 99))


def part(trainer, name):
    return next(m for m in trainer.mechanisms if type(m).__name__ == name)


@torch.no_grad()
def told_of_position(trainer, batch, parts=8):
    """Nats that the feature which carries a random unit of activation tells about the part of the text
    in which it lies."""
    f, where = (trainer.sae.encode(batch.x.float(), batch.position),
                F.one_hot(batch.position.long() * parts // 128, parts).float())
    joint = (where / where.sum(0)).T @ f
    joint = joint / joint.sum()
    return (torch.special.xlogy(joint, joint).sum()
            - sum(torch.special.xlogy(p, p).sum() for p in (joint.sum(0), joint.sum(1)))).item()


@pytest.mark.parametrize("number", TABLE)
def test_constants_are_the_tables_and_come_from_the_run(number, fresh):
    run, (builds_on, mechanisms) = find_run(f"positional/{number}"), TABLE[number]
    assert ([name for name, _ in run.mechanisms] == list(mechanisms)
            and run.builds_on == f"positional/{builds_on}")
    for name, settings in run.mechanisms:
        assert mechanisms[name].items() <= settings.items()
        assert make_mechanism(name, settings, fresh().cfg).settings.items() >= settings.items()


# Masks

def test_a_hard_mask_splits_features_equally_among_parts():
    mask = HardMask(4, 24, parts=8, length=64).mask
    assert set(mask.unique().tolist()) == {0, 1} and (mask.sum(1) == 3).all() and (mask.sum(0) == 8).all()
    assert (mask.diff(dim=0).abs().sum(0) <= 2).all() # each feature's part is of one piece
    uneven = HardMask(4, 10, parts=4, length=9).mask.sum(1)
    assert uneven.min() >= 2 and uneven.max() <= 3


@pytest.mark.parametrize("number", [1, "static"])
def test_features_speak_in_their_own_part_alone(number, train, unseen):
    trainer = train(mechanisms_of(number))
    f = trainer.sae.encode(unseen.x.float(), unseen.position).detach()
    where = unseen.position.long() * 8 // 128
    for i in range(8):
        outside = torch.cat([f[where == i][:, :32 * i], f[where == i][:, 32 * (i + 1):]], 1)
        assert not outside.any() and f[where == i][:, 32 * i:32 * (i + 1)].any()


@pytest.mark.parametrize("number, spreads", [(1, False), ("static", True)])
def test_gradients_are_masked_but_for_static_slicing(number, spreads, fresh, unseen):
    """All tokens in the first eighth: features of the others learn nothing from them, unless gradients
    pass the mask."""
    sae = fresh(d_sae=64)
    (name, settings), = mechanisms_of(number)
    sae.gates.append(make_mechanism(name, settings, sae.cfg))
    x = unseen.x[:512].float()
    (sae(x, torch.full((512,), 5)) - x).pow(2).mean().backward()
    assert sae.W_enc.grad[:, :8].any() and bool(sae.W_enc.grad[:, 8:].any()) == spreads


def test_static_slicing_beside_masked_gradients(train, unseen):
    """The same split; where features learn from what they cannot say, more is left unexplained."""
    masked, static = train(mechanisms_of(1)), train(mechanisms_of("static"))
    assert static.history[-1]["reconstruction"] > 1.05 * masked.history[-1]["reconstruction"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_masks_make_features_tell_of_position_the_more_the_sharper_they_are(number, train, unseen):
    assert (told_of_position(train(mechanisms_of(number)), unseen)
            > 1.5 * told_of_position(train(mechanisms_of(number + 1) if number < 3 else ()), unseen))


def test_a_soft_mask_begins_as_a_gaussian_around_evenly_spread_positions():
    mask = SoftMask(4, 32, temperature=0.1, length=64).mask.detach()
    for i in (0, 7, 31):
        expected = [np.exp(-((p + 0.5) / 64 - (i + 0.5) / 32)**2 / (2 * 0.01)) for p in range(64)]
        np.testing.assert_allclose(mask[:, i], expected, rtol=1e-5)


def test_mask_values_adapt_and_stay_between_nothing_and_all(train):
    trainer = train(mechanisms_of(2))
    mask = part(trainer, "SoftMask")
    assert 0 <= mask.mask.min() and mask.mask.max() <= 1
    moved = (mask.mask - mask.gaussian(0.1)).abs()
    assert moved.max() > 0.1 and trainer.history[-1]["SoftMask.moved"] == pytest.approx(moved.mean().item())


def test_the_gradient_of_a_lookup_is_autograds():
    draw = torch.Generator().manual_seed(0)
    places, weights = (torch.randint(0, 5, (3, 7), generator=draw),
                       torch.randn(3, 7, 4, generator=draw, dtype=torch.double))
    mine, theirs = (torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.double,
                                requires_grad=True) for _ in range(2))
    (Lookup.apply(mine, places) * weights).sum().backward()
    (theirs[places] * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert torch.autograd.gradcheck(lambda table: Lookup.apply(table, places), mine)


@pytest.mark.parametrize("number", [1, 2, 4, 5])
def test_without_positions_nothing_is_masked_and_beyond_the_context_all_is_as_at_its_end(number, train,
                                                                                         unseen):
    sae, x = train(mechanisms_of(number)).sae, unseen.x[:64].float()
    mask = sae.gates[0]
    flat, at_best = sae.encode(x), sae.encode(x, torch.zeros(64))
    assert (flat >= at_best).all() and not torch.equal(flat, at_best)
    if number < 4: assert torch.equal(flat, sae.ungated(x))
    assert torch.equal(sae.encode(x, torch.full((64,), 127)), sae.encode(x, torch.full((64,), 5000)))
    # rows of text, as evaluations read them
    rows = sae.encode(x.view(4, 16, -1), torch.arange(16).expand(4, 16))
    torch.testing.assert_close(rows.view(64, -1), sae.encode(x, torch.arange(16).repeat(4)), rtol=1e-4,
                               atol=1e-4)
    assert mask.length == 128


def test_content_decides_at_one_and_the_same_position(train, unseen):
    """What passes differs from token to token in run 4, and does not in run 3, on which it builds."""
    x, here = unseen.x[:512].float(), torch.full((512,), 40)
    spread = {}
    for number in (3, 4):
        sae = train(mechanisms_of(number)).sae
        before, after = sae.ungated(x).detach(), sae.encode(x, here).detach()
        passes = torch.where(before > 1e-3, after / before, torch.nan)
        often = (before > 1e-3).sum(0) > 20
        spread[number] = np.nanstd(passes[:, often].numpy(), axis=0).mean()
    assert spread[4] > 0.02 and spread[3] < 1e-5


def test_a_blend_of_nothing_is_the_mask_and_a_blend_of_all_is_the_score(train, unseen):
    mask, x = HybridMask(192, 16), unseen.x[:64].float()
    with torch.no_grad():
        mask.relevance.normal_(generator=torch.Generator().manual_seed(0))
    f, positions = torch.ones(64, 16), unseen.position[:64]
    for lean, expected in ((-1e3, mask.mask[positions.long()]),
                           (1e3, (mask.reading(x) @ mask.directions @ mask.relevance + 2).sigmoid())):
        with torch.no_grad(): mask.lean.fill_(lean)
        torch.testing.assert_close(mask.gate(x, f, positions), expected)


def test_masks_evolve_toward_where_features_would_be_active(store):
    """A feature that only ever fires late, and one that fires anywhere: the first one's mask closes at
    the beginning, the other's stays."""
    mask = EvolvingMask(4, 2, every=1, look=1)
    positions = torch.arange(1, 128).repeat(8)
    f = torch.stack([(positions > 96).float(), torch.ones(len(positions))], 1)
    start = mask.mask.clone()
    for _ in range(20):
        mask.remember(f, positions)
        mask.evolve()
    assert (mask.mask[:64, 0].max() < 0.05 and mask.mask[110:, 0].min() > 0.9
            and mask.mask[:, 1].min() > start[:, 1].min())
    expected = torch.tensor([31 / 127, 1.0])
    torch.testing.assert_close(mask.use, expected)
    torch.testing.assert_close(mask.temperatures(), (expected.mean() / expected).sqrt())


def test_the_history_is_the_mean_activation_before_the_mask(train, fresh, store):
    trainer = train(mechanisms_of(5))
    mask = part(trainer, "EvolvingMask")
    x, position = next(store.batches(2**14, 5)).x.float(), next(store.batches(2**14, 5)).position.long()
    f, where = trainer.sae.ungated(x).detach(), F.one_hot(position, 128).float()
    mean = (where.T @ f) / where.sum(0)[:, None].clamp_min(1)
    assert torch.corrcoef(
        torch.stack([mean.sum(1)[1:], (mask.history / mask.seen.clamp_min(1e-9)).sum(1)[1:]]))[0, 1] > 0.5
    assert torch.corrcoef(torch.stack([mean.sum(0), mask.history.sum(0)]))[0, 1] > 0.95


def test_what_is_used_much_gets_a_sharper_mask():
    """Two features of one profile, of which one is active ten times as often."""
    mask = EvolvingMask(4, 2, every=1, look=1, step=1.0)
    positions = torch.arange(128).repeat(40)
    f = (positions / 128)[:, None] * torch.stack(
        [torch.ones(len(positions)), (torch.arange(len(positions)) // 128 % 10 == 0).float() * 10], 1)
    mask.remember(f, positions)
    torch.testing.assert_close(mask.profile()[:, 0], mask.profile()[:, 1])
    mask.evolve()
    often, seldom = mask.mask.T
    assert (often[:100] < seldom[:100]).all() and often.max() == seldom.max() == 1
    torch.testing.assert_close(seldom, mask.profile()[:, 1] ** (1 / mask.temperatures()[1]))


def test_masks_follow_their_features_in_training(train):
    """Switched off, they stay the weak Gaussians that they were."""
    mask, still = (part(train(mechanisms_of(5, EvolvingMask=change)), "EvolvingMask")
                   for change in ({}, dict(step=0.0)))
    torch.testing.assert_close(still.mask, still.gaussian(1.0))
    follows = lambda m: torch.corrcoef(torch.stack([m.mask.flatten(), mask.profile().flatten()]))[0, 1]
    assert follows(mask) > 0.3 + follows(still)


def test_a_feature_that_is_reset_gets_a_weak_mask_and_no_history(train, fresh, store):
    sae = fresh(d_sae=64)
    trainer = Trainer(
        sae, store, [make_mechanism(n, s, sae.cfg) for n, s in mechanisms_of(5, EvolvingMask=dict(every=10))],
        TrainConfig(steps=60, lr=1e-3, warmup=5, batch=512))
    trainer.fit(progress=False)
    mask, which, others = trainer.mechanisms[0], torch.tensor([2, 9]), torch.arange(10, 64)
    kept = {name: v.detach().clone() for name, v in mask.state_dict().items()}
    trainer.reset_features(which, torch.randn(2, 192), torch.randn(256, 192))
    assert torch.equal(mask.mask[:, which], mask.gaussian(1.0)[:, which]) and not mask.history[:, which].any()
    for name, p, dim in (("relevance", mask.relevance, 1), ("readiness", mask.readiness, 0),
                         ("lean", mask.lean, 0)):
        assert (len(p.index_select(dim, which).unique()) == 1
                and torch.equal(p.index_select(dim, others), kept[name].index_select(dim, others)))
        state = trainer.optimizer.state[p]
        assert (not state["exp_avg"].index_select(dim, which).any()
                and state["exp_avg_sq"].index_select(dim, others).any())


# Attention

@pytest.fixture(scope="module")
def stream(unseen): return unseen.x[:300].float()


def routed(stream, **settings):
    router = FeatureRouter(192, 64, groups=8, **settings)
    router.reading.fit(stream)
    return router


def test_attention_is_torchs(stream):
    """Each head's division is scaled dot product attention from the token to the groups' keys."""
    router = routed(stream, heads=4, width=8)
    question = (router.reading(stream) @ router.ask).view(300, 4, 8).transpose(0, 1)
    expected = F.scaled_dot_product_attention(question, router.keys, torch.eye(8).expand(4, 8, 8), scale=1.0)
    torch.testing.assert_close(router.attention(stream), expected.transpose(0, 1))
    torch.testing.assert_close(router.attention(stream).sum(-1), torch.ones(300, 4))


def test_the_group_that_receives_most_is_wide_open_and_groups_share_their_gate(stream):
    router = routed(stream)
    opened, passes = router.openness(stream), router.gate(stream, torch.ones(300, 64), None)
    torch.testing.assert_close(opened.amax(1), torch.ones(300))
    # importance is 1 at the start
    torch.testing.assert_close(passes.view(300, 8, 8), opened[..., None].expand(-1, -1, 8))
    with torch.no_grad(): router.ask.zero_()
    # heads that care for nothing let everything pass
    torch.testing.assert_close(router.gate(stream, torch.ones(300, 64), None), torch.ones(300, 64))


def test_importance_goes_through_a_sigmoid(stream):
    router = routed(stream)
    with torch.no_grad(): router.weight[:3] = torch.tensor([-1e3, 0.0, 1e3])
    passes = router.gate(stream, torch.ones(300, 64), None)
    torch.testing.assert_close(passes[:, :3], router.openness(stream)[:, :1] * torch.tensor([0.0, 1.0, 2.0]))


def test_competition_silences_what_receives_little(stream):
    free, rivals = routed(stream), routed(stream, competition=0.9)
    with torch.no_grad():
        for router in (free, rivals): router.keys.mul_(4)
    alone, among = free.openness(stream), rivals.openness(stream)
    assert (alone > 0).all()
    others = (alone.sum(1, keepdim=True) - alone) / 7
    torch.testing.assert_close(among, (alone - 0.9 * others).clamp_min(0))
    assert (among == 0).any() and torch.equal(among == 0, alone <= 0.9 * others)


@pytest.mark.parametrize("number", [6, 8, 9])
def test_tokens_are_routed(number, train, unseen):
    """Training makes heads choose: which groups are open depends on the token; the same without a router
    lets everything pass."""
    sae = train(mechanisms_of(number)).sae
    opened = sae.gates[0].openness(unseen.x.float()).detach()
    assert opened.std(0).mean() > 0.1 and len(opened.argmax(1).unique()) > 5
    assert not train(mechanisms_of(number, without=["FeatureRouter", "PositionContrast"])).sae.gates


def test_features_choose_clusters_and_the_competition_is_learned(train):
    router = part(train(mechanisms_of(9)), "FeatureRouter")
    start = make_mechanism(*mechanisms_of(9)[0], SAEConfig(d_in=192, d_sae=256))
    torch.testing.assert_close(router.membership().sum(0), torch.ones(256))
    assert start.competition.item() == pytest.approx(0.1) and abs(router.competition.item() - 0.1) > 0.005
    assert (router.membership() - start.membership()).abs().amax(0).mean() > 0.02
    fixed = part(train(mechanisms_of(8)), "FeatureRouter")
    assert (fixed.competition == pytest.approx(0.1)
            and torch.equal(fixed.membership().sum(1), torch.full((16,), 16.0)))


def test_a_feature_that_is_reset_is_back_in_its_first_cluster(fresh, store):
    sae = fresh(d_sae=64)
    trainer = Trainer(
        sae, store, [make_mechanism("FeatureRouter", dict(groups=8, competition=0.1, learned=True), sae.cfg)],
        TrainConfig(steps=30, lr=1e-2, warmup=5, batch=512))
    trainer.fit(progress=False)
    router, start = (trainer.mechanisms[0],
                     make_mechanism("FeatureRouter", dict(groups=8, competition=0.1, learned=True), sae.cfg))
    before = router.choice.detach().clone()
    trainer.reset_features(torch.tensor([3]), torch.randn(1, 192), torch.randn(256, 192))
    assert torch.equal(router.choice[:, 3], start.choice[:, 3]) and not torch.equal(
        before[:, 3], start.choice[:, 3]) and torch.equal(router.choice[:, 4:], before[:, 4:])
    assert (router.weight[3] == 0 and not trainer.optimizer.state[router.choice]["exp_avg"][:, 3].any()
            and trainer.optimizer.state[router.choice]["exp_avg"][:, 4:].any())


def test_group_use_is_followed(train, unseen):
    router = part(trainer := train(mechanisms_of(8)), "FeatureRouter")
    f = trainer.sae.encode(unseen.x.float(), unseen.position).detach()
    spoken = f.sum(0).view(16, 16).sum(1)
    assert (router.use.sum().item() == pytest.approx(1, abs=1e-4)
            and torch.corrcoef(torch.stack([router.use, spoken]))[0, 1] > 0.9)


# Contrast

def charged(f, positions, trainer=None, **settings):
    mechanism = PositionContrast(4, f.shape[1], weight=1.0, tokens=len(f), **settings)
    generator = torch.Generator().manual_seed(0)
    from contextlib import nullcontext
    trainer = trainer or type(
        "Lone", (), dict(generator=generator, mechanisms=(), products=lambda self, a, b: nullcontext()))()
    step = type("Step", (), dict(f=f, positions=positions, trainer=trainer))
    return mechanism, step, mechanism.penalty(step)["contrast"]


def test_the_contrast_by_hand():
    f = torch.rand(12, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    positions = torch.tensor([1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 9]).to(torch.int16)
    missed = []
    for i in range(11): # the last has no companion
        e = {j: np.exp(F.cosine_similarity(f[i], f[j], dim=0).item() / 0.5) for j in range(12) if j != i}
        missed.append(-np.log(sum(v for j, v in e.items() if positions[i] == positions[j]) / sum(e.values())))
    _, _, found = charged(f, positions, temperature=0.5, memory=0.95)
    assert found.item() == pytest.approx(np.mean(missed), rel=1e-4)
    found.backward()
    assert f.grad.isfinite().all() and f.grad.any()


def test_features_that_resemble_each_other_count_as_alike():
    f = torch.zeros(4, 3)
    f[0, 0] = f[1, 1] = f[2, 2] = f[3, 2] = 1
    mechanism, step, apart = charged(f, torch.tensor([1, 1, 2, 2]), memory=0.95)
    mechanism.similarity[0, 1] = mechanism.similarity[1, 0] = 0.9
    assert mechanism.penalty(step)["contrast"] < 0.5 * apart


def test_similarity_follows_the_cosines_of_features():
    f = torch.rand(64, 5, generator=torch.Generator().manual_seed(0))
    mechanism, step, _ = charged(f, torch.arange(64) % 4, memory=0.95)
    mechanism.after_step(step)
    cosines = F.cosine_similarity(f.T[:, None], f.T[None], dim=2)
    torch.testing.assert_close(mechanism.similarity, 0.95 * torch.eye(5) + 0.05 * cosines)
    mechanism.reset_features(torch.tensor([1, 4]), None)
    torch.testing.assert_close(mechanism.similarity[[1, 4]], torch.eye(5)[[1, 4]])
    torch.testing.assert_close(mechanism.similarity[0, [2, 3]], 0.05 * cosines[0, [2, 3]])


@pytest.mark.parametrize("positions", [torch.full((16,), 7), torch.arange(16)])
def test_a_contrast_without_companions_or_without_strangers_is_nothing(positions):
    f = torch.rand(16, 6).requires_grad_()
    _, _, found = charged(f, positions, memory=0.95)
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-5) and f.grad.isfinite().all()


class Made:
    """A store of a made-up stream: what `stream` says of each position, one batch after the other."""
    d_in, path, hook_name, layer, about = 16, "made up", "", 0, dict(shards=[])

    def __init__(self, stream, positions=lambda i, n, draw: torch.randint(1, 128, (n,), generator=draw)):
        self.stream, self.positions = stream, positions
    def check_batch(self, batch, balanced): pass
    def batches(self, batch, seed, start=0, balanced=False):
        for i in itertools.count(start):
            draw = torch.Generator().manual_seed(i)
            positions, none = self.positions(i, batch, draw), torch.zeros(batch).long()
            yield Batch(x=self.stream(i, positions, draw), position=positions.short(), side=none, token=none,
                        sequence=none)


def placed(i, positions, draw):
    """Content, and where the token stands."""
    angle = positions[:, None] * torch.tensor([1.0, 2.0]) * 2 * torch.pi / 128
    return torch.cat([torch.randn(len(positions), 12, generator=draw), angle.sin(), angle.cos()], 1)


@pytest.mark.parametrize("number", [7, 9])
def test_contrast_makes_tokens_of_one_position_alike(number):
    """In a stream that holds something of positions: tokens of one position come nearer to each other
    than to those of others."""
    store, nearer = Made(placed), []
    for without in ((), ("PositionContrast",)):
        sae = SAE(SAEConfig(d_in=16, d_sae=64)).initialise(next(store.batches(4096, 0)).x, 0)
        mechanisms = [make_mechanism(name, settings, sae.cfg)
                      for name, settings in mechanisms_of(number, without)]
        Trainer(sae, store, mechanisms,
                TrainConfig(steps=300, warmup=20, lr=3e-3, batch=1024)).fit(progress=False)
        batch = next(store.batches(3000, 0, 10**6))
        f, same = F.normalize(sae.encode(batch.x).detach(), dim=1), batch.position[:, None] == batch.position
        nearer.append(((f @ f.T)[same & ~torch.eye(3000, dtype=torch.bool)].mean() - (f @ f.T)[~same].mean())
                      .item())
    assert nearer[0] > 2 * nearer[1] > 0


def test_clusters_cannot_be_compared_where_there_are_none(fresh, store):
    trainer = Trainer(fresh(d_sae=64), store, [PositionContrast(192, 64, weight=0.1)],
                      TrainConfig(steps=2, batch=256))
    with pytest.raises(SaenbError, match="by clusters where there are none"):
        trainer.fit(progress=False)


# Information

def test_mutual_information_of_what_is_normal():
    draw = torch.Generator().manual_seed(0)
    for r in (0.0, 0.5, 0.9):
        two = torch.randn(2**17, 2, generator=draw) @ torch.tensor([[1.0, r], [0.0, (1 - r * r)**0.5]])
        assert normal_information(two).item() == pytest.approx(-np.log(1 - r * r) / 2, abs=0.01)
    silent = torch.cat([two, torch.zeros(len(two), 1)], 1).requires_grad_()
    normal_information(silent).backward()
    assert silent.grad.isfinite().all()


@torch.no_grad()
def informed(trainer, batch):
    f = trainer.sae.encode(batch.x.float(), batch.position)
    share = f.sum(0) / f.sum()
    return normal_information(f).item(), -torch.special.xlogy(share, share).sum().item()


def test_each_term_of_the_information_acts(train, unseen):
    """Features tell less of each other by the one, and use is more even by the other."""
    (told, entropy), *others = (informed(train(mechanisms_of(10, FeatureInformation=change)), unseen)
                                for change in (dict(information=0.0, entropy=0.0), dict(
                                    information=0.3, entropy=0.0), dict(information=0.0, entropy=0.5)))
    assert others[0][0] < 0.9 * told and others[1][1] > entropy + 0.05


# All of them

@pytest.mark.parametrize("number", [2, 5, 9])
def test_it_says_the_same_after_saving_and_inside_the_evaluation(number, train, unseen, exam, tmp_path):
    sae = train(mechanisms_of(number)).sae
    again = load_sae(sae.save(tmp_path/"sae"))
    x = unseen.x.float()
    assert torch.equal(again.encode(x, unseen.position), sae.encode(x, unseen.position))
    assert not torch.equal(sae.encode(x, unseen.position), sae.ungated(x))
    used = [feature_stats(exam, s) for s in (sae, again)]
    for name, value in vars(used[0]).items():
        np.testing.assert_array_equal(value, vars(used[1])[name])


@pytest.mark.parametrize("number", [2, 5, 8, 10])
def test_stopped_and_resumed_it_ends_with_the_same_bytes(number, fresh, ends_the_same):
    def parts():
        sae = fresh(d_sae=64)
        frequent = dict(EvolvingMask=dict(every=7, look=2), UsageResets=dict(every=6, least=0.5))
        return sae, [make_mechanism(name, settings | frequent.get(name, {}), sae.cfg)
                     for name, settings in find_run(f"positional/{number}").mechanisms]
    ends_the_same(parts)


def hostile(i, positions, draw):
    """Ordinary tokens, zeros, and huge values."""
    x = torch.randn(len(positions), 16, generator=draw)
    if i % 5 == 1: x.zero_()
    if i % 5 in (2, 3): x[::7] *= 10.0 ** (3 * (i % 5))
    return x


@pytest.mark.parametrize("number, steps", [(1, 300), (2, 300), (3, 300), (4, 300), (5, 2500), (6, 300),
                                           (7, 300), (8, 300), (9, 300), (10, 2500), ("static", 300)])
def test_nothing_ceases_to_be_a_number_whatever_comes(number, steps):
    """Run 5 has every kind of mask, and run 10 every part of the routers, for longer: masks change fifty
    times; every third batch stands at one position."""
    store = Made(hostile, lambda i, n, draw: torch.full((n,), 9)
                     if i % 3 == 0 else torch.randint(1, 128, (n,), generator=draw))
    sae = SAE(SAEConfig(d_in=16, d_sae=64)).initialise(next(store.batches(4096, 0)).x, 0)
    mechanisms = [make_mechanism(name, settings | (dict(every=50) if "every" in settings else {}), sae.cfg)
                  for name, settings in find_run(f"positional/{number}").mechanisms]
    trainer = Trainer(sae, store, mechanisms,
                      TrainConfig(steps=steps, warmup=20, batch=64, lr=1e-3, log_every=10))
    trainer.fit(progress=False) # stops at the first term that is not finite
    assert trainer.index == steps
    for name, value in (*sae.state_dict().items(), *trainer.mechanisms.state_dict().items()):
        assert value.isfinite().all(), name
    for moments in trainer.optimizer.state.values():
        for name, value in moments.items(): assert value.isfinite().all(), name
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_settings_that_make_no_sense(fresh):
    cfg = fresh(d_sae=64).cfg
    for name, settings, said in (
            ("HardMask", dict(parts=1), "into 1 parts"), ("HardMask", dict(parts=65), "into 65 parts"),
            ("HardMask", dict(length=1), "over 1 positions"),
            ("SoftMask", dict(temperature=0), "temperature is 0"),
            ("SoftMask", {}, "correct its settings"), ("HybridMask", dict(rank=0), "through 0 directions"),
            ("EvolvingMask", dict(every=0), "every 0 steps"),
            ("EvolvingMask", dict(step=2), "move 2 of the way"), ("FeatureRouter", dict(heads=0), "0 heads"),
            ("FeatureRouter", dict(groups=65), "65 groups"),
            ("FeatureRouter", dict(competition=1.0), "competition is 1.0"),
            ("FeatureRouter", dict(learned=True), "above 0 if it is learned"),
            ("PositionContrast", dict(weight=1, tokens=1), "1 tokens cannot"),
            ("PositionContrast", dict(weight=1, temperature=0), "temperature of 0"),
            ("FeatureInformation", dict(information=0.1, entropy=0.1, asked=1), "1 features have no pairs")):
        with pytest.raises(SaenbError, match=said):
            make_mechanism(name, settings, cfg)
