"""What several dictionaries or trainings say together: costs, matchings, pairs that seeds agree on; and how the lab keeps them."""
import time

import pytest
import torch
from hypothesis import given, settings, strategies as st

from saenb.lab.analyses import step_cost
from saenb.report.experiments.orthogonality_report import chosen_pairs, matching, pairs_between_seeds
from saenb.report.experiments.positional_report import specialisation_along, position_bits
from saenb.lab.analyses import analyse
from saenb.lab.runner import run
from saenb.ideas.pairs import jaccard, pair_count, strongest
from saenb.sae.coactivation import coactivation
from saenb.ideas.run import Run
from saenb.ideas.run import find_run
from saenb.sae.gates import MECHANISMS
from saenb.sae.sae import SAE, SAEConfig
from saenb.train.config import TrainConfig
from saenb.train.mechanism import Mechanism
from saenb.train.trainer import Trainer


def reordered(sae, order):
    other = SAE(sae.cfg)
    other.load_state_dict(sae.state_dict())
    for name in ("W_dec", "b_enc"): getattr(other, name).data.copy_(getattr(sae, name)[order])
    other.W_enc.data.copy_(sae.W_enc[:, order])
    return other


@given(st.permutations(range(12)), st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_the_same_features_in_another_order_are_found(order, seed):
    sae = SAE(SAEConfig(d_in=8, d_sae=12)).initialise(torch.randn(300, 8, generator=torch.Generator().manual_seed(seed)), seed)
    names, cosine = matching(reordered(sae, torch.tensor(order)), sae)
    assert names.tolist() == list(order) and cosine == pytest.approx(1, abs=1e-5)


def test_strangers_match_badly():
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    names, cosine = matching(*(SAE(SAEConfig(d_in=64, d_sae=30)).initialise(x, seed) for seed in (0, 1)))
    assert sorted(names.tolist()) == list(range(30)) and cosine < 0.5


def test_pairs_are_those_that_the_mechanism_chooses(store, fresh):
    """For run 1, the strongest co-activations of the last batch; the dictionary is left as it was."""
    sae, definition = fresh(d_sae=128), find_run("orthogonality/1")
    before = sae.fingerprint()
    found = chosen_pairs(sae, definition, store, steps=3)
    batches = store.batches(2048, 0)
    last = [next(batches) for _ in range(3)][-1]
    wanted = strongest(coactivation(sae.encode(last.x.float()).detach()), pair_count(128, share=0.001))
    assert jaccard(found, wanted, 128) == 1
    other = SAE(sae.cfg)
    other.load_state_dict(sae.state_dict())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(sae.state_dict().values(), fresh(d_sae=128).state_dict().values())) and sae.cfg.initial == before


class Slow(Mechanism):
    def after_step(self, step): time.sleep(self.settings["seconds"] if step.index % self.settings.get("every", 1) == 0 else 0)


def test_a_slow_run_costs_more_and_the_baseline_costs_itself(store):
    runs = [find_run("orthogonality/0"), Run("orthogonality/slow", "", "", (("Slow", dict(seconds=0.05)),)), Run("orthogonality/sometimes", "", "", (("Slow", dict(seconds=0.05, every=5)),))]
    found = step_cost(runs, store, d_sae=64, batch=256, steps=5, repeats=2)
    assert [len(v) for v in found.values()] == [2, 2, 2]
    plain, slow, sometimes = (sum(v) for v in found.values())
    assert slow > 2 * plain and plain < sometimes < slow
    MECHANISMS.pop("Slow")


@pytest.fixture(scope="module")
def records(work, small):
    """Two seeds of a run, briefly trained."""
    out = work()
    return out, [run("orthogonality/1", small, seed, out, steps=20, progress=False) for seed in (0, 1)]


def test_seeds_agree_as_far_as_features_match(records, setting):
    from saenb.lab.runner import store_of
    out, made = records
    store = store_of(setting, out)
    found = pairs_between_seeds(made, store)
    assert list(found) == ["orthogonality/1"] and {k: len(v) for k, v in found["orthogonality/1"].items()} == dict(agreement=1, cosine=1, by_chance=1)
    same = pairs_between_seeds([made[0], made[0]], store)["orthogonality/1"] # a seed and itself
    assert same["agreement"] == [1.0] and same["cosine"][0] == pytest.approx(1, abs=1e-4)
    assert found["orthogonality/1"]["agreement"][0] < 1 and same["by_chance"][0] == pytest.approx(0.001 / 1.999, rel=0.01)


def test_the_lab_keeps_analyses_and_makes_what_is_missing(records, small):
    out, made = records
    found = analyse("orthogonality", small, out)
    folder = out/"tiny"/"orthogonality"
    assert {k: set(v) for k, v in found.items()} == dict(step_cost={"orthogonality/1"}, pairs_between_seeds={"orthogonality/1"})
    kept = {p.name: p.read_bytes() for p in folder.glob("*.json")}
    assert set(kept) == {"step_cost.json", "pairs_between_seeds.json"}
    assert analyse("orthogonality", small, out) == found and {p.name: p.read_bytes() for p in folder.glob("*.json")} == kept
    run("orthogonality/1", small, 2, out, steps=20, progress=False) # a third seed makes three couples
    again = analyse("orthogonality", small, out)
    assert len(again["pairs_between_seeds"]["orthogonality/1"]["agreement"]) == 3 and again["step_cost"] == found["step_cost"]


@pytest.fixture(scope="module")
def asked():
    """What is asked of positions, of the whole of the world's corpora."""
    from saenb.lab.preset_files import find_preset
    from saenb.lab.runner import readings_of
    whole = find_preset("tiny")
    return whole.evals["positional"], readings_of(whole)


def test_hard_masks_tell_of_position_from_the_start_and_retain_it(store, asked):
    training = TrainConfig(steps=100, lr=1e-3, warmup=10)
    masked, free = (specialisation_along(find_run(f"positional/{number}"), store, 128, training, *asked, shares=(0, 0.2, 1)) for number in (1, 0))
    assert masked["steps"] == free["steps"] == [0, 20, 100]
    assert masked["bits"][0] > 5 * free["bits"][0] and masked["bits"][2] > 2 * free["bits"][2]
    assert [masked["retention"][0], free["retention"][0]] == pytest.approx([1, 1])


def test_what_is_looked_at_on_the_way_is_the_training_itself(store, asked):
    """The last look is at the dictionary that a training without looks ends with."""
    from saenb.sae.gates import make_mechanism
    training, run = TrainConfig(steps=30, warmup=5, batch=512), find_run("positional/2")
    along = specialisation_along(run, store, 64, training, *asked, shares=(0, 0.5, 1))
    sae = SAE(SAEConfig(d_in=store.d_in, d_sae=64, hook_layer=store.layer)).initialise(store.rows(0, 2**15).x, training.seed)
    Trainer(sae, store, [make_mechanism(name, settings, sae.cfg) for name, settings in run.mechanisms], training).fit(progress=False)
    assert position_bits(sae, *asked)[0] == along["bits"][-1]
