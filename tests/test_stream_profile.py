"""Lengths of tokens and shares of variance of a stream, against numpy."""
import numpy as np
import pytest
import torch

from saenb.evals.dominant import stream_profile


@pytest.fixture
def stream():
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    x[::1000] *= 50 # four long tokens, the first of their rows
    return x + 2, torch.arange(4000) % 1000 + 1


def test_the_profile_is_what_numpy_says(stream):
    x, position = stream
    found, n = stream_profile(x, position), x.double().numpy()
    length, spread = np.linalg.norm(n, axis=1), ((n - n.mean(0))**2)
    assert found["lengths"]["0.5"] == pytest.approx(np.median(length), rel=1e-3)
    assert found["lengths"]["1.0"] == pytest.approx(length.max(), rel=1e-4)
    assert found["longest"]["0.001"] == pytest.approx(np.sort(spread.sum(1))[-4:].sum() / spread.sum(), rel=1e-3)
    assert found["dimensions"] == pytest.approx(np.sort(spread.sum(0) / spread.sum())[::-1][:8], rel=1e-3)
    assert found["directions"] == pytest.approx(np.sort(np.linalg.eigvalsh(np.cov(n.T)))[::-1][:8] / np.trace(np.cov(n.T)), rel=1e-3)


def test_long_tokens_stand_at_their_place(stream):
    by_place = stream_profile(*stream)["by_place"]
    assert by_place["1"][1] > 10 * by_place["4"][1] and sorted(map(int, by_place)) == [2**i for i in range(10)]
    assert by_place["1"][0] == pytest.approx(by_place["1"][1], rel=1)
