"""Halves, kept answers, intervals, power, many comparisons: against plain computations and known truths."""
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import false_discovery_control, spearmanr

from saenb.base.errors import SaenbError
from saenb.base.files import write_json
from saenb.evals.evaluation import evaluation
from saenb.evals.exam import FeatureStats, choose_features
from saenb.evals.halves import (
    Answers, answers_of, chosen, fact_draws, fact_numbers, held_out, held_out_fields, kept_answers, opened, packed,
    split_halves, unpacked, wilson)
from saenb.evals.unlearning import levels_from
from saenb.lab.records import Record, over_seeds
from saenb.lab.workspace import workspace
from saenb.report.compare import compare, records_under, verdicts
from saenb.report.coverage import STRENGTHS, covered, experiment, made_up_dictionary
from saenb.report.statistics import (
    Scatter, benjamini_hochberg, chance, difference_interval, estimate, holm, power, rank_correlation,
    replicates_of, replicated, scatter_of, score_interval)

SUBJECTS = ["wmdp-bio", "high_school_us_history", "college_computer_science", "high_school_geography", "human_aging"]


@st.composite
def answered(draw, most=12):
    "Answers to a few facts in one to three wordings, on both sides of both halves."
    subject, facts = [], []
    for s in range(draw(st.integers(2, 4))):
        for f in range(draw(st.integers(2, 6))):
            for _ in range(draw(st.integers(1, 3))):
                subject.append(s)
                facts.append(f)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    count = draw(st.integers(1, most))
    right = rng.random((count, len(subject))) < rng.choice([0.3, 0.9, 0.99, 1.0], (count, 1))
    ran = rng.random(count) < draw(st.sampled_from([0.0, 0.7, 1.0]))
    right[~ran] = False
    return Answers(right, ran, np.array(subject), fact_numbers(subject, facts),
                   split_halves([str(s) for s in subject], facts))


def plainly(answers, level):
    "The held-out shares as the words say, a setting and a question at a time."
    forgotten, kept = [], []
    for here, there in ((0, 1), (1, 0)):
        def share(i, half, forgets):
            asked = [q for q in range(len(answers.fact))
                     if answers.half[q] == half and answers.forgets[q] == forgets]
            return sum(bool(answers.right[i, q]) for q in asked) / len(asked)
        good = [i for i in range(len(answers.right))
                if answers.ran[i] and share(i, here, False) >= level - 1e-12]
        best = min(good, key=lambda i: (share(i, here, True), -share(i, here, False), i), default=None)
        forgotten.append(0 if best is None else 1 - share(best, there, True))
        kept.append(1 if best is None else share(best, there, False))
    return sum(forgotten) / 2, sum(kept) / 2


@given(answered(), st.sampled_from([0.5, 0.9, 0.99]))
def test_held_out_is_what_its_words_say(answers, level):
    forgotten, kept = held_out(answers, [level])
    assert (forgotten[0], kept[0]) == pytest.approx(plainly(answers, level))
    lower, _ = held_out(answers, [level, 0.5])
    assert lower[0] == pytest.approx((plainly(answers, level)[0] + plainly(answers, 0.5)[0]) / 2)


@given(answered(), st.integers(0, 1), st.integers(0, 2**31))
def test_the_other_half_has_no_say_in_the_choice(answers, half, seed):
    other = answers.half != half
    changed = answers.right.copy()
    changed[:, other] = np.random.default_rng(seed).random((len(changed), other.sum())) < 0.5
    assert chosen(answers, half, 0.9) == chosen(replace(answers, right=changed), half, 0.9)


@given(answered(), st.integers(0, 2**31))
def test_drawing_a_fact_twice_is_asking_it_twice(answers, seed):
    weights = fact_draws(answers, 1, seed)
    times = weights[answers.fact, 0].astype(int)
    assert all(weights[np.unique(answers.fact[mine])].sum() == len(np.unique(answers.fact[mine]))
               for mine in ((answers.subject == s) & (answers.half == h) for s in range(4) for h in (0, 1)) if mine.any())
    again = np.repeat(np.arange(len(times)), times)
    asked = Answers(answers.right[:, again], answers.ran, answers.subject[again], answers.fact[again], answers.half[again])
    assert held_out(answers, [0.9], weights)[0][0] == pytest.approx(plainly(asked, 0.9)[0])


