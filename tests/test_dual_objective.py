"""The five runs of the dual-objective experiment: their constants, their parts, and that each does what it is for."""
import numpy as np
import pytest
import torch

from saenb.base.errors import SaenbError
from saenb.evals.exam import feature_stats
from saenb.ideas.dual_objective import SideAttention, SideBlocks
from saenb.ideas.run import find_run
from saenb.sae.gates import make_mechanism
from saenb.sae.sae import load_sae
from saenb.ideas.sides import by_side
from saenb.train.config import TrainConfig
from saenb.train.mechanism import Mechanism
from saenb.train.trainer import Trainer

TABLE = { # what the log gives, and the spec for what it left out
    1: dict(SideBlocks=dict(block=32)),
    2: dict(SideBlocks=dict(block=32, gradient=0.5)),
    3: dict(SideBlocks=dict(gradient=0.5), SideSeparation=dict(margin=0.5)),
    4: dict(SideBlocks=dict(gradient=0.5), SideSeparation=dict(margin=0.5), ClusterGates=dict(clusters=32, both=0.02)),
    5: dict(SideBlocks=dict(gradient=0.5), SideSeparation=dict(margin=0.5), SideAttention=dict(heads=4, both=0.02)),
}
LENGTH = TrainConfig(steps=200, lr=1e-3, warmup=20, batch=1024, balanced=True)


def mechanisms_of(number, without=(), **change):
    """A run's mechanisms, some left out or changed, with decisions often enough for a short training."""
    return tuple((name, settings | (dict(every=50) if name in ("SideBlocks", "ClusterGates") else {}) | change.get(name, {}))
                 for name, settings in find_run(f"dual_objective/{number}").mechanisms if name not in without)


@pytest.fixture(scope="module")
def unseen(store): return next(store.batches(2**13, 99, balanced=True))


def part(trainer, name): return next(m for m in trainer.mechanisms if type(m).__name__ == name)


def evenness(sae, batch):
    """The mean of four times the product of each living feature's densities, as shares of their sum; and of the distance between its mean activations."""
    total, active, tokens = by_side(sae.encode(batch.x.float()).detach(), batch.side)
    alive = active.sum(0) > 0
    density, mean = active[:, alive] / tokens, total[:, alive] / tokens
    return (4 * density.prod(0) / density.sum(0)**2).mean().item(), ((mean[0] - mean[1]).abs() / mean.sum(0)).mean().item()


@pytest.mark.parametrize("number", TABLE)
def test_constants_are_the_tables_and_come_from_the_run(number, fresh):
    run = find_run(f"dual_objective/{number}")
    assert [name for name, _ in run.mechanisms] == list(TABLE[number]) and run.builds_on == f"dual_objective/{number - 1}" and run.training == dict(balanced=True)
    for name, settings in run.mechanisms:
        assert TABLE[number][name].items() <= settings.items()
        assert make_mechanism(name, settings, fresh().cfg).settings.items() >= settings.items()


def test_sorting_alone_changes_nothing_but_places(train):
    """Blocks of which none may rest: the same dictionary, its features in another order."""
    sorted_, plain = train(mechanisms_of(1, SideBlocks=dict(rest=0.0)), TrainConfig(steps=80, lr=1e-3, warmup=20, balanced=True)), train((), TrainConfig(steps=80, lr=1e-3, warmup=20, balanced=True))
    rows, theirs = sorted_.sae.W_dec.detach(), plain.sae.W_dec.detach()
    nearest = (rows @ theirs.T).argmax(1)
    assert not torch.equal(nearest, torch.arange(256)) and torch.equal(nearest.sort().values, torch.arange(256))
    torch.testing.assert_close(rows, theirs[nearest], rtol=0, atol=1e-3)
    torch.testing.assert_close(sorted_.sae.b_enc.detach(), plain.sae.b_enc.detach()[nearest], rtol=0, atol=1e-2)
    moments = [t.optimizer.state[t.sae.W_enc]["exp_avg_sq"] for t in (sorted_, plain)]
    torch.testing.assert_close(moments[0], moments[1][:, nearest], rtol=0.05, atol=1e-6)
    assert sorted_.history[-1]["reconstruction"] == pytest.approx(plain.history[-1]["reconstruction"], rel=1e-3)


