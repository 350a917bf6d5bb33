"""Exams, interventions and evaluations on a device that is not the processor, of which there need be none: what lies where, how often the host
waits, and that memory that ends changes no answer."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from device_cases import EVALUATIONS, INTERVENED, Cases, short_trainings
from pretended import DEVICE, Pretended, waits

from saenb.base import devices
from saenb.base.errors import SaenbError, warn_once
from saenb.data import questions
from saenb.evals import evaluation, exam as exams, position, reconstruction
from saenb.evals.evaluation import Readings
from saenb.evals.exam import feature_stats
from saenb.evals.interventions import conditional, guardrail, raw_direction
from saenb.evals.interventions.intervention import INTERVENTIONS
from saenb.report import explorer
from saenb.sae.architectures import ARCHITECTURES

INTERVENTIONS.load()
ARCHITECTURES.load()


@pytest.fixture(scope="module", autouse=True)
def short():
    with pytest.MonkeyPatch.context() as patch:
        short_trainings(patch.setattr)
        yield


@pytest.fixture(scope="module")
def here(world, model, tmp_path_factory): return Cases(world, model, tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def there(world, tmp_path_factory):
    model = world.model()
    model.to(DEVICE)
    model.cfg.device = DEVICE
    return Cases(world, model, tmp_path_factory.mktemp("there"))


def different(one, other, where=""):
    """Where two results differ by more than rounding."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for k in one for d in different(one[k], other[k], f"{where}.{k}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other)) for d in different(*pair, f"{where}[{i}]")]
    near = isinstance(one, float) and isinstance(other, float) and (math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-6) or one != one and other != other)
    return [] if near or one == other else [f"{where}: {str(one)[:80]} is not {str(other)[:80]}"]


def test_an_exam_is_the_processors(here, there):
    assert isinstance(there.exam.stream, Pretended) and not isinstance(there.exam.base, Pretended)
    assert torch.equal(here.exam.base, there.exam.base) and here.exam.base.any()
    torch.testing.assert_close(here.exam.stream, there.exam.stream.cpu(), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="two devices"): there.exam.stream @ here.exam.stream.T


@pytest.mark.parametrize("name", [*EVALUATIONS, *INTERVENED])
def test_a_device_gives_the_processors_results(here, there, name):
    """Dictionaries are made on the processor, and brought over by whoever judges them."""
    assert not different(here(name), there(name), name)


def asked(where):
    """The waits at some module's lines."""
    return {line: count for line, count in waits.items() if where in line}


@pytest.mark.parametrize("look", [
    lambda c, r, sae: feature_stats(c.exam, sae), lambda c, r, sae: conditional.retained_means(c.exam, sae),
    lambda c, r, sae: conditional.retained_bars(c.exam, sae), lambda c, r, sae: guardrail.mean_squares(c.exam, sae, "forget"),
    lambda c, r, sae: raw_direction.stream_means(c.exam), lambda c, r, sae: reconstruction.tally(sae, r.corpus(c.setup, "forget")),
    lambda c, r, sae: explorer.peaks(r, c.setup, sae, 3), lambda c, r, sae: explorer.spread(r, c.setup, sae),
    lambda c, r, sae: guardrail.retained_shares(c.exam, sae, [[1, 2], [3]], 4),
    lambda c, r, sae: reconstruction.preserved(r, sae, reconstruction.CoreSetup(**c.corpora, reconstruction_rows=4), "retain"),
    lambda c, r, sae: position.tally(sae, position.PositionalSetup(**c.corpora, order=(), position_bins=4), r)],
    ids=["feature_stats", "retained_means", "retained_bars", "mean_squares", "stream_means", "tally", "peaks", "spread", "retained_shares",
         "preserved", "position"])