def test_nothing_is_forgotten_where_no_setting_keeps_enough():
    rng = np.random.default_rng(0)
    answers = made_up_dictionary(2.0, rng).answers(rng)
    answers.right[:, ~answers.forgets] &= rng.random((60, 320)) < 0.9
    assert [float(v[0]) for v in held_out(answers, [0.99])] == [0.0, 1.0]
    assert [float(v[0]) for v in held_out(replace(answers, ran=np.zeros(60, bool)), [0.0])] == [0.0, 1.0]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=1, max_size=60))
def test_facts_are_shared_out_evenly_and_never_cut(asked):
    subjects, facts = zip(*asked)
    half = split_halves(subjects, facts)
    placed = dict(zip(asked, half.tolist()))
    assert all(placed[q] == h for q, h in zip(asked, half.tolist()))
    for s in set(subjects):
        mine = [h for (subject, _), h in placed.items() if subject == s]
        assert abs(2 * sum(mine) - len(mine)) <= 1
    order = np.random.default_rng(0).permutation(len(asked)) # a fact's place does not depend on its neighbours'
    by_subject = sorted(order, key=lambda i: list(dict.fromkeys(subjects)).index(subjects[i]))
    assert (split_halves([subjects[i] for i in by_subject], [facts[i] for i in by_subject]) == half[by_subject]).all()


@given(st.lists(st.booleans(), max_size=70))
def test_packing_comes_back(bits):
    assert unpacked(packed(bits), len(bits)).tolist() == bits
    assert json.loads(json.dumps(packed(bits))) == packed(bits)


@given(answered())
def test_answers_come_back_from_a_result(answers):
    names = [str(s) for s in range(answers.subject.max() + 1)]
    numbers = np.concatenate([3 * np.arange((answers.subject == s).sum()) for s in range(len(names))])
    kept = json.loads(json.dumps(kept_answers(answers, names, numbers)))
    back = answers_of(dict(eval_result_unstructured=kept))
    assert back.same_questions(answers) and (back.ran == answers.ran).all()
    assert (back.right == answers.right).all() and kept["asked"]["0"][-1] == numbers[(answers.subject == 0).sum() - 1]
    assert "facts" in kept or len(set(answers.fact.tolist())) == len(answers.fact)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5]), st.sampled_from([0.0, 0.2])), min_size=1, max_size=40))
def test_equally_dense_features_are_chosen_in_their_order(densities):
    forget, retain = map(np.array, zip(*densities))
    found = choose_features(FeatureStats(forget, retain, np.ones(len(forget))), 0.1).tolist()
    assert found == sorted((i for i in range(len(forget)) if forget[i] > 0 and retain[i] < 0.1), key=lambda i: (-forget[i], i))


# intervals

def test_without_draws_of_facts_it_is_students_t():
    values = [0.2, 0.31, 0.27, 0.22]
    e = estimate(np.array(values)[:, None], -1.0)
    assert (e.value, e.low, e.high) == pytest.approx(over_seeds(values)) and e.common == 0
    from scipy.stats import ttest_1samp
    assert e.p == pytest.approx(ttest_1samp(values, 0).pvalue)


def test_what_facts_do_to_all_seeds_is_counted_once():
    rng = np.random.default_rng(0)
    fact, own = 0.03 * rng.standard_normal(2000), 0.02 * rng.standard_normal((400, 2000))
    found = np.hstack([0.5 + 0.02 * rng.standard_normal((400, 1)), 0.5 + fact + own])
    e = estimate(found)
    assert e.common == pytest.approx(0.03, rel=0.1) and e.between == pytest.approx(0.02, rel=0.1)
    assert e.high - e.low == pytest.approx(2 * 1.96 * 0.03, rel=0.15) # seeds' share is averaged away


@given(st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=1, max_size=6))
def test_intervals_stay_in_their_range_and_hold_the_mean(found):
    found = np.array(found)
    for e, lowest in ((estimate(found), 0), (estimate(found - found[::-1], -1.0), -1)):
        assert e.low <= e.value <= e.high
        if len(found) > 1: assert lowest <= e.low and e.high <= 1
        assert e.p is None or 0 <= e.p <= 1


@given(st.lists(st.lists(st.floats(-0.2, 0.4), min_size=5, max_size=5), min_size=2, max_size=5))
def test_an_interval_leaves_out_zero_where_p_is_below_5_percent(found):
    e = estimate(np.array(found), -1.0)
    if abs(e.p - 0.05) > 1e-6 and e.between > 1e-9: assert (e.low <= 0 <= e.high) == (e.p > 0.05)


