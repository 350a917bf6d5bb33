"""Every intervention against its formula, the fast way against the plain one, and what is written to folders."""
import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from saenb.base.errors import SaenbError
from saenb.base.files import read_json, write_json
from saenb.data.sources import TextSource
from saenb.evals.exam import Exam, Grid, UnlearningSetup, feature_stats
from saenb.evals.interventions import crisp, guardrail, rmu
from saenb.evals.interventions.conditional import LEVELS, retained_bars, shares_above
from saenb.evals.interventions.intervention import INTERVENTIONS, EditBatch, edited, lowest_block, plain_answers, plain_name
from saenb.evals.random_choice import RandomChoiceSetup
from saenb.evals.unlearned_models import TEXT, find_setting, text_cost, unlearn, unlearned, write_unlearned
from saenb.evals.unlearning import answers_in, run_settings
from saenb.sae.sae import SAE, SAEConfig

INTERVENTIONS.load()
STREAM = ("zero_ablation", "mean_ablation", "conditional_clamp", "raw_direction", "guardrail", "guardrail_window",
          "guardrail_gate", "orthogonal_edit")
WEIGHTS = ("orthogonal_weights", "rmu", "rmu_apart", "crisp")
GRID = Grid(thresholds=(0.05, 0.3), n_features=(3, 12), multipliers=(4, 60), typical=True)


class FewQuestions(Exam):
    """An exam in which the first questions of three subjects count as known, so that nothing has to be asked in 24 orders."""
    def find_known(self, sources):
        return {s.subject: list(range(min(count, len(s.load())))) for s, count in zip(sources, (12, 8, 8))}


