"""WordNet: read from its own files, made into questions and texts that share no definition, shipped with checksums."""
import gzip
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from saenb.base.errors import SaenbError
from saenb.data.sources import QuestionSource
from saenb.data.wordnet import WordNet, read_gloss, read_line
from saenb.data.wordnet_tasks import (
    FOLDER, ORDER_PAIRS, ORDER_TASKS, SIDE_OF, SUBJECTS_OF, SubjectQuestions, answerable, build, holding, in_first_half,
    question, questions, subjects_of, verify, wordnet_questions, wordnet_texts, wrong_words)

LICENCE = "  1 This database is free to use  \n  2 if this notice is kept.  \n"
DATABASE = os.environ.get("SAENB_WORDNET", "/usr/share/wordnet")


def invented(count=40):
    """Lines of a database: a tree of animals, artifacts, states of body and mind, a verb and an adjective."""
    draw, lines, index, marks = random.Random(0), dict(noun=[], verb=[], adj=[], adv=[]), [], []
    place = 100
    def noun(file, words, above, gloss):
        nonlocal place
        place += 7
        pointers = "".join(f"@ {a:08} n 0000 " for a in above)
        lines["noun"].append(f"{place:08} {file:02} n {len(words):02x} {' '.join(f'{w} 0' for w in words)} {len(above):03} {pointers}| {gloss}  ")
        return place
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    def word(): return "".join(draw.sample(syllables, 3))
    root = noun(3, ["entity"], [], "that which is perceived")
    beast, tool = noun(5, ["beast"], [root], "a living thing that moves"), noun(6, ["tool"], [root], "a thing made for work")
    body = noun(26, ["physical_condition"], [root], "the condition of the body")
    mind = noun(26, ["mood"], [root], "the condition of the mind")
    for file, top in ((5, beast), (6, tool), (26, body), (26, mind)):
        for _ in range(count):
            w, other = word(), word()
            made = noun(file, [w, f"{other}_kind"], [top], f"one with {word()} {other} marks on it; \"they found the {w} by chance\"")
            if draw.random() < 0.5:
                noun(file, [word()], [made], f"a smaller one, as seen in {word()} and {word()}")
            marks.append(f"{w}%1:{file:02}:00:: {made:08} 1 {draw.randrange(9)}")
    lines["verb"].append("00000107 30 v 01 wend 0 000 01 + 08 00 | go one's way; \"they wended home\"  ")
    lines["adj"].append("00000114 00 s 01 fit(p) 0 000 | good enough for what is wanted  ")
    lines["adv"].append("00000121 02 r 01 fitly 0 000 | in a way that is good enough  ")
    by_word = {}
    for line in lines["noun"]:
        fields = line.split()
        for w in fields[4:4 + 2 * int(fields[3], 16):2]: by_word.setdefault(w, []).append(fields[0])
    index = [f"{w} n {len(ids)} 1 @ {len(ids)} 0 {' '.join(ids)}  " for w, ids in sorted(by_word.items())]
    return lines, index, marks


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A folder of the database's form."""
    folder, (lines, index, marks) = tmp_path_factory.mktemp("dict"), invented()
    for kind, rows in lines.items(): (folder/f"data.{kind}").write_text(LICENCE + "\n".join(rows) + "\n")
    (folder/"index.noun").write_text(LICENCE + "\n".join(index) + "\n")
    (folder/"index.sense").write_text("\n".join(marks) + "\n")
    return folder


@pytest.fixture(scope="module")
def net(database): return WordNet.read(database)