@given(st.floats(0, 1), st.integers(1, 500))
def test_wilsons_interval_is_as_it_is_defined(value, count):
    """Its ends are the shares from which the value lies 1.96 standard errors away."""
    low, high = wilson(value, count)
    assert 0 <= low <= value + 1e-9 and value - 1e-9 <= high <= 1
    for end in (low, high):
        if 0 < end < 1: assert (value - end)**2 == pytest.approx(1.96**2 * end * (1 - end) / count, abs=1e-9)


def test_an_end_that_is_the_number_itself_is_wilsons():
    assert opened(0.0, 0.0, 0.0, 100) == wilson(0.0, 100) and opened(1.0, 1.0, 1.0, 100) == pytest.approx(wilson(1.0, 100))
    assert opened(0.3, 0.2, 0.4, 100) == (0.2, 0.4)
    assert opened(0.3, 0.1, 0.3, 100) == (0.1, wilson(0.3, 100)[1]) and opened(0.3, -np.inf, np.inf, 100) == (-np.inf, np.inf)


def test_runs_that_never_vary_are_still_uncertain(tmp_path):
    rng = np.random.default_rng(0)
    whole = made_up_dictionary(0.0, rng).answers(rng)
    untouched = Answers(np.ones_like(whole.right), whole.ran, whole.subject, whole.fact, whole.half)
    runs = [[made_record(tmp_path, f"orthogonality/{n}", seed, untouched) for seed in range(3)] for n in (0, 1)]
    count = len(np.unique(whole.fact[whole.forgets]))
    score, difference = score_interval(runs[1]), difference_interval(runs[1], runs[0])
    assert (score.low, score.high) == wilson(0.0, count) and 0 < score.high < 0.05
    assert (difference.low, difference.high, difference.p) == (-score.high, score.high, 1.0)


def test_coverage_is_near_95_percent():
    "Roughly; the long measurement is kept beside the records and looked at below."
    found = covered(STRENGTHS["middling"], 3, experiments=80, draws=50, truths=(0.405, 0.516))
    assert 0.87 <= found["run"]["coverage"] and 0.87 <= found["difference"]["coverage"]


def test_the_kept_measurement_says_93_to_97_percent():
    "Up to one standard error of a measurement of so many experiments."
    kept = json.loads((workspace()/"coverage.json").read_text())["rows"]
    rows = [r for r in kept if r["interval"] in ("run", "difference")]
    assert {(r["score"], r["seeds"], r["interval"]) for r in rows} == set(
        itertools.product(STRENGTHS, (3, 5, 10), ("run", "difference")))
    for r in rows:
        error = np.sqrt(0.05 * 0.95 / r["experiments"])
        assert 0.93 - error <= r["coverage"] <= 0.97 + error and r["experiments"] >= 400, r


def test_power_is_what_simulation_finds():
    scatter = Scatter(0.05)
    needed = power(scatter)
    assert needed[0.1] < needed[0.05] and power(Scatter(0.05, 0.04))[0.05] is None and power(Scatter(0.0))[0.05] == 2
    rng = np.random.default_rng(0)
    for effect, seeds in needed.items():
        told = [estimate(rng.normal(effect, 0.05, (seeds, 1)), -1.0).p < 0.05 for _ in range(1500)]
        assert np.mean(told) == pytest.approx(chance(scatter, effect, seeds), abs=0.035)
        assert chance(scatter, effect, seeds) >= 0.8 > (chance(scatter, effect, seeds - 1) if seeds > 2 else 0)
    with pytest.raises(SaenbError, match="effect is 0"): power(scatter, (0,))


# many comparisons

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@given(p_values)
def test_benjamini_hochberg_is_scipys(p):
    np.testing.assert_allclose(benjamini_hochberg(p), false_discovery_control(p), atol=1e-12)


@given(p_values)
def test_holm_is_its_formula_and_the_stricter_one(p):
    for i, mine in enumerate(p): # the largest of (m - rank) p over all that are no larger
        ranked = sorted(range(len(p)), key=lambda j: (p[j], j))
        upto = ranked[:ranked.index(i) + 1]
        expected = min(1, max((len(p) - rank) * p[j] for rank, j in enumerate(upto)))
        assert holm(p)[i] == pytest.approx(expected)
    assert (holm(p) >= benjamini_hochberg(p) - 1e-12).all() and (holm(p) >= np.array(p) - 1e-12).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(holm(p)[order]) >= 0).all() and (np.diff(benjamini_hochberg(p)[order]) >= 0).all()


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    quality = rng.random(12)
    a, b = ({str(i): (q + 0.1 * rng.standard_normal(4)).tolist() for i, q in enumerate(quality)} for _ in range(2))
    value, low, high = rank_correlation(a, b | {"elsewhere": [1.0]}, draws=300)
    expected = spearmanr([np.mean(v) for v in a.values()], [np.mean(v) for v in b.values()]).statistic
    assert value == pytest.approx(expected) and -1 <= low < value < high <= 1
    assert rank_correlation(a, a, draws=50)[0] == pytest.approx(1)
    with pytest.raises(SaenbError, match="at least 4 runs and there are 3"):
        rank_correlation(dict(list(a.items())[:3]), b)


