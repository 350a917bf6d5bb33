import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats
from sklearn.metrics import mutual_info_score

from saenb.base.errors import SaenbError
from saenb.evals.evaluation import Readings, encoded
from saenb.evals.controls import as_logged, principal_components, untrained
from saenb.evals.order_probing import (LabelledOrder, SentenceOrder, mean_interval, order_files, pooled,
                                       probes, twin_rows)
from saenb.evals.position import (PositionalSetup, evaluate, fidelity, headline, information, jackknife, plot,
                                  retained_total, retention, rotated_positions, specialisation, states, table,
                                  tally)
from saenb.data.harvest import is_text
from saenb.sae.sae import SAE, SAEConfig
from saenb.data.sources import TextSource
from saenb.train.mechanism import Mechanism
from saenb.data.facts import SUBJECTS

PARTS, SIDES = 16, ("forget", "retain")
PART = (torch.arange(128) - 1) % 127 * PARTS // 127


class PositionalOnlyAt(Mechanism):
    """Feature i acts in one part of the row; from `free` on, anywhere."""
    def gate(self, x, f, positions):
        i = torch.arange(f.shape[-1])
        return f * ((PART[positions][..., None] == i % PARTS) | (i >= self.settings["free"]))


class PositionalQuieter(Mechanism):
    """No feature is turned off, but all are turned down in the second half of the row."""
    def gate(self, x, f, positions):
        return f * torch.where(positions < 64, 1.0, 0.4)[..., None]


class PositionalRising(Mechanism):
    def gate(self, x, f, positions): return f * (positions / 127)[..., None]


class PositionalByContent(Mechanism):
    def gate(self, x, f, positions): return f * (x[..., -1:] > 0)


class Made(Readings):
    """A stream computed from the tokens alone; no model is asked."""
    def __init__(self, model, make):
        super().__init__(model, 1)
        self.make = make

    def rows(self, tokens):
        for part in tokens.split(64):
            yield part, self.make(part), is_text(part, self.model.tokenizer)


def words(tokens):
    return torch.nn.functional.one_hot(tokens % 191, 192).float()


def clock(tokens, shuffle=False):
    """The part of the row in the first channels, noise in the last."""
    draw = torch.Generator().manual_seed(int(tokens.sum()))
    part = PART.expand(tokens.shape)
    if shuffle:
        part = part.gather(1,
                           1 + torch.rand(len(tokens), 127, generator=draw).argsort(1).repeat(1, 2)[:, :128])
    stream = torch.zeros(*tokens.shape, 192)
    stream[..., :PARTS] = torch.nn.functional.one_hot(part, PARTS).float()
    stream[..., -1] = torch.randn(tokens.shape, generator=draw)
    return stream


def reads(weights, gates=()):
    """A dictionary that reads the stream's first channels with these weights."""
    sae = SAE(SAEConfig(d_in=192, d_sae=weights.shape[1], gates=[dict(name=g, settings={}) for g in gates]))
    with torch.no_grad(): sae.W_enc[:len(weights)] = weights
    return sae.eval()


def gated(sae, name, **settings):
    twin = SAE(replace(sae.cfg, gates=[dict(name=name, settings=settings)]))
    twin.load_state_dict(sae.state_dict())
    return twin.eval()


@pytest.fixture(scope="module")
def setup(world):
    return PositionalSetup(forget=world.text_sources("forget")[0], retain=world.text_sources("retain")[0],
                           order=order_files(world.path/"order"), dataset_size=100)


@pytest.fixture(scope="module")
def readings(model, world): return Readings(model, world.layer)


@pytest.fixture(scope="module")
def result(model, trained, setup, readings):
    return evaluate(model, trained, setup, readings)


def share(sae, setup, readings):
    found = specialisation(tally(sae, setup, readings), setup)
    return found["share"][found["alive"]]


# what a feature tells

