"""What neighbours of the forgotten subject lose: as a model gives it that is asked the long way, on small random models; when nothing can be said; presets."""
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st
from matplotlib.figure import Figure
from standin import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from saenb.base.errors import SaenbError
from saenb.base.schemas import schema_error
from saenb.data.continuation import Examiner
from saenb.data.sources import WORDINGS, QuestionSource, TextSource, boot
from saenb.evals import unlearning
from saenb.evals.evaluation import as_text, result_id
from saenb.evals.exam import Exam, Grid, UnlearningSetup, feature_stats
from saenb.evals.halves import answers_of, wilson
from saenb.evals.interventions.clamp import Clamp
from saenb.evals.interventions.intervention import plain_answers
from saenb.evals.neighbours import (
    EDGES, NEIGHBOURS, NeighboursSetup, bin_name, chosen_on_halves, difference, evaluate, grouped, headline, held_out_right, make_setup,
    needs, neighbours_exam, plot, right_after, steps_of, table)
from saenb.lab.preset_files import find_preset
from saenb.lab.presets import Preset, setups
from saenb.lab.real_presets import adapted, materials
from saenb.lab.runner import evaluate_sae
from saenb.sae.sae import SAE, SAEConfig

LAYER, STEPS = 1, dict(animal=0, artifact=8, person=5, food=2, substance=6)
draw = random.Random(0)
WORDS = ["".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(draw.randint(1, 4))) for _ in range(200)]


def sentence(low, high, words=WORDS): return " ".join(draw.choices(words, k=draw.randint(low, high)))


@pytest.fixture(scope="module", params=["gemma3_text", "llama"])
def model(request, tmp_path_factory):
    """A small random model of the architectures that the real presets read."""
    import torch
    torch.manual_seed(0)
    tokenizer = make_tokenizer([sentence(5, 9, WORDS[:150]) for _ in range(200)] + [w.replace("{}", "") for w in WORDINGS])
    config = AutoConfig.for_model(request.param, vocab_size=len(tokenizer), initializer_range=0.3, bos_token_id=2, eos_token_id=1, pad_token_id=0, hidden_size=32,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=4, intermediate_size=48, max_position_embeddings=64)
    if request.param != "llama": config.sliding_window, config.layer_types = 5, ["sliding_attention", "full_attention"] * 2
    folder = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return boot(folder)


