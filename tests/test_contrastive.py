"""The four runs of the contrastive experiment: their constants, their terms, and that each part does what it is for."""
import pytest
import torch
import torch.nn.functional as F

from saenb.base.errors import SaenbError
from saenb.ideas.clusters import sizes
from saenb.sae.coactivation import coactivation, correlation
from saenb.ideas.contrastive import contrast, diversity, separation
from saenb.ideas.run import find_run
from saenb.sae.gates import make_mechanism
from saenb.sae.sae import load_sae
from saenb.ideas.sides import divergence, shares, side_information
from saenb.sae.architectures import sparsity_loss
from saenb.train.config import TrainConfig, reconstruction_loss
from saenb.train.trainer import Trainer

TABLE = { # as the log has them
    1: dict(ContrastiveGroups=dict(weight=0.1, percentile=75, every=100)),
    2: dict(ContrastiveGroups=dict(weight=0.2, percentile=85, every=100, least=5)),
    3: dict(ContrastiveGroups=dict(every=50), ImportantFeatures=dict(activation=0.4, gradient=0.6, memory=0.9, prune=0.1, threshold=0.01, every=50), SideDivergence=dict(weight=0.2)),
    4: dict(ContrastiveGroups=dict(clusters=32, every=50), ImportantFeatures=dict(activation=0.35, gradient=0.5, information=0.15, memory=0.9, prune=0.05, threshold=0.01, every=50),
            SideDivergence=dict(weight=0.3)),
}
LENGTH = TrainConfig(steps=300, lr=1e-3, warmup=20, batch=1024)


def mechanisms_of(number, without=(), **change):
    """A run's mechanisms, some left out or changed, with groupings often enough for a short training."""
    change = {"ContrastiveGroups": dict(every=50)} | change
    return tuple((name, settings | change.get(name, {})) for name, settings in find_run(f"contrastive/{number}").mechanisms if name not in without)


@pytest.fixture(scope="module")
def train(store, fresh):
    """A short training with some mechanisms, from the same start; made once for the same settings."""
    made = {}

    def run(mechanisms=()):
        if str(mechanisms) not in made:
            sae = fresh(d_sae=256)
            made[str(mechanisms)] = Trainer(sae, store, [make_mechanism(name, settings, sae.cfg) for name, settings in mechanisms], LENGTH)
            made[str(mechanisms)].fit(progress=False)
        return made[str(mechanisms)]
    return run


@pytest.fixture(scope="module")
def unseen(store): return next(store.batches(2**13, 99))


def part(trainer, name): return next(m for m in trainer.mechanisms if type(m).__name__ == name)


def within(sae, labels, batch):
    """Contrast, correlation and squared cosine within given groups."""
    members = (labels >= 0).nonzero().squeeze(1)
    alike = labels[members][:, None] == labels
    f = sae.encode(batch.x.float()).detach()
    company = alike.clone().scatter(1, members[:, None], False)
    return dict(contrast=contrast(F.normalize(sae.W_enc[:, members].T, dim=1), sae.W_dec, members, alike).item(),
                correlation=correlation(coactivation(f), f.mean(0))[members][company].mean().item(), diversity=diversity(sae.W_dec, members, alike).item(),
                separation=separation(sae.W_dec, members, alike).item())


def apart(sae, batch):
    f = sae.encode(batch.x.float()).detach()
    return divergence(shares(f, batch.side, "forget"), shares(f, batch.side, "retain")).item()


@pytest.mark.parametrize("number", TABLE)
def test_constants_are_the_tables_and_come_from_the_run(number, fresh):
    run = find_run(f"contrastive/{number}")
    assert [name for name, _ in run.mechanisms] == list(TABLE[number]) and run.builds_on == f"contrastive/{number - 1}"
    for name, settings in run.mechanisms:
        assert TABLE[number][name].items() <= settings.items()
        assert make_mechanism(name, settings, fresh().cfg).settings.items() >= settings.items()


def test_the_contrast_by_hand():
    draw = torch.Generator().manual_seed(0)
    rows, reading = (F.normalize(torch.randn(6, 4, generator=draw), dim=1) for _ in range(2))
    labels = torch.tensor([0, 0, 0, 1, 1, -1])
    asked = torch.tensor([1, 4])
    alike = labels[asked][:, None] == labels
    logits = lambda i, group: torch.stack([reading[i] @ rows[j] for j in group]) / 0.1
    wanted = (torch.logsumexp(logits(1, (0, 1, 2)), 0) - reading[1] @ rows[1] / 0.1 + torch.logsumexp(logits(4, (3, 4)), 0) - reading[4] @ rows[4] / 0.1) / 2
    torch.testing.assert_close(contrast(reading[asked], rows, asked, alike), wanted)
    cos = lambda i, j: (rows[i] @ rows[j])**2
    torch.testing.assert_close(diversity(rows, asked, alike), (cos(1, 0) + cos(1, 2) + cos(4, 3)) / 3)
    middles = [F.normalize(rows[list(g)].mean(0), dim=0) for g in ((0, 1, 2), (3, 4))]
    torch.testing.assert_close(separation(rows, asked, alike), (middles[0] @ middles[1])**2)