def test_information_against_scikit_learn():
    rng = np.random.default_rng(0)
    part, state = rng.integers(0, 5, 3000), np.stack([rng.integers(0, 3, 3000), rng.integers(0, 3, 3000)])
    state[1] = np.where(part == 2, 2, state[1] % 2)
    counts = torch.tensor([[[((part == p) & (s == v)).sum() for s in state] for p in range(5)]
                           for v in range(3)]).double()
    bits, sign = information(counts)
    for i, s in enumerate(state):
        assert bits[i].item() == pytest.approx(mutual_info_score(part, s) / np.log(2), abs=1e-9)
        told = sum((s == v).sum() * stats.entropy(np.bincount(part[s == v], minlength=5),
                                                  np.bincount(part, minlength=5), base=2) for v in (1, 2))
        assert sign[i].item() == pytest.approx(told / (s > 0).sum(), abs=1e-9)


def test_counts_of_single_features_against_the_tokens_themselves(trained, setup, readings):
    seen = tally(trained, setup, readings)
    bits, _ = information(states(seen.above.sum(0), seen.tokens.sum(0)).double())
    batches = [b for side in SIDES for b in readings.corpus(setup, side)]
    f = torch.cat([encoded(trained, stream)[keep] for _, stream, keep in batches])
    part = torch.cat([PART.expand(keep.shape)[keep] for _, _, keep in batches])
    assert seen.tokens[:, 0].sum(0).tolist() == part.bincount(minlength=PARTS).tolist()
    for i in (0, 7, 100, bits[0].argmax().item()):
        typical = f[:, i].sum() / (f[:, i] > 0).sum()
        state = sum((f[:, i] > level * typical).int() for level in setup.levels)
        assert bits[0, i].item() == pytest.approx(mutual_info_score(part, state) / np.log(2), rel=1e-3,
                                                  abs=1e-6)
        for p in (0, 9):
            assert seen.active.sum(0)[p, i].item() == pytest.approx(f[part == p, i].sum().item(), rel=1e-3)


def test_rotation_keeps_positions_and_neighbours(setup):
    positions = rotated_positions(6, setup, torch.Generator().manual_seed(0))
    assert torch.equal(positions[0], torch.arange(128).expand(6, 128)) and not positions[..., 0].any()
    for row in positions.flatten(0, 1):
        assert sorted(row.tolist()) == list(range(128))
        assert ((row[2:] - row[1:-1]) % 127 == 1).all()
    assert all(not torch.equal(p, positions[0]) for p in positions[1:])


def test_planted_features_tell_all_and_blind_ones_nothing(model, trained, setup, readings):
    assert share(gated(trained, "PositionalOnlyAt", free=512), setup, readings).mean() > 0.97
    told = share(reads(torch.eye(PARTS)), setup, Made(model, clock))
    assert len(told) == PARTS and told.min() > 0.98
    often = replace(setup, min_active=200)
    blind = share(reads(torch.eye(192)), often, Made(model, words))
    assert len(blind) > 20 and abs(blind.mean()) < 0.03
    assert (abs(share(reads(torch.eye(PARTS)), setup, Made(model, lambda t: clock(t, shuffle=True))).mean())
            < 0.01)


def test_bits_reach_the_features_own_entropy(model, setup):
    seen = tally(reads(torch.eye(PARTS)), replace(setup, levels=(0.0,)), Made(model, clock))
    bits, _ = information(states(seen.above.sum(0), seen.tokens.sum(0)).double())
    on = seen.tokens[:, 0].sum(0).double() / seen.tokens[:, 0].sum()
    torch.testing.assert_close(bits[0], torch.tensor(stats.entropy(np.stack([on, 1 - on]), base=2)),
                               atol=1e-9, rtol=0)


def test_a_mask_that_only_turns_down_is_seen_by_the_levels(model, setup):
    loud = reads(torch.ones(PARTS, 1))
    bits = {levels: specialisation(tally(gated(loud, "PositionalQuieter"), replace(setup, levels=levels),
                                         Made(model, clock)), setup)["bits"].item()
            for levels in ((0.0,), (0.0, 0.5, 1.0))}
    assert abs(bits[0.0,]) < 1e-9 and bits[0.0, 0.5, 1.0] > 0.9