@pytest.fixture(scope="module")
def setup(model, tmp_path_factory):
    """What is asked: questions in the form of WordNet's, which the model answers its own way, so that it knows them in the first wording."""
    folder, count = tmp_path_factory.mktemp("questions"), 12
    rows = [dict(subject=s, question=sentence(3, 7), choices=draw.sample(WORDS, 4), answer=0, fact=f"{s} {i}", distance=steps)
            for s, steps in STEPS.items() for i in range(count)]
    (folder/"questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for side, words in (("forget", WORDS[:120]), ("retain", WORDS[80:])):
        (folder/f"{side}.jsonl").write_text("\n".join(json.dumps(dict(text=sentence(20, 40, words))) for _ in range(40)))
    sources = {s: QuestionSource(s, str(folder/"questions.jsonl"), asked="continuation", wordings=WORDINGS[:1]) for s in STEPS}
    asked = UnlearningSetup(questions=tuple(sources.values()), forget=TextSource(str(folder/"forget.jsonl")), retain=TextSource(str(folder/"retain.jsonl")),
                            dataset_size=12, seq_len=32, lowest_retain=0.0, retain_floor=0.75, grid=Grid((0.3, 1.0), (4, 16), (1.0, 4.0), True), reference=None)
    examiner, at = Examiner(model), 0
    for source in sources.values():
        questions = examiner.asking(source, source.load())
        for answer in examiner.read_whole(questions).tolist():
            rows[at]["answer"], at = answer, at + 1
    (folder/"questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return replace(asked, questions=tuple(sources[s] for s in list(STEPS)[:3])), NeighboursSetup(neighbours=(sources["food"], sources["substance"]))


@pytest.fixture(scope="module")
def exam(model, setup): return Exam(model, setup[0], LAYER)


@pytest.fixture(scope="module")
def sae(model, exam):
    """A dictionary of random weights."""
    cfg = SAEConfig(d_in=32, d_sae=64, hook_name=f"blocks.{LAYER}.hook_out", hook_layer=LAYER, model_name=str(model.cfg.model_name))
    return SAE(cfg).initialise(exam.stream, 0)


@pytest.fixture(scope="module")
def unlearned(exam, sae): return unlearning.evaluate(exam.model, sae, exam.setup, exam)


@pytest.fixture(scope="module")
def result(exam, sae, setup, unlearned): return evaluate(exam.model, sae, setup[1], exam, unlearned)


def test_neighbours_are_answered_as_if_asked_one_by_one(exam, sae, setup, unlearned):
    """Question by question and setting by setting, every sequence read whole through the clamp as it is defined."""
    beyond, stats = neighbours_exam(exam, setup[1]), feature_stats(exam, sae)
    assert beyond.base.all() and len(beyond.answer) == 24 and steps_of(beyond) == [2] * 12 + [6] * 12
    settings, places = Clamp().settings(exam.setup.grid, stats), [1, 3, 6]
    after = right_after(exam, beyond, sae, unlearned, [*places, None])
    wanted = np.array([plain_answers(beyond, sae, *Clamp().asked(settings[p], stats)[:2], Clamp()).numpy() for p in places])
    assert np.array_equal(after[:-1], wanted) and after[-1].all() and 0 < wanted.mean() < 1 and len(np.unique(wanted, axis=0)) > 1


def test_shares_are_those_of_the_reported_settings(exam, sae, setup, unlearned, result):
    assert schema_error(result, NEIGHBOURS.shape) is None and result["eval_type_id"] == "neighbours"
    ours, theirs = result["eval_result_unstructured"], unlearned["eval_result_unstructured"]
    assert ours["places"] == chosen_on_halves(unlearned) and set(ours["places"]) != {None} and ours["before"] == 1
    after = right_after(exam, neighbours_exam(exam, setup[1]), sae, unlearned, ours["places"])
    assert ours["sides"]["neighbours"]["share"] == pytest.approx(after.mean()) and ours["finding"] is None
    assert [s["share"] for s in ours["subjects"] if s["side"] == "neighbours"] == pytest.approx([after[:, :12].mean(), after[:, 12:].mean()])
    assert ours["sides"]["forgotten"]["share"] == pytest.approx(1 - theirs["held_out"]) # the halves are as large as each other
    assert ours["sides"]["retained"]["share"] == pytest.approx(theirs["held_out_retain"])
    assert {(b["side"], bin_name(b["bin"]), b["known"]) for b in ours["bins"]} == {
        ("forgotten", "0", 12), ("retained", "7 and more", 12), ("retained", "5", 12), ("neighbours", "1 to 3", 12), ("neighbours", "6", 12)}
    value, low, high = headline(result)["neighbours lost beyond retained"]
    assert value == pytest.approx(theirs["held_out_retain"] - after.mean()) and low <= value <= high


def test_each_question_is_judged_by_the_setting_chosen_without_it(unlearned):
    answers, places = answers_of(unlearned), chosen_on_halves(unlearned)
    right = held_out_right(unlearned, places)
    for i, half in enumerate(answers.half): assert right[i] == (places[1 - half] is None or answers.right[places[1 - half], i])
    assert held_out_right(unlearned, [None, None]).all()


def test_a_result_that_is_not_given_is_made(exam, sae, setup, result):
    alone = evaluate(exam.model, sae, setup[1], exam)
    assert alone | dict(datetime_epoch_millis=0) == result | dict(datetime_epoch_millis=0)


def test_another_dictionarys_result_is_refused(exam, sae, setup, unlearned):
    other = SAE(sae.cfg).initialise(exam.stream, 3)
    other.b_enc.data -= 100.0 # nothing is active, so nothing is chosen
    with pytest.raises(SaenbError, match="other settings"): evaluate(exam.model, other, setup[1], exam, unlearned)


def test_table_and_picture(result):
    text = as_text(table(result))
    assert "food" in text and "7 and more steps" in text and len(table(result)) == 5 + 5
    figure = plot(dict(one=result, other=result))
    assert isinstance(figure, Figure) and [t.get_text() for t in figure.axes[0].get_xticklabels()] == [bin_name(i) for i in range(len(EDGES))]


def test_nothing_to_say(exam, sae, setup, unlearned, tmp_path):
    rows = [row | dict(subject="food", answer=(row["answer"] + 1) % 4) for row in setup[1].neighbours[0].load()]
    (tmp_path/"unknown.jsonl").write_text("\n".join(map(json.dumps, rows)))
    unknown = NeighboursSetup(neighbours=(replace(setup[1].neighbours[0], path=str(tmp_path/"unknown.jsonl")),))
    found = evaluate(exam.model, sae, unknown, exam, unlearned)
    assert schema_error(found, NEIGHBOURS.shape) is None and headline(found) == {}
    assert "knows no question of food" in as_text(table(found)) and isinstance(plot(dict(none=found)), Figure)
    with pytest.raises(SaenbError, match="no neighbours"): NeighboursSetup(neighbours=())


def test_the_runner_gives_it_the_unlearning_result(exam, sae, setup, unlearned, result, tmp_path, monkeypatch):
    folder, texts = str(exam.model.cfg.model_name), (setup[0].forget,)
    preset = Preset("near", folder, folder, LAYER, texts, dict(neighbours=setup[1], unlearning=setup[0]), 64, None)
    monkeypatch.setattr("saenb.lab.runner.exam_of", lambda *a: exam)
    found = evaluate_sae(sae, preset, tmp_path, ["neighbours"])["neighbours"]
    assert {p.name for p in tmp_path.glob("*.json")} == {"neighbours.json", "unlearning.json"}
    assert found["eval_result_unstructured"] == result["eval_result_unstructured"]
    assert found["eval_id"] == result_id(sae, (setup[1], unlearned["eval_id"]))
    monkeypatch.setattr("saenb.lab.runner.exam_of", lambda *a: pytest.fail("asked again"))
    assert evaluate_sae(sae, preset, tmp_path, ["neighbours"])["neighbours"] == found
    changed = replace(preset, evals=preset.evals | dict(unlearning=replace(setup[0], retain_floor=0.5)))
    with pytest.raises(pytest.fail.Exception, match="asked again"): evaluate_sae(sae, changed, tmp_path, ["neighbours"])


@given(st.lists(st.tuples(st.sampled_from(["forgotten", "retained", "neighbours"]), st.sampled_from("ab"), st.integers(-1, 20), st.sampled_from([0, 0.5, 1])), min_size=1))
def test_groups_are_plain_counts(rows):
    found = grouped(*(np.array(column) for column in zip(*rows)))
    def wanted(kept): return dict(known=len(kept), share=pytest.approx(sum(kept) / len(kept)))
    for side, group in found["sides"].items(): assert wanted([r[3] for r in rows if r[0] == side]) == {k: group[k] for k in ("known", "share")}
    for group in found["subjects"]: assert wanted([r[3] for r in rows if r[:2] == (group["side"], group["subject"])]) == {k: group[k] for k in ("known", "share")}
    for group in found["bins"]:
        low, high = (*EDGES, 10**9)[group["bin"]:group["bin"] + 2]
        mine = [r[3] for r in rows if r[0] == group["side"] and low <= r[2] < high]
        assert wanted(mine) == {k: group[k] for k in ("known", "share")} and (group["low"], group["high"]) == pytest.approx(wilson(np.mean(mine), len(mine)))
    assert sum(g["known"] for g in found["bins"]) == sum(r[2] >= 0 for r in rows) and sum(g["known"] for g in found["subjects"]) == len(rows)


def test_a_difference_has_the_spread_of_two_shares():
    rng = np.random.default_rng(0)
    one, other = (rng.random(400) < p for p in (0.9, 0.7))
    value, low, high = difference(one.astype(float), other.astype(float))
    assert low < value < high and high - low == pytest.approx(2 * 1.96 * (0.09 / 400 + 0.21 / 400)**0.5, rel=0.2)


def test_presets_have_it_where_there_are_neighbours():
    given = materials()
    evals = adapted(setups(given))
    assert [s.subject for s in evals["neighbours"].neighbours] == ["food", "substance", "group", "process", "bodily_state"]
    assert all(need[0] == "questions" and "160 questions, 160 with a distance" == need[2]() for need in list(needs(evals["neighbours"]))[:1])
    assert make_setup(replace(given, nearby=())) is None and "neighbours" not in setups(replace(given, nearby=()))
    for name in ("tiny", "tiny-full"): assert "neighbours" not in (*find_preset(name).evals, *find_preset(name).recorded)


def test_other_questions_have_other_neighbours(setup):
    """Those of living things are none of chemistry's."""
    from saenb.lab import preset_files
    base = Preset("near", "m", "m", LAYER, (setup[0].forget,), dict(neighbours=setup[1], unlearning=setup[0]), 64, None)
    own = preset_files._asking(base, setup[0].questions)
    assert set(own.evals) == set(own.recorded) == {"unlearning"}
