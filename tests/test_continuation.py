"""Questions asked by continuation: answers as transformers alone gives them, known questions, clamps, controls, and what cannot be asked."""
import json
import random
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from standin import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from saenb.base.errors import SaenbError
from saenb.data.continuation import Continued, Examiner, continued, likelihoods, likeliest
from saenb.data.shared_prefixes import Ends, Trie, prefix_ids, read_ends
from saenb.data.sources import WORDINGS, QuestionSource, TextSource, boot
from saenb.evals.autopsy import autopsy
from saenb.evals.contextual_reference import contextual_reference
from saenb.evals.evaluation import _asked, result_id
from saenb.evals.exam import Exam, Grid, UnlearningSetup
from saenb.evals.interventions.clamp import Clamp
from saenb.evals.interventions.intervention import InterventionBatch, plain_answers
from saenb.evals.random_choice import RandomChoiceSetup, evaluate
from saenb.evals.word_lists import word_lists
from saenb.sae.sae import SAE, SAEConfig

DEPTH, LAYER, SUBJECTS, COUNT = 4, 1, ("animal", "artifact"), 14
draw = random.Random(0)
WORDS = ["".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(draw.randint(1, 4))) for _ in range(300)]


def sentence(low, high, words=WORDS): return " ".join(draw.choices(words, k=draw.randint(low, high)))


@pytest.fixture(scope="module")
def tokenizer():
    """One that cuts rare words into pieces."""
    return make_tokenizer([sentence(5, 9, WORDS[:150]) for _ in range(200)] + [w.replace("{}", "") for w in WORDINGS])


@pytest.fixture(scope="module", params=["gemma3_text", "llama", "gemma2"])
def pair(request, tokenizer, tmp_path_factory):
    """A small random model, as we read it and as transformers does; what its logits are capped at is near them."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param, vocab_size=len(tokenizer), initializer_range=0.3, bos_token_id=2, eos_token_id=1, pad_token_id=0, hidden_size=32, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_hidden_layers=DEPTH, intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=False)
    if request.param != "llama":
        config.sliding_window, config.layer_types = 5, ["sliding_attention", "full_attention"] * (DEPTH // 2)
    if request.param == "gemma2": config.final_logit_softcapping = 2.0
    folder = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return boot(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


one_model = pytest.mark.parametrize("pair", ["llama"], indirect=True, scope="module")


def totals(plain, tokenizer, prompt, choices):
    """Each choice's log-probability behind a prompt, by transformers alone, one sequence after another."""
    found, begin = [], tokenizer("<bos>" + prompt, add_special_tokens=False)["input_ids"]
    for choice in choices:
        row = tokenizer(f"<bos>{prompt} {choice}", add_special_tokens=False)["input_ids"]
        with torch.no_grad(): logs = plain(torch.tensor([row])).logits[0].log_softmax(-1)
        found.append(sum(logs[place - 1, row[place]] for place in range(len(begin), len(row))))
    return torch.stack(found)


