"""Runs whose training reads from which corpus a token is are known, and marked wherever they are shown."""
import pytest
import torch

from saenb.ideas.run import all_runs, reads_labels
from saenb.lab.records import MARK, Record
from saenb.sae.gates import make_mechanism
from saenb.sae.sae import SAE
from saenb.train.config import TrainConfig
from saenb.train.mechanism import Step
from saenb.train.trainer import Trainer
from saenb.base.files import write_json

LABELLED = {"contrastive/3", "contrastive/4", *(f"dual_objective/{n}" for n in range(6))}


def test_which_runs_read_labels():
    assert {id for id, run in all_runs().items() if run.labelled} == LABELLED


@pytest.mark.parametrize("id", list(all_runs()))
def test_a_run_that_is_not_marked_never_reads_a_side(id, fresh, store, monkeypatch):
    """Training with sides that cannot be read: whatever asks for them fails, and only marked runs ask."""
    read = []
    monkeypatch.setattr(Step, "side", property(lambda step: read.append(1) or step.batch.side))
    run, sae = all_runs()[id], fresh(d_sae=64)
    torch.manual_seed(0)
    mechanisms = [make_mechanism(name, settings, sae.cfg) for name, settings in run.mechanisms]
    Trainer(sae, store, mechanisms, TrainConfig(steps=2, batch=64, **run.training)).fit(progress=False)
    assert bool(read) <= run.labelled
    if run.mechanisms and run.labelled: assert read


def test_a_variant_without_its_labelled_part_is_not_marked():
    run = all_runs()["contrastive/3"]
    assert reads_labels(run.mechanisms, {}) and not run.but(without="SideDivergence").labelled
    assert all_runs()["contrastive/4"].but(without="SideDivergence").labelled # its importance counts sides


def test_records_are_marked(tmp_path):
    for n, mechanisms in enumerate(([], [dict(name="SideDivergence", settings=dict(weight=0.2))],
                                    [dict(name="Unheard", settings={})])):
        config = dict(run=dict(id=f"x/{n}", title=f"Run {n}", mechanisms=mechanisms), seed=0, preset="tiny", variant="")
        write_json(tmp_path/str(n)/"config.json", config)
    assert [Record(tmp_path/str(n)).label for n in range(3)] == ["Run 0", "Run 1" + MARK, "Run 2"]
