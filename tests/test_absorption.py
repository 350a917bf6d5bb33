import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from saenb.base.errors import SaenbError
from saenb.evals.absorption import Features, absorption, evaluate, headline, measure_absorption, mean_interval, plot, rank_features, split_features, table
from saenb.evals.class_words import AbsorptionSetup, Probes, Words, f1, first_letters, ground_truth, labelled_words, probes_of, read_words, train_probes, words_of
from saenb.evals.evaluation import Readings, as_text
from saenb.evals.controls import as_logged, untrained
from saenb.sae.sae import SAE, SAEConfig
from saenb.data.world_tasks import class_words
from saenb.train.config import TrainConfig
from saenb.train.trainer import Trainer
from saenb.data.facts import Writer, write_rows


@pytest.fixture(scope="module")
def setup(world, tmp_path_factory):
    """Names and values of every subject, at the end of statements that do not tell the subject."""
    path = tmp_path_factory.mktemp("words")/"words.jsonl.gz"
    write_rows(path, class_words(Writer(world.facts, "absorption test"), 3))
    return AbsorptionSetup(words=str(path), train_share=0.6, min_feats_for_eval=5, probe_num_epochs=100, k_sparse_probe_batch_size=32)


@pytest.fixture(scope="module")
def readings(model, world): return Readings(model, world.layer)


@pytest.fixture(scope="module")
def sae(store, fresh): return Trainer(fresh(d_sae=384), store, cfg=TrainConfig(steps=200, batch=512, lr=1e-3)).fit(progress=False)


@pytest.fixture(scope="module")
def results(model, sae, setup, readings, store):
    dictionaries = dict(trained=sae, untrained=untrained(sae.cfg, store.rows(0, 4096).x))
    return {name: evaluate(model, each, setup, readings) for name, each in dictionaries.items()}


def one_word(x, acts, decoder, direction, main):
    """The definition, for a single word, in plain numbers."""
    unit = direction / np.linalg.norm(direction)
    cosine = [float(row @ unit) / float(np.linalg.norm(row)) for row in decoder]
    parts, whole = [float(a) * c for a, c in zip(acts, cosine)], float(x @ unit)
    own = sum(parts[i] for i in main)
    others = sorted((p for i, p in enumerate(parts) if i not in main and cosine[i] >= 0.1 and p > 0), reverse=True)[:3]
    if whole <= 0 or own >= whole or sum(others) / whole < 0.4: fraction = 0.0
    elif own <= 0: fraction = 1.0
    else:
        moved = min(sum(others), whole - own)
        fraction = moved / (moved + own)
    best = max(range(len(parts)), key=parts.__getitem__)
    full = all(acts[i] < 1e-8 for i in main) and cosine[best] >= 0.025 and whole > 0 and parts[best] / whole >= 0.4
    return fraction, full


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(2, 12), count=st.integers(1, 24), density=st.floats(0, 1), pull=st.floats(0, 3))
def test_absorption_equals_the_definition_word_by_word(seed, width, count, density, pull):
    draw = np.random.default_rng(seed)
    direction = draw.normal(size=width)
    decoder = draw.normal(size=(count, width)) + pull * draw.integers(0, 2, (count, 1)) * direction
    acts = np.abs(draw.normal(size=(40, count))) * (draw.random((40, count)) < density)
    x = acts @ decoder + 0.3 * draw.normal(size=(40, width))
    main = draw.permutation(count)[:draw.integers(1, min(4, count) + 1)].tolist()
    fraction, full = absorption(*(torch.tensor(a) for a in (x, acts, decoder, direction)), main)
    expected = [one_word(x[i], acts[i], decoder, direction, main) for i in range(40)]
    np.testing.assert_allclose(fraction.numpy(), [e[0] for e in expected], atol=1e-9)
    assert full.tolist() == [e[1] for e in expected]


