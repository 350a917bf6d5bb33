import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from saenb.base.errors import SaenbError
from saenb.base.schemas import schema_error
from saenb.evals.evaluation import corpus_rows, reference_rows
from saenb.evals.controls import (as_logged, principal_components, supervised_reference, corpus_activations,
                                  untrained)
from saenb.data.questions import ORDERS, letter_tokens, question_prompt
from saenb.evals.exam import REFERENCE, Exam, Grid, choose_features, feature_stats
from saenb.evals.halves import answers_of, held_out, wilson
from saenb.evals.interventions.clamp import Clamp
from saenb.evals.interventions.intervention import InterventionBatch, plain_answers
from saenb.evals.unlearning import (
    UNLEARNING, bootstrap, evaluate, headline, levels_from, notes, run_settings, selectivity, table,
    trade_off)
from saenb.sae.sae import SAE, SAEConfig
from saenb.data.sources import boot


@pytest.fixture(scope="module")
def dictionaries(trained, exam, store):
    x = store.rows(0, 8192).x
    return dict(trained=trained, untrained=untrained(trained.cfg, x),
                ceiling=supervised_reference(trained.cfg, **corpus_activations(exam)),
                components=principal_components(trained.cfg, x))


@pytest.fixture(scope="module")
def results(exam, dictionaries):
    return {name: evaluate(exam.model, sae, exam.setup, exam) for name, sae in dictionaries.items()}


def test_the_prompt_is_the_references():
    assert question_prompt("human aging", "Why?", list("wxyz")) == (
        "<bos><start_of_turn>user\nThe following are multiple choice questions (with answers) "
        "about human aging.\nWhy?\nA. w\nB. x\nC. y\nD. z"
        "<end_of_turn>\n<start_of_turn>model\nAnswer: (")


def test_known_means_right_under_all_24_orders(exam, model):
    """Asked again one by one, through the Hugging Face model, without batches."""
    letters = letter_tokens(model.tokenizer)
    source = exam.setup.questions[3]
    rows = source.load()[:10]
    for i, row in enumerate(rows):
        right = []
        for order in ORDERS:
            ids = model.tokenizer(question_prompt(source.spoken, row["question"],
                                                  [row["choices"][j] for j in order]),
                                  add_special_tokens=False, return_tensors="pt")
            probabilities = model.original_model(**ids).logits[0, -1].softmax(-1)
            right.append(order[max(range(4), key=lambda l: max(
                probabilities[letters[0, l]], probabilities[letters[1, l]]))] == row["answer"])
        assert all(right) == (i in exam.known[source.subject])
    assert len(ORDERS) == 24 == len(set(ORDERS))


def test_the_world_is_known_and_large_enough(exam, world):
    """A third of its questions is known; and all of them are enough."""
    sources = {s.subject: len(s.load()) for s in world.question_sources()}
    assert (sum(map(len, exam.known.values())) >= 0.95 * sum(len(s.load()) for s in exam.setup.questions)
            >= 0.95 * sum(sources.values()) / 3)
    assert exam.base.all()
    forget, *retain = sources.values()
    assert 1 / forget < 0.01 and 1 / sum(retain) < 0.005


def test_reference_rows_are_cut_as_the_reference_cuts(model):
    """The reference's function, written out plainly."""
    tokenizer = model.tokenizer
    texts = [f"The host of x is tako. As for y, its {'rank ' * n}is z." for n in range(40)]
    full = tokenizer.eos_token.join(texts)
    size = (len(full) - 1) // 20 + 1
    ids = [t for i in range(20) for t in tokenizer(full[i * size:(i + 1) * size])["input_ids"]]
    rows = [ids[i:i + 16] for i in range(0, len(ids) - 15, 16)]
    for row in rows: row[0] = tokenizer.bos_token_id
    assert reference_rows(tokenizer, texts, 16).tolist() == rows


def test_features_are_chosen_by_density():
    from saenb.evals.exam import FeatureStats
    stats = FeatureStats(forget=np.array([0.5, 0.2, 0.0, 0.3, 0.1]),
                         retain=np.array([0.4, 0.0, 0.0, 0.0005, 0.001]), typical=np.ones(5))
    assert choose_features(stats, 0.001).tolist() == [3, 1]
    assert choose_features(stats, 0.01).tolist() == [3, 1, 4]
    assert choose_features(stats, 0.0).tolist() == []


def test_densities_against_a_count_by_hand(exam, trained, model):
    stats = feature_stats(exam, trained)
    rows = corpus_rows(model.tokenizer, exam.setup)["retain"]
    active, tokens = torch.zeros(trained.cfg.d_sae), 0
    for some in rows.split(64):
        x = model.original_model(some, output_hidden_states=True).hidden_states[exam.layer + 1]
        keep = torch.tensor([[t not in (0, 1, 2) for t in row] for row in some.tolist()])
        active += (trained.encode(x[keep]) > 0).sum(0)
        tokens += int(keep.sum())
    np.testing.assert_allclose(stats.retain, np.round((active / tokens).detach().numpy(), 6), atol=3 / tokens)