@pytest.mark.parametrize("number", [1, 2])
def test_the_least_important_blocks_rest(number, train, unseen):
    trainer = train(mechanisms_of(number, SideBlocks=dict(threshold=1e9))) # all are below it, so as many as may
    blocks, sae = part(trainer, "SideBlocks"), trainer.sae
    assert sae.n_active == blocks.n_active == 192 and trainer.history[-1]["SideBlocks.resting"] == 0.25
    f = sae.encode(unseen.x.float())
    assert (f[:, 192:] == 0).all() and (f[:, :192] > 0).any(0).float().mean() > 0.9
    importance = blocks.importance()
    assert importance[:192].mean() > importance[192:].mean()
    assert (importance.view(-1, 32).mean(1).diff() < 0.1 * importance.mean()).all() # sorted, but for what has changed since


def test_a_block_that_is_important_enough_stays_at_work(train):
    assert train(mechanisms_of(1, SideBlocks=dict(threshold=0.0))).sae.n_active == 256
    some = train(mechanisms_of(1, SideBlocks=dict(threshold=2e-3, rest=0.9)))
    blocks = part(some, "SideBlocks")
    assert 32 <= some.sae.n_active < 256
    low = blocks.importance().view(-1, 32).mean(1) < 2e-3
    assert abs(int(low.sum()) * 32 - (256 - some.sae.n_active)) <= 32 # as decided, but for what has changed since


def test_nothing_is_decided_once_the_learning_rate_falls(fresh, store):
    sae = fresh(d_sae=64)
    trainer, decided = Trainer(sae, store, [SideBlocks(192, 64, block=8, every=10)], TrainConfig(steps=60, warmup=5, decay=0.5, batch=256, balanced=True)), []
    trainer.mechanisms[0].decide = lambda t: decided.append(t.index)
    trainer.fit(progress=False)
    assert decided == [9, 19, 29]


