"""The training of a world's model is stopped in every phase, by a signal and by force, and ends with the same bytes."""
import os
import signal
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from saenb.base.errors import SaenbError
from saenb.base.files import read_tensors, write_tensors
from saenb.base.signals import Stopped
from saenb.data import phases as page
from saenb.data.cue_facts import CueWorldConfig
from saenb.data.facts import WorldConfig
from saenb.data.phases import CHECKPOINT, Phases
from saenb.data.world import EDITIONS
from saenb.data.world_model import LessonSteps

ONE = WorldConfig(seed=3, names=4, forget_names=4, relations=2, width=32, layers=2, drills=3, steps=3, finish=3,
                  texts=4)
TWO = CueWorldConfig(seed=3, relations=2, width=32, layers=3, reading=3, steps=3, finish=2, guided=3, tuned=3,
                     first_taught=4, texts=4)
PHASES = {ONE: ["learning to answer from a list", "learning the facts"],
          TWO: ["learning to read cues", "learning the facts", "going over the facts"]}


class Killed(Exception):
    "A process that is gone in the middle of a step."


def train(cfg, folder=None, log=None):
    """A model's parameters as bytes."""
    edition = next(e for e in EDITIONS.values() if type(cfg) is e.config)
    facts = edition.facts(cfg)
    net = edition.train(cfg, facts, edition.tokenizer(cfg, facts), Phases(folder, asdict(cfg), log))
    return {name: p.detach().numpy().tobytes() for name, p in net.named_parameters()}


@pytest.fixture(scope="module", params=[ONE, TWO], ids=["first edition", "second edition"])
def whole(request):
    """A training that nobody stopped, and its curve."""
    log = []
    return SimpleNamespace(cfg=request.param, weights=train(request.param, log=log), log=log)


@pytest.fixture
def strike(monkeypatch):
    """Let something happen in the middle of so many updates of the optimisers from now on; counts them."""
    counted, update = SimpleNamespace(steps=0, at=None, happens=None), LessonSteps.update
    def struck(self, rate):
        counted.steps += 1
        if counted.steps == counted.at: counted.happens()
        update(self, rate)
    monkeypatch.setattr(LessonSteps, "update", struck)
    return counted


def on_disk(folder): return read_tensors(folder/CHECKPOINT, "checkpoint")[1]


def test_signals_in_every_phase(whole, strike, tmp_path):
    """Every second step ends the process, so that phases are left and entered at their ends as well."""
    seen, log, strike.happens = [], [], lambda: os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(20):
        strike.at, log = strike.steps + 2, []
        try: weights = train(whole.cfg, tmp_path, log)
        except Stopped as e:
            about = on_disk(tmp_path)
            seen.append(about["phase"])
            assert about["done"] == strike.steps and e.number == signal.SIGTERM # no step is lost, none done twice
            if about["phase"] != "learned":
                assert e.text.startswith(f"Stopped after step {strike.steps} of at most ") and str(tmp_path) in e.text
        else: break
    assert list(dict.fromkeys(seen))[:len(PHASES[whole.cfg])] == PHASES[whole.cfg]
    assert weights == whole.weights and log == whole.log
    done = strike.steps
    assert train(whole.cfg, tmp_path) == weights and strike.steps == done # what was learned is not learned twice


def test_a_killed_process_in_every_phase(whole, strike, tmp_path, monkeypatch):
    """In the middle of a step everything is lost but the file."""
    monkeypatch.setattr(page, "EVERY", 2)
    seen = []
    def killed(): raise Killed
    strike.happens = killed
    for _ in range(20):
        strike.at, log = strike.steps + 4, []
        try: weights = train(whole.cfg, tmp_path, log)
        except Killed: seen.append(on_disk(tmp_path)["phase"])
        else: break
    assert set(PHASES[whole.cfg]) <= set(seen)
    assert weights == whole.weights and log == whole.log


def test_without_a_folder_a_signal_keeps_nothing(strike, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    strike.at, strike.happens = 2, lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped) as stop: train(ONE)
    assert strike.steps == 2 and stop.value.text == "" and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The checkpoint of a training on its way."""
    folder, update = tmp_path_factory.mktemp("stopped"), LessonSteps.update
    def struck(self, rate):
        os.kill(os.getpid(), signal.SIGTERM)
        update(self, rate)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(LessonSteps, "update", struck)
        train(TWO, folder)
    return read_tensors(folder/CHECKPOINT, "checkpoint")


@pytest.mark.parametrize("odd, said", [
    (dict(world=asdict(TWO) | dict(seed=4)), "another world, whose seed is 4 and not 3; choose another folder"),
    (dict(world=asdict(ONE)), "another world, whose"), (dict(phase="x"), "phase is x"), (dict(phase=1), "phase is 1"),
    (dict(now={}), "now has nothing"), (dict(now=dict(left="x")), r"now\.left is 'x'"), (dict(step=-1), "step is -1"),
    (dict(lessons=dict(draw=[3, [1], None], pending=[], taught=None)), "does not fit")])
def test_a_checkpoint_that_is_not_continued(stopped, odd, said, tmp_path):
    tensors, about = stopped
    write_tensors(tmp_path/CHECKPOINT, tensors, about | odd)
    with pytest.raises(SaenbError, match=said): train(TWO, tmp_path)


@pytest.mark.parametrize("change", [
    lambda t: t.pop("generator"), lambda t: t.pop("beside.0"), lambda t: t.update(x=torch.zeros(1)),
    lambda t: t.update({"beside.1": torch.zeros(2)}), lambda t: t.update({"beside.1": t["beside.1"].double()}),
    lambda t: t.update(generator=torch.zeros(3))])
def test_tensors_of_another_model(stopped, change, tmp_path):
    tensors, about = stopped
    change(tensors := dict(tensors))
    write_tensors(tmp_path/CHECKPOINT, tensors, about)
    with pytest.raises(SaenbError, match="does not fit .* delete it, and the model is trained from its beginning"):
        train(TWO, tmp_path)


def test_a_broken_checkpoint(tmp_path):
    (tmp_path/CHECKPOINT).write_bytes(b"x" * 100)
    with pytest.raises(SaenbError, match="is not a readable checkpoint"): train(ONE, tmp_path)