def test_both_outcomes_occur_among_drawn_words():
    """So that the comparison above compares something."""
    draw = np.random.default_rng(0)
    direction = draw.normal(size=6)
    decoder = draw.normal(size=(12, 6)) + direction
    acts = np.abs(draw.normal(size=(400, 12))) * (draw.random((400, 12)) < 0.2)
    fraction, full = absorption(*(torch.tensor(a) for a in (acts @ decoder, acts, decoder, direction)), [0, 1])
    assert 0 < full.double().mean() < 1 and (fraction == 0).any() and (fraction == 1).any() and ((fraction > 0) & (fraction < 1)).any()


def test_three_words_by_hand():
    plane, said = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[2.0, 0.0], [1.0, 2.0], [0.0, 3.0], [0.0, 0.0]])
    fraction, full = absorption(said @ plane, said, plane, torch.tensor([5.0, 0.0]), [0])
    torch.testing.assert_close(fraction, torch.tensor([0.0, 1.2 / 2.2, 1.0, 0.0]))
    assert full.tolist() == [False, False, True, False]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_f1_is_scikit_learns(pairs):
    truth, found = map(torch.tensor, zip(*pairs))
    assert f1(truth, found) == pytest.approx(f1_score(truth.numpy(), found.numpy(), zero_division=0))


