"""Pair statistics against numpy, scipy, scikit-learn and plain loops."""
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import gaussian_kde
from sklearn.feature_selection import mutual_info_regression

from saenb.base.errors import SaenbError
from saenb.ideas.pairs import (STATISTICS, jaccard, make_statistic, mutual_information, on_grid, pair_count,
                               strongest)
from saenb.sae.coactivation import coactivation, correlation


def sparse(n, features, seed=0):
    """Activations as a dictionary gives them: mostly zero, never negative, some of them related."""
    draw = torch.Generator().manual_seed(seed)
    f = torch.relu(torch.randn(n, features, generator=draw) - 1)
    f[:, 1] = 0.7 * f[:, 0] + 0.3 * f[:, 1]
    return f


def known(n=3000):
    """Pairs of columns whose dependence is known, and their mutual information where there is a formula."""
    draw = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(n, generator=draw) for _ in range(3))
    sign = (torch.rand(n, generator=draw) < 0.5) * 2.0 - 1
    return dict(independent=(a, b), line=(a, 0.8 * a + 0.6 * b),
                circle=((3 * c).cos(), (3 * c).sin() + 0.1 * b), xor=(a.abs() * sign, b.abs() * sign))


def by_scipy(x, y, points=60):
    """Mutual information from scipy's kernel density, evaluated on a fine grid."""
    u, v = (np.linspace(c.min() - 0.7, c.max() + 0.7, points) for c in (x, y))
    p = (gaussian_kde(np.stack([x, y]))(np.stack(np.meshgrid(u, v, indexing="ij")).reshape(2, -1))
         .reshape(points, points))
    p /= p.sum()
    return float((p * np.log(np.maximum(p, 1e-300) / np.outer(p.sum(1), p.sum(0)))).sum())


def test_coactivation_and_correlation_against_numpy():
    f = sparse(500, 9)
    f[:, 4] = 0; f[:, 7] = 0.25 # a dead feature and one that never changes
    product = coactivation(f)
    np.testing.assert_allclose(product, np.einsum("ni,nj->ij", f, f) / 500, rtol=1e-5, atol=1e-7)
    found = correlation(product, f.mean(0))
    varies = [i for i in range(9) if i not in (4, 7)]
    np.testing.assert_allclose(found[varies][:, varies], np.corrcoef(f[:, varies].T.double()), atol=1e-4)
    assert not found[4].any() and not found[7].any() and found.abs().max() <= 1


@pytest.mark.parametrize("above", [-9.0, 0.5, 2.5, 99.0])
def test_few_or_many_active_features_make_the_same_products(above):
    """Products of sparse matrices where few are active, of dense ones elsewhere."""
    f = torch.relu(torch.randn(300, 40, generator=torch.Generator().manual_seed(0)) - above)
    torch.testing.assert_close(coactivation(f), f.T @ f / 300, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["independent", "line", "circle", "xor"])
def test_mutual_information_against_scipy_and_sklearn(name):
    x, y = known()[name]
    fine = mutual_information(torch.stack([x, y], 1), grid=40)[0, 1].item()
    # the nearest-neighbour estimate is sharper than any kernel's, which blurs thin shapes
    neighbours = mutual_info_regression(x[:, None].numpy(), y.numpy(), random_state=0)[0]
    assert fine == pytest.approx(by_scipy(x.numpy(), y.numpy()), abs=0.12)
    assert (fine == pytest.approx(neighbours, abs=0.1)
            if name in ("independent", "line") else 0.15 < fine < neighbours + 0.05)


def test_mutual_information_of_a_line_follows_the_formula():
    """Gaussians stay Gaussian under a Gaussian kernel, whose width then counts as noise."""
    x, y = known(8000)["line"]
    width = 1.06 * 8000**-0.2
    blurred = 0.8 / (1 + width**2)
    assert (mutual_information(torch.stack([x, y], 1), grid=60)[0, 1].item()
            == pytest.approx(-0.5 * np.log(1 - blurred**2), abs=0.03))


def test_mutual_information_is_not_rounded_where_products_are():
    f = sparse(500, 30)
    with torch.autocast("cpu", torch.bfloat16): found = mutual_information(f)
    assert torch.equal(found, mutual_information(f))


def test_the_coarse_grid_of_training_tells_dependence_from_none():
    found = {name: mutual_information(torch.stack(pair, 1))[0, 1].item() for name, pair in known().items()}
    assert all(found[name] > 8 * found["independent"] for name in ("line", "circle", "xor")), found
    f = sparse(4000, 6)
    matrix = mutual_information(f)
    others = [matrix[i, j] for i, j in itertools.combinations(range(6), 2) if (i, j) != (0, 1)]
    assert matrix[0, 1] > 5 * max(others)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(2, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_mutual_information_of_all_pairs_is_that_of_each(features, block, grid, seed):
    """In blocks of any size; symmetric and never negative."""
    f = torch.relu(torch.randn(60, features, generator=torch.Generator().manual_seed(seed)))
    f[:, -1] = 0
    matrix = mutual_information(f, grid, block)
    weights = on_grid(f, grid).double()
    torch.testing.assert_close(weights.sum(-1), torch.ones(60, features, dtype=torch.float64), rtol=0,
                               atol=1e-5)
    for i, j in itertools.product(range(features), repeat=2):
        joint = torch.einsum("na,nb->ab", weights[:, i], weights[:, j]) / 60
        plain = torch.special.xlogy(joint, joint / torch.outer(joint.sum(1), joint.sum(0))).sum()
        assert matrix[i, j].item() == pytest.approx(plain.item(), abs=1e-4)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-6)
    assert matrix.min() >= 0