def test_a_feature_that_picks_its_own_row_is_not_charged():
    rows = torch.eye(4)
    every = torch.ones(4, 4, dtype=torch.bool)
    assert contrast(rows, rows, torch.arange(4), every) < 2e-4
    assert contrast(rows.roll(1, 0), rows, torch.arange(4), every) > 9


@pytest.mark.parametrize("number", [1, 2])
def test_groups_are_told_apart(number, train, unseen):
    """In the groups it ended with, each feature picks its own row better than in the baseline, trained from the same start, and features keep less company."""
    with_, without = train(mechanisms_of(number)), train()
    labels = part(with_, "ContrastiveGroups").labels
    ours, theirs = (within(t.sae, labels, unseen) for t in (with_, without))
    assert ours["contrast"] < 0.9 * theirs["contrast"] and ours["correlation"] < theirs["correlation"]
    assert with_.history[-1]["reconstruction"] < 1.2 * without.history[-1]["reconstruction"]


def test_diversity_and_separation_part_rows(train, unseen):
    """Run 2 without its two more terms."""
    with_, without = train(mechanisms_of(2)), train(mechanisms_of(2, ContrastiveGroups=dict(every=50, diversity=0.0, separation=0.0)))
    labels = part(with_, "ContrastiveGroups").labels
    ours, theirs = (within(t.sae, labels, unseen) for t in (with_, without))
    assert ours["diversity"] < 0.8 * theirs["diversity"] and ours["separation"] < theirs["separation"] and ours["correlation"] < theirs["correlation"]


def test_a_higher_percentile_makes_fewer_and_firmer_groups(train):
    one, two = (train(mechanisms_of(number)) for number in (1, 2))
    assert two.history[-1]["ContrastiveGroups.groups"] < one.history[-1]["ContrastiveGroups.groups"]
    assert two.history[-1]["ContrastiveGroups.threshold"] > one.history[-1]["ContrastiveGroups.threshold"]
    assert sizes(part(two, "ContrastiveGroups").labels).min() >= 5 and sizes(part(one, "ContrastiveGroups").labels).min() >= 2


def test_a_history_steadies_the_groups(train):
    """Run 2 with the correlations of the batch at hand alone changes its groups more."""
    mean = lambda t: sum(line["ContrastiveGroups.agreement"] for line in t.history[5:]) / len(t.history[5:])
    assert mean(train(mechanisms_of(2))) > mean(train(mechanisms_of(2, ContrastiveGroups=dict(every=50, history=1))))


def test_run_4_has_clusters_of_a_number(train):
    line = train(mechanisms_of(4)).history[-1]
    assert 10 < line["ContrastiveGroups.groups"] <= 32 and "ContrastiveGroups.threshold" not in line # those of one feature are none
    assert sizes(part(train(mechanisms_of(4)), "ContrastiveGroups").labels).min() >= 2


@pytest.mark.parametrize("number, most", [(3, 0.1), (4, 0.05)])
def test_what_matters_least_is_pruned_and_silent(number, most, train, unseen, tmp_path):
    trainer = train(mechanisms_of(number))
    chooser = part(trainer, "ImportantFeatures")
    pruned = chooser.kept == 0
    assert 0 < pruned.float().mean() <= most
    f = trainer.sae.encode(unseen.x.float())
    assert (f[:, pruned] == 0).all() and (trainer.sae.ungated(unseen.x.float())[:, pruned] > 0).any()
    importance = chooser.importance()
    assert importance[pruned].mean() < 0.1 * importance[~pruned].mean() and importance.max() <= 1
    trainer.sae.save(tmp_path/"sae") # the choice is part of the dictionary
    torch.testing.assert_close(load_sae(tmp_path/"sae").encode(unseen.x.float()), f)
    without = train(mechanisms_of(number, without=["ImportantFeatures"]))
    assert trainer.history[-1]["reconstruction"] < 1.1 * without.history[-1]["reconstruction"] # little is lost