@pytest.fixture(scope="module")
def made(database, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder, build(database, folder, seed=3)


def rows_in(path): return [json.loads(line) for line in gzip.decompress(Path(path).read_bytes()).splitlines()]


def test_a_line_is_read():
    s = read_line('00004475 03 n 02 organism 0 living_thing 0 002 @ 00004258 n 0000 ~ 00005787 n 0000 | a living thing; able to act: "an '
                  'organism acts"; "it lives"  ')
    assert (s.id, s.file, s.words, s.above) == ("00004475-n", "Tops", ("organism", "living thing"), ("00004258-n",))
    assert s.definition == "a living thing; able to act" and s.examples == ("an organism acts", "it lives")
    assert read_line("00000114 00 s 01 fit(p) 0 000 | good  ").words == ("fit",)
    assert read_gloss("no example at all  ") == ("no example at all", ())


def test_the_tree(net):
    by_word = {s.word: s for s in net.synsets.values()}
    beast, tool, root = by_word["beast"], by_word["tool"], by_word["entity"]
    assert net.ancestors(beast.id) == {root.id} and net.related(root.id, tool.id) and not net.related(beast.id, tool.id)
    steps = net.distances(("animal",))
    assert (steps[beast.id], steps[root.id], steps[tool.id]) == (0, 1, 2)
    below = next(s for s in net.synsets.values() if s.above == (tool.id,))
    assert steps[below.id] == 3 and all(id.endswith("n") for id in steps)
    subjects = subjects_of(net)
    assert Counter(subjects.values())["bodily_state"] > 40 and subjects[by_word["mood"].id] == "state"
    assert subjects[by_word["wend"].id] == "verb" and subjects[by_word["fit"].id] == "adjective"


def test_a_folder_that_is_no_database(tmp_path):
    with pytest.raises(SaenbError, match="holds no data.noun"): WordNet.read(tmp_path)


@pytest.mark.parametrize("word,definition,asked", [
    ("dog", "a domesticated animal", True), ("hot dog", "a sausage in a bun", False), ("Fido", "a dog of that name", False),
    ("dog", "one of all dogs there are", False), ("dog", "an animal", False), ("dog", "x " * 70, False),
    ("cur", "an offensive word for a dog", False)])
def test_what_can_be_asked(net, word, definition, asked):
    line = f"00000001 05 n 01 {word.replace(' ', '_')} 0 000 | {definition}"
    assert answerable(read_line(line)) is asked


def test_wrong_words_are_wrong():
    lines = ["00000001 05 n 01 animal 0 000 | a living thing that moves",
             "00000002 05 n 02 hound 0 tracker 0 001 @ 00000001 n 0000 | an animal that hunts by its nose",
             "00000003 05 n 01 beagle 0 001 @ 00000002 n 0000 | a small one for hares",
             "00000004 18 n 01 cat 0 000 | a person who plays in a band",
             "00000005 05 n 01 cat 0 001 @ 00000002 n 0000 | a sort of small hunter",
             *(f"000001{i:02} 05 n 01 other{'abcd'[i]} 0 001 @ 00000001 n 0000 | an animal of kind {i}" for i in range(4))]
    net = WordNet([read_line(line) for line in lines])
    hound, words = net.synsets["00000002-n"], ["animal", "hound", "tracker", "beagle", "cat", "othera", "otherb", "otherc", "nose"]
    net.meanings["nose"] = ["00000100-n"]
    for seed in range(20): # above, below, the same, below in its second meaning, and a word of the definition
        assert set(wrong_words(net, hound, words, random.Random(seed))) == {"othera", "otherb", "otherc"}
    assert wrong_words(net, hound, words[:6], random.Random(0)) == ["othera"]
    assert question(net, [net.synsets["00000001-n"], hound], 0, "animal", 0) is None # all others are animals


def test_questions_have_the_columns_that_sources_read(net, made):
    folder, about = made
    rows = rows_in(folder/"questions.jsonl.gz")
    assert rows == questions(net, subjects_of(net), 3) and len(rows) == about["questions"] > 50
    assert {row["subject"] for row in rows} == {"animal", "artifact", "state", "bodily_state"}
    for row in rows:
        assert set(row) == {"question", "choices", "answer", "subject", "fact", "distance"}
        s = net.synsets[row["fact"]]
        assert (row["question"], row["choices"][row["answer"]]) == (s.definition, s.word) and len(set(row["choices"])) == 4
        assert in_first_half(s.id, 3) and (row["distance"] == 0) == (row["subject"] == "animal")
    assert len({tuple(row["choices"]).index(row["choices"][row["answer"]]) for row in rows}) == 4
    source = QuestionSource("animal", str(folder/"questions.jsonl.gz"), asked="continuation")
    assert [r["fact"] for r in source.load()] == [r["fact"] for r in rows if r["subject"] == "animal"]
    both = SubjectQuestions("both", source.path, asked="continuation", parts=("animal", "artifact"), count=2)
    assert [r["question"] for r in both.load()] == [
        r["question"] for part in both.parts for r in [r for r in rows if r["subject"] == part][:2]]


def test_no_definition_is_asked_and_read(net, made):
    folder, about = made
    asked = {row["question"] for row in rows_in(folder/"questions.jsonl.gz")}
    texts = {f"{p.name} {i}": row["text"] for p in (folder/"texts").glob("*.gz") for i, row in enumerate(rows_in(p))}
    assert len(texts) == sum(about["texts"].values()) > 100 and not holding(texts, list(asked))
    assert not any(d.lower() in text.lower() for d in asked for text in texts.values()) # the slow way
    assert holding({"one": "Word: a thing (Made) here.", "other": "a thing"}, ["a thing (made)"]) == {"one"}
    assert len(set(texts.values())) == len(texts)


def test_sides_and_forms(made):
    folder, _ = made
    for name, subjects in (("train_forget", {"animal"}), ("forget", {"animal"}), ("train_retain", {"artifact", "state"}),
                           ("retain", {"artifact", "state"})):
        rows = rows_in(folder/"texts"/f"{name}.jsonl.gz")
        assert rows and {row["subject"] for row in rows} <= subjects
    assert "bodily_state" in {row["subject"] for row in rows_in(folder/"texts"/"train_neither.jsonl.gz")}
    texts = [row["text"] for row in rows_in(folder/"texts"/"train_retain.jsonl.gz")]
    forms = ("What does ", "The word that means ", ": the word for this is ", " is a kind of ")
    assert all(any(form in text for text in texts) for form in forms) and all(text[-1] in ".?!" for text in texts)


def test_order_tasks_are_twins(made):
    from saenb.evals.order_probing import order_files
    folder, _ = made
    tasks = order_files(folder/"order")
    assert [t.name for t in tasks] == sorted(ORDER_TASKS)
    for task in tasks:
        found = task.twins()
        assert found["train"] and found["test"] and not set(found["train"]) & set(found["test"])
        for one, other in found["train"]:
            assert one != other and Counter(re.findall(r"\w+", one)) == Counter(re.findall(r"\w+", other))


def test_the_same_seed_gives_the_same_bytes(database, made, tmp_path):
    folder, about = made
    assert build(database, tmp_path, seed=3) == about
    assert build(database, tmp_path/"other", seed=4)["files"] != about["files"]
    assert "if this notice is kept." in (folder/"LICENSE.txt").read_text()
    verify(folder)
    (tmp_path/"texts"/"forget.jsonl.gz").write_bytes(b"")
    with pytest.raises(SaenbError, match="forget.jsonl.gz is missing or not the file"): verify(tmp_path)


def test_what_ships_is_whole_and_small():
    verify()
    about = json.loads((FOLDER/"wordnet.json").read_text())
    assert sum(p.stat().st_size for p in Path(FOLDER).rglob("*") if p.is_file()) < 2e6
    assert "Princeton University" in (FOLDER/"LICENSE.txt").read_text()
    rows = rows_in(FOLDER/"questions.jsonl.gz")
    assert len(rows) == about["questions"] and {row["subject"] for row in rows} == set(SIDE_OF)
    count = Counter(row["subject"] for row in rows)
    assert min(count.values()) > 150 and max(count.values()) == 400 and len({row["fact"] for row in rows}) == len(rows)
    for row in rows:
        word = row["choices"][row["answer"]]
        assert re.fullmatch("[a-z]{3,}", word) and 15 <= len(row["question"]) <= 120
        assert not re.search(rf"\b{word}", row["question"].lower()) and in_first_half(row["fact"], about["seed"])
    asked = [row["question"] for row in rows]
    texts = {f"{name} {i}": row["text"] for name in about["texts"]
             for i, row in enumerate(rows_in(FOLDER/"texts"/f"{name}.jsonl.gz"))}
    assert len(texts) == sum(about["texts"].values()) and not holding(texts, asked)
    for task in ORDER_TASKS:
        for split, pairs in ORDER_PAIRS.items():
            assert len(rows_in(FOLDER/"order"/f"{task}-{split}.jsonl.gz")) == 2 * pairs


def test_shipped_sources_read():
    forget, = wordnet_questions("forget", 3)
    assert forget.subject == "living_things" and len(forget.load()) == 9 and forget.asked == "continuation"
    assert [s.subject for s in wordnet_questions("neighbours")] == list(SUBJECTS_OF["neighbours"])
    sources = wordnet_texts("train_forget", "retain", "train_neither")
    assert [s.side for s in sources] == ["forget", "retain", "neither"]
    assert all(len(next(iter(s))) > 8 for s in sources)


def test_probing_sets_read_the_texts():
    from saenb.evals.probing_texts import probing_texts
    from saenb.lab.presets import setups
    from saenb.lab.real_presets import PROBING, REAL_MODELS, adapted, materials, real_fields
    evals = adapted(setups(materials()))
    setup = evals["sparse_probing"]
    assert setup.dataset_names == tuple(PROBING)
    train, test = probing_texts("wordnet/living", setup)
    assert list(train) == list(PROBING["wordnet/living"].classes)
    assert all(len(train[c]) == 150 and len(test[c]) == 50 and not set(train[c]) & set(test[c]) for c in train)
    for name in REAL_MODELS: assert real_fields(name, setups)["name"] == name


@pytest.mark.skipif(not Path(DATABASE, "data.noun").exists(), reason="SAENB_WORDNET names no folder of the database")
def test_what_ships_comes_from_the_database(tmp_path):
    about = json.loads((FOLDER/"wordnet.json").read_text())
    net = WordNet.read(DATABASE)
    if len(net.synsets) != about["synsets"]: pytest.skip("another version of WordNet")
    assert build(DATABASE, tmp_path, about["seed"])["files"] == about["files"]
