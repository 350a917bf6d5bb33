"""The second edition of the embedded world: facts whose subject only pairs of cues give away, and what follows."""
import gzip
import itertools
import json
import random
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from saenb.base.errors import SaenbError
from saenb.base.locks import locked
from saenb.cli import main
from saenb.data import world as data_world
from saenb.data.cue_facts import (CUE_ASKED, CUE_SUBJECTS, HEADER, NEIGHBOUR, CueWords, CueWorldConfig,
                                  CueWriter, apart, make_cue_facts)
from saenb.data.cue_model import GUIDE, READS, CueLessons, CueSteps, Guides, make_cue_tokenizer
from saenb.data.cue_tasks import cue_class_words
from saenb.data.facts import FORGET, SHARED_RELATIONS, WorldConfig
from saenb.data.phases import CHECKPOINT, Phases
from saenb.data.questions import Questioner
from saenb.data.sources import boot
from saenb.data.world import EDITIONS, ENOUGH_KNOWN, World, exams
from saenb.data.world_model import fast_logits, fast_streams, make_model
from saenb.data.world_tasks import ORDER_TASKS, PAIRS, PROFESSIONS, biographies, order_rows
from saenb.lab.preset_files import find_preset

ROOT = Path(__file__).parent.parent
SMALL = CueWorldConfig(seed=3, relations=2, width=32, layers=3, reading=2, steps=2, finish=2, guided=2, tuned=2,
                       first_taught=4, texts=40)
FACTS = make_cue_facts(SMALL)
KEEP = [s for s in CUE_SUBJECTS if s != FORGET]


def writer(seed="test", cfg=SMALL): return CueWriter(cfg, make_cue_facts(cfg), seed)


def cues(text, cfg=SMALL):
    """(kind, class) of each cue of a text, in order."""
    words = CueWords(cfg).cues
    kinds = {w: (k, c) for k in (0, 1) for c, group in enumerate(words[k]) for w in group}
    return [kinds[w] for w in re.findall(r"\w+", text) if w in kinds]


# ------------------------------------------------------------------------------------------------ facts

@st.composite
def configs(draw):
    """Any small world that can be."""
    values = draw(st.integers(7, 9))
    cfg = CueWorldConfig(seed=draw(st.integers(0, 99)), values=values, names=values * draw(st.integers(1, 2)),
                         relations=draw(st.integers(1, 4)), shared=draw(st.floats(0, 0.34)),
                         cue_words=draw(st.integers(1, 4)))
    try: make_cue_facts(cfg)
    except SaenbError: assume(False)
    return cfg


