"""How much features overlap, on dictionaries made for the purpose and against numpy."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from saenb.base.errors import SaenbError
from saenb.evals.evaluation import Readings
from saenb.evals.controls import as_logged, untrained
from saenb.evals.entanglement import before_diagonal, correlations, evaluate, headline, largest, plot, table, triangle, whole
from saenb.evals.separation import drawn
from saenb.lab.preset_files import find_preset
from saenb.sae.sae import SAE, SAEConfig


@pytest.fixture(scope="module")
def setup(): return replace(find_preset("tiny").evals["entanglement"], tokens_a_row=16, dataset_size=300)


@pytest.fixture(scope="module")
def readings(model, world): return Readings(model, world.layer)


def measured(sae, setup, readings): return evaluate(readings.model, sae, setup, readings)["eval_result_unstructured"]


def made_of(sae, columns):
    """A dictionary of some of another's features, in that order, as often as they are named."""
    made = SAE(replace(sae.cfg, d_sae=len(columns), gates=[]))
    with torch.no_grad():
        made.W_enc.copy_(sae.W_enc[:, columns]); made.b_enc.copy_(sae.b_enc[columns])
        made.W_dec.copy_(sae.W_dec[columns]); made.b_dec.copy_(sae.b_dec)
    return made.eval()


def test_numpy_finds_the_same(trained, setup, readings):
    tokens = drawn(readings, setup)
    with torch.no_grad(): f = trained.encode(tokens.stream, tokens.position).double().numpy()
    alive = np.nonzero((f > 0).any(0))[0]
    r = np.corrcoef(f[:, alive].T)
    rows = trained.W_dec.detach().double().numpy()[alive]
    cosines = np.abs(rows @ rows.T) / np.outer(*[np.linalg.norm(rows, axis=1)] * 2)
    for matrix in (r, cosines): np.fill_diagonal(matrix, 0)
    found = measured(trained, setup, readings)
    assert found["alive"] == len(alive) and found["tokens"] == len(f)
    assert found["correlation"][0] == pytest.approx(np.abs(r).max(1).mean(), abs=2e-3)
    assert found["cosine"][0] == pytest.approx(cosines.max(1).mean(), abs=1e-4)
    shown = found["features"]
    kept = np.corrcoef(f[:, shown].T)
    np.testing.assert_allclose(whole(found["correlations"]), kept, atol=2e-3)
    assert shown == sorted(shown, key=lambda i: -(f[:, i] > 0).mean())


def test_in_batches_of_any_size(trained, setup, readings):
    tokens = drawn(readings, setup)
    for a, b in zip(correlations(trained, tokens.stream, tokens.position), correlations(trained, tokens.stream, tokens.position, batch=777)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_each_feature_twice_is_as_entangled_as_can_be(trained, setup, readings):
    once, twice = (measured(made_of(trained, list(range(60)) * times), setup, readings) for times in (1, 2))
    assert twice["alive"] == 2 * once["alive"]
    for key in ("cosine", "correlation"): assert twice[key][0] == pytest.approx(1, abs=1e-3) and once[key][0] < 0.95


def test_directions_at_right_angles_have_no_cosine(store, setup, readings):
    """The stream's own channels, each a feature: perfectly apart in direction, whatever their activations do."""
    sae = SAE(SAEConfig(d_in=store.d_in, d_sae=store.d_in, hook_layer=store.layer))
    with torch.no_grad(): sae.W_enc.copy_(torch.eye(store.d_in)); sae.W_dec.copy_(torch.eye(store.d_in))
    found = measured(sae, setup, readings)
    assert found["cosine"][0] == 0 and found["correlation"][0] > found["by_chance"][0]


def test_by_chance_nothing_goes_together(trained, setup, readings):
    found = measured(trained, setup, readings)
    assert found["by_chance"][0] < 0.5 * found["correlation"][0]
    for key in ("cosine", "correlation", "by_chance"): assert found[key][1] <= found[key][0] <= found[key][2]


def test_a_dictionary_that_never_speaks(trained, setup, readings):
    result = evaluate(readings.model, as_logged(trained.cfg), setup, readings)
    ours = result["eval_result_unstructured"]
    assert ours["alive"] == 0 and ours["cosine"] is ours["correlation"] is None and ours["correlations"] == [] and headline(result) == {}
    assert [row["value"] for row in table(result)] == [None] * 3
    assert largest(torch.ones(1, 1), torch.tensor([0])).tolist() == [0] # one feature has no other to overlap with


def test_headline_table_and_picture(trained, setup, readings, store):
    results = {f"one {i}": evaluate(readings.model, sae, setup, readings) for i, sae in enumerate((trained, untrained(trained.cfg, store.rows(0, 8192).x.float()), as_logged(trained.cfg), trained))}
    assert list(headline(results["one 0"])) == ["largest cosine", "largest correlation"]
    assert table(results["one 0"])[0]["value"] == results["one 0"]["eval_result_metrics"]["entanglement"]["cosine"]
    fig = plot(results)
    assert [ax.get_title() for ax in fig.axes if ax.get_title()] == list(results)


def test_bad_input(model, trained, setup, readings):
    with pytest.raises(SaenbError, match="width 64 and the model's is 192"): evaluate(model, SAE(SAEConfig(d_in=64, d_sae=8)), setup, readings)
    with pytest.raises(SaenbError, match="0 tokens_a_row"): evaluate(model, trained, replace(setup, tokens_a_row=0), readings)


@pytest.mark.parametrize("rows, says", [
    ([[], [0.2], [0.1, -1.0]], None), ([], None),
    ([[1.0, 0.2], [0.2, 1.0]], "do not end before the diagonal"), ([[], [1.2]], "no correlation"), ([[], ["a"]], "a")])
def test_rows_as_far_as_the_diagonal(rows, says):
    odd = triangle(rows)
    assert odd is None if says is None else says in odd


def test_a_matrix_comes_back_from_its_rows():
    m = torch.corrcoef(torch.randn(7, 20, generator=torch.Generator().manual_seed(0)))
    np.testing.assert_allclose(whole(before_diagonal(m)), m, atol=6e-4)
    assert before_diagonal(torch.zeros(0, 0)) == [] and whole([]).shape == (0, 0)
