"""Features at random among those that pass a threshold, as an evaluation of its own."""
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from saenb.base.schemas import schema_error
from saenb.evals.controls import as_logged
from saenb.evals.exam import FeatureStats, Grid, choose_features, feature_stats
from saenb.evals.halves import held_out
from saenb.evals.interventions.clamp import Clamp
from saenb.evals.random_choice import RANDOM_CHOICE, RandomChoiceSetup, drawn_at_random, evaluate, shuffled
from saenb.evals.unlearning import answers_in, run_settings

densities = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40)


@given(densities, st.floats(0, 1), st.integers(0, 100))
def test_the_same_features_pass_in_another_order(pairs, threshold, seed):
    forget, retain = map(np.array, zip(*pairs))
    stats = FeatureStats(forget, retain, np.ones(len(pairs)))
    drawn = shuffled(stats, np.random.default_rng(seed))
    assert sorted(choose_features(drawn, threshold)) == sorted(choose_features(stats, threshold))
    assert np.array_equal(drawn.retain, retain) and np.array_equal(stats.forget, forget)


def test_every_order_is_as_likely():
    stats = FeatureStats(np.array([0.9, 0.5, 0.1]), np.zeros(3), np.ones(3))
    rng = np.random.default_rng(0)
    orders = [tuple(choose_features(shuffled(stats, rng), 0.5)) for _ in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and min(counts) > 150


@pytest.fixture(scope="module")
def setup(exam):
    few = Grid(thresholds=(0.001, 0.01), n_features=(10, 30), multipliers=(8,), typical=True)
    return RandomChoiceSetup(**{f.name: getattr(exam.setup, f.name) for f in fields(exam.setup)} | dict(grid=few), draws=2)


def test_a_draw_is_the_exam_on_shuffled_features(exam, trained, setup):
    """The scores are those of the search on the first draw's order, written out."""
    result = evaluate(exam.model, trained, setup, exam)
    assert schema_error(result, RANDOM_CHOICE.shape) is None
    ours, stats = result["eval_result_unstructured"], feature_stats(exam, trained)
    first = shuffled(stats, np.random.default_rng(setup.random_seed))
    settings = Clamp().settings(setup.grid, first)
    rows, _ = run_settings(exam, trained, settings, stats, Clamp())
    best = max((1 - r["forget_share"] for r in rows if r["right"] is not None and r["retain_share"] >= 0.99), default=0)
    assert ours["score"][0] == best and len(ours["score"]) == 2
    assert ours["held_out"][0] == held_out(answers_in(rows, exam), [0.99])[0][0]
    headline = RANDOM_CHOICE.headline(result)
    assert headline["matched random score"] == (np.mean(ours["score"]), min(ours["score"]), max(ours["score"]))


def test_nothing_passes_in_an_empty_dictionary(exam, trained, setup):
    drawn = drawn_at_random(exam, as_logged(trained.cfg), draws=1)
    assert drawn["score"] == drawn["held_out"] == 0.0 and drawn["draws"] == [0.0]


def test_other_seeds_draw_others(exam, trained, setup):
    a, b = (evaluate(exam.model, trained, replace(setup, random_seed=seed, draws=1), exam) for seed in (1, 2))
    again = evaluate(exam.model, trained, replace(setup, random_seed=1, draws=1), exam)
    assert a["eval_result_unstructured"] == again["eval_result_unstructured"] and a["eval_id"] != b["eval_id"]