# records

def made_record(root, run, seed, answers, **training):
    "A finished record with made-up answers, as an evaluation would have left it."
    experiment, number = run.split("/")
    folder = root/experiment/f"run_{number}"/f"seed_{seed}"
    lost = (~answers.right[:, answers.forgets]).mean(1)[answers.right[:, ~answers.forgets].mean(1) >= 0.99].max(initial=0)
    numbers = np.concatenate([np.arange((answers.subject == s).sum()) for s in range(5)])
    ours = dict(score=float(lost), interval=[0.0, 1.0], selectivity=float(lost) / 2, selectivity_interval=[0.0, 1.0],
                retain_floor=0.99, lowest_retain=0.9, **kept_answers(answers, SUBJECTS, numbers),
                **held_out_fields(answers, 0.99, levels_from(0.9), draws=50))
    write_json(folder/"config.json", dict(run=dict(id=run, title=f"Run {number}", mechanisms=[]), preset="made", seed=seed,
                                          variant="", training=dict(steps=300, batch=64, lr=1e-3) | training))
    write_json(folder/"final_info.json", {})
    write_json(folder/"evals"/"unlearning.json", dict(eval_id=f"{run} {seed}", eval_result_unstructured=ours))
    return Record(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A baseline, a far better run and one like it, three seeds each."
    root, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(1)
    ease = rng.standard_normal(240)
    return root, {number: [made_record(root, f"orthogonality/{number}", seed, made_up_dictionary(at, rng, 0.0).answers(rng, ease))
                           for seed in range(4)] for number, at in ((0, -1.5), (1, 0.2), (2, -1.5))}


def test_the_kept_headline_is_recomputed_from_the_record(made):
    for r in made[1][1]:
        shown = evaluation("unlearning").headline(r.result())
        answers = answers_of(r.result())
        assert shown["held-out score"][0] == held_out(answers, [0.99])[0][0]
        assert shown["held-out selectivity"][0] == held_out(answers, levels_from(0.9))[0][0]
        assert shown["held-out score"] == tuple(np.array([r.unlearning["held_out"], *r.unlearning["held_out_interval"]]))
    assert [float(v) for v in replicates_of(made[1][1], draws=5)[:, 0]] == [r.unlearning["held_out"] for r in made[1][1]]


def test_compare_takes_intervals_over_seeds_and_facts(made):
    root, runs = made
    rows = {(r["run"], r["measure"]): r for r in compare(records_under([root]))}
    row, e = rows["orthogonality/1", "held-out score"], difference_interval(runs[1], runs[0])
    assert (row["difference"], row["difference_low"], row["difference_high"], row["p"]) == (e.value, e.low, e.high, e.p)
    assert (row["value"], row["low"]) == (score_interval(runs[1]).value, score_interval(runs[1]).low)
    lines = verdicts(list(rows.values())).splitlines()
    assert "held-out score" in lines[0] and "Holm" in lines[0] and "Benjamini-Hochberg" in lines[0]
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["helps", "not told apart"]
    found = scatter_of(runs[1], runs[0])
    assert (found.between, found.common) == (e.between, e.common)
    assert scatter_of(runs[0] + runs[0]) == scatter_of(runs[0]) # one training under two names is one


def test_ideas_on_another_architecture_are_compared_with_its_own_baseline(made, tmp_path):
    from saenb.lab import survival
    assert survival.best_runs(made[0], 1) == {"orthogonality": ["orthogonality/1"]} # a baseline is no idea
    def copy(variant):
        for number, records in made[1].items():
            for r in records[:3 - (number == 2)]: # run 2 lacks a seed
                folder = tmp_path/"orthogonality"/f"run_{number}@{variant}"/f"seed_{r.seed}"
                for name in ("config.json", "final_info.json", "evals/unlearning.json"):
                    kept = json.loads((r.path/name).read_text())
                    write_json(folder/name, kept | dict(variant=variant) if name == "config.json" else kept)
    copy("architecture=topk,k=5")
    rows = survival.survival(tmp_path)
    assert [(r["architecture"], r["run"], r["seeds"]) for r in rows] == [("topk", "orthogonality/1", 3), ("topk", "orthogonality/2", 2)]
    assert rows[0]["difference"] == difference_interval(made[1][1][:3], made[1][0][:3]) and rows[0]["baseline"] < rows[0]["score"]
    assert [r["holm"] for r in rows] == holm([r["difference"].p for r in rows]).tolist()
    drawn = survival.draw_survival(rows)
    assert [t.get_text() for t in drawn.axes[0].get_yticklabels()] == ["Adaptive tau", "Basic orthogonality"]
    copy("architecture=jumprelu")
    assert len(survival.survival(tmp_path)) == 4
    both = survival.survival(tmp_path, together=True)
    assert [(r["architecture"], r["run"], r["seeds"]) for r in both] == [("all", "orthogonality/1", 6), ("all", "orthogonality/2", 4)]
    assert both[0]["difference"] == difference_interval(2 * made[1][1][:3], 2 * made[1][0][:3])
    assert survival.survival(tmp_path/"empty") == []


def test_ideas_on_other_architectures_are_made_with_their_baselines(monkeypatch):
    from saenb.lab import survival
    asked = []
    monkeypatch.setattr(survival, "run", lambda id, preset, seed, out, steps, change, progress: asked.append((id, preset.recorded, seed, steps, change)))
    survival.make_survival(dict(orthogonality=["orthogonality/2"], contrastive=["contrastive/3"]), seeds=(4,), steps=9, on=dict(topk="topk,k=5"))
    ids = ["orthogonality/0", "orthogonality/2", "contrastive/0", "contrastive/3"]
    assert asked == [(id, ("unlearning",), 4, 9, dict(architecture="topk,k=5")) for id in ids]


def test_a_record_of_before_opens_and_is_compared(made, tmp_path):
    "It has neither halves nor answers, and the tables are then about the score."
    for number, found in made[1].items():
        for r in found:
            folder = tmp_path/"orthogonality"/f"run_{number}"/f"seed_{r.seed}"
            result = r.result()
            ours = {k: v for k, v in result["eval_result_unstructured"].items() if "score" in k or "interval" in k or k == "selectivity"}
            ours = {k: v for k, v in ours.items() if not k.startswith("held")}
            for name in ("config.json", "final_info.json"): write_json(folder/name, json.loads((r.path/name).read_text()))
            write_json(folder/"evals"/"unlearning.json", dict(result, eval_result_unstructured=ours))
    records = records_under([tmp_path])
    rows = compare(records)
    assert {r["measure"] for r in rows} == {"score", "selectivity"} and "score beside" in verdicts(rows)
    with pytest.raises(SaenbError, match="does not keep its answers"): answers_of(records[0].result())


@pytest.mark.parametrize("spoiled", [dict(half="AAAA"), dict(half="?"), dict(answers=["AAAA"]), dict(asked={"a": [1, 2]}),
                                     dict(facts={"wmdp-bio": [1]})])
def test_answers_that_cannot_be_read(made, spoiled):
    result = made[1][0][0].result()
    result = dict(result, eval_result_unstructured=result["eval_result_unstructured"] | spoiled)
    with pytest.raises(SaenbError, match="cannot be read") as e: answers_of(result)
    assert str(e.value).count(". ") == 0 and str(e.value).endswith(".")


def test_what_cannot_be_put_together(made, tmp_path):
    rng = np.random.default_rng(0)
    with pytest.raises(SaenbError, match="cannot be paired"): difference_interval(made[1][1][:2], made[1][0][1:3])
    whole = made_up_dictionary(0.0, rng).answers(rng)
    fewer = Answers(whole.right[:, 2:], whole.ran, whole.subject[2:], whole.fact[2:] - 1, whole.half[2:])
    with pytest.raises(SaenbError, match="asked different questions"): replicated([whole, fewer], [0.99], 10)
    other = made_record(tmp_path, "orthogonality/1", 0, fewer)
    with pytest.raises(SaenbError, match="asked different questions"): replicates_of([made[1][0][0], other])


def test_too_few_questions_for_halves_have_no_held_out_score():
    answers = Answers(np.ones((2, 3), bool), np.ones(2, bool), np.array([0, 1, 1]), np.arange(3), np.array([0, 0, 1]))
    assert set(held_out_fields(answers, 0.99, [0.99]).values()) == {None}


def test_a_baseline_and_its_better_run_share_their_facts():
    baseline, better = experiment(STRENGTHS["high"], 3, np.random.default_rng(0), draws=60)
    assert np.corrcoef(np.vstack([baseline, better])[:, 1:])[np.triu_indices(6, 1)].mean() > 0.1
