"""How differently features act on the two sides: against scipy and sklearn."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score

from saenb.sides import activity, divergence, shares, side_information


def made_up(n=400, features=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    side = torch.randint(0, 3, (n,), generator=draw)
    rate = torch.rand(3, features, generator=draw) * 0.5
    return (torch.rand(n, features, generator=draw) < rate[side]) * torch.rand(n, features, generator=draw), side


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
    for distribution in (p, q): assert distribution.sum().item() == pytest.approx(1, abs=1e-5) and (distribution >= smoothing / 5 * 0.999).all()
    assert -1e-6 <= divergence(p, q).item() <= np.log(5 / smoothing) + 1e-6


def test_only_one_sides_tokens_count():
    f, side = made_up()
    changed = f.clone()
    changed[side != 1] = 7.0
    assert torch.equal(shares(f, side, "forget"), shares(changed, side, "forget")) and not torch.equal(shares(f, side, "retain"), shares(changed, side, "retain"))


def test_a_side_without_tokens_says_nothing():
    f, side = torch.rand(10, 3), torch.full((10,), 2)
    assert torch.isfinite(shares(f, side, "forget")).all() and torch.equal(side_information(activity(f, side)), torch.zeros(3))


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