@pytest.fixture(scope="module")
def few(world, model, tmp_path_factory):
    texts, folder = {}, tmp_path_factory.mktemp("texts")
    for side in ("forget", "retain"):
        (folder/f"{side}.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t, _ in world.texts(side, 60)))
        texts[side] = TextSource(str(folder/f"{side}.jsonl"), side=side)
    setup = UnlearningSetup(**texts, questions=world.question_sources()[:3], dataset_size=16, seq_len=48, lowest_retain=0.0,
                            retain_floor=0.5, grid=GRID, reference=None)
    return FewQuestions(model, setup, world.layer)


@pytest.fixture(scope="module")
def random_sae(few):
    cfg = SAEConfig(d_in=few.model.cfg.d_model, d_sae=96, hook_name=f"blocks.{few.layer}.hook_out", hook_layer=few.layer)
    return SAE(cfg).initialise(torch.cat([x[keep] for x, keep in few.corpus("forget")]), 0)


@pytest.fixture(scope="module")
def stats(few, random_sae): return feature_stats(few, random_sae)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Trainings of a few steps."""
    for module in (rmu, crisp): monkeypatch.setattr(module, "STOPS", (2, 4))
    for name, value in dict(LENGTHS=(4,), ALPHAS=(10,), RATES=(3e-3,)).items(): monkeypatch.setattr(rmu, name, value)
    for name, value in dict(COUNTS=(12,), RATE=1e-4, RATIO=1.2).items(): monkeypatch.setattr(crisp, name, value)


def prepared(name, few, sae, stats):
    intervention = INTERVENTIONS.named(name)()
    worked, known = intervention.prepare(few, sae, stats)
    return intervention, worked, known, intervention.settings(GRID, known)


@pytest.mark.parametrize("name", STREAM + WEIGHTS)
def test_fast_equals_plain(name, few, random_sae, stats):
    """Question by question, for settings drawn at random; most interventions change an answer somewhere."""
    intervention, worked, known, settings = prepared(name, few, random_sae, stats)
    drawn = np.random.default_rng(0).choice(len(settings), min(3 if name in STREAM else 2, len(settings)), replace=False)
    settings = [settings[i] for i in sorted(drawn)]
    for row, setting in zip(run_settings(few, worked, settings, known, intervention)[0], settings):
        features, values, rule = intervention.asked(setting, known)
        assert torch.equal(row["right"], plain_answers(few, worked, features, values, intervention, **rule)), setting
        json.dumps({k: v for k, v in row.items() if k != "right"})


@torch.no_grad()
def by_hand(sae, x, features, change):
    """A stream [1, tokens, width] in which `change(token, activations)` gives the chosen features' new activations."""
    out = x.clone()
    for t in range(1, x.shape[1]):
        f = sae.encode(x[0, t])
        for j, new in change(t, f).items(): out[0, t] += (new - f[j]) * sae.W_dec[j]
    return out


@pytest.fixture(scope="module")
def text(few): return few.stream[:len(few.tokens[0])][None]


def same(a, b): torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_ablations_and_the_conditional_clamp_by_hand(few, random_sae, stats, text):
    f = random_sae.encode(text)[0].detach()
    features = f[1:].sum(0).topk(3).indices.tolist()
    zero, mean, conditional = (INTERVENTIONS.named(n)() for n in ("zero_ablation", "mean_ablation", "conditional_clamp"))
    same(zero.apply(random_sae, text, features, torch.zeros(3)),
         by_hand(random_sae, text, features, lambda t, f: {j: 0.0 for j in features if f[j] > 0}))
    _, known = mean.prepare(few, random_sae, stats)
    rows = torch.cat([random_sae.encode(x)[keep] for x, keep in few.corpus("retain")]).detach()
    np.testing.assert_allclose(known.more["means"], rows.mean(0).numpy(), rtol=1e-4)
    _, values, rule = mean.asked(dict(features=np.array(features)), known)
    same(mean.apply(random_sae, text, features, values, **rule),
         by_hand(random_sae, text, features, lambda t, f: dict(zip(features, values.tolist()))))
    bars = f[1:, features].quantile(0.7, dim=0)
    same(conditional.apply(random_sae, text, features, torch.tensor([1.0, 2.0, 3.0]), bars=bars),
         by_hand(random_sae, text, features,
                 lambda t, f: {j: -v for j, v, bar in zip(features, (1.0, 2.0, 3.0), bars) if f[j] > bar}))


def test_bars_are_percentiles(few, random_sae, stats):
    rows = torch.cat([random_sae.encode(x)[keep] for x, keep in few.corpus("retain")]).detach()
    bars = retained_bars(few, random_sae)
    assert torch.equal(retained_bars(few, random_sae, (0, *LEVELS)), torch.cat([torch.zeros_like(bars[:1]), bars])) # the raw direction's
    for bar, level in zip(bars, LEVELS):
        np.testing.assert_array_equal(bar, np.percentile(rows.numpy(), level, axis=0, method="inverted_cdf"))
    above = shares_above(few, random_sae, bars, "retain")
    assert (above.max(1) <= 1 - np.array(LEVELS) / 100 + 1e-6).all()
    intervention, _, known, settings = prepared("conditional_clamp", few, random_sae, stats)
    forgotten = shares_above(few, random_sae, bars, "forget")
    for s in settings: # the densest above their bars on forgotten text
        level, chosen = LEVELS.index(s["percentile"]), s["features"]
        densest = forgotten[level][chosen]
        assert (np.diff(densest) <= 0).all() and densest.min() == np.sort(forgotten[level])[::-1][len(chosen) - 1]
        np.testing.assert_array_equal(intervention.rule(s, known)["bars"], bars[level][torch.from_numpy(chosen.copy())])


def test_the_raw_direction_by_hand(few, random_sae, stats, text):
    intervention, direction, known, _ = prepared("raw_direction", few, random_sae, stats)
    means = [torch.cat([x[keep] for x, keep in few.corpus(side)]).double().mean(0).float() for side in ("forget", "retain")]
    unit = F.normalize(means[0] - means[1], dim=0)
    expected = text.clone()
    for t in range(1, text.shape[1]):
        read = (text[0, t] - means[1]) @ unit
        if read > 0.05: expected[0, t] -= (read + 2.0) * unit
    same(intervention.apply(direction, text, [0], torch.tensor([2.0]), bars=0.05), expected)


def test_a_share_of_tokens_by_hand():
    fired = torch.rand(5, 20, generator=torch.Generator().manual_seed(0)) < 0.4
    places = torch.arange(20).repeat(5, 1)
    places[2, 13:] = places[4, 5:] = -1 # padding
    for i, length in enumerate((20, 20, 13, 20, 5)):
        row = fired[i, :length].double()
        assert guardrail.fired_share(fired, places)[i] == row.mean()
        best = max(row[max(0, t - 7):t + 1].sum() for t in range(length)) / min(8, length)
        assert guardrail.fired_share(fired, places, 8)[i] == best


def test_the_guardrail_by_hand(few, random_sae, stats, text):
    intervention = INTERVENTIONS.named("guardrail")()
    features, values = [3, 17, 40, 41], torch.tensor([1.0, 2.0, 3.0, 4.0])
    fires = [t for t in range(1, text.shape[1]) if (random_sae.encode(text[0, t])[features] > 0).any()]
    share = len(fires) / text.shape[1]
    assert 0 < share < 1
    shut = intervention.apply(random_sae, text, features, values, tau=share, window=0)
    same(shut, text)
    same(intervention.apply(random_sae, text, features, values, tau=share - 1e-9, window=0), by_hand(
        random_sae, text, features, lambda t, f: dict(zip(features, (-values).tolist())) if t in fires else {}))
    _, _, known, settings = prepared("guardrail", few, random_sae, stats)
    rows = {side: torch.cat([random_sae.encode(x)[keep] for x, keep in few.corpus(side)]).detach() for side in ("forget", "retain")}
    squares = {side: (f.double()**2).mean(0).numpy() for side, f in rows.items()}
    ratio = squares["forget"] / (squares["retain"] + 1e-21)
    for s in settings:
        passing = [j for j in np.argsort(-squares["forget"], kind="stable") if ratio[j] >= np.percentile(ratio, s["cut"])]
        assert s["features"].tolist() == passing[:s["n_features"]]
    s = settings[0]
    shares = [(random_sae.encode(row[1:])[:, s["features"]] > 0).any(1).double().sum() / len(row)
              for x, _ in few.corpus("retain") for row in x]
    assert s["tau"] == pytest.approx(np.percentile(shares, s["quiet"]))


def test_orthogonal_edits_by_hand(few, random_sae, stats, text):
    edit, heavy = (INTERVENTIONS.named(n)() for n in ("orthogonal_edit", "orthogonal_weights"))
    features, centre = [5, 6, 9], torch.randn(text.shape[-1])
    basis = torch.linalg.qr(random_sae.W_dec[features].T.detach())[0]
    expected = text - (text - centre) @ basis @ basis.T
    expected[:, 0] = text[:, 0]
    same(edit.apply(random_sae, text, features, torch.zeros(3), centre=centre), expected)
    weights = heavy.weights(few, random_sae, features, torch.zeros(3))
    assert {n.rsplit(".", 2)[1] for n in weights} == {"o_proj", "down_proj"} and len(weights) == 2 * (few.depth - few.layer)
    states = lambda: few.model.original_model(few.tokens[0][None], output_hidden_states=True).hidden_states[few.layer + 1:-1]
    with torch.no_grad(), edited(few.model, weights): streams = states()
    for below, above in zip(streams, streams[1:]): # nothing is written along the chosen rows
        assert ((above - below) @ random_sae.W_dec[features].T).abs().max() < 1e-4 * (above - below).abs().max() + 1e-5
    assert heavy.settings(GRID, heavy.prepare(few, random_sae, stats)[1])[-1]["n_features"] <= few.model.cfg.d_model // 2


def test_an_edit_leaves_no_trace(few):
    own = {plain_name(n): p for n, p in few.model.original_model.named_parameters()}
    before = {n: p.clone() for n, p in own.items()}
    name = next(n for n in own if n.endswith("down_proj.weight"))
    with pytest.raises(KeyError), edited(few.model, {name: own[name] + 1}): raise KeyError
    tokens = few.tokens[0][None]
    weights = {name: before[name].clone().requires_grad_()}
    rmu.streams_under(few.model, weights, tokens, (few.layer,))[few.layer].sum().backward()
    assert weights[name].grad.abs().sum() > 0
    own = {plain_name(n): p for n, p in few.model.original_model.named_parameters()}
    assert all(torch.equal(own[n], before[n]) for n in before)


def test_losses_and_their_gradients_against_the_formula(random_sae):
    draw = torch.Generator().manual_seed(0)
    h, h0 = (torch.randn(2, 5, random_sae.cfg.d_in, generator=draw) for _ in range(2))
    u, keep, features = torch.randn(random_sae.cfg.d_in, generator=draw), torch.rand(2, 5, generator=draw) < 0.8, [1, 4, 30]
    def grad(loss):
        x = h.clone().requires_grad_()
        value = loss(x)
        value.backward()
        return value.detach(), x.grad
    plain = lambda x: ((x - 3 * u)**2).sum() / x.numel() + 7 * ((x - h0)**2).sum() / x.numel()
    for a, b in zip(grad(lambda x: rmu.rmu_loss(x, 3 * u, x, h0, 7.0)), grad(plain)): torch.testing.assert_close(a, b)

    def plainly(x):
        kept = []
        for i, t in keep.nonzero().tolist():
            now = (x[i, t] - random_sae.b_dec) @ random_sae.W_enc + random_sae.b_enc
            was = (h0[i, t] - random_sae.b_dec) @ random_sae.W_enc + random_sae.b_enc
            kept += [a for j in features if (a := now[j] + (20 * now.mean()).abs().detach() * (was[j] > 0)) > 0]
        return torch.stack(kept).mean()
    for a, b in zip(grad(lambda x: crisp.feature_loss(random_sae, features, x, h0, keep, 20.0)), grad(plainly)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    whole = lambda x: crisp.crisp_loss(x.sum(), crisp.moved(x, h0, keep), crisp.moved(x + 1, h0, keep))
    total = h0[keep].var(0, correction=0).mean()
    sums = lambda x: 0.01 * x.sum() + (0.99 * ((x - h0)[keep]**2).mean() + 0.0099 * ((x + 1 - h0)[keep]**2).mean()) / total
    for a, b in zip(grad(whole), grad(sums)): torch.testing.assert_close(a, b)


def test_a_step_of_crisp_against_the_plain_way(few, random_sae):
    """Products beside the matrices, all rows together and what is kept of the untouched model give loss and gradients of the plain loss."""
    draw, matrices, layer, last = torch.Generator().manual_seed(0), crisp.tuned_matrices(few), few.layer, few.depth - 1
    start = {n: p + 0.05 * torch.randn(p.shape, generator=draw) for n, p in crisp.factors(matrices, 0).items()}
    assert set(crisp.linear_maps(few.model, matrices)) == set(matrices)
    seen, features = [], [1, 4, 30]
    def tuned(model, begin, weights, loss, rate, stops):
        for maker in (loss, plainly):
            moving = {n: p.clone().requires_grad_() for n, p in start.items()}
            value = maker(moving, 1)
            value.backward(inputs=list(moving.values()))
            seen.append([value.detach(), *(p.grad for p in moving.values())])
    def plainly(parameters, step):
        weights, count = crisp.with_factors(matrices, parameters), crisp.ROWS * max(crisp.STOPS)
        kinds = [rmu.drawn_rows(few, side, n * count, few.setup.random_seed) for side, n in (("forget", 1), ("retain", 2))]
        begins = (0, step * crisp.ROWS), (1, step * crisp.ROWS), (1, count + step * crisp.ROWS)
        (a, a0, text), (b, b0, there), (c, _, where) = (rmu.stacked(kinds[k][i:i + crisp.ROWS]) for k, i in begins)
        at = lambda tokens, weights, where: rmu.streams_under(few.model, weights, tokens, (where,))[where]
        active = crisp.feature_loss(random_sae, features, at(a, weights, layer), a0, text, crisp.MARGIN)
        return crisp.crisp_loss(active / a0[text].var(0, correction=0).mean()**0.5, crisp.moved(at(b, weights, layer), b0, there),
                                crisp.moved(at(c, weights, last), at(c, {}, last), where))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crisp, "tuned", tuned)
        INTERVENTIONS.named("crisp")().train(few, random_sae, features)
    for fast, plain in zip(*seen): torch.testing.assert_close(fast, plain, atol=1e-5 * plain.abs().max().item() + 1e-9, rtol=1e-3)


@pytest.mark.parametrize("unit", (0.01, 3.0, 250.0))
def test_crisps_loss_does_not_depend_on_the_streams_unit(unit):
    """A longer stream with a dictionary to match is trained alike, so the terms' weights mean the same on every model."""
    draw = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 3, 40, 16, generator=draw)
    keep, features = torch.rand(3, 40, generator=draw) < 0.7, list(range(12))
    def terms(c):
        sae = SAE(SAEConfig(d_in=16, d_sae=64, hook_name="blocks.0.hook_out", hook_layer=0)).initialise(before.flatten(0, 1), 0).eval()
        for bias in (sae.b_dec, sae.b_enc): bias.data *= c
        active = crisp.feature_loss(sae, features, c * after, c * before, keep, 10.0)
        return torch.stack([active / crisp.variance(c * before, keep).sqrt(), crisp.moved(c * after, c * before, keep)])
    torch.testing.assert_close(terms(unit), terms(1.0), rtol=1e-4, atol=0)
    assert (terms(1.0) > 0).all()


