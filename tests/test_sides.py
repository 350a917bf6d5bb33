"""How differently features act on the two sides: against scipy and sklearn."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import quad
from scipy.stats import entropy, expon
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, mutual_info_score

from saenb.ideas.sides import (SideReader, SideStatistics, activation_divergence, activity, by_side,
                               divergence, shares, side_information)


def made_up(n=400, features=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    side = torch.randint(0, 3, (n,), generator=draw)
    rate = torch.rand(3, features, generator=draw) * 0.5
    return ((torch.rand(n, features, generator=draw) < rate[side]) * torch.rand(n, features, generator=draw),
            side)


def test_divergence_of_known_distributions():
    """Against scipy and against the closed form for two geometric-like distributions."""
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    assert divergence(p, q).item() == pytest.approx(0.25 * np.log(2)) and divergence(p, p) == 0
    f, side = made_up()
    p, q = (shares(f, side, name) for name in ("forget", "retain"))
    assert divergence(p, q).item() == pytest.approx(entropy(p, q), rel=1e-4)


@given(st.integers(0, 1000), st.floats(0.001, 0.5))
@settings(max_examples=30, deadline=None)
def test_shares_are_a_distribution_and_the_divergence_is_bounded(seed, smoothing):
    f, side = made_up(30, seed=seed)
    p, q = (shares(f, side, name, smoothing) for name in ("forget", "retain"))
    for distribution in (p, q):
        assert (distribution.sum().item() == pytest.approx(1, abs=1e-5)
                and (distribution >= smoothing / 5 * 0.999).all())
    assert -1e-6 <= divergence(p, q).item() <= np.log(5 / smoothing) + 1e-6


def test_only_one_sides_tokens_count():
    f, side = made_up()
    changed = f.clone()
    changed[side != 1] = 7.0
    assert (torch.equal(shares(f, side, "forget"), shares(changed, side, "forget"))
            and not torch.equal(shares(f, side, "retain"), shares(changed, side, "retain")))


def test_a_side_without_tokens_says_nothing():
    f, side = torch.rand(10, 3), torch.full((10,), 2)
    assert (torch.isfinite(shares(f, side, "forget")).all()
            and torch.equal(side_information(activity(f, side)), torch.zeros(3)))


@pytest.mark.parametrize("seed", range(5))
def test_information_about_the_side_is_sklearns(seed):
    f, side = made_up(seed=seed)
    sided = side > 0
    theirs = [mutual_info_score(side[sided], f[sided, i] > 0) for i in range(5)]
    np.testing.assert_allclose(side_information(activity(f, side)), theirs, atol=1e-6)
    whole = activity(f[:200], side[:200]) + activity(f[200:], side[200:]) # counts can be gathered
    np.testing.assert_allclose(side_information(whole), theirs, atol=1e-6)


def test_a_feature_of_one_side_tells_everything():
    side = torch.tensor([1, 1, 2, 2])
    f = torch.tensor([[1.0, 0, 1], [1, 1, 1], [0, 0, 1], [0, 1, 1]])
    np.testing.assert_allclose(side_information(activity(f, side)), [np.log(2), 0, 0], atol=1e-6)


@given(st.tuples(*[st.floats(0.001, 0.9)] * 2), st.tuples(*[st.floats(0.1, 10)] * 2))
@settings(max_examples=30, deadline=None)
def test_the_divergence_of_activations_is_the_integral(densities, sizes):
    """Silence with one probability and an exponential with the other, integrated by scipy."""
    (p, q), (a, b) = densities, sizes
    strength = quad(lambda x: expon.pdf(x, scale=a) * (expon.logpdf(x, scale=a) - expon.logpdf(x, scale=b)),
                    0, 60 * a, limit=200)[0]
    wanted = entropy([p, 1 - p], [q, 1 - q]) + p * strength
    ours = activation_divergence(*(torch.tensor(v, dtype=torch.double) for v in (p, a, q, b))).item()
    assert ours == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    assert ours >= -1e-12 and activation_divergence(
        *(torch.tensor(v, dtype=torch.double) for v in (p, a, p, a))).item() == pytest.approx(0, abs=1e-12)


def test_the_estimate_finds_a_known_divergence():
    """Drawn from two known distributions, the statistics give back the formula's value."""
    draw = np.random.default_rng(0)
    densities, sizes = (0.05, 0.02), (1.0, 2.5)
    f, side = np.zeros((200_000, 1)), np.repeat([1, 2], 100_000)
    for which, p, a in zip((1, 2), densities, sizes):
        rows = side == which
        f[rows, 0] = (draw.random(rows.sum()) < p) * draw.exponential(a, rows.sum())
    statistics = SideStatistics(1)
    statistics.update(torch.tensor(f, dtype=torch.float), torch.tensor(side))
    p, q, a, b = (torch.tensor(v) for v in (*densities, *sizes))
    assert statistics.divergence().item() == pytest.approx(
        ((activation_divergence(p, a, q, b) + activation_divergence(q, b, p, a)) / 2).item(), rel=0.05)