def test_fast_equals_plain_on_every_dictionary(exam, dictionaries):
    """Question by question; abandoned settings really are below the lowest share of interest."""
    for name, sae in dictionaries.items():
        stats = feature_stats(exam, sae)
        counts = (3, 12) if name == "trained" else (12,)
        grid = Grid(thresholds=(0.001, 0.6), n_features=counts, multipliers=(2, 40))
        settings = Clamp().settings(grid, stats)
        rows, batch = run_settings(exam, sae, settings, stats, Clamp())
        for row, setting in zip(rows, settings):
            plain = (plain_answers(exam, sae, setting["features"], Clamp().values(setting, stats), Clamp())
                     if len(setting["features"]) else exam.base)
            retain = plain[~exam.forgets].float().mean().item()
            if row["right"] is None:
                assert retain < exam.setup.lowest_retain, name
            else: assert torch.equal(row["right"], plain), name
        assert batch.read <= len(settings) * len(exam.stream)
        assert batch.passes == batch.read * (exam.depth - exam.layer - 1)


@pytest.fixture(scope="module")
def beside(exam, trained):
    """The trained dictionary under the reference's settings, beside one other."""
    one = Grid(thresholds=(0.01,), n_features=(10,), multipliers=(8,), typical=True)
    return evaluate(exam.model, trained, replace(exam.setup, grid=one, reference=REFERENCE), exam)


def test_the_score_is_the_references_formula(exam, trained, beside):
    result = beside["eval_result_unstructured"]
    stats = feature_stats(exam, trained)
    shares = []
    for setting in Clamp().settings(REFERENCE, stats):
        right = (plain_answers(exam, trained, setting["features"], setting["multiplier"], Clamp())
                 if len(setting["features"]) else exam.base)
        if right[~exam.forgets].float().mean() >= 0.99:
            shares.append(right[exam.forgets].float().mean().item())
    assert result["reference_score"] == 1 - min(shares, default=1)


def test_the_references_settings_are_tried_where_they_are_asked_for(beside, results):
    """A quick budget leaves them out, and its result says so."""
    found, left_out = (r["eval_result_unstructured"] for r in (beside, results["trained"]))
    low, high = found["reference_interval"]
    assert low <= found["reference_score"] <= high and len(found["settings"]) == 1 + 16
    assert left_out["reference_score"] is None is left_out["reference_interval"]
    assert len(left_out["settings"]) == 18
    measures = [{row["measure"]: row for row in table(r)} for r in (beside, results["trained"])]
    assert measures[0]["under the reference's settings"] == dict(
        measure="under the reference's settings", value=found["reference_score"], low=low, high=high)
    assert measures[0].keys() - measures[1].keys() == {"under the reference's settings"}
    for result, said in ((beside, True), (results["trained"], False)):
        assert any("reference's settings" in line for line in notes(result)[0]) == said
        assert schema_error(json.loads(json.dumps(result)), UNLEARNING.shape) is None


def test_the_result_has_saebenchs_fields(results):
    result = results["trained"]
    assert {"eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics",
            "eval_result_details", "sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id",
            "sae_lens_version", "sae_cfg_dict", "eval_result_unstructured"} == set(result)
    assert (result["eval_result_metrics"]
            == dict(unlearning=dict(unlearning_score=result["eval_result_unstructured"]["score"])))
    assert {"random_seed", "dataset_names", "intervention_method", "retain_thresholds", "n_features_list",
            "multipliers", "dataset_size", "seq_len"} <= set(result["eval_config"])
    json.dumps(result, allow_nan=False)


def test_held_out_numbers_are_recomputed_from_what_a_result_keeps(exam, results):
    """Answers, questions, facts and halves come back as they were; wordings of a fact share a half."""
    for result in results.values():
        ours = result["eval_result_unstructured"]
        answers = answers_of(json.loads(json.dumps(result)))
        assert ours["asked"] == exam.known
        assert answers.half.tolist() == exam.half.tolist() and answers.forgets.tolist() == exam.forgets.tolist()
        pairs = {(s, f): n for s, f, n in zip(exam.subject, exam.fact, answers.fact.tolist())}
        assert len(pairs) == len(set(answers.fact.tolist())) and all(
            pairs[s, f] == n for s, f, n in zip(exam.subject, exam.fact, answers.fact.tolist()))
        forgotten, retained = held_out(answers, [exam.setup.retain_floor])
        assert (ours["held_out"], ours["held_out_retain"]) == (forgotten[0], retained[0])
        assert headline(result)["held-out selectivity"][0] == held_out(answers, levels_from(0.9))[0][0]
        # the settings' shares are those of the answers
        rows = ours["settings"][:len(answers.ran)]
        assert [r["forget_share"] is not None for r in rows] == answers.ran.tolist()
        for right, row in zip(answers.right, rows):
            if row["forget_share"] is not None:
                assert (right[answers.forgets].mean(), right[~answers.forgets].mean()) == pytest.approx(
                    (row["forget_share"], row["retain_share"]))


