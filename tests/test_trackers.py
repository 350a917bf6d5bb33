"""A tracker sees what the log holds, and changes nothing."""
import json
import time

import pytest

from saenb import lab
from saenb.base.errors import SaenbError
from saenb.train import trackers
from saenb.train.config import TrainConfig
from saenb.train.checkpoint import read_log
from saenb.train.trainer import Trainer

SHORT = TrainConfig(steps=30, warmup=5, batch=512, log_every=10, checkpoint_every=10)


def scalars(folder):
    "TensorBoard's own reading of what was written: {name: {step: value}}."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_tensorboard_holds_the_log_after_a_training_that_was_taken_up(store, fresh, tmp_path):
    def fit(steps_before=None):
        with trackers.tracked("tensorboard", tmp_path, {}) as watch:
            trainer = Trainer(fresh(), store, cfg=SHORT, out=tmp_path, watch=watch)
            if steps_before:
                one_step = trainer.one_step
                def until(batch):
                    if trainer.index == steps_before: raise KeyboardInterrupt
                    one_step(batch)
                trainer.one_step = until
            return trainer.fit(progress=False)
    with pytest.raises(KeyboardInterrupt): fit(25)
    watched = fit().fingerprint()
    found, log = scalars(tmp_path/"tensorboard"), read_log(tmp_path/"train_log.jsonl")
    assert [line["step"] for line in log] == [10, 20, 30]
    for name in log[0].keys() - {"step"}:
        assert found[name] == pytest.approx({line["step"]: line[name] for line in log})
    assert watched == Trainer(fresh(), store, cfg=SHORT).fit(progress=False).fingerprint()


def test_weights_and_biases_offline(store, fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = dict(run=dict(id="orthogonality/0"), variant="", seed=0, preset="tiny")
    with trackers.tracked("wandb", tmp_path, config) as watch:
        Trainer(fresh(), store, cfg=SHORT, out=tmp_path, watch=watch).fit(progress=False)
        watch.results({"unlearning/score": 0.5})
        assert watch.run.summary["unlearning/score"] == 0.5
        log = read_log(tmp_path/"train_log.jsonl")
        assert watch.run.summary["loss"] == pytest.approx(log[-1]["loss"])
    kept, = (tmp_path/"wandb").glob("offline-run-*/run-*.wandb")
    ends = time.time() + 60
    while kept.stat().st_size <= 1000 and time.time() < ends:
        time.sleep(0.1) # another process writes it
    assert kept.stat().st_size > 1000


def test_a_tracker_that_cannot_be_had_is_told_before_any_work(saenb, one_sentence, small, tmp_path,
                                                              monkeypatch):
    with pytest.raises(SaenbError, match="did you mean tensorboard"):
        lab.run("orthogonality/0", small, out=tmp_path, track="tensorbord")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(SaenbError, match=r"pip install 'saenb\[wandb\]'"):
        lab.run("orthogonality/0", small, out=tmp_path, track="wandb")
    assert not list(tmp_path.rglob("config.json"))
    one_sentence(saenb("run", "orthogonality/0", "--track", "paper"), "--track")


def test_a_record_sends_its_results(work, small):
    out = work()
    record = lab.run("orthogonality/0", small, out=out, steps=20, progress=False, track="tensorboard")
    found = scalars(record.path/"tensorboard")
    headlines = json.loads((record.path/"final_info.json").read_text())["headlines"]
    assert list(found["unlearning/score"].values()) == pytest.approx([headlines["unlearning"]["score"][0]])
    assert "loss" in found