def test_what_lies_below_an_edit_is_read_once(few, monkeypatch):
    """An edit of the last block: the same answers, of which only that block is computed; what loses too much is abandoned in the middle."""
    name, = (n for n, p in few.model.original_model.named_parameters() if f".{few.depth - 1}." in n and n.endswith("down_proj._original_component.weight"))
    own, name = dict(few.model.original_model.named_parameters())[name], plain_name(name)
    class Edit:
        def weights(self, exam, sae, features, values, share): return {name: own.detach() * share}
    tokens, stream, _ = rmu.stacked(rmu.drawn_rows(few, "retain", 3, 0))
    with torch.no_grad():
        whole = rmu.streams_under(few.model, {}, tokens, (few.depth - 1,))[few.depth - 1]
        same(rmu.streams_under(few.model, {}, tokens, (few.depth - 1,), (few.layer + 1, stream))[few.depth - 1], whole)
    assert lowest_block({name: own}) == few.depth - 1 and lowest_block({name: own, "model.norm.weight": own}) == 0
    settings = [([], [], dict(share=share)) for share in (1.0, 0.5, -9.0)]
    firsts, ask = [], few.answers
    monkeypatch.setattr(few, "answers", lambda names, inputs, first=0, **how: firsts.append((first, len(names))) or ask(names, inputs, first, **how))
    for lowest in (0.0, 1.0):
        monkeypatch.setattr(few, "setup", replace(few.setup, lowest_retain=lowest))
        batch = EditBatch(few, None, settings, Edit())
        for (*_, rule), outcome in zip(settings, batch.run()):
            plain = plain_answers(few, None, [], [], Edit(), **rule)
            lost = int((~plain & ~few.forgets).sum())
            assert (outcome.right is None) == (lost > 0 and lowest == 1)
            if outcome.right is not None: assert torch.equal(outcome.right, plain) and outcome.retain_errors == lost
        below = (few.depth - 1) * len(few.stream)
        assert batch.passes == below + batch.read # one block of each that is answered, and all others once
    assert {first for first, _ in firsts} == {few.depth - 1}