def test_controls_stand_where_they_must(exam, results, trained):
    found = {name: r["eval_result_unstructured"] for name, r in results.items()}
    score = {name: r["score"] for name, r in found.items()}
    assert score["untrained"] == 0.0 == evaluate(exam.model, as_logged(trained.cfg), exam.setup,
                                                 exam)["eval_result_unstructured"]["score"]
    assert score["ceiling"] >= 0.6 and score["ceiling"] > score["components"]
    assert (found["trained"]["selectivity_interval"][0] > 0
            and found["trained"]["selectivity_interval"][1] < found["ceiling"]["selectivity"])



def test_what_is_computed_once_is_the_same(exam, trained):
    """Two settings share a place exactly if they have made the same stream of the question up to there."""
    stats = feature_stats(exam, trained)
    chosen = choose_features(stats, 0.6)
    rare = [f for f in chosen if stats.retain[f] < 0.01]
    lists = [chosen[:12], chosen[:3], rare[:3], chosen[:3], rare[:6], []]
    batch = InterventionBatch(
        exam, trained,
        [(f, torch.full((len(f),), v)) for f, v in zip(lists, (40.0, 40.0, 40.0, 2.0, 40.0, 1.0))], Clamp())
    settings, shared, apart = torch.arange(len(lists)), 0, 0
    for q in range(0, len(exam.tokens), 30):
        places = torch.arange(len(exam.tokens[q]))
        streams = torch.stack([batch.stream(torch.full_like(places, q), torch.full_like(places, s), places)
                               for s in settings])
        names = batch.first_equal(q, settings)
        for a in settings.tolist():
            for b in settings.tolist():
                same = (streams[a] == streams[b]).all(1).long().cumprod(0).bool()
                assert ((names[a] == names[b]) == same.numpy()).all()
                shared, apart = shared + int(same.sum()), apart + int((~same).sum())
    assert shared > 0 and apart > 0


def test_a_model_in_half_precision(exam, trained, world):
    """The fast path and the long one agree there too, but for questions that rounding decides."""
    half = Exam(boot(world.path/"model", dtype="bfloat16"), replace(exam.setup, lowest_retain=0.0),
                exam.layer)
    features = choose_features(feature_stats(half, trained), 0.01)[:10]
    outcome, = InterventionBatch(half, trained, [(features, torch.full((len(features),), 8.0))],
                                 Clamp()).run()
    plain = plain_answers(half, trained, features, 8.0, Clamp())
    assert (outcome.right == plain).float().mean() > 0.97 and plain.float().mean() < 0.99


def test_nothing_happens_where_nothing_fires(exam, trained):
    batch = InterventionBatch(exam, SAE(trained.cfg),
                              [([0, 1], torch.tensor([50.0, 50.0])), ([], torch.zeros(0))], Clamp())
    for outcome in batch.run():
        assert not outcome.fired.any() and torch.equal(outcome.right, exam.base)
    assert batch.read == 0


points = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=12)


@given(points, st.floats(0, 1), st.floats(0, 1))
def test_asking_for_less_never_costs_more(points, a, b):
    low, high = sorted((a, b))
    assert trade_off(points, low) <= trade_off(points, high) <= 1


@given(points)
def test_selectivity_lies_between_0_and_1_and_grows_with_points(points):
    assert 0 <= selectivity(points) <= 1
    assert selectivity(points + [(1.0, 0.0)]) == 1 >= selectivity(points)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_the_interval_holds_the_score(seed):
    rng = np.random.default_rng(seed)
    forgets = np.arange(300) < 100
    right = np.ones((3, 300), bool)
    right[:, :100] = rng.random((3, 100)) < 0.4
    low, high = bootstrap(right, forgets, [0.99])
    assert (low <= 1 - right[:, :100].mean(1).min() + 1e-9 and high >= 1 - right[:, :100].mean(1).min() - 0.05
            and high - low < 0.3)
    untouched = bootstrap(np.ones_like(right), forgets, [0.99])
    assert bootstrap(right[:0], forgets, [0.99]) == untouched == wilson(0.0, 100) and untouched[0] == 0 < untouched[1] < 0.04
    assert bootstrap(np.tile(~forgets, (3, 1)), forgets, [0.99]) == pytest.approx((1 - untouched[1], 1.0))


def test_a_dictionary_of_another_width(exam):
    with pytest.raises(SaenbError, match="width 64 and the model's is 192"):
        evaluate(exam.model, SAE(SAEConfig(d_in=64, d_sae=8)), exam.setup, exam)


def test_a_corpus_shorter_than_a_row(exam, model, tmp_path):
    from saenb.data.sources import TextSource
    (tmp_path/"short.txt").write_text("The host of rufige is tako and nothing else is known about it at all.")
    with pytest.raises(SaenbError, match="does not fill one row of 128 tokens"):
        corpus_rows(model.tokenizer, replace(exam.setup, forget=TextSource(str(tmp_path/"short.txt"))))