def test_the_threshold_follows_the_distribution(fresh):
    """Importance all ten times as large: a fixed threshold decides otherwise, run 2's does not."""
    class Sorted:
        mechanisms = ()
        def reorder(self, order): self.order = order
    found = {}
    for name, settings in (("fixed", dict(threshold=0.02)), ("follows", {})):
        for scale in (1, 10):
            blocks = make_mechanism("SideBlocks", dict(block=8, rest=0.9) | settings, fresh(d_sae=64).cfg)
            values = torch.logspace(-4, -1, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
            blocks.importance = lambda labels: scale * values
            blocks.decide(trainer := Sorted())
            assert torch.equal(values[trainer.order], values.sort(descending=True).values)
            found[name, scale] = blocks.n_active
    assert found["fixed", 1] < found["fixed", 10] and found["follows", 1] == found["follows", 10] < 64


def test_gradients_keep_at_work_what_the_loss_would_miss(train, unseen):
    """The last quarter of the features put to rest as run 1 sorts them, and as run 2 does: the stream is explained better in run 2."""
    def unexplained(number):
        trainer = train(mechanisms_of(number, SideBlocks=dict(rest=0.0)))
        sae, x = trainer.sae, unseen.x.float()
        part(trainer, "SideBlocks").n_active = 192
        error = (sae(x) - x).pow(2).sum().item()
        part(trainer, "SideBlocks").n_active = 256
        return error
    assert unexplained(2) < 0.9 * unexplained(1)


def test_blocks_sort_the_important_to_the_front_and_part_it_from_the_rest(train, unseen):
    """Run 1's features at work differ more between the sides than those at rest would, on tokens that were not trained on."""
    trainer = train(mechanisms_of(1, SideBlocks=dict(threshold=1e9)))
    sae, blocks = trainer.sae, part(trainer, "SideBlocks")
    with torch.no_grad(): f = torch.relu(unseen.x.float() @ sae.W_enc + (sae.b_enc - sae.b_dec @ sae.W_enc))
    seen = type(blocks.statistics)(256)
    seen.update(f, unseen.side)
    apart = seen.divergence()
    assert apart[:192].mean() > 2 * apart[192:].mean()


def test_a_resting_feature_returns(fresh, store):
    """Put to rest by force, features of importance are back after the next decision."""
    sae = fresh(d_sae=64)
    trainer = Trainer(sae, store, [make_mechanism("SideBlocks", dict(block=8, every=20, look=1), sae.cfg)], TrainConfig(steps=30, warmup=5, balanced=True))
    rows = sae.W_dec.detach().clone()
    trainer.mechanisms[0].n_active = 32
    trainer.fit(progress=False)
    at_work = (sae.W_dec.detach()[:sae.n_active] @ rows.T).argmax(1)
    assert (at_work >= 32).float().mean() > 0.25


def test_features_are_pushed_to_a_side(train, unseen):
    """Run 3 beside the same without what distinguishes it: densities' products fall, means part, and little of the stream is lost."""
    with_, without = train(mechanisms_of(3)), train(mechanisms_of(3, without=["SideSeparation"]))
    (product, apart), (their_product, their_apart) = (evenness(t.sae, unseen) for t in (with_, without))
    assert product < 0.6 * their_product and apart > 1.5 * their_apart
    assert with_.history[-1]["reconstruction"] < 1.5 * without.history[-1]["reconstruction"]


def test_each_term_of_the_separation_acts(train, unseen):
    plain = evenness(train().sae, unseen)
    product = evenness(train((("SideSeparation", dict(weight=0.2, margin_weight=0.0)),)).sae, unseen)
    margin = evenness(train((("SideSeparation", dict(weight=0.0, margin_weight=0.2)),)).sae, unseen)
    assert product[0] < 0.7 * plain[0] and margin[1] > 1.2 * plain[1]


def test_the_separation_by_hand(fresh):
    """Three features, four tokens: one on both sides alike, one on a side alone, one silent."""
    side = torch.tensor([1, 1, 2, 2])
    f = torch.tensor([[1.0, 2, 0], [0, 2, 0], [0, 0, 0], [1, 0, 0]], requires_grad=True)
    terms = make_mechanism("SideSeparation", dict(weight=0.3, margin=0.5), fresh(d_sae=64).cfg).penalty(type("Step", (), dict(f=f, side=side)))
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(dict(product=0.3 * 1 / 3, margin=0.3 * 0.5 / 3))
    sum(terms.values()).backward()
    assert torch.isfinite(f.grad).all()


def shared(f, side):
    """How much of their activation the sides have in common, feature by feature: 1 if all, 0 if nothing."""
    total = by_side(f.detach(), side)[0]
    return torch.minimum(*(total / total.sum(1, keepdim=True))).sum().item()


@pytest.mark.parametrize("number, name", [(4, "ClusterGates"), (5, "SideAttention")])
def test_gates_keep_the_sides_apart(number, name, train, unseen):
    """With the gates switched off, the same dictionary's sides have more in common. Being wide open on both costs more here, so that gates part in a short training."""
    trainer, x = train(mechanisms_of(number, **{name: dict(both=0.1)})), unseen.x.float()
    forget, retain = (openness := part(trainer, name).openness())
    assert (forget - retain).abs().mean() > 0.1 and (openness.amin(0) < 0.5).any() and (openness.amax(0) == 1).all()
    assert shared(trainer.sae.encode(x), unseen.side) < 0.97 * shared(trainer.sae.ungated(x), unseen.side)
    assert shared(trainer.sae.encode(x), unseen.side) < shared(train(mechanisms_of(number, without=[name])).sae.encode(x), unseen.side)


def test_a_clusters_features_share_their_gates(train):
    gates = part(train(mechanisms_of(4)), "ClusterGates")
    for cluster in gates.labels.unique(): assert len(gates.openness()[:, gates.labels == cluster].unique(dim=1).T) == 1


def test_clusters_are_of_features_that_write_alike(train):
    trainer = train(mechanisms_of(4))
    labels, rows = part(trainer, "ClusterGates").labels, trainer.sae.W_dec.detach()
    alike, cosines = labels[:, None] == labels, rows @ rows.T
    alike.fill_diagonal_(False)
    assert 10 < len(labels.unique()) <= 32 and cosines[alike].mean() > 0.1 + cosines[~alike].mean()


def test_tokens_pay_for_the_clusters_that_speak(train, unseen):
    count = {}
    for sparsity in (0.0, 0.01):
        trainer = train(mechanisms_of(4, ClusterGates=dict(sparsity=sparsity)))
        spoken = torch.zeros(len(unseen.x), 32).index_add_(1, part(trainer, "ClusterGates").labels, trainer.sae.encode(unseen.x.float()).detach())
        count[sparsity] = (spoken.sum(1)**2 / spoken.pow(2).sum(1).clamp_min(1e-12)).mean()
    assert count[0.01] < 0.9 * count[0.0]


def test_importance_has_a_part_from_the_cluster(train):
    blocks, labels = part(train(mechanisms_of(4)), "SideBlocks"), part(train(mechanisms_of(4)), "ClusterGates").labels
    alone, together = blocks.importance(), blocks.importance(labels)
    for cluster in labels.unique():
        mine = labels == cluster
        torch.testing.assert_close(together[mine], 0.5 * alone[mine] + 0.5 * alone[mine].mean())


def test_attention_goes_where_a_feature_acts(train):
    """What leans to a side is open there; what attends to one side attends the less to the other."""
    gates = part(train(mechanisms_of(5)), "SideAttention")
    forget, retain = gates.openness().detach()
    torch.testing.assert_close(gates.belonging().sum(0), torch.ones(256))
    lean = (gates.statistics.density[0] / gates.statistics.density[1]).log()
    assert torch.corrcoef(torch.stack([lean, forget - retain]))[0, 1] > 0.5


def test_thresholds_adapt_for_each_feature(train, unseen):
    """What lies below its feature's threshold is silent; and what lies above it speaks, unless a gate masks it there."""
    trainer = train(mechanisms_of(5))
    gates, x = part(trainer, "SideAttention"), unseen.x.float()
    floor = gates.floor(gates.belonging())
    assert len(floor.unique()) > 100
    before, after = trainer.sae.ungated(x).detach(), trainer.sae.encode(x).detach()
    cut = (before > 0) & (before <= floor)
    assert cut.any() and (after[cut] == 0).all()
    forget = gates.reader(x).detach()
    share = torch.stack([forget, 1 - forget], 1) @ gates.openness().detach()
    torch.testing.assert_close(after, before * (before > floor) * share * (share >= 0.5))


@pytest.mark.parametrize("number", [2, 4, 5])
def test_it_says_the_same_after_saving_and_inside_the_evaluation(number, train, unseen, exam, tmp_path):
    """The activations of a gated dictionary come back bit for bit, without a side being told, and the evaluation meets the same ones."""
    sae = train(mechanisms_of(number)).sae
    again = load_sae(sae.save(tmp_path/"sae"))
    x = unseen.x.float()
    assert torch.equal(again.encode(x), sae.encode(x)) and again.n_active == sae.n_active
    assert not torch.equal(sae.encode(x), torch.relu(x @ sae.W_enc + (sae.b_enc - sae.b_dec @ sae.W_enc)))
    used = [feature_stats(exam, s) for s in (sae, again)]
    for name, value in vars(used[0]).items(): np.testing.assert_array_equal(value, vars(used[1])[name])


@pytest.mark.parametrize("number", [2, 4, 5])
def test_stopped_and_resumed_it_ends_with_the_same_bytes(number, fresh, ends_the_same):
    def parts():
        sae = fresh(d_sae=64)
        frequent = dict(SideBlocks=dict(every=7, block=8, look=2), ClusterGates=dict(every=7, clusters=8), SideAttention=dict(look=2))
        return sae, [make_mechanism(name, settings | frequent.get(name, {}), sae.cfg) for name, settings in find_run(f"dual_objective/{number}").mechanisms]
    ends_the_same(parts)


def test_features_cannot_change_places_beside_what_would_lose_track(fresh, store):
    class Keeps(Mechanism):
        def __init__(self, d_in, d_sae):
            super().__init__(d_in, d_sae)
            self.register_buffer("mine", torch.zeros(d_sae))
    sae = fresh(d_sae=64)
    trainer = Trainer(sae, store, [SideBlocks(192, 64, block=8, every=2), Keeps(192, 64)], TrainConfig(steps=4, warmup=1))
    with pytest.raises(SaenbError, match="Keeps"): trainer.fit(progress=False)


def test_a_damaged_number_of_features_at_work_is_named(train, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = train(mechanisms_of(2)).sae.save(tmp_path/"sae")
    weights = load_file(folder/"sae_weights.safetensors")
    for odd in (-5, 0, 257):
        save_file(weights | {"gates.0._extra_state": torch.tensor(odd)}, folder/"sae_weights.safetensors")
        with pytest.raises(SaenbError, match=f"{odd} at work"): load_sae(folder)


def test_settings_that_make_no_sense(fresh):
    cfg = fresh(d_sae=64).cfg
    for name, settings, said in (("SideBlocks", dict(block=7), "blocks of 7"), ("SideBlocks", dict(rest=1.0), "share that may rest"), ("SideBlocks", dict(every=0), "at least 1"),
                                 ("SideSeparation", dict(weight=0.1, margin=2), "from 0 to 1"), ("ClusterGates", dict(clusters=65), "65 clusters"), ("SideAttention", dict(heads=0), "0 heads"),
                                 ("SideSeparation", dict(), "correct its settings")):
        with pytest.raises(SaenbError, match=said): make_mechanism(name, settings, cfg)
