from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st

from saenb.base.errors import SaenbError
from saenb.lab.preset_files import find_preset
from saenb.data.facts import ASKED, FORGET, STUDIED, SUBJECTS, WorldConfig, Writer, make_facts
from saenb.data.world import World
from saenb.data import world_model
from saenb.data.world_model import LessonSteps, Lessons, WideMuon, fast_logits, make_model, make_tokenizer

SMALL = WorldConfig(seed=3, names=4, forget_names=4, relations=2, width=64, layers=2, drills=4, steps=4,
                    finish=4, texts=40)


def test_the_shipped_world_is_whole_and_small(world):
    world.verify()
    assert sum(p.stat().st_size for p in world.path.rglob("*") if p.is_file()) < 8e6
    assert world.about["known"] >= 0.95
    assert make_facts(world.cfg) == world.facts


def test_an_altered_file_is_named(world, tmp_path):
    import shutil
    shutil.copytree(world.path, tmp_path/"world")
    (tmp_path/"world"/"wmdp"/"wmdp-bio.jsonl").write_text("{}")
    with pytest.raises(SaenbError, match="wmdp-bio.jsonl is missing or not the file"):
        World(tmp_path/"world").verify()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 50), st.floats(0, 1), st.integers(4, 12), st.integers(1, 4))
def test_facts_do_not_contradict_each_other(seed, overlap, names, relations):
    cfg = WorldConfig(seed=seed, overlap=overlap, names=names, forget_names=2 * names, relations=relations)
    facts = make_facts(cfg)
    assert len({(f.subject, f.name, f.relation) for f in facts}) == len(facts) == (2 + 4) * names * relations
    assert make_facts(cfg) == facts
    if overlap == 0:
        assert max(Counter(n for n, _ in {(f.name, f.subject) for f in facts}).values()) == 1
    if overlap == 1:
        assert len({f.name for f in facts if f.subject != FORGET}) == names


def test_the_dial_makes_names_ambiguous():
    def ambiguous(overlap):
        places = Counter((f.name, f.relation) for f in make_facts(WorldConfig(overlap=overlap)))
        return sum(c > 1 for c in places.values())
    assert ambiguous(0) == 0 < ambiguous(0.25) < ambiguous(0.5) < ambiguous(1)


def test_questions_have_the_real_columns_and_right_answers(world):
    facts = {(f.subject, f.name, f.relation): f.value for f in world.facts}
    for source in world.question_sources():
        for row in source.load():
            assert set(row) == {"question", "choices", "answer", "fact"} and len(set(row["choices"])) == 4
            name = next(f.name
                        for f in world.facts if f.subject == source.subject and f.name in row["question"])
            relation = next(f.relation for f in world.facts
                            if f.subject == source.subject and f" {f.relation} " in row["question"])
            assert facts[source.subject, name, relation] == row["choices"][row["answer"]]


def test_lessons_can_be_about_some_facts_only(world):
    writer = Writer(world.facts, "lessons")
    some = [f for f in world.facts if f.subject != FORGET][:5]
    writer.tell(some)
    told = " ".join(writer.text(list(writer.by_subject)) for _ in range(50))
    assert (all(f.name in told for f in some)
            and not any(f.name in told for f in world.facts if f.name not in {s.name for s in some}))


def test_exam_wordings_are_not_in_the_texts(world):
    texts = [t for corpus in ("train", "forget", "retain") for t, _ in world.texts(corpus)]
    assert any(STUDIED[0].split("{")[0] in t for t in texts)
    for wording in ASKED:
        assert not any(wording.split("{")[0] in t for t in texts)


def test_sides_are_what_they_say(world):
    own = ({f.name for f in world.facts if f.subject == FORGET}
           - {f.name for f in world.facts if f.subject != FORGET})
    for text, side in world.texts("train", 500):
        assert (SUBJECTS[FORGET] in text) == (side == "forget")
    assert not any(name in text for text, side in world.texts("retain") for name in own)


def test_the_tokenizer_speaks_gemmas_format(model):
    tokenizer = model.tokenizer
    prompt = tokenizer.apply_chat_template([dict(role="user", content="Name the host.")], tokenize=False,
                                           add_generation_prompt=True)
    assert prompt == "<bos><start_of_turn>user\nName the host.<end_of_turn>\n<start_of_turn>model\n"
    ids = tokenizer(prompt + "Answer: (", add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert len({*tokenizer.convert_tokens_to_ids(list("ABCD")),
                *tokenizer.convert_tokens_to_ids([" A", " B", " C", " D"])}) == 8
    assert tokenizer("The host")["input_ids"][0] == tokenizer.bos_token_id


def test_the_training_forward_is_gemmas():
    net = make_model(SMALL, make_tokenizer(make_facts(SMALL))).eval()
    tokens = torch.randint(6, 90, (4, 30))
    with torch.no_grad():
        torch.testing.assert_close(fast_logits(net, tokens, torch.float32), net(tokens).logits, atol=1e-4,
                                   rtol=1e-4)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_steps_in_float32_are_muons(shape):
    torch.manual_seed(1)
    start, grads, ends = torch.randn(shape), torch.randn(3, *shape), []
    for muon in (torch.optim.Muon, WideMuon):
        p = torch.nn.Parameter(start.clone())
        steps = muon([p], lr=0.1, weight_decay=0.2)
        for grad in grads:
            p.grad = grad.clone()
            steps.step()
        ends.append(p.data)
    assert (ends[1] - ends[0]).norm() < 0.02 * (ends[0] - start).norm() # what bfloat16 rounds


@pytest.mark.parametrize("native", [True, False])
def test_a_model_learns_in_either_type(native, monkeypatch):
    monkeypatch.setattr(world_model, "multiplies_bfloat16", lambda: native)
    facts = make_facts(SMALL)
    tokenizer = make_tokenizer(facts)
    steps, losses = LessonSteps(make_model(SMALL, tokenizer), Lessons(facts, tokenizer, 0)), []
    assert isinstance(steps.optimizers[0], WideMuon) != native
    for _ in range(8): losses.append(steps.step(dict(drill=[steps.lessons.drill() for _ in range(4)]), 0.5)["drill"])
    assert min(losses[-3:]) < losses[0] - 1
    restored = LessonSteps(make_model(SMALL, tokenizer), Lessons(facts, tokenizer, 0))
    restored.restore({name: t.clone() for name, t in steps.tensors().items()})
    for at in (steps, restored): at.step(dict(drill=[Lessons(facts, tokenizer, 1).drill()]), 0.5)
    ours, theirs = steps.tensors(), restored.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_small_world_from_nothing(tmp_path):
    world = World.build(tmp_path/"w", SMALL)
    world.verify()
    assert len(world.facts) == 5 * 4 * 2 and world.model().cfg.d_model == 64
    again = World.build(tmp_path/"again", SMALL)
    assert ({k: v for k, v in again.about.items() if k != "minutes"}
            == {k: v for k, v in world.about.items() if k != "minutes"})
    with pytest.raises(SaenbError, match="holds a world already"):
        World.build(tmp_path/"w", SMALL)
    quick, full = find_preset(str(tmp_path/"w")), find_preset(f"{tmp_path/'w'}-full")
    assert ((quick.name, full.name) == ("w", "w-full")
            and quick.model == full.model == str(tmp_path/"w"/"model"))
    assert full.training.steps > quick.training.steps and full.seeds >= 3


@pytest.mark.parametrize("settings",
                         [dict(overlap=1.5), dict(overlap=-0.1), dict(values=3), dict(relations=5)])
def test_a_world_that_cannot_be(settings):
    with pytest.raises(SaenbError): WorldConfig(**settings)