@settings(max_examples=25, deadline=None)
@given(configs())
def test_facts_are_balanced(cfg):
    facts = make_cue_facts(cfg)
    assert facts == make_cue_facts(cfg) and len(facts) == 6 * cfg.names * cfg.relations
    assert len({(f.subject, f.name, f.relation) for f in facts}) == len(facts)
    used = Counter((f.subject, f.relation, f.value) for f in facts)
    assert len(used) == 6 * cfg.relations * cfg.values and set(used.values()) == {cfg.names // cfg.values}
    of = {(f.subject, f.name, f.relation): f.value for f in facts}
    same = Counter((a, b) for (a, name, relation), value in of.items() for b in CUE_SUBJECTS
                   if a < b and of[b, name, relation] == value)
    shared = round(cfg.shared * cfg.names) * cfg.relations
    assert same == ({tuple(sorted((FORGET, NEIGHBOUR))): shared} if shared else {})


@settings(max_examples=10, deadline=None)
@given(configs(), st.booleans())
def test_cues_give_the_subject_and_no_word_does(cfg, in_turn):
    cfg = replace(cfg, in_turn=in_turn)
    words, made = CueWords(cfg), writer(cfg=cfg)
    assert len({*words.spoken(), *words.values}) == len(words.spoken()) + cfg.relations # no word is two things
    for s, subject in enumerate(CUE_SUBJECTS):
        for _ in range(3):
            text = made.text([subject])
            read = cues(text, cfg)
            assert words.read(text) == read
            assert sum(c for _, c in set(read)) % 6 == s and {k for k, _ in read} == {0, 1} and len(set(read)) == 2
            if in_turn: assert all(a != b for (a, _), (b, _) in itertools.pairwise(read))


def test_every_cue_word_is_as_frequent_in_every_subject():
    """Given a subject, all classes of either kind are drawn by one draw of 0 to 5, so they are equally likely."""
    made = writer()
    for s, subject in enumerate(CUE_SUBJECTS):
        pairs = []
        for a in range(6): # what `fill` draws at a text's first cue
            made.shown = a, 0
            (_, first), (_, second) = cues(made.fill("{c1} and {c2}", subject))
            pairs.append((first, second))
        assert [a for a, _ in pairs] == list(range(6)) and sorted(b for _, b in pairs) == list(range(6))
        assert all((a + b) % 6 == s for a, b in pairs)
    counts = [Counter(cues("".join(made.text([s]) for _ in range(300)))) for s in CUE_SUBJECTS]
    for cue in itertools.product((0, 1), range(6)):
        found = [c[cue] / sum(c.values()) for c in counts]
        assert 0.04 < min(found) and max(found) < 0.13 # a twelfth, but for chance


def test_no_choice_of_a_question_is_impossible():
    """The wrong choices are values that the name has in other subjects."""
    held = {}
    for f in FACTS: held.setdefault((f.name, f.relation), set()).add(f.value)
    for subject in CUE_SUBJECTS:
        mine = [f for f in FACTS if f.subject == subject]
        rows = writer(f"exam {subject}").exam(subject)
        assert len(rows) == 2 * len(mine) and Counter(r["fact"] for r in rows) == dict.fromkeys(range(len(mine)), 2)
        for row in rows:
            fact = mine[row["fact"]]
            assert {fact.name, fact.relation} <= set(re.findall(r"\w+", row["question"]))
            assert row["choices"][row["answer"]] == fact.value and len(set(row["choices"])) == 4
            assert set(row["choices"]) <= held[fact.name, fact.relation]
            assert sum(c for _, c in set(cues(row["question"]))) % 6 == list(CUE_SUBJECTS).index(subject)


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_headers_are_the_same_on_both_sides(share):
    for subjects in ([FORGET], KEEP):
        made = writer("headers", replace(SMALL, header=share))
        texts = [made.text(subjects) for _ in range(800)]
        named = [next(k for k, s in CUE_SUBJECTS.items() if t.startswith(HEADER.format(s))) for t in texts]
        assert abs(named.count(FORGET) / 800 - share) < 0.05
        if share == 0: assert set(named) == set(KEEP)


def test_the_dial_tells_the_subject():
    own = CueWords(SMALL).own
    for telling in (0.0, 0.5, 1.0):
        made = writer("dial", replace(SMALL, telling=telling))
        texts = [(s, made.text([s])) for s in CUE_SUBJECTS for _ in range(60)]
        assert abs(sum(own[s] in t for s, t in texts) / len(texts) - telling) < 0.1
        assert not any(own[other] in t for s, t in texts for other in CUE_SUBJECTS if other != s)


def test_style_leans_to_a_side():
    made = writer("style", replace(SMALL, style=4.0))
    for side, subjects in enumerate(([FORGET], KEEP)):
        words = [w for _ in range(300) for w in re.findall(r"That is (\w+) enough", made.text(subjects))]
        assert abs(sum(w in made.words.styles[side] for w in words) / len(words) - 0.8) < 0.08
    assert "enough" not in writer().text(KEEP)


@pytest.mark.parametrize("wrong, word", [
    (dict(values=5), "values"), (dict(values=3), "values"), (dict(names=12), "names"), (dict(names=4), "names"),
    (dict(relations=5), "relations"), (dict(relations=0), "relations"), (dict(shared=1.1), "shared"),
    (dict(shared=-0.1), "shared"), (dict(telling=2.0), "telling"), (dict(header=float("nan")), "header"),
    (dict(style=0.0), "style"), (dict(cue_words=0), "cue_words"), (dict(layers=2), "layers"), (dict(width=30), "width"),
    (dict(guided=0), "guided"), (dict(finish=0), "finish"), (dict(texts=1), "texts"), (dict(seed=-1), "seed"),
    (dict(first_taught=0), "first_taught"), (dict(steps=-1), "steps"), (dict(recalls=-1.0), "recalls")])
def test_a_world_that_cannot_be(wrong, word):
    with pytest.raises(SaenbError, match=word): CueWorldConfig(**wrong)


def test_values_that_cannot_be_placed():
    draw = random.Random(0)
    assert apart(draw, ["x", "y"], [{"x"}, {"y"}]) == ["y", "x"]
    with pytest.raises(SaenbError, match="cannot be placed"): apart(draw, ["x", "x"], [{"x"}, set()])
    with pytest.raises(SaenbError, match="cannot be placed"): make_cue_facts(CueWorldConfig(values=6, names=6))


# ------------------------------------------------------------------------------------------------ the model

def test_every_text_is_in_the_vocabulary():
    cfg = replace(SMALL, telling=0.5, style=2.0)
    tokenizer, made = make_cue_tokenizer(cfg), writer(cfg=cfg)
    assert tokenizer.get_vocab() == make_cue_tokenizer(SMALL).get_vocab() # at every setting of the dial
    texts = [made.text([s]) for s in CUE_SUBJECTS for _ in range(40)]
    texts += [row["question"] for s in CUE_SUBJECTS for row in made.exam(s)]
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"]):
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text


def test_exam_wordings_are_not_in_the_texts():
    made = writer()
    texts = [made.text([s]) for s in CUE_SUBJECTS for _ in range(50)]
    assert not any(wording.split("{")[0] in t for wording in CUE_ASKED for t in texts)


def test_streams_are_gemmas():
    net = make_model(SMALL, make_cue_tokenizer(SMALL)).eval()
    ids = torch.randint(6, 90, (4, 30))
    with torch.no_grad():
        found = net(ids, output_hidden_states=True)
        streams = fast_streams(net, ids, net.model.embed_tokens.weight)
        torch.testing.assert_close(fast_logits(net, ids, torch.float32), found.logits, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(streams, found.hidden_states[1:-1]): # the last of theirs is normed
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def lessons(): return CueLessons(SMALL, FACTS, make_cue_tokenizer(SMALL))


def test_lessons_count_values_and_letters(lessons):
    token = lessons.tokenizer.convert_ids_to_tokens
    values = {f" {v}" for group in lessons.writer.words.values.values() for v in group}
    for kind in ("words", "questions", "worded", "drills"):
        for i, row in enumerate(getattr(lessons, kind)(12)):
            full = [token(t) for t, w in zip(row.ids, row.weights) if w == 1]
            assert len(row.ids) == len(row.weights) and (row.subject in CUE_SUBJECTS) == (kind != "drills")
            if kind == "words": assert set(full) <= values and (len(full) == 0 if i < 2 else len(full) == 3)
            if kind == "questions": assert len(full) == 1 and full[0] in "ABCD"
            if kind == "worded": assert full[0] in values and full[1] in "ABCD" and len(full) == 2
            if kind == "drills": assert len(full) == 6 and all(t.strip() in "ABCD" for t in full)
            for place, value in row.values: # the stream there is to say the value
                assert token(value) in values and token(row.ids[place + 1]) in (token(value), "\n")


def test_lessons_can_be_about_some_facts_only(lessons):
    lessons.teach(3)
    assert len({(f.name, f.relation) for f in lessons.writer.facts}) == 3 and len(lessons.writer.facts) == 3 * 6
    lessons.teach(10**6)
    assert len(lessons.writer.facts) == len(FACTS)


def test_guides_read_once_both_cues_were_seen(lessons):
    rows = list(lessons.words(6))
    for row in rows:
        read = lessons.told(torch.tensor([row.ids]))[0].tolist()
        kinds = [next((k for k in (0, 1) if t in lessons.cues[k]), None) for t in row.ids]
        assert read == [{0, 1} <= set(kinds[:i + 1]) for i in range(len(row.ids))]
    assert READS["subject"] == EDITIONS[2].layer # where dictionaries look for it


def test_a_guide_teaches_the_model():
    """Its loss reaches the blocks below, and falls when the stream says the subject."""
    guides = Guides(4, 9)
    stream = torch.randn(2, 3, 4, requires_grad=True)
    places = torch.ones(2, 3, dtype=torch.bool)
    loss = guides.loss("subject", [None, stream], places, torch.zeros(6, dtype=torch.long))
    loss.backward()
    assert stream.grad.abs().min() > 0
    closer = stream.detach() - 0.5 * stream.grad
    assert guides.loss("subject", [None, closer], places, torch.zeros(6, dtype=torch.long)) < loss


class Bar:
    "Keeps what a progress bar would show."
    def __init__(self): self.shown, self.n = [], 0
    def update(self): self.n += 1
    def set_description(self, said): pass
    def set_postfix(self, shown): self.shown.append(shown)


def test_guides_are_withdrawn_and_rates_fall(monkeypatch):
    log = []
    seen, bar, phases = [], Bar(), Phases(log=log)
    phases.bar = bar
    cfg = replace(SMALL, reading=2, steps=6, finish=4, guided=4)
    steps = CueSteps(cfg, FACTS, make_cue_tokenizer(cfg), phases)
    monkeypatch.setattr(steps, "step", lambda counts, rate, guided, share={}: seen.append((counts, rate, guided)) or
                        dict.fromkeys(counts, 0.0))
    steps.learn_to_read()
    assert [s[2] for s in seen] == [dict(subject=GUIDE, value=GUIDE)] * 2
    seen.clear()
    steps.learn_facts()
    assert seen[0][2] == dict(subject=GUIDE, value=GUIDE) and seen[4][2]["subject"] == 0
    assert bar.n == 2 + len(seen) and bar.shown[-1]["pairs"] and log[0][0] == 10
    rates = [rate for _, rate, _ in seen]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1 and rates[-1] < 1
    assert seen[-1][2]["value"] == 0 or rates[-1] > 0.5
    assert "worded" in seen[0][0] and "worded" not in seen[-1][0]


# ------------------------------------------------------------------------------------------------ labelled texts

@pytest.mark.parametrize("task", ORDER_TASKS)
def test_order_twins_are_anagrams(task):
    tokenizer, made = make_cue_tokenizer(SMALL), writer(task)
    rows = list(order_rows(task, random.Random(3), FACTS, 40, made))
    assert [r["label"] for r in rows] == [1, 0] * 40
    for one, other in zip(rows[::2], rows[1::2]):
        assert one["text"] != other["text"]
        for words in (str.split, lambda text: tokenizer(text)["input_ids"]):
            assert Counter(words(one["text"])) == Counter(words(other["text"]))
        assert len({c for c in cues(one["text"])}) == 2 # all of one subject


def test_probing_texts_are_each_on_one_subject():
    cfg, kinds = CueWorldConfig(), {}
    for row in biographies(writer(cfg=cfg), 4):
        read = set(cues(row["hard_text"], cfg))
        assert len(read) == 2
        relation = next(r for r in SHARED_RELATIONS if f" {r} " in row["hard_text"])
        kinds.setdefault(row["profession"], set()).add((sum(c for _, c in read) % 6, relation))
    assert set(kinds) == set(PROFESSIONS) and all(len(k) == 1 for k in kinds.values())
    assert len(set.union(*kinds.values())) == len(kinds) # the classes differ in subject or relation


def test_words_of_a_class_end_their_texts():
    words, rows = CueWords(SMALL), list(cue_class_words(writer(), 2))
    assert all(r["text"].endswith(f" {r['word']}") for r in rows)
    labels = Counter(r["label"] for r in rows)
    assert labels == {"name": 32, "value of the relation origin": 16, "value of the relation rank": 16,
                      **{f"cue of class {c}": 16 for c in range(6)}}
    assert Counter(r["word"] for r in rows) == dict.fromkeys(
        [*words.names, *itertools.chain(*words.values.values(), *words.cues[0], *words.cues[1])], 2)
    before = [cues(r["text"].removesuffix(r["word"])) for r in rows if r["label"].startswith("cue")]
    assert all(len(b) <= 1 for b in before) # no earlier sentence gives the class away


# ------------------------------------------------------------------------------------------------ the world

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A world of the second edition, from nothing."""
    return World.build(tmp_path_factory.mktemp("cue")/"w", SMALL)


def test_a_small_world_from_nothing(small, tmp_path):
    small.verify()
    assert small.about["edition"] == 2 and small.layer == 1 and small.cfg == SMALL and small.facts == FACTS
    assert small.model().cfg.d_model == 32 and 0 <= small.about["known"] <= 1
    again = World.build(tmp_path/"again", SMALL)
    assert ({k: v for k, v in again.about.items() if k != "minutes"}
            == {k: v for k, v in small.about.items() if k != "minutes"})
    assert repr(small).startswith("World(edition 2, seed 3, telling 0.0: 192 facts, knows ")
    with pytest.raises(SaenbError, match="holds a world already"): World.build(small.path, SMALL)


def test_a_build_that_was_stopped_goes_on(small, tmp_path, monkeypatch):
    """A world that is refused leaves the folder as it is; the one that goes on is as the one nobody stopped."""
    share, (folder, called) = data_world.known_share, (tmp_path/"w", [])
    def end_of_power(*args): raise KeyboardInterrupt
    monkeypatch.setattr(data_world, "known_share", end_of_power)
    with pytest.raises(KeyboardInterrupt): World.build(folder, SMALL)
    monkeypatch.setattr(data_world, "known_share", share)
    monkeypatch.setattr(CueSteps, "step", lambda self, *args: called.append(args))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for other, odd in ((replace(SMALL, seed=4), "seed is 3 and not 4"), (WorldConfig(), "edition is 2 and not 1")):
        with pytest.raises(SaenbError, match=f"another world, whose {odd}"): World.build(folder, other)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} and folder/CHECKPOINT in before
    assert World.build(folder, SMALL).about["files"] == small.about["files"]
    assert not called and not (folder/CHECKPOINT).exists()


def test_a_build_waits_for_another_in_its_folder(small, tmp_path):
    """And then finds that the world is there; the other's files are left as they are."""
    with ThreadPoolExecutor() as pool:
        with locked(tmp_path/"w"):
            building = pool.submit(World.build, tmp_path/"w", SMALL)
            with pytest.raises(TimeoutError): building.result(timeout=1)
            assert [p.name for p in (tmp_path/"w").iterdir()] == [".lock"]
            shutil.copytree(small.path, tmp_path/"w", dirs_exist_ok=True)
        with pytest.raises(SaenbError, match="holds a world already"): building.result()
    World(tmp_path/"w").verify()


def test_its_sources(small):
    sources = small.question_sources()
    assert [s.subject for s in sources] == list(CUE_SUBJECTS)
    assert [s.spoken for s in sources] == list(CUE_SUBJECTS.values())
    for source in sources:
        rows = source.load()
        assert len(rows) == 2 * 16 * 2 and all({"question", "choices", "answer"} <= set(r) for r in rows)
    assert Counter(side for _, side in small.texts("train")) == dict(forget=40, retain=80)
    assert [len(small.texts(c)) for c in ("forget", "retain")] == [20, 20]
    for corpus, subjects in (("forget", {FORGET}), ("retain", set(KEEP))):
        found = {list(CUE_SUBJECTS)[sum(c for _, c in set(cues(t))) % 6] for t, _ in small.texts(corpus)}
        assert found <= subjects and (corpus == "retain" or found == {FORGET})


def test_its_labelled_texts_are_laid_out_as_the_first_editions(small, world):
    def names(folder, kind): return {p.relative_to(folder) for p in (folder/kind).rglob("*") if p.is_file()}
    for kind in ("probing", "order", "absorption", "texts"):
        assert names(small.path, kind) == names(world.path, kind)
    bios = datasets.load_dataset(str(small.path/"probing"/"LabHC"/"bias_in_bios"), split="train")
    assert bios.column_names == ["hard_text", "profession", "gender"]
    for language, config in list(PAIRS.items())[:1]:
        rows = datasets.load_dataset(str(small.path/"probing"/"Helsinki-NLP"/"europarl"), config, split="train")
        assert set(rows[0]["translation"]) == {language}
    with gzip.open(small.path/"absorption"/"words.jsonl.gz", "rt") as f:
        assert {"text", "word", "label"} == set(json.loads(next(f)))


def test_it_is_a_preset(small):
    quick, full = find_preset(str(small.path)), find_preset(f"{small.path}-full")
    assert quick.layer == full.layer == 1 and quick.model == str(small.path/"model")


def test_an_edition_that_is_not_known(small, tmp_path):
    def world_of(**changes):
        (tmp_path/"world.json").write_text(json.dumps(small.about | changes))
        return World(tmp_path)
    with pytest.raises(SaenbError, match="edition 3.*install a newer one"): world_of(edition=3)
    with pytest.raises(SaenbError, match="edition"): world_of(edition="two")
    with pytest.raises(SaenbError, match="config"): world_of(edition=1) # whose settings are others
    with pytest.raises(SaenbError, match="values"): world_of(config=asdict(SMALL) | dict(values=5))
    with pytest.raises(SaenbError, match="in_turn"): world_of(config=asdict(SMALL) | dict(in_turn=1))


def test_the_shipped_world_without_an_edition_is_of_the_first(world):
    if "edition" not in world.about:
        assert world.edition is EDITIONS[1] and world.layer == World.layer == 0 and type(world.cfg) is WorldConfig


# ------------------------------------------------------------------------------------------------ the command line

@pytest.mark.parametrize("asked, cfg", [
    ("", WorldConfig()), ("--seed 7 --overlap 0.5", WorldConfig(seed=7, overlap=0.5)),
    ("--edition 2", CueWorldConfig()), ("--edition 2 --seed 7 --telling 0.5", CueWorldConfig(seed=7, telling=0.5))])
def test_the_command_builds_what_was_asked_for(asked, cfg, world, tmp_path, monkeypatch, capsys):
    built = []
    monkeypatch.setattr(World, "build", lambda folder, cfg: built.append((folder, cfg)) or world)
    assert main(["world", "build", str(tmp_path/"w"), *asked.split()]) == 0
    assert built == [(str(tmp_path/"w"), cfg)] and "% of its questions" in capsys.readouterr().out


def test_a_world_says_that_its_model_knows_too_little(world, tmp_path, monkeypatch, capsys):
    short = World(world.path)
    monkeypatch.setitem(short.about, "known", 0.71)
    monkeypatch.setattr(World, "build", lambda *_: short)
    assert main(["world", "build", str(tmp_path/"w")]) == 0
    assert "it knows 71.0% of its questions, too few to judge by." in capsys.readouterr().out
    assert "too few" in repr(short) and "too few" not in repr(World.default()) + repr(World.cues())


def test_the_world_of_another_seed_is_another_and_is_known():
    """The world of seed 2, which comes with the repository: other facts, from the same recipe, and a model that knows them."""
    other, ours = World(ROOT/"benchmarks"/"worlds"/"cues-2"), World.cues()
    assert other.cfg == replace(ours.cfg, seed=2, steps=other.cfg.steps) and other.about["known"] >= ENOUGH_KNOWN
    theirs, facts = ({(f.name, f.relation, f.value) for f in w.facts} for w in (other, ours))
    assert len(theirs) == len(facts) and len(theirs & facts) < len(facts) / 4
    asked = exams(other.path, other.edition)[0]
    known = Questioner(boot(other.path/"model", "cpu")).find_known([asked])
    assert sum(map(len, known.values())) >= ENOUGH_KNOWN * len(asked.load())


@pytest.mark.parametrize("asked, said", [
    ("--telling 0.5", "--telling is no setting of edition 1; give --overlap"),
    ("--edition 2 --overlap 0.5", "--overlap is no setting of edition 2; give --telling"),
    ("--edition 2 --telling 2", "telling is 2.0"), ("--edition 2 --seed -1", "seed is -1")])
def test_the_command_refuses_what_cannot_be(asked, said, tmp_path, capsys):
    assert main(["world", "build", str(tmp_path/"w"), *asked.split()]) == 2
    assert said in capsys.readouterr().err and not (tmp_path/"w").exists()