def test_the_host_waits_as_often_for_many_batches_as_for_one(there, monkeypatch, look):
    counts, sae = [], there.placed()[0]
    for tokens in (2**14, 48 * 3):
        readings = Readings(there.model, there.layer, batch_tokens=tokens)
        for side in ("forget", "retain"): readings.corpus(there.setup, side)
        monkeypatch.setattr(there.exam, "readings", readings)
        waits.clear()
        look(there, readings, sae)
        counts.append({line: n for line, n in waits.items() if "cache_utils" not in line}) # transformers' own, with each batch that is read
    assert counts[0] == counts[1] and sum(counts[0].values()) < 20, counts


def test_the_blocks_of_an_exam_wait_for_nothing(there):
    """What they need was sent before the first of them."""
    exam = there.exam
    waits.clear()
    exam.answers(exam.prefixes, lambda row, place: exam.stream[exam.starts[row].to(DEVICE) + place.to(DEVICE)], exam.layer + 1, asked=exam.asked)
    assert not asked("shared_prefixes") and sum(asked("questions").values()) == 1, waits


def needing(work, most, size):
    """The same, with memory for `most` of what `size` counts."""
    def hurt(*args, **kwargs):
        if size(*args) > most:
            hurt.times += 1
            raise torch.OutOfMemoryError("CUDA out of memory (pretended).")
        return work(*args, **kwargs)
    hurt.times = 0
    return hurt


def test_memory_that_ends_changes_no_answer(here, world, model, tmp_path, monkeypatch, capsys):
    """Neither where questions are asked nor where texts are read; it is said, and each sentence once."""
    monkeypatch.setattr(devices, "_smaller", {})
    warn_once.cache_clear()
    hurt = [needing(questions.read_ends, 200, lambda model, trie, *_: len(trie)), needing(exams.stream_at, 300, lambda model, rows, _: rows.numel()),
            needing(evaluation.stream_at, 5, lambda model, rows, _: len(rows))]
    for module, name, one in zip((questions, exams, evaluation), ("read_ends", "stream_at", "stream_at"), hurt): monkeypatch.setattr(module, name, one)
    poor = Cases(world, model, tmp_path)
    assert torch.equal(poor.exam.base, here.exam.base)
    torch.testing.assert_close(poor.exam.stream, here.exam.stream, rtol=1e-4, atol=1e-4)
    for name in ("conditional_clamp", "guardrail", "core", "separation"): # smaller groups share less, so that more is read
        assert not different(here(name) | dict(read=0), poor(name) | dict(read=0), name)
    assert all(one.times for one in hurt)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("saenb: The device's memory is full")]
    assert len(said) == len(set(said)) and {line.split("; ")[1].split(" goes on")[0] for line in said} == {
        "the reading of questions' tokens", "the reading of rows of text"}
    assert devices._smaller["the reading of rows of text"] == 3 * 48 # tokens: six rows of the corpora did not fit


def test_memory_that_holds_nothing_is_a_sentence(here, monkeypatch):
    monkeypatch.setattr(devices, "_smaller", {})
    monkeypatch.setattr(questions, "read_ends", needing(questions.read_ends, 0, lambda *_: 1))
    with pytest.raises(SaenbError, match="not enough memory on the device for the reading of questions' tokens"):
        here.intervention("clamp")


def test_batches_run_on_tensors_that_hold_no_numbers():
    """One of each kind, on a device called cuda, where whatever lies elsewhere is refused."""
    done = subprocess.run([sys.executable, Path(__file__).parent/"fake_cuda.py"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)})
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    mixed = {name: said for name, said in found.items() if name.startswith("mixture")}
    assert done.returncode == 0 and len(mixed) == 3 and all(s.startswith("FakeTensorDeviceMismatchError") for s in mixed.values()), done.stderr
    assert {name: said for name, said in found.items() if said not in ("cuda", "cpu")} == mixed
    assert {f"encode {name}" for name in ARCHITECTURES} | {"harvest", "exam", "losses", "absorption", "order probing"} < found.keys()
