"""A linear gate on the stream, learned on one half of the questions and judged on the other."""
from copy import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from saenb.evals.contextual_reference import (contextual_reference, learned_gates, linear_probe,
                                              question_stream)
from saenb.data.questions import read_letters


def test_the_probe_is_ridge_regression():
    torch.manual_seed(0)
    x = torch.randn(500, 6) @ torch.randn(6, 6) + 3
    y = (x[:, 0] > 3).float()
    direction, centre = linear_probe(x, y, ridge=0.01)
    z = x - x.mean(0)
    strength = 0.01 * (z.T @ z / 500).diagonal().mean().item()
    fit = Ridge(alpha=strength * 500).fit(z.numpy(), y.numpy())
    np.testing.assert_allclose(direction.numpy(), fit.coef_, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(centre, x.mean(0))


def test_the_header_is_not_learned_from(exam):
    """The stream that it gives begins with the question's own words."""
    x, side = question_stream(exam, 0)
    mine = [i for i in range(len(exam.tokens)) if exam.half[i] == 0]
    first = exam.tokens[mine[0]]
    text = [exam.model.tokenizer.decode(t) for t in first]
    begin = text.index("\n", text.index("\n") + 1) + 1 # after the header's own line
    start = int(exam.starts[mine[0]])
    torch.testing.assert_close(x[:len(first) - begin], exam.stream[start + begin:start + len(first)].float())
    assert len(x) == len(side) and side.any() and not side.all()


def test_it_is_learned_from_one_half_alone(exam):
    """Other questions in the other half do not change the gate."""
    changed = copy(exam)
    changed.stream = exam.stream.clone()
    for i in range(len(exam.tokens)):
        if exam.half[i] == 1:
            changed.stream[int(exam.starts[i]):int(exam.starts[i]) + len(exam.tokens[i])] += 5
    ours, theirs = learned_gates(exam, 0), learned_gates(changed, 0)
    assert torch.equal(ours.direction, theirs.direction) and torch.equal(ours.bars, theirs.bars)
    assert not torch.equal(learned_gates(exam, 1).direction, learned_gates(changed, 1).direction)


def test_what_it_pushes_is_what_a_hook_pushes(exam):
    """The strongest gate and push, prompt by prompt through hooks: the same share of questions goes wrong."""
    from saenb.evals.exam import FeatureStats
    from saenb.evals.interventions.clamp import Clamp
    from saenb.evals.unlearning import run_settings
    gates = learned_gates(exam, 0)
    settings = [dict(retain_threshold=1.0, n_features=1, multiplier=3.0, typical=True, features=np.array([2]))]
    rows, _ = run_settings(exam, gates, settings, FeatureStats(*[np.ones(5)] * 3), Clamp())

    def change(stream, hook):
        on = gates.encode(stream)[..., 2]
        on[:, 0] = 0
        return stream - 4.0 * on[..., None] * gates.W_dec[2]
    right = []
    for tokens, answer in zip(exam.tokens, exam.answer):
        with exam.model.hooks(fwd_hooks=[(f"blocks.{exam.layer}.hook_out", change)]):
            right.append((read_letters(exam.model, [tokens], exam.letters)[0] == answer).item())
    if rows[0]["right"] is None:
        assert np.mean(np.array(right)[~exam.forgets.numpy()]) < exam.setup.lowest_retain
    else:
        assert rows[0]["right"].tolist() == right


def test_the_score_keeps_what_is_to_be_kept(exam):
    found = contextual_reference(exam)
    assert 0 < found["held_out"] <= 1 and found["held_out_retain"] > 0.97
