import gzip
import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

from saenb.base.errors import SaenbError
from saenb.evals.evaluation import Readings, encoded
from saenb.evals.controls import untrained
from saenb.evals.probing_texts import (SETS, SparseProbingSetup, grouped, probing_texts, probing_tokens,
                                       text_means)
from saenb.evals.sparse_probing import (balanced, evaluate, first_weights, fit_on_all, headline, plot,
                                        probe_classes, table)
from saenb.sae.sae import SAE, SAEConfig

NEWS, CODE, EUROPARL, REVIEWS = ("fancyzhx/ag_news", "codeparrot/github-code", "Helsinki-NLP/europarl",
                                 "canrager/amazon_reviews_mcauley_1and5")


@pytest.fixture(scope="module")
def setup(world):
    return SparseProbingSetup(root=str(world.path/"probing"), probe_train_set_size=400,
                              probe_test_set_size=200)


@pytest.fixture(scope="module")
def few(setup):
    """Two sets and few texts, for what needs a whole evaluation."""
    return replace(setup, dataset_names=(NEWS, EUROPARL), probe_train_set_size=160, probe_test_set_size=80,
                   k_values=(1, 5))


@pytest.fixture(scope="module")
def readings(world, model): return Readings(model, world.layer)


@pytest.fixture(scope="module")
def news(setup, readings, model):
    """The stream's means of one set: to learn from, to be judged on."""
    groups, judged = probing_tokens(NEWS, setup, model.tokenizer)
    means, = text_means(readings, groups, [lambda x: x])
    return means[:-judged], means[-judged:]


