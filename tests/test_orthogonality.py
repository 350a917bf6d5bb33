"""The ten runs of the orthogonality experiment: their constants, their penalty, and that each does what
it is for."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from saenb.base.errors import SaenbError
from saenb.ideas.pairs import jaccard, mutual_information
from saenb.ideas.orthogonality import (OrthogonalPairs, charged_cosines, exponential, fixed, proportional,
                                       rising)
from saenb.ideas.run import find_run
from saenb.sae.gates import make_mechanism
from saenb.train.config import TrainConfig
from saenb.train.trainer import Trainer

TABLE = { # as the log has them
    1: dict(by="coactivation", share=0.001, tau=0.1, rule="fixed"),
    2: dict(by="coactivation", share=0.001, tau=0.1, tau_max=0.5, rule="rising"),
    3: dict(by="coactivation", share=0.001, tau=0.5, tau_max=2.0, rule="rising"),
    4: dict(by="coactivation", share=0.0005, tau=0.1, rate=2.0, rule="exponential"),
    5: dict(by="gradients", count=100, memory=0.9, tau=0.1, rule="proportional"),
    6: dict(by="gradients", share=0.05, memory=0.9, tau=0.1, rule="fixed"),
    7: dict(by="gradients", share=0.1, memory=0.5, tau=0.5, rule="fixed"),
    8: dict(by="window", window=5, tau=0.3, rule="proportional"),
    9: dict(by="persistence", window=20, share=0.1, tau=0.5, rule="exponential"),
    10: dict(by="information", share=0.1, tau=0.5, rule="proportional"),
}
LENGTH = TrainConfig(steps=150, lr=1e-3, warmup=20)


def settings_of(number, **change):
    (name, settings), = find_run(f"orthogonality/{number}").mechanisms
    assert name == "OrthogonalPairs"
    return settings | change


@pytest.fixture(scope="module")
def train(store, fresh):
    """A short training with one mechanism or none, from the same start; made once for the same settings."""
    made = {}

    def run(settings=None, length=LENGTH):
        name = str((settings, length))
        if name not in made:
            sae = fresh(d_sae=256)
            made[name] = Trainer(sae, store, [make_mechanism("OrthogonalPairs", settings, sae.cfg)]
                                     if settings else [], length)
            made[name].fit(progress=False)
        return made[name]
    return run


def squared_cosines(sae, pairs):
    return (sae.W_dec[pairs[0]] * sae.W_dec[pairs[1]]).sum(1).detach()**2


def chosen(trainer):
    m = trainer.mechanisms[0]
    return m.pairs[:, m.tau > 0]


@pytest.mark.parametrize("number", TABLE)
def test_constants_are_the_tables_and_come_from_the_run(number, fresh):
    settings = settings_of(number)
    assert TABLE[number].items() <= (dict(rule="fixed") | settings).items()
    made = make_mechanism("OrthogonalPairs", settings, fresh().cfg)
    assert made.settings.items() >= settings.items() and made.extra["tau"] == TABLE[number]["tau"]
    run = find_run(f"orthogonality/{number}")
    assert run.as_dict()["constants"] == settings
    assert (find_run(run.builds_on).experiment == "orthogonality"
            and int(find_run(run.builds_on).number) < number)


@pytest.mark.parametrize("number", [3, 40, 2000])
def test_the_penalty_and_its_gradient(number):
    """By looking rows up or by whole products: the mean of tau times the squared cosine, and what
    autograd makes of that."""
    draw = torch.Generator().manual_seed(number)
    rows = torch.nn.functional.normalize(torch.randn(90, 20, generator=draw), dim=1)
    every = torch.combinations(torch.arange(90)).T
    pairs = every[:, torch.randperm(every.shape[1], generator=draw)[:number]]
    tau = torch.rand(number, generator=draw) + 0.1
    plain, ours = (rows.clone().requires_grad_() for _ in range(2))
    wanted = sum(t * torch.dot(plain[i], plain[j])**2 for i, j, t in zip(*pairs.tolist(), tau)) / number
    wanted.backward()
    # the list may be longer than what is chosen
    found = charged_cosines(ours, torch.cat([pairs, torch.zeros(2, 5, dtype=torch.long)], 1),
                            torch.cat([tau, torch.zeros(5)]))
    found.backward()
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_no_pairs_cost_nothing():
    rows = torch.eye(4).requires_grad_()
    assert charged_cosines(rows, torch.zeros(2, 0, dtype=torch.long), torch.zeros(0)) == 0
    assert charged_cosines(rows, torch.zeros(2, 3, dtype=torch.long), torch.zeros(3)) == 0


def test_rules():
    weight = torch.tensor([0.0, 0.25, 1.0, 3.0])
    torch.testing.assert_close(fixed(weight, 0.1), torch.tensor([0.1] * 4))
    torch.testing.assert_close(rising(weight, 0.1, 0.5), torch.tensor([0.1, 0.2, 0.5, 0.5]))
    torch.testing.assert_close(exponential(weight, 0.1, 2.0), 0.1 * torch.tensor([0.0, 0.5, 2.0, 6.0]).exp())
    torch.testing.assert_close(proportional(weight, 0.3), 0.3 * weight)


@pytest.mark.parametrize("number", TABLE)
def test_the_pairs_that_a_run_watches_part(number, train):
    """Their squared cosines are smaller than those of the same pairs in the baseline, trained from the
    same start, and the reconstruction survives."""
    with_, without = train(settings_of(number)), train()
    pairs = chosen(with_)
    assert pairs.shape[1] > 10
    # there is little information in a pair, so run 10 charges little
    assert (squared_cosines(with_.sae, pairs).mean()
            < (0.98 if number == 10 else 0.95) * squared_cosines(without.sae, pairs).mean())
    last = with_.history[-1]
    assert last["reconstruction"] < 2 * without.history[-1]["reconstruction"]
    assert (0 <= last["OrthogonalPairs.agreement"] <= 1 and last["OrthogonalPairs.squared_cosine"]
            == pytest.approx(squared_cosines(with_.sae, pairs).mean().item(), rel=1e-3))


@pytest.mark.parametrize("number, on", [(2, 1), (3, 2), (7, 6)])
def test_a_stronger_charge_parts_them_further(number, on, train):
    """What distinguishes these runs from the ones they build on is the charge."""
    stronger, weaker = train(settings_of(number)), train(settings_of(on))
    pairs = chosen(stronger)
    assert squared_cosines(stronger.sae, pairs).mean() < squared_cosines(weaker.sae, pairs).mean()


@pytest.mark.parametrize("number", [2, 3, 4])
def test_tau_follows_the_correlation_in_the_batch(number, train, store):
    """The same seed, with the rule switched off: there every pair is charged alike."""
    adaptive, alike = (train(s).mechanisms[0] for s in (settings_of(number), {k: v for k, v in settings_of(
        number, rule="fixed").items() if k not in ("tau_max", "rate")}))
    assert len(set(alike.tau.tolist())) == 1
    # the batch of the last step
    last = [batch.x.float()
            for batch, _ in zip(store.batches(LENGTH.batch, LENGTH.seed, LENGTH.steps - 1), range(1))][0]
    f = train(settings_of(number)).sae.encode(last).detach().double() # a step later, so a little different
    pairs, tau = chosen(train(settings_of(number))), adaptive.tau[adaptive.tau > 0]
    r = np.abs(np.corrcoef(f.T))[pairs[0], pairs[1]]
    assert np.corrcoef(tau, r)[0, 1] > 0.95
    assert (tau.min() >= TABLE[number]["tau"]
            and TABLE[number]["tau"] * 1.2 < tau.max() <= TABLE[number].get("tau_max", 0.1 * 7.39))


def test_run_4_charges_half_as_many_pairs(train):
    assert chosen(train(settings_of(4))).shape[1] == pytest.approx(chosen(train(settings_of(2))).shape[1] / 2,
                                                                   abs=1)


def test_gradients_choose_other_pairs_than_activations(train):
    """Run 5 without its gradients is run 1 with a count."""
    by_gradients, by_activations = train(settings_of(5)), train(dict(by="coactivation", count=100, tau=0.1))
    assert jaccard(chosen(by_gradients), chosen(by_activations), 256) < 0.8
    assert by_gradients.mechanisms[0].tau.max() > by_gradients.mechanisms[0].tau.min() > 0


def test_run_6s_count_grows_with_the_dictionary(fresh):
    counts = {d: make_mechanism("OrthogonalPairs", settings_of(6), fresh(d_sae=d).cfg).pairs.shape[1]
              for d in (64, 128, 256)}
    assert counts == {d: round(0.05 * d * (d - 1) / 2) for d in counts}
    assert all(make_mechanism("OrthogonalPairs", settings_of(5), fresh(d_sae=d).cfg).pairs.shape[1] == 100
               for d in (64, 128))


def test_a_shorter_memory_forgets_sooner(train):
    """Run 7 against run 6: with 0.5 the choice follows the last batches, so it agrees less with the one
    before."""
    long, short = (train(settings_of(7, memory=m)).history for m in (0.9, 0.5))
    mean = lambda history: sum(line["OrthogonalPairs.agreement"] for line in history[2:]) / len(history[2:])
    assert mean(short) < mean(long)


@pytest.mark.parametrize("number, window", [(8, 5), (9, 20)])
def test_a_window_steadies_the_choice(number, window, train):
    """The same run with a window of one batch changes its mind more."""
    mean = lambda history: sum(line["OrthogonalPairs.agreement"] for line in history[2:]) / len(history[2:])
    steady, hasty = (train(settings_of(number, window=w)).history for w in (window, 1))
    assert mean(steady) > mean(hasty) + 0.02


def test_run_9_charges_what_persists_exponentially(train):
    m = train(settings_of(9)).mechanisms[0]
    assert m.tau.min() >= 0.5 and m.tau.max() > 0.6 and m.tau.max() <= 0.5 * 2.7183


def test_run_10_charges_dependence(train, store):
    """Its pairs hold more information about each other than the baseline's correlated ones do by chance,
    and tau is half of it."""
    trainer = train(settings_of(10))
    pairs, m = chosen(trainer), trainer.mechanisms[0]
    f = trainer.sae.encode(store.rows(0, 4096).x).detach()
    information = mutual_information(f)
    off = ~torch.eye(len(information), dtype=torch.bool)
    assert information[pairs[0], pairs[1]].mean() > 3 * information[off].mean()
    torch.testing.assert_close(m.tau[m.tau > 0], 0.5 * m.statistic.weight(pairs))


@pytest.mark.parametrize("number", [1, 7, 9, 10])
def test_stopped_and_resumed_it_ends_with_the_same_bytes(number, fresh, ends_the_same):
    def parts():
        sae = fresh(d_sae=64)
        return sae, [make_mechanism("OrthogonalPairs", settings_of(
            number, refresh=min(3, settings_of(number).get("refresh", 1))), sae.cfg)]
    ends_the_same(parts)


def test_charging_less_often_weighs_as_much(store, fresh):
    """Over two steps, a charge at every second step with twice the weight adds up to one at each."""
    def charges(every):
        sae = fresh(d_sae=64)
        trainer = Trainer(sae, store, [make_mechanism(
            "OrthogonalPairs", dict(by="coactivation", share=0.1, tau=0.2, every=every), sae.cfg)],
                          replace(LENGTH, steps=2, lr=1e-12, log_every=1))
        trainer.fit(progress=False)
        return [line["OrthogonalPairs.cosines"] for line in trainer.history]
    each, second = charges(1), charges(2)
    assert second[0] == 0 and second[1] == pytest.approx(2 * each[1], rel=1e-4)


def test_settings_that_make_no_sense(fresh):
    cfg = fresh(d_sae=64).cfg
    for settings, said in (
            (dict(by="coactivation", tau=0.1), "share or a count"),
            (dict(by="coactivations", tau=0.1, share=0.1), "did you mean coactivation"),
            (dict(by="coactivation", tau=0.1, share=0.1, rule="rising"), "rule 'rising' cannot be used"),
            (dict(by="window", tau=0.1, share=0.1), "cannot be chosen by window"),
            (dict(by="window", tau=0.1, share=0.1, window=5, windows=3), "cannot be chosen by window"),
            (dict(tau=0.1), "correct its settings"),
            (dict(by="window", tau=0.1, share=0.1, window=0), "window of 0"),
            *((dict(by="coactivation", tau=0.1, share=0.1) | wrong, "Pairs cannot be charged")
              for wrong in (dict(refresh=0), dict(every=0), dict(tau=-1.0)))):
        with pytest.raises(SaenbError, match=said):
            make_mechanism("OrthogonalPairs", settings, cfg)
    assert isinstance(make_mechanism("OrthogonalPairs", dict(by="window", window=5, tau=0.1, share=0.1), cfg),
                      OrthogonalPairs)