@pytest.mark.parametrize("architecture", ("relu", "jumprelu", "topk,k=9", "batchtopk"))
def test_crisp_counts_what_the_architecture_lets_pass(architecture):
    """Without a margin it is the mean of what the dictionary gives, and no gradient stays in the dictionary."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 30, 16, generator=draw)
    sae = SAE(SAEConfig(d_in=16, d_sae=64, hook_name="blocks.0.hook_out", hook_layer=0, architecture=architecture))
    sae = sae.initialise(x.flatten(0, 1), 0).eval()
    if hasattr(sae, "threshold"): sae.threshold.data.fill_(0.5)
    keep, features = torch.ones(2, 30, dtype=torch.bool), list(range(0, 64, 3))
    f = sae.encode(x)[..., features].detach()
    assert 0 < (f > 0).sum() < f.numel()
    moving = x.clone().requires_grad_()
    loss = crisp.feature_loss(sae, features, moving, x, keep, 0.0)
    torch.testing.assert_close(loss, f[f > 0].mean())
    found = rmu.tuned(None, dict(x=x), lambda p: p, lambda p, step: crisp.feature_loss(sae, features, p["x"], x, keep, 0.0),
                      0.01, (3,))[3]["x"]
    assert sae.encode(found)[..., features].sum() < f.sum() # the mean of what is left may rise where weak ones fall silent
    assert all(p.grad is None for p in sae.parameters())


def test_salient_features_by_hand(few, random_sae, stats):
    intervention, _, known, settings = prepared("crisp", few, random_sae, stats)
    rows = {side: torch.cat([random_sae.encode(x)[keep] for x, keep in few.corpus(side)]).detach() for side in ("forget", "retain")}
    mean = {side: f.double().mean(0) for side, f in rows.items()}
    for count in (1, 3, 12):
        leading = sorted(np.flatnonzero(stats.forget > stats.retain), key=lambda j: stats.retain[j] - stats.forget[j])[:10 * count]
        expected = [j for j in leading if mean["forget"][j] >= 1.2 * mean["retain"][j]][:count]
        assert expected and crisp.salient(known, count).tolist() == expected
    drawn = intervention.at_random(known, np.random.default_rng(0))
    pairs = lambda s: sorted(zip(s.forget, s.retain, s.more["ratio"]))
    assert pairs(drawn) == pairs(known) and not np.array_equal(drawn.more["ratio"], known.more["ratio"])


def test_training_goes_where_it_should(few, random_sae, stats):
    """RMU's forget stream comes nearer to its target, CRISP's features fall silent; a seed decides the bytes."""
    with torch.no_grad():
        tokens, stream, keep = rmu.stacked(rmu.drawn_rows(few, "forget", 8, 5))
        target = 4 * rmu.random_target(few)
        away = lambda x: (x - target)[keep].norm(dim=1).mean()
        intervention, _, known, settings = prepared("rmu", few, random_sae, stats)
        weights = intervention.weights(few, random_sae, *intervention.asked(settings[-1], known)[:2], **intervention.rule(settings[-1], known))
        assert away(rmu.streams_under(few.model, weights, tokens, (few.layer,))[few.layer]) < away(stream)
        again = INTERVENTIONS.named("rmu")().weights(few, random_sae, [], [], **intervention.rule(settings[-1], known))
        assert all(torch.equal(weights[n], again[n]) for n in weights)
        intervention, _, known, settings = prepared("crisp", few, random_sae, stats)
        features, values, rule = intervention.asked(settings[-1], known)
        weights = intervention.weights(few, random_sae, features, values, **rule)
        after = rmu.streams_under(few.model, weights, tokens, (few.layer,))[few.layer]
        assert random_sae.encode(after)[keep][:, features].sum() < random_sae.encode(stream)[keep][:, features].sum()


@pytest.mark.parametrize("name", ("conditional_clamp", "guardrail", "orthogonal_edit", "orthogonal_weights"))
def test_a_folder_gives_the_model_back(name, few, random_sae, stats, tmp_path):
    """It answers as the exam says, and writes the same with a cache, without one, and padded on the left."""
    intervention, worked, known, settings = prepared(name, few, random_sae, stats)
    setting = next(s for s in reversed(settings) if s["multiplier"] in (None, 4, 8) and s.get("quiet", 90) == 90)
    features, values, rule = intervention.asked(setting, known)
    found = dict(dictionary=worked, features=[int(f) for f in features], values=values, rule=rule, setting=dict(n=3),
                 **{k: dict(forget_left=0.5, retain_left=1.0) for k in ("chosen_on", "reported_on")})
    world_model = few.model.cfg.model_name
    write_unlearned(tmp_path/"out", few, intervention, found, world_model)
    assert str(tmp_path) not in (tmp_path/"out"/"unlearned.json").read_text() and "saenb:assets" in (tmp_path/"out"/"unlearned.json").read_text()
    with pytest.raises(SaenbError, match="holds something already"):
        write_unlearned(tmp_path/"out", few, intervention, found, world_model)
    model = unlearned(tmp_path/"out")
    plain = plain_answers(few, worked, features, values, intervention, **rule)
    with torch.no_grad():
        logits = torch.stack([model(t[None]).logits[0, -1] for t in few.tokens])
        answers = logits[:, few.letters.flatten()].view(-1, 2, 4).amax(1).argmax(1)
        assert torch.equal(answers == few.answer, plain)
        long, cut = few.tokens[0][:14], few.tokens[-1][:9]
        write = lambda ids, **how: model.generate(ids, max_new_tokens=8, do_sample=False, **how)
        alone = write(long[None])[0]
        assert torch.equal(alone, write(long[None], use_cache=False)[0])
        both = torch.stack([long, F.pad(cut, (5, 0))])
        mask = torch.ones_like(both)
        mask[1, :5] = 0
        padded = write(both, attention_mask=mask)
        assert torch.equal(padded[0], alone) and torch.equal(padded[1, 14:], write(cut[None])[0, 9:])


def test_unlearn_chooses_on_one_half_and_reports_the_other(few, random_sae, tmp_path):
    found = find_setting(few, random_sae, INTERVENTIONS.named("raw_direction")())
    said = unlearn(few, random_sae, "raw_direction", tmp_path/"out", few.model.cfg.model_name)
    assert said["setting"] == found["setting"]
    right = plain_answers(few, found["dictionary"], found["features"], found["values"],
                          INTERVENTIONS.named("raw_direction")(), **found["rule"]).numpy()
    for half, name in enumerate(("chosen_on", "reported_on")):
        mine, forgets = few.half == half, few.forgets.numpy()
        assert said[name]["forget_left"] == pytest.approx(right[mine & forgets].mean())
        assert said[name]["retain_left"] == pytest.approx(right[mine & ~forgets].mean())
    assert said["chosen_on"]["retain_left"] >= few.setup.retain_floor
    assert said["text"] == json.loads((tmp_path/"out"/"unlearned.json").read_text())["text"]
    assert said["text"] == text_cost(few, hugging_face(few), unlearned(tmp_path/"out"))
    assert said["text"]["forget"]["divergence"] > 0
    with pytest.raises(SaenbError, match="No setting of zero_ablation"):
        find_setting(few, SAE(random_sae.cfg), INTERVENTIONS.named("zero_ablation")())


def test_answers_that_are_known_choose_the_same_setting(few, random_sae, stats, monkeypatch):
    intervention, worked, known, settings = prepared("raw_direction", few, random_sae, stats)
    answers = answers_in(run_settings(few, worked, settings, known, intervention)[0], few)
    wanted = find_setting(few, random_sae, intervention)
    monkeypatch.setattr("saenb.evals.unlearned_models.run_settings", None) # nothing is asked again
    found = find_setting(few, random_sae, intervention, answers=answers)
    assert all(found[k] == wanted[k] for k in ("setting", "features", "chosen_on", "reported_on"))
    for other in (replace(answers, half=1 - answers.half), replace(answers, right=answers.right[1:], ran=answers.ran[1:])):
        with pytest.raises(SaenbError, match="not of these settings of raw_direction"):
            find_setting(few, random_sae, intervention, answers=other)


def hugging_face(few):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(few.model.cfg.model_name).eval()


def test_what_a_change_costs_in_text_against_transformers_own_loss(few):
    """A changed model, and one that is not: the losses of transformers and the divergence of distributions, row by row."""
    before, after, same = (hugging_face(few) for _ in range(3))
    with torch.no_grad(): after.get_output_embeddings().weight.mul_(1.3)
    cost, none = text_cost(few, before, after, rows=5, length=12), text_cost(few, before, same, rows=5, length=12)
    for side in ("forget", "retain"):
        parts = [(tokens, keep) for tokens, _, keep in few.readings.corpus(few.setup, side)]
        losses, apart = [[], []], []
        with torch.no_grad():
            for tokens, keep in zip(*(torch.cat(c)[:5] for c in zip(*parts))):
                labels = tokens.masked_fill(~keep, -100)
                for model, mine in zip((before, after), losses):
                    mine += [model(tokens[None], labels=labels[None]).loss.item()] * int(keep[1:].sum())
                said = [torch.distributions.Categorical(logits=m(tokens[None]).logits[0, :-1][keep[1:]].float()) for m in (before, after)]
                apart += torch.distributions.kl_divergence(*said).tolist()
        assert cost[side]["perplexity"] == pytest.approx([np.exp(np.mean(mine)) for mine in losses], rel=1e-4)
        assert cost[side]["divergence"] == pytest.approx(np.mean(apart), rel=1e-3) and cost[side]["divergence"] > 0.01
        assert none[side]["divergence"] == pytest.approx(0, abs=1e-6)
        assert none[side]["perplexity"][0] == none[side]["perplexity"][1] == cost[side]["perplexity"][0]
    assert none["repeated"][0] == none["repeated"][1]


def test_a_text_that_can_no_longer_be_foreseen_has_a_cost_that_can_be_read_again(few, tmp_path):
    """Whatever the loss, a file that is written is taken back."""
    before, broken = hugging_face(few), hugging_face(few)
    broken.config.final_logit_softcapping = None
    with torch.no_grad(): broken.get_output_embeddings().weight.mul_(1e4)
    cost = text_cost(few, before, broken, rows=2, length=4)
    write_json(tmp_path/"text.json", cost)
    assert read_json(tmp_path/"text.json", "text cost", TEXT) == cost
    assert cost["forget"]["divergence"] > 100 and 1e29 < cost["forget"]["perplexity"][1] < 1e30


@pytest.mark.parametrize("written, share", [([7] * 12, 8 / 9), (list(range(20, 32)), 0), ([20, 21, 22], 0), ([20, 21, 22, 23, 24] * 2, 2 / 7)])
def test_how_much_of_what_is_written_repeats(few, monkeypatch, written, share):
    """Up to the end of the text."""
    model = hugging_face(few)
    end = model.generation_config.eos_token_id
    told = lambda begun, **how: torch.cat([begun, torch.tensor([[*written, end, 7, 7, 7, 7, 7, 7]]).expand(len(begun), -1)], 1)
    monkeypatch.setattr(model, "generate", told)
    assert text_cost(few, model, model, rows=2)["repeated"] == pytest.approx([share, share])


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(SaenbError, match="does not exist"): unlearned(tmp_path)
    (tmp_path/"unlearned.json").write_text("{}")
    with pytest.raises(SaenbError, match="not an? unlearned model"): unlearned(tmp_path)


def test_the_command(few, random_sae, tmp_path, monkeypatch, capsys):
    import saenb
    from saenb.cli import main
    from saenb.lab import intervention_table
    monkeypatch.setattr(intervention_table, "exam_of", lambda *given: few)
    random_sae.save(tmp_path/"sae")
    asked = ["unlearn", str(tmp_path/"sae"), "--out", str(tmp_path/"out"), "--anyway"]
    assert main([*asked, "--by", "raw_direktion"]) == 2 and "raw_direction" in capsys.readouterr().err
    assert main([*asked, "--by", "raw_direction", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert all(said[k] == json.loads((tmp_path/"out"/"unlearned.json").read_text())[k] for k in ("reported_on", "text"))
    assert saenb.unlearned(tmp_path/"out").generate(few.tokens[0][None, :9], max_new_tokens=2, do_sample=False).shape[1] <= 11
    assert main([*asked, "--by", "raw_direction"]) == 2 and "holds something already" in capsys.readouterr().err


def test_cells_are_made_once_and_compared(few, random_sae, tmp_path, monkeypatch):
    from saenb.lab import intervention_table as table, runner
    from saenb.lab.preset_files import find_preset
    asked, tiny = [], find_preset("tiny")
    def exam_of(preset, out):
        asked.append(preset.name)
        return few
    monkeypatch.setattr(runner, "exam_of", exam_of)
    by_chance = RandomChoiceSetup(**{f.name: getattr(few.setup, f.name) for f in fields(few.setup)}, draws=2)
    preset = replace(tiny, name="few", shares="tiny", evals=tiny.evals | dict(unlearning=few.setup, random_choice=by_chance))
    made = {name: table.cell(random_sae, "random", preset, name, tmp_path) for name in ("clamp", "zero_ablation")}
    again = table.cell(random_sae, "random", preset, "clamp", tmp_path)
    assert again["eval_result_unstructured"] == made["clamp"]["eval_result_unstructured"] and len(asked) == 2
    found = table.cells(preset, tmp_path)
    assert list(found) == [("random", "clamp"), ("random", "zero_ablation")]
    drawn = table.cell(random_sae, "random", preset, "clamp", tmp_path, "random_choice")["eval_result_unstructured"]
    assert {key: r["eval_result_unstructured"] for key, r in table.cells(preset, tmp_path, "random_choice").items()} == {("random", "clamp"): drawn}
    assert len(drawn["score"]) == 2 and list(table.cells(preset, tmp_path)) == list(found)
    row, = table.as_table(found)
    assert row["dictionary"] == "random" and row["clamp"].startswith(f"{made['clamp']['eval_result_unstructured']['held_out']:.3f}")
    grouped = table.by_seed(found)
    d = table.difference(grouped["random", "clamp"], grouped["random", "zero_ablation"])
    assert d.value == pytest.approx(made["clamp"]["eval_result_unstructured"]["held_out"] - made["zero_ablation"]["eval_result_unstructured"]["held_out"])
    assert d.low <= d.value <= d.high and d.seeds == 1
    assert table.picture(found).axes
    monkeypatch.setattr(table, "exam_of", exam_of)
    cost = table.text_of(random_sae, "random", preset, "clamp", tmp_path)
    assert cost["retain"]["divergence"] > 0 and table.texts(preset, tmp_path) == {("random", "clamp"): cost}
    monkeypatch.setattr(table, "text_cost", None) # it is found
    assert table.text_of(random_sae, "random", preset, "clamp", tmp_path) == cost


def result_of(right, ran=None):
    """An unlearning result that keeps these answers, [settings, questions]; 20 facts to forget and 20 to retain, in two halves."""
    from saenb.evals.halves import Answers, kept_answers
    side, ran = np.repeat([0, 1], 20), np.ones(len(right), bool) if ran is None else ran
    answers = Answers(np.asarray(right, bool), ran, side, np.arange(40), np.tile([0, 1], 20))
    kept = kept_answers(answers, ["gone", "kept"], [*range(20), *range(20)])
    return dict(eval_result_unstructured=kept | dict(retain_floor=0.9, held_out=0.0))


def test_a_cell_is_chosen_on_one_half_and_reported_on_the_other():
    """Of several cells the one that forgets most on the half of choice is taken, and not the one that happens to forget most on the half of report."""
    from saenb.lab.intervention_table import difference
    rng = np.random.default_rng(3)
    ones, others = {}, {}
    for seed in "012":
        cells = [rng.random((4, 40)) < np.repeat([0.6, 0.97], 20) for _ in range(3)]
        ones[seed], others[seed] = [result_of(c) for c in cells], result_of(np.ones((1, 40)))
        every, half, expected = np.vstack(cells), np.tile([0, 1], 20), []
        for here, there in ((0, 1), (1, 0)):
            fit = [s for s in every if s[20:][half[20:] == here].sum() >= 9]
            best = min(fit, key=lambda s: (s[:20][half[:20] == here].sum(), -s[20:][half[20:] == here].sum()))
            expected.append(1 - best[:20][half[:20] == there].mean())
        alone = difference({seed: ones[seed]}, {seed: others[seed]})
        assert alone.value == pytest.approx(np.mean(expected)) and alone.low <= alone.value <= alone.high
    d = difference(ones, others)
    assert d.seeds == 3 and d.low <= d.value <= d.high
    with pytest.raises(SaenbError, match="cannot be paired"): difference(ones, {"0": others["0"]})
    odd = result_of(np.ones((1, 40)))
    odd["eval_result_unstructured"]["asked"]["gone"] = [*range(1, 20)]
    with pytest.raises(SaenbError, match="asked different questions"): difference({"0": [ones["0"][0], odd]}, {"0": others["0"]})


def test_a_table_is_filled_and_goes_on(work, setting, monkeypatch):
    """A dictionary a row and seed, a cell a column, but one cell for all rows of what reads no dictionary; stopped, it goes on with what is missing."""
    from saenb.lab import intervention_table as table
    out, brief = work(), replace(setting, name="brief", shares="tiny", training=replace(setting.training, steps=20), d_sae=192,
                                evals=setting.evals | dict(unlearning=replace(setting.exam, grid=Grid(thresholds=(0.01,), n_features=(10,), multipliers=(8,), typical=True), reference=None)))
    rows = dict(plain=dict(run="orthogonality/0"), topk=dict(run="orthogonality/0", architecture="topk,k=5"))
    def fill(): return table.fill_table(rows, brief, ["zero_ablation", "raw_direction"], range(2), out, progress=False)
    first = table.cell
    def stopped(sae, named, preset, kind, out):
        if named == "topk/seed_1": raise KeyboardInterrupt
        return first(sae, named, preset, kind, out)
    monkeypatch.setattr(table, "cell", stopped)
    with pytest.raises(KeyboardInterrupt): fill()
    kept = {p: p.read_bytes() for p in (out/"brief").rglob("*.json")}
    before = set(table.cells(brief, out))
    assert before == {("plain/seed_0", "zero_ablation"), ("no_dictionary", "raw_direction"), ("topk/seed_0", "zero_ablation"),
                      ("plain/seed_1", "zero_ablation")}
    monkeypatch.setattr(table, "cell", first)
    found = fill()
    assert set(found) == before | {("topk/seed_1", "zero_ablation")}
    assert kept.items() <= {p: p.read_bytes() for p in (out/"brief").rglob("*.json")}.items()
    by = table.by_seed(found)
    assert [list(by[key]) for key in (("plain", "zero_ablation"), ("topk", "zero_ablation"))] == [["0", "1"]] * 2 and ("topk", "raw_direction") not in by
    shown = {row["dictionary"]: row for row in table.as_table(found)}
    (alone,), shares = table.forgotten(by["no_dictionary", "raw_direction"]), table.forgotten(by["plain", "zero_ablation"])
    assert shown["plain"]["zero_ablation"] == f"{sum(shares) / 2:.3f} ({min(shares):.3f} to {max(shares):.3f})" and shown["topk"]["raw_direction"] == ""
    assert shown["no_dictionary"]["raw_direction"].startswith(f"{alone:.3f} (") and shown["no_dictionary"]["zero_ablation"] == ""
    d = table.difference(by["no_dictionary", "raw_direction"], by["plain", "zero_ablation"])
    assert d.seeds == 2 and d.value == pytest.approx(alone - sum(shares) / 2) and d.low <= d.value <= d.high
    turned = table.difference(by["plain", "zero_ablation"], by["no_dictionary", "raw_direction"])
    assert (turned.value, turned.low, turned.high) == pytest.approx((-d.value, -d.high, -d.low))
    with pytest.raises(SaenbError, match="cannot be paired"): table.difference(by["plain", "zero_ablation"], {"0": by["topk", "zero_ablation"]["0"]})
