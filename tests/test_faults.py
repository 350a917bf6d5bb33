"""Whatever breaks: what was finished stays, what was under way goes on or says what to do."""
import pytest

import faults


@pytest.fixture(scope="module")
def lab(small, harvested, work, tmp_path_factory):
    """Commands are called in this process, other than those that are killed, beside each other or cut short."""
    from saenb.lab.runner import run
    made = work("made")
    run("orthogonality/0", small, out=made, steps=faults.STEPS, progress=False)
    return faults.Lab(small, made, tmp_path_factory.mktemp("labs"), processes=False)


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda f: f.__name__)
def test_nothing_is_lost(lab, fault): fault(lab)


def test_every_stage_meets_every_fault():
    met = {(f.stage, kind) for f in faults.FAULTS for kind in ("kill", "full", "read-only", "two|second", "cut|altered") if any(word in f.fault for word in kind.split("|"))}
    assert {(stage, kind) for stage in faults.STAGES for kind in ("kill", "full", "read-only", "cut|altered")} <= met
    assert {("harvest", "two|second"), ("train", "two|second"), ("report", "two|second")} <= met


def test_a_fault_that_is_not_survived_is_found(lab, tmp_path):
    with pytest.raises(AssertionError): faults.Said(1, "", "Traceback ...").sentence()
    with pytest.raises(AssertionError): faults.Said(2, "", "saenb: It broke. And now?").sentence()
    assert faults.Said(2, "", "saenb: It broke; correct it.").sentence("correct").last == "saenb: It broke; correct it."