@pytest.fixture(scope="module")
def planted(model, few, readings, fresh, store):
    """A dictionary with a feature for each class of each set, along the directions of a regression on
    the stream."""
    x, looks = store.rows(0, 8192).x, []
    for name in few.dataset_names:
        groups, judged = probing_tokens(name, few, model.tokenizer)
        means = text_means(readings, groups, [lambda x: x])[0][:-judged]
        classes = np.repeat(range(len(SETS[name].classes)), len(means) // len(SETS[name].classes))
        look = torch.from_numpy(LogisticRegression(max_iter=1000).fit(means.numpy(), classes).coef_).float().T
        looks.append(look / (means @ look).std(0))
    look = torch.cat(looks, 1)
    sae = SAE(replace(fresh().cfg, d_sae=look.shape[1]))
    with torch.no_grad():
        sae.W_enc.copy_(look)
        sae.b_enc.copy_(-(x @ look).min(0).values)
    return sae


@pytest.fixture(scope="module")
def results(model, few, readings, planted, fresh, store):
    few_random = untrained(planted.cfg, store.rows(0, 8192).x)
    return {name: evaluate(model, sae, few, readings)
            for name, sae in {"planted": planted, "untrained": fresh(), "few untrained": few_random}.items()}


def frame(world, name, split="train"):
    with gzip.open(world.path/"probing"/name/f"{split}.jsonl.gz", "rt") as f:
        return pd.DataFrame(map(json.loads, f))


def global_balanced(classes, size, chosen):
    """The reference's draws, from torch's global generator, on text numbers."""
    texts = torch.arange(classes * size).view(classes, size)
    others = torch.cat([texts[c][torch.randperm(size)[:-(-size // (classes - 1))]]
                        for c in range(classes) if c != chosen])
    both = torch.cat([texts[chosen], others[torch.randperm(len(others))[:size]]])
    order = torch.randperm(len(both))
    return both[order], torch.cat([torch.ones(size), torch.zeros(size)])[order].int()


@pytest.mark.parametrize("name", SETS)
def test_all_eight_sets_have_their_sizes_and_classes(name, setup, world):
    train, test = probing_texts(name, setup)
    assert tuple(train) == tuple(test) == SETS[name].classes and 2 <= len(train) <= 5
    assert {len(t) for t in train.values()} == {200} and {len(t) for t in test.values()} == {100}
    if name != EUROPARL:
        assert train[SETS[name].classes[0]] != train[SETS[name].classes[1]]


def test_texts_are_sampled_as_pandas_samples(setup, world):
    for split, part, count in (("train", 0, 200), ("test", 1, 100)):
        table = frame(world, NEWS, split)
        assert probing_texts(NEWS, setup)[part] == {
            str(c): table[table.label == c].text.sample(n=count, random_state=42).tolist() for c in range(4)}


def test_a_class_is_balanced_by_its_second_column(setup, world):
    for name, folder, columns in (("LabHC/bias_in_bios_class_set2", "LabHC/bias_in_bios",
                                   ("profession", "gender", "hard_text")),
                                  (REVIEWS, REVIEWS, ("category", "rating", "text"))):
        label, second, text = columns
        table = frame(world, folder)
        wanted = {c: [t for _, group in table[table[label] == int(c)].groupby(second)
                      for t in group.sample(n=100, random_state=42)[text]] for c in SETS[name].classes}
        assert probing_texts(name, setup)[0] == wanted


def test_sentiment_takes_all_categories_together(setup, world):
    table = frame(world, REVIEWS)
    wanted = {str(r): table[table.rating == r].text.sample(n=200, random_state=42).tolist()
              for r in (1.0, 5.0)}
    assert probing_texts(REVIEWS + "_sentiment", setup)[0] == wanted


def test_streams_are_taken_as_they_come_then_shuffled(setup, world):
    """One more than needed of each, shuffled by one generator class after class; code loses its beginning."""
    draw, needed = random.Random(42), 300
    found = {c: [] for c in ("C", "Python", "HTML", "Java", "PHP")}
    for row in frame(world, CODE).to_dict("records"):
        if len(row["code"]) > 534:
            found[row["language"]].append(row["code"][150:])
        if all(len(t) > needed for t in found.values()): break
    for texts in found.values(): draw.shuffle(texts)
    assert probing_texts(CODE, setup) == ({c: t[:200] for c, t in found.items()},
                                          {c: t[200:300] for c, t in found.items()})

    draw, found = random.Random(42), {}
    for language, pair in dict(en="en-fr", fr="fr-it", de="de-en", es="es-fr", nl="nl-pt").items():
        with gzip.open(world.path/"probing"/EUROPARL/f"{pair}-train.jsonl.gz", "rt") as f:
            found[language] = [json.loads(line)["translation"][language] for line in f][:301]
    for texts in found.values(): draw.shuffle(texts)
    assert probing_texts(EUROPARL, setup) == ({c: t[:200] for c, t in found.items()},
                                              {c: t[200:300] for c, t in found.items()})


@settings(max_examples=25, deadline=None)
@given(classes=st.integers(2, 6), size=st.integers(2, 40), chosen=st.integers(0, 5),
       seed=st.integers(0, 2**31))
def test_draws_follow_torchs_global_generator(classes, size, chosen, seed):
    chosen %= classes
    before, own = torch.get_rng_state(), torch.Generator().manual_seed(seed)
    ours = [*balanced(classes, size, chosen, own), *first_weights(size, own),
            torch.randperm(size, generator=own)]
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        numbers, labels = global_balanced(classes, size, chosen)
        linear = torch.nn.Linear(size, 1)
        theirs = [numbers, labels, linear.weight, linear.bias, torch.randperm(size)]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert labels.sum() == size and len(set(numbers[labels == 1].tolist())) == size


def test_means_are_those_of_single_texts(setup, readings, model, fresh):
    texts = ([t for group in probing_texts(REVIEWS, setup)[1].values() for t in group][::40]
             + [" ".join(["The origin of luzebi is kiva."] * 40)])
    sae = fresh()
    channels, features = text_means(readings, grouped(model.tokenizer, texts, 128),
                                    [lambda x: x, lambda x: encoded(sae, x)], chunk=3)
    for i, text in enumerate(texts):
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"][:, :128]
        assert ids[0, 0] == model.tokenizer.bos_token_id
        stream = model.original_model(ids, output_hidden_states=True).hidden_states[readings.layer + 1][0, 1:]
        torch.testing.assert_close(channels[i], stream.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(features[i], sae.encode(stream).mean(0).detach(), atol=1e-5, rtol=1e-4)


def test_padding_to_the_full_length_changes_nothing(setup, readings, model, news):
    texts = [t for group in probing_texts(NEWS, setup)[0].values() for t in group][:40]
    rows = model.tokenizer(texts, truncation=True, max_length=128, padding="max_length", padding_side="right",
                           return_tensors="pt")["input_ids"]
    padded, = text_means(readings, [(torch.arange(40), rows)], [lambda x: x])
    torch.testing.assert_close(padded, news[0][:40], atol=2e-6, rtol=1e-5)


def test_few_features_against_plain_scikit_learn(news):
    """The reference's way from means to accuracies, written out with numpy, pandas' ranking and
    scikit-learn."""
    train, test = news
    found, chosen = probe_classes(train, test, tuple("0123"), (1, 3, 20), torch.Generator().manual_seed(7),
                                  seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for c in range(4): # the probes on all columns draw first
            (numbers,
             labels), (test_numbers, test_labels) = global_balanced(4, 200, c), global_balanced(4, 100, c)
            probe = torch.nn.Linear(train.shape[1], 1)
            optimizer, best, patience = torch.optim.AdamW(probe.parameters(), lr=1e-2), 0.0, 0
            for _ in range(100):
                for at in torch.randperm(400).split(250):
                    loss = torch.nn.BCEWithLogitsLoss()(probe(train[numbers][at]).squeeze(-1),
                                                        labels[at].float())
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                accuracy = (((probe(test[test_numbers]).squeeze(-1) > 0).int() == test_labels).float().mean()
                            .item())
                best, patience = (accuracy, 0) if accuracy > best else (best, patience + 1)
                if patience == 10: break
            assert found["test"]["accuracy"][str(c)] == best
        for k in (1, 3, 20):
            for c in range(4):
                (numbers,
                 labels), (test_numbers, test_labels) = global_balanced(4, 200, c), global_balanced(4, 100, c)
                x, y = train[numbers].numpy(), labels.numpy()
                apart = np.abs(x[y == 1].mean(0) - x[y == 0].mean(0))
                best = np.sort(np.argsort(-apart)[:k])
                probe = LogisticRegression(C=1.0, max_iter=1000).fit(x[:, best], y)
                assert sorted(chosen[str(k)][str(c)]) == best.tolist()
                assert found[f"top_{k}_test"]["accuracy"][str(c)] == accuracy_score(
                    test_labels.numpy(), probe.predict(test[test_numbers].numpy()[:, best]))
    assert found["top_3_test"]["mean"] == sum(found["top_3_test"]["accuracy"].values()) / 4


def test_the_honest_probe_leaves_the_other_draws_alone(news):
    first, second = (probe_classes(*news, tuple("0123"), (2,), torch.Generator().manual_seed(1), seed)[0]
                     for seed in (0, 1))
    assert first["test"] == second["test"] and first["top_2_test"] == second["top_2_test"]


def test_watching_the_test_texts_flatters():
    """On labels that mean nothing an epoch is right half of the time, and the best of many more often."""
    draw = torch.Generator().manual_seed(0)
    x, labels = torch.randn(800, 30, generator=draw), torch.randint(0, 2, (800,), generator=draw).int()
    best, mean = [], []
    for i in range(10):
        part = slice(400 + 40 * i, 440 + 40 * i)
        _, watched = fit_on_all(x[:400], labels[:400], x[part], labels[part],
                                torch.Generator().manual_seed(i))
        best.append(max(watched))
        mean.append(np.mean(watched))
    assert np.mean(best) > np.mean(mean) + 0.05 and abs(np.mean(mean) - 0.5) < 0.06


def test_the_error_is_that_of_drawing_other_test_texts(news):
    """Against a bootstrap over texts; a probe's own right and wrong answers are all it needs."""
    from saenb.evals.sparse_probing import Tally
    rng, tally = np.random.default_rng(0), Tally(300)
    right = {}
    for c in range(3):
        numbers, labels = balanced(3, 100, c, torch.Generator().manual_seed(c))
        right[c] = numbers.numpy(), rng.random(200) < 0.8
        tally.add(str(c), numbers, torch.from_numpy(right[c][1]))
    above, below = np.zeros(300), np.zeros(300)
    for numbers, hits in right.values():
        np.add.at(above, numbers, hits)
        np.add.at(below, numbers, 1)
    draws = [(above[at].sum() / below[at].sum()) for at in rng.integers(0, 300, (2000, 300))]
    assert (tally.summary()["mean"] == pytest.approx(above.sum() / below.sum())
            and tally.summary()["error"] == pytest.approx(np.std(draws), rel=0.1))


def test_raised_channels_are_probed_as_the_channels_are(setup, readings, model, news, store):
    raised = SAE(SAEConfig(d_in=store.d_in, d_sae=store.d_in))
    with torch.no_grad():
        raised.W_enc.copy_(torch.eye(store.d_in))
        raised.b_enc.fill_(2 * store.rows(0, 8192).x.abs().max().item())
    groups, judged = probing_tokens(NEWS, setup, model.tokenizer)
    means, = text_means(readings, groups, [lambda x: encoded(raised, x)])
    (channels, ranked), (features, also_ranked) = (
        probe_classes(*parts, tuple("0123"), (1, 5), torch.Generator().manual_seed(42), 42)
        for parts in (news, (means[:-judged], means[-judged:])))
    # the probe on all columns stops after another number of epochs, and the draws after it are others
    assert sum(ranked["1"][c] == also_ranked["1"][c] for c in "0123") >= 3
    assert abs(channels["top_1_test"]["mean"] - features["top_1_test"]["mean"]) < 0.05


def test_channels_and_their_opposites_hold_the_channels(setup, readings, model, news, store):
    both = SAE(SAEConfig(d_in=store.d_in, d_sae=2 * store.d_in))
    with torch.no_grad():
        both.W_enc.copy_(torch.cat([torch.eye(store.d_in), -torch.eye(store.d_in)], 1))
    groups, judged = probing_tokens(NEWS, setup, model.tokenizer)
    means, = text_means(readings, groups, [lambda x: encoded(both, x)])
    up, down = means.split(store.d_in, 1)
    torch.testing.assert_close(up - down, torch.cat(news), atol=1e-4, rtol=1e-4)


def test_planted_features_need_no_company(results):
    """One of them nearly always tells; one of as many random features does not, and neither does the
    best of many."""
    one = {name: headline(result)["probing k=1"] for name, result in results.items()}
    assert (one["planted"][0] > 0.97 and one["untrained"][2] < one["planted"][1]
            and one["few untrained"][2] < one["untrained"][1])


def test_the_result_has_saebenchs_fields(results, few):
    for result in results.values():
        json.dumps(result, allow_nan=False)
        assert (result["eval_type_id"] == "sparse_probing"
                and result["eval_config"]["dataset_names"] == list(few.dataset_names))
        assert {"random_seed", "probe_train_set_size", "probe_test_set_size", "context_length",
                "sae_batch_size", "llm_batch_size", "k_values", "lower_vram_usage",
                "model_name", "llm_dtype", "dataset_names"} == set(result["eval_config"])
        sae, llm = result["eval_result_metrics"]["sae"], result["eval_result_metrics"]["llm"]
        assert (set(sae) == {"sae_test_accuracy", "sae_top_1_test_accuracy", "sae_top_5_test_accuracy"}
                and set(llm) == {m.replace("sae", "llm") for m in sae})
        assert ([d["dataset_name"] for d in result["eval_result_details"]]
                == [f"{n}_results" for n in few.dataset_names])
        for metric, value in (sae | llm).items():
            per_set = [result["eval_result_unstructured"][f"{n}_results"][metric] for n in few.dataset_names]
            means = [sum(classes.values()) / len(classes) for classes in per_set]
            assert ([d[metric] for d in result["eval_result_details"]] == means
                    and value == sum(means) / len(means))
        ours = result["eval_result_unstructured"]["ours"]
        assert ({k: {len(c) for c in v.values()} for k, v in ours["features"][NEWS].items()}
                == {"1": {1}, "5": {5}})


def test_the_streams_part_is_the_same_for_every_dictionary(results, model, few, planted):
    assert (results["planted"]["eval_result_metrics"]["llm"]
            == results["untrained"]["eval_result_metrics"]["llm"])
    alone = evaluate(model, planted, replace(few, dataset_names=(EUROPARL,)),
                     Readings(model, planted.cfg.hook_layer, batch_tokens=700, room=0))
    assert (alone["eval_result_unstructured"][f"{EUROPARL}_results"]
            == results["planted"]["eval_result_unstructured"][f"{EUROPARL}_results"])


def test_headline_table_and_picture(results):
    shown = headline(results["planted"])
    assert set(shown) == {"probing k=1", "probing k=5", "probing all features"}
    assert all(0.5 < low <= value <= high <= 1 for value, low, high in shown.values())
    rows = table(results["planted"])
    assert ([r["features"] for r in rows][:2] == ["1", "5"] and len(rows) == 4
            and rows[0]["accuracy"] == shown["probing k=1"][0])
    few_features, sets = plot(results).axes
    assert ([t.get_text() for t in few_features.get_legend().get_texts()]
            == ["planted", "the stream's channels", "untrained", "few untrained"])


def rewrite(path, lines):
    with gzip.open(path, "wt") as f: f.write("\n".join(map(json.dumps, lines)))


def test_a_missing_column(setup, world, tmp_path):
    shutil.copytree(world.path/"probing"/NEWS, tmp_path/NEWS)
    rewrite(tmp_path/NEWS/"train.jsonl.gz", [dict(text="a", topic=1)])
    with pytest.raises(SaenbError, match="ag_news .train. has no column 'label'; it has text, topic"):
        probing_texts(NEWS, replace(setup, root=str(tmp_path)))


@pytest.mark.parametrize("name, words",
                         [(NEWS, "240 texts of class 0 where 300"), (CODE, "360 texts of class C where 400"),
                          (EUROPARL, "360 texts of class en where 400"),
                          (REVIEWS, "120 texts of class 1 with one rating where 150")])
def test_too_few_texts(setup, name, words):
    with pytest.raises(SaenbError, match=f"{words} are needed; ask for a smaller probe_train_set_size"):
        probing_texts(name, replace(setup, probe_train_set_size=600))


def test_texts_without_tokens(setup, model, world, tmp_path):
    shutil.copytree(world.path/"probing"/NEWS, tmp_path/NEWS)
    rewrite(tmp_path/NEWS/"test.jsonl.gz",
            [dict(text="" if i % 2 else "The host of tako.", label=i % 4) for i in range(800)])
    with pytest.raises(SaenbError,
                       match="200 of the texts drawn from the probing set fancyzhx/ag_news hold no token"):
        probing_tokens(NEWS, replace(setup, root=str(tmp_path)), model.tokenizer)


def test_github_code_has_to_be_local(setup, model, fresh, tmp_path):
    for root in (None, str(tmp_path)):
        with pytest.raises(SaenbError, match="loaded from the hub by code of its own, "
                               "which saenb does not run; put a copy .* or leave it out of dataset_names"):
            evaluate(model, fresh(), replace(setup, root=root, dataset_names=(CODE,)))
    (tmp_path/CODE).mkdir(parents=True)
    (tmp_path/CODE/"github-code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(SaenbError, match="loaded by code of its own, which saenb does not run"):
        evaluate(model, fresh(), replace(setup, root=str(tmp_path), dataset_names=(CODE,)))


@pytest.mark.parametrize("change, words",
                         [(dict(dataset_names=("fancyzhx/ag_new",)),
                           "no probing set called 'fancyzhx/ag_new'; did you mean fancyzhx/ag_news"),
                          (dict(dataset_names=()), "dataset_names is empty"),
                          (dict(root="/nowhere"), "/nowhere is not a folder"),
                          (dict(k_values=(0, 1)), "numbers of features, from 1 up"),
                          (dict(probe_test_set_size=2), "probe_test_set_size is 2, too few")])
def test_a_setup_that_cannot_be_asked(setup, model, fresh, change, words):
    with pytest.raises(SaenbError, match=words):
        evaluate(model, fresh(), replace(setup, **change))


def test_dictionaries_that_cannot_be_probed(few, model, fresh, readings):
    with pytest.raises(SaenbError, match="width 64 and the model's is 192"):
        evaluate(model, SAE(SAEConfig(d_in=64, d_sae=8)), few, readings)
    broken = SAE(fresh().cfg)
    with torch.no_grad(): broken.W_enc.fill_(float("nan"))
    with pytest.raises(SaenbError, match="not finite"):
        evaluate(model, broken, few, readings)