def test_each_part_of_importance_counts(train):
    """The same account with a part left out ranks what has little of it higher; run 4's information favours what tells the sides apart."""
    chooser = part(train(mechanisms_of(4)), "ImportantFeatures")
    parts = dict(activation=chooser.size, gradient=chooser.pull, information=side_information(chooser.counts))
    shares_ = dict(chooser.parts)
    wanted = sum(share * parts[name] / parts[name].max() for name, share in shares_.items())
    torch.testing.assert_close(chooser.importance(), wanted)
    for name in parts:
        assert torch.corrcoef(torch.stack([wanted, parts[name]]))[0, 1] > torch.corrcoef(torch.stack([wanted - shares_[name] * parts[name] / parts[name].max(), parts[name]]))[0, 1]


def test_activation_and_gradient_are_those_of_the_batch(fresh, store):
    """Without memory, after one step: the mean activation, and the absolute product of activation and the loss' gradient, taken here by hand."""
    sae, length = fresh(d_sae=64), TrainConfig(steps=1, warmup=0, lr=1e-9)
    batch = next(store.batches(length.batch, length.seed))
    f = sae.encode(batch.x.float()).detach().requires_grad_()
    loss = reconstruction_loss(batch.x.float(), sae.decode(f), sae.cfg.scale) + length.sparsity_penalty * sparsity_loss(f, sae.cfg.scale, sae.cfg.d_in)
    gradient, = torch.autograd.grad(loss, f)
    trainer = Trainer(sae, store, [make_mechanism("ImportantFeatures", dict(activation=0.4, gradient=0.6, memory=0.0), sae.cfg)], length)
    trainer.fit(progress=False)
    torch.testing.assert_close(trainer.mechanisms[0].size, f.detach().mean(0))
    torch.testing.assert_close(trainer.mechanisms[0].pull, (f.detach() * gradient).abs().sum(0), rtol=1e-4, atol=1e-9)


def test_a_pruned_feature_may_return(fresh, store):
    """Silenced by force, features of importance are back after the next choice."""
    sae = fresh(d_sae=64)
    trainer = Trainer(sae, store, [make_mechanism("ImportantFeatures", dict(activation=0.4, gradient=0.6, prune=0.1, every=10), sae.cfg)], TrainConfig(steps=10, warmup=5))
    trainer.mechanisms[0].kept[:32] = 0
    assert (sae.encode(store.rows(0, 100).x.float())[:, :32] == 0).all()
    trainer.fit(progress=False)
    assert trainer.mechanisms[0].kept[:32].mean() > 0.8


@pytest.mark.parametrize("number", [3, 4])
def test_the_sides_are_pulled_apart(number, train, unseen):
    """On tokens that were not trained on."""
    with_, without = train(mechanisms_of(number)), train(mechanisms_of(number, without=["SideDivergence"]))
    assert apart(with_.sae, unseen) > 3 * apart(without.sae, unseen)
    assert with_.history[-1]["reconstruction"] < 1.5 * without.history[-1]["reconstruction"]


def test_a_larger_weight_pulls_harder(train, unseen):
    alone = [(("SideDivergence", dict(weight=w)),) for w in (0.2, 0.3)]
    assert apart(train(alone[1]).sae, unseen) > apart(train(alone[0]).sae, unseen)


@pytest.mark.parametrize("number", [2, 4])
def test_stopped_and_resumed_it_ends_with_the_same_bytes(number, fresh, ends_the_same):
    def parts():
        sae = fresh(d_sae=64)
        return sae, [make_mechanism(name, settings | (dict(every=7) if "every" in settings else {}), sae.cfg) for name, settings in mechanisms_of(number)]
    ends_the_same(parts)


def test_where_nothing_correlates_nothing_is_charged(store, fresh):
    sae = fresh(d_sae=64)
    sae.b_enc.data.fill_(-1e4) # silent
    trainer = Trainer(sae, store, [make_mechanism("ContrastiveGroups", dict(weight=0.1, percentile=75), sae.cfg)], TrainConfig(steps=2, lr=1e-9, log_every=1))
    trainer.fit(progress=False)
    assert [line["ContrastiveGroups.contrast"] for line in trainer.history] == [0, 0] and trainer.history[-1]["ContrastiveGroups.grouped"] == 0


def test_settings_that_make_no_sense(fresh):
    cfg = fresh(d_sae=64).cfg
    for name, settings, said in (("ContrastiveGroups", dict(weight=0.1), "percentile or a number"), ("ContrastiveGroups", dict(weight=0.1, percentile=75, clusters=3), "percentile or a number"),
                                 ("ContrastiveGroups", dict(weight=0.1, percentile=75, every=0), "at least 1"), ("ContrastiveGroups", dict(weight=0.1, percentile=175), "from 0 to 100"),
                                 ("ImportantFeatures", dict(activation=1.0, gradient=0.0, prune=1.0), "share to prune"), ("SideDivergence", dict(), "correct its settings")):
        with pytest.raises(SaenbError, match=said): make_mechanism(name, settings, cfg)
