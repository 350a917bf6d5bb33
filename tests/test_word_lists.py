"""Controls that look at words alone, each compared with the same thing computed another way."""
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from saenb.data.questions import read_letters
from saenb.evals.evaluation import corpus_rows
from saenb.evals.exam import choose_features
from saenb.evals.unlearning import score_of
from saenb.evals.word_lists import (Bag, TokenFeatures, auroc, chosen_entries, directions, entry_stats,
                                    held_out_scores, judged_list, pairs, windows, word_lists, words)

rows_of_tokens = st.lists(st.lists(st.integers(0, 50), min_size=5, max_size=5), min_size=1, max_size=4)


@given(rows_of_tokens)
def test_codes_stand_for_words_and_pairs(rows):
    tokens = torch.tensor(rows)
    assert torch.equal(words(tokens), tokens)
    seen = {}
    for row, codes in zip(rows, pairs(tokens).tolist()):
        assert codes[0] == -1 and -1 not in codes[1:]
        for pair, code in zip(zip(row, row[1:]), codes[1:]):
            assert seen.setdefault(pair, code) == code
    assert len(set(seen.values())) == len(seen)


@given(rows_of_tokens, st.integers(1, 7))
def test_windows_hold_the_last_tokens(rows, size):
    found = windows(torch.tensor(rows), size).tolist()
    for row, seen in zip(rows, found):
        for place, last in enumerate(seen):
            assert [t for t in last if t >= 0] == row[max(0, place + 1 - size):place + 1]


@pytest.mark.parametrize("read", [words, pairs])
def test_densities_are_shares_of_the_corpora(exam, read):
    entries, stats = entry_stats(exam, read)
    for side, density in (("forget", stats.forget), ("retain", stats.retain)):
        counts, total = Counter(), 0
        for row in corpus_rows(exam.model.tokenizer, exam.setup)[side].tolist():
            for place, token in enumerate(row):
                if token in (0, 1, 2): continue # padding, end, beginning
                total += 1
                counts[token if read is words else (row[place - 1], token)] += 1
        if read is pairs: counts = {a * 2**32 + b: n for (a, b), n in counts.items()}
        expected = [counts.get(e, 0) / total for e in entries.tolist()]
        np.testing.assert_allclose(density, expected, atol=6e-7)


def test_a_setting_is_what_a_hook_on_the_stream_gives(exam):
    """The ten densest words are pushed back, once by the exam's fast way and once prompt by prompt."""
    entries, stats = entry_stats(exam, words)
    row = next(r for r in judged_list(exam, words) if r["chosen"] == 10 and r["right"] is not None
               and not r["right"].all())
    chosen = choose_features(stats, row["retain_threshold"])[:10].copy()
    on_list, right = torch.from_numpy(entries.numpy()[chosen]), []
    features = TokenFeatures(words, on_list, None)
    own = directions(exam, features.active)[:10]
    for tokens, answer in zip(exam.tokens, exam.answer):
        active = features.active(tokens).float()
        active[0] = 0
        hook = (f"blocks.{exam.layer}.hook_out",
                lambda stream, hook: stream - (1 + row["multiplier"]) * active @ own)
        with exam.model.hooks(fwd_hooks=[hook]):
            right.append(read_letters(exam.model, [tokens], exam.letters)[0] == answer)
    assert torch.equal(row["right"], torch.stack(right))


def test_directions_are_differences_of_means(exam):
    entries, stats = entry_stats(exam, words)
    chosen = entries.numpy()[chosen_entries(exam, stats)][:5]
    found = directions(exam, TokenFeatures(words, torch.from_numpy(chosen), None).active)
    stream, tokens, side = [], [], []
    for name in ("forget", "retain"):
        for t, x, keep in exam.readings.corpus(exam.setup, name):
            stream.append(x[keep]), tokens.append(t[keep]), side.extend([name == "forget"] * int(keep.sum()))
    stream, tokens, side = torch.cat(stream).double(), torch.cat(tokens), torch.tensor(side)
    for i, word in enumerate(chosen):
        own = stream[tokens == word].mean(0) - stream.mean(0)
        torch.testing.assert_close(found[i].double(), own, atol=1e-4, rtol=1e-3)
    difference = stream[side].mean(0) - stream[~side].mean(0)
    torch.testing.assert_close(found[-1].double(), difference, atol=1e-4, rtol=1e-3)


def test_a_bag_is_a_logistic_regression_on_counts(exam):
    """Fitted again from dictionaries of counts."""
    bag, counts, sides = Bag(exam, window=3, limit=10**9), {0: [], 1: []}, {0: [], 1: []}
    for side in ("forget", "retain"):
        for n, row in enumerate(corpus_rows(exam.model.tokenizer, exam.setup)[side].tolist()):
            for place, token in enumerate(row):
                if token not in (0, 1, 2):
                    counts[n % 2].append(Counter(map(str, row[max(0, place - 2):place + 1])))
                    sides[n % 2].append(side == "forget")
    table = DictVectorizer()
    fit = LogisticRegression(C=1.0, max_iter=300).fit(table.fit_transform(counts[0]), sides[0])
    expected = fit.decision_function(table.transform(counts[1]))
    found = held_out_scores(exam, bag)
    np.testing.assert_allclose(torch.cat(list(found.values())).numpy(), expected, atol=0.05)
    assert auroc(found) == pytest.approx(roc_auc_score(sides[1], torch.cat(list(found.values())).numpy()))
    assert 0.7 < auroc(found) < auroc(held_out_scores(exam, Bag(exam, window=16)))


def test_a_bag_has_no_opinion_of_words_it_never_saw(exam):
    bag = Bag(exam, limit=2000)
    unseen = torch.full((1, 20), 10**6)
    assert torch.equal(bag(unseen), torch.full((1, 20), bag.bias))


def test_words_alone_reach_the_supervised_reference_on_the_first_world(exam):
    scores = {name: score_of(rows, exam, 0.99)["score"] for name, rows in word_lists(exam).items()}
    assert set(scores) == {"single words", "pairs of words", "bag of 16 words"}
    assert all(0.3 < score <= 1 for score in scores.values()) and scores["single words"] > 0.6