@contextmanager
def clamped(plain, sae, features, value):
    """Some features set to minus a value where they are active, in transformers' own layer."""
    def change(module, given, out):
        x = out[0] if isinstance(out, tuple) else out
        f = sae.encode(x)
        f[:, 0] = 0
        new = f.clone()
        for feature in features: new[..., feature][f[..., feature] > 0] = -value
        new = x + (new - f) @ sae.W_dec
        return (new, *out[1:]) if isinstance(out, tuple) else new
    hook = plain.model.layers[LAYER].register_forward_hook(change)
    try: yield
    finally: hook.remove()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """Made-up questions on two subjects with two to five choices of one to three tokens each, seldom of different lengths, and texts."""
    folder, rows, by_length = tmp_path_factory.mktemp("questions"), [], {n: [] for n in range(1, 9)}
    for word in WORDS: by_length[len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"])].append(word)
    for subject in SUBJECTS:
        for i in range(COUNT):
            choices = draw.sample(by_length[1 + i % 3], draw.randint(2, 5)) + ([draw.choice(by_length[1])] if i % 6 == 5 else [])
            rows.append(dict(subject=subject, question=sentence(3, 8), choices=choices, answer=0, fact=f"{subject} {i // 2}", distance=1))
    (folder/"questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for side, words in (("forget", WORDS[:200]), ("retain", WORDS[100:])):
        (folder/f"{side}.jsonl").write_text("\n".join(json.dumps(dict(text=sentence(20, 40, words))) for _ in range(40)))
    return folder


@pytest.fixture(scope="module")
def answered(pair, folder, tmp_path_factory):
    """The same questions with the model's own answers in the first wording, so that it knows all in that one."""
    model, plain = pair
    rows = [json.loads(line) for line in (folder/"questions.jsonl").read_text().splitlines()]
    for row in rows: row["answer"] = int(totals(plain, model.tokenizer, WORDINGS[0].replace("{}", row["question"]), row["choices"]).argmax())
    path = tmp_path_factory.mktemp("answered")/"questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return tuple(QuestionSource(s, str(path), asked="continuation", wordings=WORDINGS[:1]) for s in SUBJECTS)


@pytest.fixture(scope="module")
def asked(pair, answered, folder):
    """An exam on them."""
    setup = UnlearningSetup(questions=answered, forget=TextSource(str(folder/"forget.jsonl")), retain=TextSource(str(folder/"retain.jsonl")),
                            dataset_size=20, seq_len=32, batch_tokens=500, lowest_retain=0.0, grid=Grid((0.3, 1.0), (5, 20), (2.0, 8.0), True), reference=None)
    return Exam(pair[0], setup, LAYER)


@pytest.fixture(scope="module")
def sae(pair, asked):
    """A dictionary of random weights."""
    cfg = SAEConfig(d_in=32, d_sae=64, hook_name=f"blocks.{LAYER}.hook_out", hook_layer=LAYER, model_name=str(pair[0].cfg.model_name))
    return SAE(cfg).initialise(asked.stream, 0)


@pytest.mark.parametrize("choices, rows, ends", [
    ([(7,), (8,)], [[2, 3]], (1,)), ([(7,), (8, 5)], [[2, 3, 8]], (2,)), ([(8, 5), (8, 6), (9, 1, 1)], [[2, 3, 8], [2, 3, 9, 1]], (2, 3))])
def test_only_what_is_needed_is_read(choices, rows, ends):
    question = continued([2, 3], choices)
    assert [row.tolist() for row in question.rows] == rows and question.ends == ends
    assert len(question.parts) == sum(map(len, choices)) and question.parts[:, 3].sum() == sum(len(c) - 1 for c in choices)


def test_log_probabilities_are_those_of_transformers(pair, answered):
    """Up to what the choices of a question share, its prompt's normaliser."""
    model, plain = pair
    examiner, rows = Examiner(model), answered[0].load()
    questions = examiner.asking(answered[0], rows)
    tokens = [row for q in questions for row in q.rows]
    trie = Trie(prefix_ids(tokens), [n for q in questions for n in q.ends])
    nodes = torch.stack([tokens[s][p] for s, p in zip(trie.sequence, trie.place)])
    found = likelihoods(questions, read_ends(model, trie, nodes), trie.leaf)
    assert {len(c) for q in questions for c in q.choices} == {1, 2, 3}
    for row, got in zip(rows, found):
        wanted = totals(plain, model.tokenizer, WORDINGS[0].replace("{}", row["question"]), row["choices"]).double()
        got = got[:len(wanted)]
        torch.testing.assert_close(got - got.mean(), wanted - wanted.mean(), rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 2**16), few=st.integers(1, 20), scale=st.sampled_from([0.1, 1.0, 5.0, 20.0]), capped=st.sampled_from([None, 3.0]))
@settings(max_examples=60, deadline=None)
def test_the_answer_by_bounds_is_the_answer(seed, few, scale, capped):
    """Whatever part of the words gives the bounds; and all words are computed at fewer places than without them."""
    draw = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(6, 200, bias=False)
    with torch.no_grad(): head.weight.copy_(scale * torch.randn(200, 6, generator=draw))
    model = SimpleNamespace(original_model=SimpleNamespace(config=SimpleNamespace(final_logit_softcapping=capped)), unembed=SimpleNamespace(original_component=head))
    def words(n): return tuple(torch.randint(200, (n,), generator=draw).tolist())
    questions = [continued([1, 2], list(dict.fromkeys(words(1 + i % 3) for i in range(4)))) for _ in range(12)]
    places = sum(sum(q.ends) for q in questions)
    ends = Ends(model, torch.randn(places // 2 + 1, 6, generator=draw)) # leaves that questions share
    ends.few, leaf, read = few, torch.randint(places // 2 + 1, (places,), generator=draw), []
    inner = ends.normalisers
    ends.normalisers = lambda leaves: read.extend(leaves.unique().tolist()) or inner(leaves)
    with torch.no_grad():
        wanted = likelihoods(questions, ends, leaf).argmax(1)
        every = len(read)
        assert ends.bounds_pay and likeliest(questions, ends, leaf).tolist() == wanted.tolist()
    assert len(set(read[every:])) == len(read[every:]) <= every
    ends.states = ends.states.bfloat16()
    assert not ends.bounds_pay # rounding there is wider than what is close


@one_model
def test_known_is_right_in_all_wordings(pair, answered):
    model, plain = pair
    source = replace(answered[0], wordings=WORDINGS[:2])
    wanted = [i for i, row in enumerate(source.load()) if all(
        totals(plain, model.tokenizer, w.replace("{}", row["question"]), row["choices"]).argmax() == row["answer"] for w in source.wordings)]
    assert Examiner(model, 200).find_known((source,)) == {"animal": wanted} and 0 < len(wanted) < COUNT


def test_an_exam_asks_one_wording_of_each_question(asked, answered):
    assert asked.base.all() and len(asked.answer) == len(asked.asked) == 2 * COUNT < len(asked.tokens)
    assert asked.owner.tolist() == [i for i, q in enumerate(asked.asked) for _ in q.rows]
    halves = {}
    for fact, half in zip(asked.fact, asked.half.tolist()): assert halves.setdefault(fact, half) == half
    assert torch.equal(asked.read_whole(asked.asked), asked.answer)


def test_a_clamp_gives_what_transformers_gives(pair, asked, sae):
    """Question by question, one prompt at a time, for several features and strengths at once."""
    plain, rows = pair[1], [row for source in asked.setup.questions for row in source.load()]
    settings = [(features, share * sae.cfg.scale) for features, share in (([3, 9, 30], 2.0), (list(range(40)), 1.0))]
    batch = InterventionBatch(asked, sae, [(f, torch.full((len(f),), v)) for f, v in settings], Clamp())
    outcomes, changed = batch.run(), 0
    for (features, value), outcome in zip(settings, outcomes):
        right = []
        for row in rows:
            with clamped(plain, sae, features, value):
                found = totals(plain, pair[0].tokenizer, WORDINGS[0].replace("{}", row["question"]), row["choices"])
            right.append(bool(found.argmax() == row["answer"]))
        assert outcome.right.tolist() == right
        changed += right.count(False)
    assert plain_answers(asked, sae, features, torch.full((len(features),), value), Clamp()).tolist() == right
    assert 5 < changed < 3 * COUNT
    assert batch.read < len(settings) * sum(len(q.prompt) + len(c) for q in asked.asked for c in q.choices)


def test_letters_and_continuations_in_one_exam(world, model, tmp_path):
    """The embedded world's letters beside its own sentences."""
    lettered = world.question_sources()[0]
    rows = [row | dict(question=row["fact"]) for row in world.question_sources()[1].load()[:20]]
    (tmp_path/"sentences.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = QuestionSource("sentences", str(tmp_path/"sentences.jsonl"), asked="continuation", wordings=["The {} is"])
    both = Examiner(model)
    questions = both.asking(lettered, lettered.load()[:20])
    mixed = [q for two in zip(questions, both.asking(said, rows)) for q in two]
    tokens = [row for q in mixed for row in q.rows]
    found, _ = both.answers(prefix_ids(tokens), lambda row, place: torch.stack([tokens[r][p] for r, p in zip(row, place)]), asked=mixed)
    assert torch.equal(found, both.read_whole(mixed)) and not isinstance(mixed[0], Continued)
    assert found[::2].tolist() == [row["answer"] for row in lettered.load()[:20]]
    assert (found[1::2] == torch.tensor([row["answer"] for row in rows])).float().mean() > 0.9


@one_model
def test_controls_and_the_autopsy_ask_by_continuation_too(pair, asked, sae):
    given = {k: getattr(asked.setup, k) for k in ("questions", "forget", "retain", "dataset_size", "seq_len", "batch_tokens", "lowest_retain", "grid", "reference")}
    ours = evaluate(pair[0], sae, RandomChoiceSetup(**given, draws=2), asked)["eval_result_unstructured"]
    assert len(ours["held_out"]) == 2 and all(0 <= v <= 1 for v in ours["score"])
    lists = word_lists(asked)
    assert all(len(rows) and any(r["right"] is not None and not r["right"].all() for r in rows) for rows in lists.values())
    found = contextual_reference(asked)
    assert 0 <= found["held_out"] <= 1 and 0 <= found["held_out_retain"] <= 1
    report = autopsy(pair[0], sae, asked.setup, asked)
    assert report["counts"]["known"] == dict(animal=COUNT, artifact=COUNT) and report["counts"]["settings"] == 8


@one_model
def test_another_wording_of_the_same_questions(pair, answered, asked, folder):
    questions = tuple(replace(q, wordings=WORDINGS) for q in answered)
    last = Exam(pair[0], replace(asked.setup, questions=questions, wording=-1), LAYER, cache=folder/"cache")
    again = Exam(pair[0], replace(asked.setup, questions=questions), LAYER, cache=folder/"cache")
    assert last.known == again.known and len(list((folder/"cache").glob("known_*.json"))) == 1
    assert last.base.all() and again.base.all() and 0 < len(last.asked) < 2 * COUNT
    assert all(not torch.equal(a.rows[0], b.rows[0]) for a, b in zip(last.asked, again.asked))
    with pytest.raises(SaenbError, match="wording is 3"): replace(asked.setup, questions=questions, wording=3)


@one_model
def test_new_fields_leave_old_names_as_they_were(asked, sae):
    """A setup that asks by letters has the name that it had before there was another way."""
    lettered = replace(asked.setup, questions=tuple(QuestionSource(s, "x") for s in SUBJECTS))
    assert result_id(sae, lettered) == result_id(sae, replace(lettered, wording=0))
    assert result_id(sae, lettered) != result_id(sae, replace(lettered, questions=tuple(QuestionSource(s, "x", asked="continuation") for s in SUBJECTS)))
    assert _asked(lettered)["questions"] == [dict(subject=s, path="x", split="test") for s in SUBJECTS]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv"])
def test_one_file_of_any_kind_holds_several_subjects(tmp_path, name):
    import gzip
    import pandas as pd
    rows = [dict(subject=s, question=f"{s}?", choices=["x", "y z", "w"], answer=i) for i, s in enumerate(SUBJECTS)]
    lines, table = "\n".join(map(json.dumps, rows)), pd.DataFrame(rows)
    path = tmp_path/name
    if name.endswith("gz"): path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith("parquet"): table.to_parquet(path)
    elif name.endswith("csv"): table.assign(choices=[json.dumps(r["choices"]) for r in rows]).to_csv(path, index=False)
    else: path.write_text(lines if name.endswith("l") else json.dumps(rows))
    assert QuestionSource("artifact", str(path), asked="continuation").load() == [dict(question="artifact?", choices=["x", "y z", "w"], answer=1)]


@pytest.mark.parametrize("given, said", [
    (dict(wordings=["The word is"]), "one or more, each with one {}"), (dict(wordings=[]), "one or more, each with one {}"),
    (dict(wordings="{}"), "one or more, each with one {}"), (dict(asked="telepathy"), "no way of asking called 'telepathy'")])
def test_sources_that_cannot_be_asked(given, said):
    with pytest.raises(SaenbError, match=said.replace("{}", r"\{\}")): QuestionSource("animal", "x", **dict(asked="continuation") | given)


@pytest.mark.parametrize("change, said", [
    (dict(choices=["paw"]), "two or more choices"), (dict(choices=["paw", " "]), "no text or stands there twice"), (dict(choices=["paw", "paw "]), "stands there twice"),
    (dict(choices=None), "two or more choices"), (dict(answer=2), "the number of the right one"), (dict(subject="animals"), "did you mean animals"),
    (dict(question=None), "does not have a question")])
def test_rows_that_cannot_be_asked(tmp_path, change, said):
    (tmp_path/"q.jsonl").write_text(json.dumps(dict(subject="animal", question="?", choices=["paw", "hoof"], answer=0) | change))
    with pytest.raises(SaenbError, match=said) as told: QuestionSource("animal", str(tmp_path/"q.jsonl"), asked="continuation").load()
    assert "\n" not in str(told.value)


def test_a_file_without_the_columns(tmp_path):
    (tmp_path/"q.jsonl").write_text(json.dumps(dict(text="no question")))
    for asked in ("letters", "continuation"):
        with pytest.raises(SaenbError, match="Question 0 of .* does not have a question"): QuestionSource("q", str(tmp_path/"q.jsonl"), asked=asked).load()


@pytest.mark.parametrize("ids, said", [
    (lambda text: [1, 2] if text.endswith("is") else [1, 3, 4], "joins the end of a wording"), (lambda text: [1, 2] + [3] * text.endswith("bado"), "leaves nothing of a choice"),
    (lambda text: [1, 2] + [3] * (" is " in text), "tell two choices apart")])
@one_model
def test_choices_that_the_tokenizer_spoils(pair, ids, said):
    source, examiner = QuestionSource("animal", "x", asked="continuation", wordings=["{} is"]), Examiner(pair[0])
    examiner.ids = lambda texts: list(map(ids, texts))
    with pytest.raises(SaenbError, match=said): examiner.asking(source, [dict(question="a foot", choices=["bado", "fige"], answer=0)])