def test_the_floor_is_fair_to_features_that_stay_on(model, setup):
    """Features on for 40 tokens in a row, anywhere: what they seem to tell is chance, and the floor says
    so."""
    def stretches(tokens):
        begin = torch.randint(0, 127, (len(tokens), 1, 192),
                              generator=torch.Generator().manual_seed(int(tokens.sum())))
        return ((torch.arange(128)[:, None] + begin) % 127 < 40).float()
    seen = tally(reads(torch.eye(192)), replace(setup, levels=(0.0,)), Made(model, stretches))
    bits, _ = information(states(seen.above.sum(0), seen.tokens.sum(0)).double())
    by_chance = (PARTS - 1) / (2 * seen.tokens[:, 0].sum() * np.log(2)) # were the tokens independent
    assert (bits[0].mean() > 5 * by_chance
            and bits[1:].mean().item() == pytest.approx(bits[0].mean().item(), rel=0.1))


def test_the_jackknife_of_a_mean_is_the_t_interval():
    from saenb.evals.position import Tally
    values = torch.randn(20, 5, 16, generator=torch.Generator().manual_seed(0)).double()
    (value, low, high), = jackknife(Tally(*[values] * 5), lambda t: [t.tokens.mean().item()])
    each = values.flatten(1).mean(1).numpy()
    np.testing.assert_allclose((low, high), stats.t.interval(0.95, 19, each.mean(), stats.sem(each)))
    assert value == pytest.approx(each.mean())


# masks

def test_fidelity_is_high_where_features_follow_and_low_where_they_work_around(model, setup):
    ramp = torch.arange(1.0, PARTS + 1) / PARTS
    three = torch.stack([torch.ones(PARTS), ramp, ramp.flip(0)], 1)
    alike, with_it, against = (fidelity(tally(reads(three, ["PositionalRising"]), setup, Made(model, clock)))
                               .tolist())
    assert alike > 0.999 and 0.9 < with_it < alike and abs(against) < 0.3
    steeper = fidelity(tally(reads(ramp.flip(0).pow(4)[:, None], ["PositionalRising"]), setup,
                             Made(model, clock))).item()
    assert steeper < -0.5


def test_only_masks_by_position_have_a_fidelity(model, trained, setup, readings):
    assert not fidelity(tally(reads(torch.ones(PARTS, 1), ["PositionalByContent"]), setup,
                              Made(model, clock))).isfinite().any()
    assert not fidelity(tally(trained, setup, readings)).isfinite().any()
    half = fidelity(tally(gated(trained, "PositionalOnlyAt", free=256), setup, readings))
    assert (half[:256].isfinite().float().mean() > 0.8 and half[:256].nanmean() > 0.97
            and not half[256:].isfinite().any())


# texts whose label is their order

