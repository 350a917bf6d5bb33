"""Groups of features that act together: against scipy and sklearn, on groups that are known, and with bad input."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from saenb.base.errors import SaenbError
from saenb.ideas.clusters import agreement, close, groups, in_order, living, sizes
from saenb.sae.coactivation import coactivation, correlation


def together(members=(8, 6, 3, 1), n=3000, seed=0):
    """Activations of features that act in groups of these sizes, shuffled, and each one's group."""
    draw = torch.Generator().manual_seed(seed)
    owner = torch.arange(len(members)).repeat_interleave(torch.tensor(members))[torch.randperm(sum(members), generator=draw)]
    active = torch.rand(n, len(members), generator=draw) < 0.1
    return active.float()[:, owner] * (0.5 + torch.rand(n, len(owner), generator=draw)), owner


def correlations(f): return correlation(coactivation(f), f.mean(0))


@pytest.mark.parametrize("cut", [dict(threshold=0.4), dict(number=4)])
def test_known_groups_are_found(cut):
    f, owner = together()
    labels = groups(correlations(f), **cut, least=1)
    assert adjusted_rand_score(owner, labels) == 1 and sorted(sizes(labels).tolist()) == [1, 3, 6, 8]


@given(st.integers(2, 25), st.floats(0.05, 0.9), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_groups_are_those_of_sklearn(features, threshold, seed):
    r = torch.corrcoef(torch.rand(features, 6, generator=torch.Generator().manual_seed(seed)))
    theirs = AgglomerativeClustering(None, metric="precomputed", linkage="average", distance_threshold=1 - threshold).fit_predict((1 - r.double()).clamp_min(0).fill_diagonal_(0))
    ours = groups(r, threshold, least=1)
    assert adjusted_rand_score(theirs, ours) == 1 and set(ours.tolist()) == set(range(ours.max() + 1))


@given(st.integers(2, 25), st.integers(1, 6), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_no_group_is_below_the_least_size(features, least, seed):
    r = torch.corrcoef(torch.rand(features, 6, generator=torch.Generator().manual_seed(seed)))
    whole, kept = groups(r, 0.3, least=1), groups(r, 0.3, least=least)
    assert (sizes(kept) >= least).all()
    assert (kept >= 0).tolist() == (sizes(whole)[whole] >= least).tolist()


def test_dead_features_are_in_no_group():
    f, owner = together()
    f[:, 2] = 0 # never active
    f[:, 5] = 1 # always the same
    r = correlations(f)
    assert set(living(r).tolist()) == set(range(18)) - {2, 5}
    labels = groups(r, 0.4, least=1)
    assert labels[2] == labels[5] == -1 and (labels >= 0).sum() == 16
    assert (groups(correlations(torch.zeros(10, 4)), 0.4) == -1).all() and (groups(torch.eye(1), number=3) == -1).all()


def test_the_percentile_is_of_correlations_above_zero():
    f, _ = together()
    r = correlations(f)
    above = [v for v in r[np.triu_indices(18, 1)].tolist() if v > 0]
    assert close(r, 75) == pytest.approx(np.percentile(above, 75), rel=1e-5)
    assert close(torch.eye(4), 75) == 1


def test_the_order_puts_groups_side_by_side():
    f, owner = together()
    assert len(torch.unique_consecutive(owner[in_order(correlations(f))])) == 4
    assert in_order(torch.eye(1)).tolist() == [0]


def test_agreement_counts_what_both_group():
    a, b = torch.tensor([0, 0, 1, 1, -1, 2]), torch.tensor([5, 5, 3, 3, 3, -1])
    assert agreement(a, b) == 1 and agreement(a, -torch.ones(6, dtype=torch.long)) == 0
    draw = torch.Generator().manual_seed(0)
    one, two = torch.randint(0, 5, (2, 4000), generator=draw)
    assert abs(agreement(one, two)) < 0.01


def test_bad_input():
    r = torch.eye(3)
    for settings_, said in ((dict(), "threshold or a number"), (dict(threshold=0.1, number=3), "threshold or a number")):
        with pytest.raises(SaenbError, match=said): groups(r, **settings_)
    for percentile in (-1, 101):
        with pytest.raises(SaenbError, match="from 0 to 100"): close(r, percentile)