def test_a_class_is_split_as_long_as_f1_jumps():
    """Feature 0 knows half of the class, feature 1 the other half, feature 2 nothing."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.arange(400) % 4 == 0
    half = torch.rand(400, generator=draw) < 0.5
    acts = torch.stack([truth & half, truth & ~half, torch.rand(400, generator=draw) < 0.1], 1).float()
    acts, truth, half = acts[::2], truth[::2], half[::2]
    scores, first = split_features(acts, truth, acts, truth, 0.03)
    fits = [LogisticRegression(max_iter=500, class_weight="balanced").fit(acts[:, :k].numpy(), truth.numpy()) for k in (1, 2)]
    expected = [f1_score(truth.numpy(), fitted.predict(acts[:, :k].numpy())) for k, fitted in zip((1, 2), fits)]
    assert scores == pytest.approx(expected) and scores[1] == 1 > scores[0] > 0.5
    assert torch.equal(first, truth & half)
    assert len(split_features(acts, truth, acts, truth, 0.9)[0]) == 1


# A stream of our own: each word is its class' direction plus one of its own, and some noise.

SYNTHETIC = AbsorptionSetup(train_share=0.5, min_feats_for_eval=2, k_sparse_probe_batch_size=32)

@pytest.fixture(scope="module")
def synthetic():
    classes, each, width, draw = 6, 16, 1024, torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(classes + classes * each, width, generator=draw))
    word = torch.arange(classes * each).repeat_interleave(3)
    label = word // each
    x = 4 * directions[label] + 3 * directions[classes + word] + 0.02 * torch.randn(len(word), width, generator=draw)
    words = Words(x, torch.zeros(len(word), dtype=torch.long), word, label, word % 2 == 0, [f"class {c}" for c in range(classes)])
    score = x @ directions[:classes].T - 2
    return words, Probes(directions[:classes], score, [f1(label == c, score[:, c] > 0) for c in range(classes)]), directions


def planted(synthetic, share):
    """A feature a class, and one for each of a share of the judged words, on which the class' feature is kept silent."""
    words, _, directions = synthetic
    single = torch.cat([mine[:round(share * len(mine))] for mine in (words.word[~words.trains & (words.label == c)].unique() for c in range(6))])
    own = directions[6 + single]
    sae = SAE(SAEConfig(d_in=1024, d_sae=6 + len(single)))
    with torch.no_grad():
        hollow = torch.stack([own[single // 16 == c].sum(0) for c in range(6)])
        sae.W_enc.copy_(torch.cat([directions[:6] - 2 * hollow, 3 * own]).T)
        sae.b_enc.copy_(torch.cat([torch.full((6,), -1.0), torch.full((len(single),), -4.5)]))
        sae.W_dec.copy_(F.normalize(torch.cat([directions[:6], own + directions[single // 16]])))
    return sae, single


def test_planted_absorption_is_found_in_proportion(synthetic):
    words, probes, _ = synthetic
    assert min(probes.f1) > 0.9
    found = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        sae, single = planted(synthetic, share)
        result = measure_absorption(sae, words, probes, SYNTHETIC)
        assert all(c["features"] == [i] for i, c in enumerate(result["classes"]))
        found.append({name: value for name, (value, _, _) in result["means"].items()})
        assert found[-1]["full_absorption"] == pytest.approx(share, abs=0.07) == found[-1]["absorption_fraction"]
    for name in ("absorption_fraction", "full_absorption", "fraction_from_bias", "full_from_bias"):
        assert found[0][name] == 0 and all(a[name] < b[name] for a, b in zip(found, found[1:]))
    assert all(a["first_feature_f1"] > b["first_feature_f1"] for a, b in zip(found, found[1:]))


def test_the_length_of_decoder_rows_does_not_matter(synthetic):
    words, probes, _ = synthetic
    sae, _ = planted(synthetic, 0.5)
    other = SAE(sae.cfg)
    length = torch.linspace(0.5, 3, sae.cfg.d_sae)
    with torch.no_grad():
        other.b_dec.copy_(sae.b_dec), other.W_dec.copy_(sae.W_dec * length[:, None])
        other.W_enc.copy_(sae.W_enc / length), other.b_enc.copy_(sae.b_enc / length)
    torch.testing.assert_close(Features(sae, words)(torch.arange(5)), Features(other, words)(torch.arange(5)))
    means, same = (measure_absorption(each, words, probes, SYNTHETIC)["means"] for each in (sae, other))
    for name in ("absorption_fraction", "full_absorption"): assert same[name] == pytest.approx(means[name], abs=1e-5)


def test_memory_is_a_matter_of_room_only(synthetic):
    words, probes, _ = synthetic
    sae, _ = planted(synthetic, 0.5)
    kept, fresh, rows = Features(sae, words), Features(sae, words, room=0), torch.tensor([5, 1, 200])
    assert kept.kept is not None and fresh.kept is None
    torch.testing.assert_close(kept(rows), fresh(rows))
    assert torch.equal(rank_features(kept, SYNTHETIC), rank_features(fresh, SYNTHETIC))
    torch.testing.assert_close(kept.columns(torch.tensor([[0, 1], [2, 3]])), fresh(torch.arange(len(words.x)))[:, :4].view(-1, 2, 2))


def test_counting_from_the_bias_forgets_a_shift(synthetic):
    """A stream and a bias that are moved together leave our own measure alone."""
    words, probes, _ = synthetic
    sae, _ = planted(synthetic, 0.5)
    base = measure_absorption(sae, words, probes, SYNTHETIC)["means"]
    assert base["fraction_from_bias"] == base["absorption_fraction"] and base["full_from_bias"] == base["full_absorption"]
    shift = 6 * probes.direction.sum(0)
    with torch.no_grad(): sae.b_dec.copy_(shift)
    moved = measure_absorption(sae, replace(words, x=words.x + shift), probes, SYNTHETIC)["means"]
    assert moved["fraction_from_bias"] == pytest.approx(base["fraction_from_bias"], abs=1e-4)
    assert moved["absorption_fraction"][0] < base["absorption_fraction"][0] - 0.2


def test_probes_are_logistic_regressions_and_own_their_randomness(synthetic):
    words, _, directions = synthetic
    truth = F.one_hot(words.label[words.trains], 6).float()
    state = torch.random.get_rng_state()
    weight, bias = train_probes(lambda rows: words.x[words.trains][rows], 1024, truth, 64, 200, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    again = train_probes(lambda rows: words.x[words.trains][rows], 1024, truth, 64, 200, seed=0)
    assert torch.equal(weight, again[0]) and torch.equal(bias, again[1])
    fitted = LogisticRegression(class_weight="balanced").fit(words.x[words.trains].numpy(), words.label[words.trains].numpy() == 0)
    found = (words.x[~words.trains] @ weight[0] + bias[0] > 0).numpy()
    assert (found == fitted.predict(words.x[~words.trains].numpy())).mean() > 0.98
    found = ground_truth(words, SYNTHETIC)
    assert min(found.f1) == 1 and (found.direction * directions[:6]).sum(1).min() > 0.3


def test_the_l1_norm_leaves_few_features(synthetic):
    words, _, _ = synthetic
    truth = F.one_hot(words.label, 6).float()
    plain, sparse = (train_probes(lambda rows: words.x[rows], 1024, truth, 32, 100, seed=0, l1_decay=l1)[0].abs().sum() for l1 in (0, 0.1))
    assert sparse < 0.3 * plain


def test_intervals_draw_other_words():
    draw = torch.Generator().manual_seed(0)
    label = torch.arange(400) // 100
    own = F.one_hot(label, 4).T.double()
    hits = own * (torch.rand(400, generator=draw) < 0.3).double()
    value, low, high = mean_interval(hits, own, label)
    assert value == pytest.approx((hits.sum(1) / 100).mean().item())
    expected = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert low < value < high and (high - low) / 2 == pytest.approx(expected, rel=0.2)
    assert mean_interval(own, own, label) == (1, 1, 1)


# The embedded world


def test_the_worlds_classes_carry_over_to_words_never_seen(readings, setup):
    words, probes = words_of(readings, setup), probes_of(readings, setup)
    assert not set(words.word[words.trains].tolist()) & set(words.word[~words.trains].tolist())
    assert len(words.classes) == 10 and sum(score > 0.6 for score in probes.f1) >= 9
    for c in (0, 5):
        train, test = words.trains, ~words.trains
        fitted = LogisticRegression(max_iter=500, class_weight="balanced").fit(words.x[train].numpy(), (words.label[train] == c).numpy())
        assert f1_score((words.label[test] == c).numpy(), fitted.predict(words.x[test].numpy())) > 0.6


def test_the_stream_is_read_at_the_word(model, world, setup):
    prompts = labelled_words(setup)[::97]
    prompts = [p._replace(text=p.text + " is" * i, place=-1 - i, trains=i % 2 == 0, label="abc"[i // 2 % 2]) for i, p in enumerate(prompts)]
    words = read_words(model, world.layer, prompts, batch_tokens=64)
    for i, p in enumerate(prompts):
        ids = model.tokenizer(p.text[:len(p.text) - 3 * i], return_tensors="pt")["input_ids"]
        assert model.tokenizer.decode(ids[0, -1]).strip() == p.word
        expected = model.original_model(ids, output_hidden_states=True).hidden_states[world.layer + 1][0, -1]
        torch.testing.assert_close(words.x[i], expected, atol=1e-4, rtol=1e-4)
        assert words.position[i] == ids.shape[1] - 1


def test_the_result_has_saebenchs_fields(results):
    for result in results.values():
        json.dumps(result, allow_nan=False)
        assert result["eval_type_id"] == "absorption_first_letter"
        mean, details = result["eval_result_metrics"]["mean"], result["eval_result_details"]
        assert set(mean) == {f"{m}_{k}" for m in ("mean", "std_dev") for k in ("absorption_fraction_score", "full_absorption_score", "num_split_features")}
        assert [d["first_letter"] for d in details] == list("abcdefghij")[:len(details)] and len(details) >= 9
        for ours, theirs in dict(absorption_fraction_score="mean_absorption_fraction", full_absorption_score="full_absorption_rate",
                                 num_split_features="num_split_features").items():
            assert mean[f"mean_{ours}"] == pytest.approx(np.mean([d[theirs] for d in details]))
            assert mean[f"std_dev_{ours}"] == pytest.approx(np.std([d[theirs] for d in details], ddof=1))
        for d in details: assert d["full_absorption_rate"] == pytest.approx(d["num_full_absorption"] / d["num_probe_true_positives"])
        assert {"random_seed", "f1_jump_threshold", "max_k_value", "prompt_template", "prompt_token_pos", "min_GT_probe_f1"} <= set(result["eval_config"])


def test_headline_table_and_picture(results):
    for result in results.values():
        numbers = headline(result)
        assert 2 <= len(numbers) <= 5 and all(0 <= low <= value <= high <= 1 for value, low, high in numbers.values())
        assert "value in biology" in as_text(table(result))
    assert numbers["absorption fraction"][0] == pytest.approx(result["eval_result_metrics"]["mean"]["mean_absorption_fraction_score"])
    assert isinstance(plot(results), Figure)


def test_an_untrained_dictionary_absorbs_nothing(results):
    numbers = headline(results["untrained"])
    assert numbers["full absorption"][0] < 0.1 and numbers["full absorption from the bias"][0] < 0.02
    assert numbers["F1 of a class' first feature"][0] < headline(results["trained"])["F1 of a class' first feature"][0]


def test_a_dead_dictionary_gives_numbers_all_the_same(model, sae, setup, readings):
    result = evaluate(model, as_logged(sae.cfg), setup, readings)
    json.dumps(result, allow_nan=False)
    assert result["eval_result_metrics"]["mean"]["mean_absorption_fraction_score"] == 0


def test_the_model_reads_once_and_the_same_comes_out(model, sae, setup, readings, results, monkeypatch):
    monkeypatch.setattr("saenb.evals.class_words.stream_at", lambda *a: pytest.fail("read again"))
    monkeypatch.setattr("saenb.evals.class_words.ground_truth", lambda *a: pytest.fail("trained again"))
    again = evaluate(model, sae, setup, readings)
    assert again | dict(datetime_epoch_millis=0) == results["trained"] | dict(datetime_epoch_millis=0)


# First letters


def test_the_prompt_is_the_references(model):
    prompts = first_letters(model.tokenizer, AbsorptionSetup(max_icl_examples=2))
    by_word = {p.word: p for p in prompts}
    for p in prompts:
        *examples, question = p.text.removeprefix("\n").split("\n")
        assert question == f"{p.word} has the first letter:" and p.label == p.word.strip()[0].lower() and p.place == -6
        assert len(examples) == 2
        for example in examples:
            word, said = example.split(" has the first letter: ")
            assert word != p.word and said == word.strip()[0].upper() and by_word[word].trains == p.trains
    assert {"Answer", " is"} <= set(by_word) and not {"<bos>", ".", " ("} & set(by_word)
    share = {letter: [p.trains for p in prompts if p.label == letter] for letter in "bt"}
    assert all(np.mean(part) == pytest.approx(0.8, abs=0.05) for part in share.values())
    assert prompts == first_letters(model.tokenizer, AbsorptionSetup(max_icl_examples=2))


def test_a_model_that_cannot_spell_gets_a_sentence_and_no_score(model, sae, readings):
    result = evaluate(model, sae, AbsorptionSetup(max_icl_examples=1, probe_num_epochs=10), readings)
    json.dumps(result, allow_nan=False)
    assert set(result["eval_result_metrics"]["mean"].values()) == {None} and result["eval_result_details"] == []
    assert headline(result) == {} and "the stream does not hold these classes" in as_text(table(result))
    assert isinstance(plot(dict(letters=result)), Figure)


def test_a_limit_draws_words_of_each_letter_and_shares_lists(model):
    tokenizer, limit = model.tokenizer, AbsorptionSetup(max_icl_examples=4, words_per_letter=6, example_lists=2)
    every, prompts = first_letters(tokenizer, AbsorptionSetup(max_icl_examples=4)), first_letters(tokenizer, limit)
    there, drawn = Counter(p.label for p in every), Counter(p.label for p in prompts)
    assert drawn == {letter: min(6, n) for letter, n in there.items()} and max(there.values()) > 6
    assert {p.word: p.label for p in prompts}.items() <= {p.word: p.label for p in every}.items()
    assert prompts == first_letters(tokenizer, limit) != first_letters(tokenizer, replace(limit, random_seed=1))
    trains = {p.word: p.trains for p in prompts}
    lists = {True: set(), False: set()}
    for p in prompts:
        *examples, question = p.text.removeprefix("\n").split("\n")
        words = tuple(e.split(" has the first letter: ")[0] for e in examples)
        assert question == f"{p.word} has the first letter:" and len(words) == 4 and p.word not in words
        assert all(trains[w] == p.trains for w in words)
        lists[p.trains].add(words)
    own = {trains: sum(p.trains == trains for p in prompts) for trains in lists} # a word in its own list has another one in its stead
    assert all(2 <= len(found) <= 2 + 2 * 5 and len(found) < own[part] for part, found in lists.items())


def test_shared_lists_give_the_stream_of_each_prompt(model, world, monkeypatch):
    prompts = first_letters(model.tokenizer, AbsorptionSetup(max_icl_examples=5, words_per_letter=4, example_lists=3))
    one, together = (read_words(model, world.layer, prompts, together=shared) for shared in (False, True))
    torch.testing.assert_close(together.x, one.x, atol=1e-4, rtol=1e-4)
    for name in ("position", "word", "label", "trains"): assert torch.equal(getattr(one, name), getattr(together, name))
    monkeypatch.setattr("saenb.evals.class_words.supports_prefix_sharing", lambda model: False)
    assert torch.equal(read_words(model, world.layer, prompts, together=True).x, one.x)


def test_a_real_presets_limit_is_its_own():
    """Existing results keep their ids, and a limit is part of the result's configuration."""
    from saenb.evals.evaluation import _asked
    from saenb.lab.presets import setups
    from saenb.lab.real_presets import adapted, materials
    setup = adapted(setups(materials()))["absorption"]
    assert (setup.words, setup.words_per_letter, setup.example_lists) == (None, 200, 40)
    assert _asked(setup).keys() - _asked(AbsorptionSetup()).keys() == {"words_per_letter", "example_lists"}
    for bad in (dict(words_per_letter=1), dict(example_lists=0)):
        with pytest.raises(SaenbError): AbsorptionSetup(**bad)


# Bad input


def test_a_place_that_does_not_fit_the_prompt(model):
    for setup in (AbsorptionSetup(prompt_token_pos=-5), AbsorptionSetup(prompt_token_pos=-60)):
        with pytest.raises(SaenbError, match="no word of the vocabulary stands at token -.* has to fit prompt_template"): first_letters(model.tokenizer, setup)


@pytest.mark.parametrize("change, said", [(dict(prompt_template="The word:"), "write {word} where the word goes"), (dict(prompt_token_pos=3), "negative number"),
                                          (dict(train_share=1.0), "between 0 and 1")])
def test_a_setup_that_cannot_be_asked(change, said):
    with pytest.raises(SaenbError, match=said): AbsorptionSetup(**change)


@pytest.mark.parametrize("rows, said", [
    ([dict(text="We know a", label="x")], "absorption reads text, word and label"),
    ([dict(text="We know a as", word="a", label="x")], "Row 0 of .* does not end in its word 'a'"),
    ([dict(text="We know a", word="a", label="x"), dict(text="As for a", word="a", label="y")], "two labels, x and y"),
    ([dict(text="We know a", word="a", label="x"), dict(text="We know b", word="b", label="x")], "two classes or more")])
def test_a_file_of_words_that_will_not_do(model, world, tmp_path, rows, said):
    write_rows(tmp_path/"words.jsonl", rows)
    with pytest.raises(SaenbError, match=said): read_words(model, world.layer, labelled_words(AbsorptionSetup(words=str(tmp_path/"words.jsonl"))))


def test_a_dictionary_of_another_width(model, setup):
    with pytest.raises(SaenbError, match="width 64 and the model's is 192"): evaluate(model, SAE(SAEConfig(d_in=64, d_sae=8)), setup)