def test_the_worlds_twins_have_the_same_tokens_and_none_is_asked_twice(world, model):
    for task in order_files(world.path/"order"):
        rows = twin_rows(task, model.tokenizer, 128)
        lines = {split: [tuple(r[is_text(r, model.tokenizer)].tolist()) for r in rows[split]]
                 for split in ("train", "test")}
        for some in lines.values():
            assert all(a != b and sorted(a) == sorted(b) for a, b in zip(some[::2], some[1::2]))
        assert not set(lines["train"]) & set(lines["test"]) and len(set(lines["test"])) == len(lines["test"])
        found = task.twins()
        assert (rows["left_out"]
                == sum(map(len, found.values())) - (len(lines["train"]) + len(lines["test"])) // 2)
        assert model.tokenizer.decode(rows["train"][0]).startswith(f"<bos>{found['train'][0][0]}")


def test_sentences_in_order_and_swapped(world, model, tmp_path):
    path = tmp_path/"texts.txt"
    path.write_text("\n".join("The origin of fokena is zazu. As for tevini, its host is mire. "
                              f"We know number {i} as it is. Short one." for i in range(90)))
    task = SentenceOrder("sentences", TextSource(str(path)), count=40)
    found = task.twins(seed=3)
    assert (len(found["train"]) == 40 and len(found["test"]) == 20
            and found == task.twins(seed=3) != task.twins(seed=4))
    for one, other in found["train"] + found["test"]:
        assert (one.startswith("Notes: ") and one != other and sorted(one.split()) == sorted(other.split())
                and "Short" not in one)
        first, second = one.removeprefix("Notes: ").split(". ", 1)
        assert other == f"Notes: {second} {first}."
    spoken = [(a.removeprefix("Notes: "), b.removeprefix("Notes: ")) for a, b in found["train"]]
    same = [sorted(model.tokenizer(a)["input_ids"]) == sorted(model.tokenizer(b)["input_ids"])
            for a, b in spoken]
    assert not any(same) # without a beginning, the first word has no space before it and is another token


def test_bare_words_know_nothing_of_sentences_either(world, model, setup):
    task = SentenceOrder("sentences", world.text_sources("retain")[0], count=60)
    rows = twin_rows(task, model.tokenizer, 128)
    assert torch.equal(rows["train"][::2].sort(1).values, rows["train"][1::2].sort(1).values)
    mean, *_ = evaluate(model, reads(torch.eye(192)), replace(setup, order=(task,)),
                        Made(model, words))["eval_result_details"]
    assert (mean["pairs"] == len(rows["test"]) // 2
            and {v for k, v in mean.items() if k.endswith("accuracy")} == {0.5})


def test_twins_of_other_tokens_are_left_out(model):
    class Odd:
        name = "odd"
        def __init__(self, good, bad): self.good, self.bad = good, bad
        def twins(self, seed):
            good = [(f"{'the ' * i}origin is", f"{'the ' * i}is origin") for i in range(1, 2 * self.good + 1)]
            return dict(train=good[:self.good] + [("the origin is", "the origin was")] * self.bad + good[:1],
                        test=good[self.good:])
    rows = twin_rows(Odd(20, 5), model.tokenizer, 128)
    assert (len(rows["train"]), len(rows["test"]), rows["left_out"]) == (40, 40, 6)
    with pytest.raises(SaenbError, match="odd has 15 usable pairs for train out of 21"):
        twin_rows(Odd(15, 5), model.tokenizer, 128)
    with pytest.raises(SaenbError, match="max_tokens=4"):
        twin_rows(Odd(20, 0), model.tokenizer, 4)


def test_files_that_hold_no_twins(tmp_path, world):
    def task(*rows):
        (tmp_path/"t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return LabelledOrder("t", str(tmp_path/"t.jsonl"), str(tmp_path/"t.jsonl"))
    assert task(dict(text="b a", label=0), dict(text="a b", label=1)).twins()["train"] == [("a b", "b a")]
    with pytest.raises(SaenbError, match="needs text and label"):
        task(dict(text="a")).twins()
    with pytest.raises(SaenbError, match="Rows 0 and 1 .* not twins"):
        task(dict(text="a b", label=1), dict(text="b a", label=1)).twins()
    with pytest.raises(SaenbError, match="Rows 2 and 3 .* not twins"):
        task(dict(text="a b", label=1), dict(text="b a", label=0), dict(text="a b", label=1)).twins()
    with pytest.raises(SaenbError, match="holds no order task"):
        order_files(tmp_path)
    assert [t.name for t in order_files(world.path/"order")] == ["binding", "entity_order", "relation_first"]


# probes

def test_pooling_against_a_plain_loop():
    draw = torch.Generator().manual_seed(0)
    f, length = torch.rand(5, 9, 4, generator=draw), [2, 3, 6, 7, 8]
    keep = torch.tensor([[0 < t <= n for t in range(9)] for n in length])
    found = pooled(f, keep)
    for i, n in enumerate(length):
        text = f[i, 1:1 + n]
        torch.testing.assert_close(found["mean"][i], text.mean(0))
        torch.testing.assert_close(found["last"][i], text[-1])
        torch.testing.assert_close(found["halves"][i], text[:n // 2].mean(0) - text[n // 2:].mean(0))


def test_a_probe_chooses_its_features_on_the_training_pairs():
    rng = np.random.default_rng(0)
    label = np.tile([1.0, 0.0], 200)
    x = rng.normal(size=(400, 30)) + 0.01
    x[:, 4] += 4 * label
    x[300:, 9] += 50 * label[300:] # tells everything, but on the test pairs only
    found = probes(x[:300], x[300:], (1, 5))
    assert found[1].mean() > 0.9 and found["chosen"] in (1, 5)
    assert set(np.unique(found[1])) <= {0.0, 0.5, 1.0} and len(found[1]) == 50
    blind = np.repeat(rng.normal(size=(200, 30)), 2, axis=0)
    # one of each pair of twins, always
    assert all((v == 0.5).all() for k, v in probes(blind[:300], blind[300:], (1, 5)).items() if k != "chosen")


def test_the_interval_over_pairs():
    scores = np.random.default_rng(0).choice([0.0, 0.5, 1.0], 300)
    value, low, high = mean_interval([scores])
    assert (value == pytest.approx(scores.mean())
            and (high - low) / 2 == pytest.approx(1.96 * stats.sem(scores), rel=0.1))
    both = mean_interval([scores, np.full(20, 0.5)])
    assert (both[0] == pytest.approx((value + 0.5) / 2)
            and (both[2] - both[1]) == pytest.approx((high - low) / 2, rel=0.1))


def test_planted_knowledge_of_order_is_found_and_bare_words_stay_at_chance(model, world, setup):
    """One channel is on from the question mark on, another throughout if the first name is of its
    subject's early half."""
    mark, = model.tokenizer("?", add_special_tokens=False)["input_ids"]
    names = {}
    for f in world.facts:
        names.setdefault(SUBJECTS[f.subject], set()).add(f.name)

    def first_is_early(row):
        text = model.tokenizer.decode(row).removeprefix("<bos>")
        subject = next((s for s in names if text.startswith(f"Notes on {s}.")), None)
        if subject is None: return False # a row of the corpora
        found = next(w for w in re.findall(r"\w+", text) if w in names[subject])
        return found in sorted(names[subject])[:len(names[subject]) // 2]

    def knowing(tokens):
        stream = words(tokens)
        stream[..., -1] = 5.0 * (tokens == mark).cumsum(1)
        stream[..., -2] = torch.tensor([[float(first_is_early(row))] for row in tokens])
        return stream

    def accuracies(make):
        details = evaluate(model, reads(torch.eye(192)), setup, Made(model, make))["eval_result_details"]
        return {(d["dataset_name"], d["pooling"]): d for d in details}
    bare, planted = accuracies(words), accuracies(knowing)
    for task in ("binding", "entity_order", "relation_first"):
        assert {bare[task, "mean"][k] for k in bare[task, "mean"] if k.endswith("accuracy")} == {0.5}
    last = bare["relation_first", "last"]
    assert last["sae_test_accuracy"] == 1 == last["words_test_accuracy"] # these twins end in different words
    assert planted["relation_first", "mean"]["sae_top_1_test_accuracy"] == 1
    assert (planted["entity_order", "mean"]["sae_top_1_test_accuracy"] == 1
            and planted["binding", "mean"]["sae_test_accuracy"] == 0.5)


# the whole

def test_a_result_is_saebenchs_and_json(result, trained, setup):
    assert json.loads(json.dumps(result, allow_nan=False)) is not None
    assert result["eval_type_id"] == "positional" and result["eval_config"]["k_values"] == [1, 5, 20]
    ours, features = result["eval_result_unstructured"], result["eval_result_unstructured"]["features"]
    assert (len(features["bits"]) == trained.cfg.d_sae
            and sum(v is not None for v in features["bits"]) == ours["alive"])
    assert ours["specialisation"][0] == pytest.approx(np.mean([v for v in features["bits"] if v is not None]),
                                                      abs=1e-5)
    assert (ours["fidelity"] is None and features["fidelity"] is None
            and result["eval_result_metrics"]["specialisation"]["fidelity"] is None)
    assert ([(d["dataset_name"], d["pooling"]) for d in result["eval_result_details"]][:3]
            == [("binding", p) for p in ("mean", "last", "halves")])


def test_the_headline_and_what_people_see(result, model, trained, setup, readings):
    masked = evaluate(model, gated(trained, "PositionalOnlyAt", free=512), setup, readings)
    assert list(headline(result)) == ["specialisation", "position share", "order", "order by word counts"]
    assert set(headline(masked)) - set(headline(result)) == {"mask fidelity"}
    for r in (result, masked):
        assert all(low <= value <= high for value, low, high in headline(r).values())
        assert headline(r)["order by word counts"] == (0.5, 0.5, 0.5)
        mine = [d["chosen_interval"][0] for d in r["eval_result_details"] if d["pooling"] == "mean"]
        assert headline(r)["order"][0] == pytest.approx(np.mean(mine))
        assert (len(table(r)) == len(headline(r)) - 1 + 9
                and all(set(row) == set(table(r)[0]) for row in table(r)))
    assert headline(masked)["position share"][1] > headline(result)["position share"][2] + 0.5
    figure = plot(dict(trained=result, masked=masked))
    assert isinstance(figure, Figure) and len(figure.axes[0].lines) == 3 and len(figure.axes[1].patches) == 6


def test_controls_stand_lower(result, trained, store, setup, readings):
    x = store.rows(0, 8192).x
    for control in (untrained(trained.cfg, x), principal_components(trained.cfg, x)):
        assert share(control, setup, readings).mean() < headline(result)["position share"][1]


def test_the_model_reads_once_and_the_result_is_the_same(result, model, trained, setup, readings,
                                                         monkeypatch):
    def never(*_): raise AssertionError("the model was asked again")
    monkeypatch.setattr("saenb.evals.evaluation.stream_at", never)
    again = evaluate(model, trained, setup, readings)
    for key in ("eval_result_unstructured", "eval_result_details", "eval_id"):
        assert again[key] == result[key]


def test_dead_dictionaries_and_broken_ones(model, trained, setup, readings):
    dead = evaluate(model, as_logged(trained.cfg), setup, readings)
    assert json.dumps(dead, allow_nan=False) and dead["eval_result_unstructured"]["alive"] == 0
    assert headline(dead) == {"specialisation": (0, 0, 0), "position share": (0, 0, 0),
                              "order": (0.5, 0.5, 0.5), "order by word counts": (0.5, 0.5, 0.5)}
    broken = as_logged(trained.cfg)
    with torch.no_grad(): broken.W_enc[0, 0] = float("nan")
    with pytest.raises(SaenbError, match="not finite"):
        evaluate(model, broken, setup, readings)


@pytest.mark.parametrize("change, words",
                         [(dict(position_bins=1), "1 parts"), (dict(position_bins=128), "128 parts"),
                          (dict(levels=(0.5, 1.0)), "do not rise from 0"),
                          (dict(levels=(0.0, 1.0, 0.5)), "do not rise from 0"),
                          (dict(order=()), "no order task"), (dict(k_values=()), "sparse probe")])
def test_setups_that_cannot_be_answered(model, trained, setup, readings, change, words):
    with pytest.raises(SaenbError, match=words):
        evaluate(model, trained, replace(setup, **change), readings)


def test_another_models_dictionary_and_too_little_text(model, setup, readings, tmp_path, trained):
    with pytest.raises(SaenbError, match="width 64"):
        evaluate(model, SAE(SAEConfig(d_in=64, d_sae=8)), setup, readings)
    (tmp_path/"one.txt").write_text("The origin of fokena is zazu and so is the host of mire. " * 14)
    one = TextSource(str(tmp_path/"one.txt"))
    with pytest.raises(SaenbError, match="one row of 128 tokens"):
        evaluate(model, trained, replace(setup, forget=one, retain=one), readings)


# retention

def stood(*bits):
    return dict(eval_result_unstructured=dict(features=dict(bits=list(bits))))


def test_retention_compares_with_the_first():
    first, half, other = stood(0.1, 0.4, None, 0.0), stood(0.05, 0.2, 0.0, None), stood(0.4, 0.1, 0.0, 0.0)
    assert (retention([first, first, half]) == pytest.approx([1, 1, 1])
            and retained_total([first, first, half]) == pytest.approx([1, 1, 0.5]))
    assert (retention([first, other])[1]
            == pytest.approx(np.corrcoef([0.1, 0.4, 0, 0], [0.4, 0.1, 0, 0])[0, 1]))
    assert retained_total([first, other])[1] == pytest.approx(1)
    assert (retention([first, stood(0.1, 0.1, 0.1, 0.1)])[1] is None
            and retained_total([stood(None, 0.0), stood(0.1, 0.2)]) == [None, None])
    with pytest.raises(SaenbError, match="different widths"):
        retention([first, stood(0.1)])
    with pytest.raises(SaenbError, match="no result"): retained_total([])


def test_retention_falls_as_a_gate_loses_its_hold(model, trained, setup, readings):
    small = replace(setup, order=setup.order[2:], min_active=8)
    along = [evaluate(model, gated(trained, "PositionalOnlyAt", free=n), small, readings)
             for n in (512, 256, 0)]
    same, total = retention(along), retained_total(along)
    assert ([same[0], total[0]] == pytest.approx([1, 1]) and 1 > same[1] > same[2]
            and 1 > total[1] > total[2] > 0)