@given(st.integers(2, 12), st.integers(1, 80), st.integers(0, 99), st.booleans())
@settings(deadline=None)
def test_the_strongest_pairs_are_the_strongest(features, count, seed, ties):
    draw = np.random.default_rng(seed)
    raw = (draw.integers(0, 4, (features, features)).astype(np.float32)
           if ties else np.maximum(draw.normal(size=(features, features)), 0).astype(np.float32))
    strength = torch.from_numpy(raw + raw.T)
    count = pair_count(features, count=count)
    found = strongest(strength, count)
    all_pairs = sorted((strength[i, j].item() for i, j in itertools.combinations(range(features), 2)
                        if strength[i, j] > 0), reverse=True)
    assert (found[0] < found[1]).all() and len({tuple(p) for p in found.T.tolist()}) == found.shape[1]
    assert sorted(strength[found[0], found[1]].tolist(), reverse=True) == all_pairs[:count]


def test_few_of_many_are_found_by_the_other_way_as_well():
    strength = torch.rand(300, 300, generator=torch.Generator().manual_seed(0))
    few, many = strongest(strength, 40), strongest(strength, 4000)
    values = strength.triu(1).flatten().sort(descending=True).values
    assert strength[few[0], few[1]].min() == values[39] and strength[many[0], many[1]].min() == values[3999]
    assert set(map(tuple, few.T.tolist())) <= set(map(tuple, many.T.tolist()))


def test_shares_and_counts():
    assert pair_count(2304, share=0.001) == 2653 and pair_count(2304, share=1) == 2304 * 2303 // 2
    assert pair_count(10, count=100) == 45 and pair_count(10, share=1e-6) == 1
    for wrong in (dict(), dict(share=0.1, count=3), dict(share=0.0), dict(share=1.5), dict(count=0)):
        with pytest.raises(SaenbError, match="pairs"): pair_count(10, **wrong)


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(4, 7))),
       st.sets(st.tuples(st.integers(0, 3), st.integers(4, 7))))
def test_agreement_is_that_of_sets(a, b):
    tensors = [torch.tensor(sorted(s), dtype=torch.long).reshape(-1, 2).T for s in (a, b)]
    assert jaccard(*tensors, 8) == pytest.approx(len(a & b) / len(a | b) if a | b else 1.0)


@pytest.mark.parametrize("by", ["window", "persistence"])
def test_a_window_holds_the_last_batches_and_no_others(by):
    statistic, batches = (make_statistic(by, 5, window=3),
                          [sparse(200, 5, seed) * (1 + seed) for seed in range(8)])
    for i, batch in enumerate(batches):
        statistic.update(batch)
        window = np.corrcoef(torch.cat(batches[max(0, i - 2):i + 1]).T.double())
        np.testing.assert_allclose(statistic.lasting, window, atol=0.02) # products are kept in half precision
        window = np.abs(window)
        if by == "persistence":
            np.testing.assert_allclose(statistic.strength(),
                                       (window + np.abs(np.corrcoef(batch.T.double()))) / 2, atol=0.02)
    pairs = torch.tensor([[0, 2], [1, 3]])
    np.testing.assert_allclose(statistic.weight(pairs), window[pairs[0], pairs[1]], atol=0.02)


def test_gradients_are_averaged_over_steps():
    statistic, average = make_statistic("gradients", 4, memory=0.9), np.zeros((4, 4))
    for seed in range(5):
        g = torch.randn(50, 4, generator=torch.Generator().manual_seed(seed)) * 1e-6
        statistic.update(g)
        average = (0.9 * average
                   + 0.1 * np.mean([np.abs(np.outer(row, row)) for row in g.double().numpy()], axis=0))
    np.testing.assert_allclose(statistic.strength(), average, rtol=1e-4)
    pairs = torch.tensor([[0, 1], [2, 3]])
    np.testing.assert_allclose(statistic.weight(pairs),
                               average[[0, 1], [2, 3]] / average[[0, 1], [2, 3]].mean(), rtol=1e-4)
    assert STATISTICS["gradients"].follows == "gradients" and STATISTICS["window"].follows == "activations"


@pytest.mark.parametrize("by, given",
                         [("coactivation", {}), ("gradients", dict(memory=0.5)), ("window", dict(window=4)),
                          ("persistence", dict(window=4)), ("information", {})])
def test_statistics_are_saved_with_what_they_remember(by, given):
    batches = [sparse(100, 6, seed) for seed in range(7)]
    whole, first, second = (make_statistic(by, 6, **given) for _ in range(3))
    for batch in batches: whole.update(batch)
    for batch in batches[:5]: first.update(batch)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for batch in batches[5:]: second.update(batch)
    assert torch.equal(whole.strength(), second.strength())


def test_a_statistic_that_is_not_there():
    with pytest.raises(SaenbError, match="did you mean window"):
        make_statistic("windows", 4)
    with pytest.raises(SaenbError, match="cannot be chosen by window"):
        make_statistic("window", 4, memory=0.3)
