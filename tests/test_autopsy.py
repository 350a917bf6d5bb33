from dataclasses import replace

import torch

from saenb.evals.autopsy import autopsy, weights_finding
from saenb.evals.controls import as_logged, principal_components, untrained
from saenb.sae.sae import SAE


def reason(exam, sae, **setup):
    return autopsy(exam.model, sae, replace(exam.setup, **setup), exam)["reason"]


def copy(sae):
    twin = SAE(replace(sae.cfg))
    twin.load_state_dict(sae.state_dict())
    return twin


def test_the_dictionary_of_the_logs(exam, trained, store):
    found = autopsy(exam.model, as_logged(trained.cfg), exam.setup, exam)
    assert found["score"] == 0.0 and found["reason"] == "no training step was taken"
    found = autopsy(exam.model, untrained(trained.cfg, store.rows(0, 4096).x), exam.setup, exam)
    assert found["score"] == 0.0 and found["reason"] == "no training step was taken"


def test_a_foreign_dictionary_gives_itself_away(trained, store):
    start = untrained(trained.cfg, store.rows(0, 4096).x)
    start.cfg.training_steps, start.cfg.initial = None, ""
    with torch.no_grad():
        start.b_dec.zero_()
        start.b_enc.zero_()
    assert weights_finding(start) == "no training step was taken"
    foreign = copy(trained)
    foreign.cfg.training_steps, foreign.cfg.initial = None, ""
    assert weights_finding(foreign) is None
    stuck = copy(trained)
    stuck.cfg.initial = stuck.fingerprint()
    assert weights_finding(stuck) == "no training step was taken"


def test_every_reason_from_a_dictionary_made_for_it(exam, trained, store):
    broken, dead, blind, shy = (copy(trained) for _ in range(4))
    with torch.no_grad():
        broken.b_enc[0] = float("inf")
        dead.b_enc.fill_(-1e9)
        blind.W_dec.mul_(-1)
        shy.b_enc.fill_(-1e9)
    assert reason(exam, broken) == "the weights are not finite"
    assert reason(exam, dead).startswith("the dictionary is dead")
    assert reason(exam, blind).startswith(("the dictionary reconstructs nothing", "the score is")) # clamped the other way it may still harm
    assert reason(exam, trained).startswith("the score is ")


def test_no_feature_passes_where_all_are_dense(exam, store, trained):
    components = principal_components(trained.cfg, store.rows(0, 4096).x)
    found = autopsy(exam.model, components, exam.setup, exam)
    assert found["reason"] == "no feature passes the retain threshold" and not any(found["counts"]["passing"].values())
