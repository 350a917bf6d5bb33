"""The world's labelled texts: classes, orders that words alone cannot tell, and files laid out as the real sets'."""
import random
from collections import Counter
from dataclasses import replace

import datasets
import pytest
from hypothesis import given, settings, strategies as st

from saenb.data.world_tasks import (LANGUAGES, ORDER_TASKS, PAIRS, PROFESSIONS, PROBING_TEST, PROBING_TRAIN,
                                    biographies, class_words, debates, news, order_rows, reviews, sources,
                                    write_tasks)
from saenb.data.facts import SHARED_RELATIONS, Writer, WorldConfig, make_facts


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("tasks")
    write_tasks(out, world.cfg, world.facts)
    return out


def test_the_shipped_files_are_what_the_code_writes(world, folder):
    made = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert made and all((world.path/name).read_bytes() == data for name, data in made.items())
    assert {str(name) for name in made} <= set(world.about["files"])


def test_sets_have_the_real_ones_columns_and_classes(folder):
    bios = datasets.load_dataset(str(folder/"probing"/"LabHC"/"bias_in_bios"))
    assert bios["train"].column_names == ["hard_text", "profession", "gender"]
    counts = Counter(zip(bios["train"]["profession"], bios["train"]["gender"]))
    assert (set(counts) == {(p, g) for p in PROFESSIONS for g in (0, 1)}
            and set(counts.values()) == {PROBING_TRAIN // 2})
    goods = datasets.load_dataset(str(folder/"probing"/"canrager"/"amazon_reviews_mcauley_1and5"),
                                  split="test")
    assert set(goods["rating"]) == {1.0, 5.0} and set(Counter(goods["category"]).values()) == {PROBING_TEST}
    code = datasets.load_dataset(str(folder/"probing"/"codeparrot"/"github-code"), split="train")
    assert set(code["language"]) == set(LANGUAGES) and min(map(len, code["code"])) > (50 + 128) * 3
    for language, config in PAIRS.items():
        rows = datasets.load_dataset(str(folder/"probing"/"Helsinki-NLP"/"europarl"), config, split="train")
        assert len(rows) == PROBING_TRAIN + PROBING_TEST and set(rows[0]["translation"]) == {language}
    assert (set(datasets.load_dataset(str(folder/"probing"/"fancyzhx"/"ag_news"), split="train")["label"])
            == {0, 1, 2, 3})


def test_texts_to_learn_from_are_hardly_those_to_be_asked_about(folder):
    for name, column in (("LabHC/bias_in_bios", "hard_text"), ("fancyzhx/ag_news", "text")):
        sets = datasets.load_dataset(str(folder/"probing"/name))
        seen = set(sets["train"][column])
        assert sum(text in seen for text in sets["test"][column]) < 0.1 * len(sets["test"]), name


@pytest.mark.parametrize("task", ORDER_TASKS)
def test_twins_have_the_same_words_and_other_labels(world, model, task):
    rows = list(order_rows(task, random.Random(3), world.facts, 40))
    assert [r["label"] for r in rows] == [1, 0] * 40
    for one, other in zip(rows[::2], rows[1::2]):
        words = [Counter(model.tokenizer(r["text"])["input_ids"]) for r in (one, other)]
        assert words[0] == words[1] and one["text"] != other["text"]


def test_labels_of_order_tasks_mean_what_they_say(world):
    names = {f.name for f in world.facts}
    for row in order_rows("relation_first", random.Random(0), world.facts, 30):
        words = row["text"].replace(".", "").replace("?", "").split()
        relation = next(i for i, w in enumerate(words) if w in {f.relation for f in world.facts})
        value = next(i for i, w in enumerate(words) if w in {f.value for f in world.facts})
        assert (relation < value) == bool(row["label"])
    for row in order_rows("entity_order", random.Random(0), world.facts, 30):
        first, second = [w for w in row["text"].replace(",", "").replace(".", "").split() if w in names]
        twin_first = min(first, second) # of two halves of the alphabet, the early one
        assert (first == twin_first) == bool(row["label"])
    for row in order_rows("binding", random.Random(0), world.facts, 30):
        told = [set(sentence.replace(",", " ").replace(".", " ").split())
                for sentence in row["text"].split(". ")[1:]]
        true = [any({f.name, f.relation, f.value} <= words for f in world.facts) for words in told]
        assert len(told) == 2 and all(true) == any(true) == bool(row["label"])


def test_words_of_a_class_end_their_texts(world):
    rows = list(class_words(Writer(world.facts, "test"), 2))
    assert all(r["text"].endswith(" " + r["word"]) for r in rows)
    homes = {}
    for f in world.facts: homes.setdefault(f.name, set()).add(f.subject)
    assert not {r["word"] for r in rows} & {name for name, subjects in homes.items() if len(subjects) > 1}
    assert len({r["label"] for r in rows}) == 10


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.integers(0, 50))
def test_every_setting_of_the_dial_gives_all_sets(overlap, seed):
    facts = make_facts(WorldConfig(seed=seed, overlap=overlap))
    writer = Writer(facts, "any")
    assert {r["profession"] for r in biographies(writer, 2)} == set(PROFESSIONS)
    assert (len(list(reviews(writer, 2))) == 10 and len(list(sources(writer, 1))) == 5
            and len(list(news(writer, 1))) == 4)
    text = next(debates(writer, "de", 1))["translation"]["de"]
    assert (any(r in text for r in SHARED_RELATIONS)) == (overlap > 0)
    assert (list(class_words(writer, 1))
            and all(list(order_rows(t, random.Random(seed), facts, 2)) for t in ORDER_TASKS))
    again = make_facts(replace(WorldConfig(), seed=seed, overlap=overlap))
    assert list(news(Writer(again, "any"), 2)) == list(news(Writer(facts, "any"), 2))