def test_statistics_are_those_of_the_batches():
    """With nothing forgotten, over three batches as over one; and the older, the less it counts."""
    f, side = made_up(600, seed=3)
    whole, parts, short = (SideStatistics(5, memory=1.0), SideStatistics(5, memory=1.0),
                           SideStatistics(5, memory=0.0))
    whole.update(f, side)
    for at in (0, 200, 400):
        for s in (parts, short): s.update(f[at:at + 200], side[at:at + 200])
    for name in ("density", "size"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    forget = f[side == 1]
    torch.testing.assert_close(whole.density[0], ((forget > 0).sum(0) + 0.5) / (len(forget) + 1))
    torch.testing.assert_close(short.total, by_side(f[400:], side[400:])[0])


def test_what_is_seen_on_few_tokens_is_drawn_together():
    f, side = torch.zeros(2000, 3), torch.arange(2000) % 2 + 1
    f[0, 1] = 1.0 # once
    f[side == 1, 2] = 1.0 # on one side always
    statistics = SideStatistics(3)
    statistics.update(f, side)
    never, once, always = statistics.divergence().tolist()
    assert never == 0 < once < 0.01 < 1 < always


def test_features_take_their_statistics_along():
    f, side = made_up()
    one, other, order = SideStatistics(5), SideStatistics(5), torch.tensor([3, 0, 4, 1, 2])
    for s, x in ((one, f), (other, f[:, order])):
        s.update(x, side)
        s.update_gradients(x, x.cos(), side, 5)
    one.reorder(order)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])


def test_a_gradient_is_felt_by_the_first_only():
    f, side = made_up()
    statistics = SideStatistics(5, memory=0.0)
    statistics.update_gradients(f, torch.ones_like(f), side, 3)
    assert (statistics.pull[:, 3:] == 0).all()
    torch.testing.assert_close(statistics.pull[0, :3], f[side == 1, :3].mean(0) * len(f))


def test_the_reader_is_a_logistic_regression():
    """Trained to the end, it guesses as sklearn's does; tokens of neither side do not teach it."""
    draw = torch.Generator().manual_seed(0)
    side = torch.randint(0, 3, (900,), generator=draw)
    x = torch.randn(900, 4, generator=draw) * 3 + 5 + (side == 1)[:, None] * torch.tensor([2.0, -1, 0, 0])
    reader = SideReader(4)
    reader.fit_scale(x)
    assert reader.loss(x, side).item() == pytest.approx(np.log(2))
    optimizer = torch.optim.LBFGS(reader.parameters(), max_iter=200)
    def closure():
        optimizer.zero_grad()
        loss = reader.loss(x, side)
        loss.backward()
        return loss
    optimizer.step(closure)
    known = side > 0
    theirs = LogisticRegression(C=1e6, max_iter=1000).fit(x[known], side[known] == 1)
    np.testing.assert_allclose(reader(x).detach(), theirs.predict_proba(x)[:, 1], atol=1e-3)
    assert (reader.loss(x, side).item()
            == pytest.approx(log_loss(side[known] == 1, theirs.predict_proba(x[known])[:, 1]), rel=1e-4))
