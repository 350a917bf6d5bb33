import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import roc_auc_score

from saenb.base.errors import SaenbError
from saenb.evals.evaluation import Readings
from saenb.evals.controls import as_logged, supervised_reference, untrained
from saenb.evals.separation import (SeparationSetup, activations, compare, drawn, evaluate, headline,
                                    held_out, importance_histogram, importances, in_order, over_rows, overlap,
                                    plot, redraws, redrawn, shuffled, table)
from saenb.sae.sae import SAE, SAEConfig


class Planted(Readings):
    """The same texts with a direction added wherever they are on the forget side."""
    def __init__(self, model, layer, plant):
        super().__init__(model, layer)
        self.plant = plant

    def corpus(self, setup, side):
        for tokens, stream, keep in super().corpus(setup, side):
            yield tokens, stream + self.plant * (side == "forget"), keep


def changed(sae, change, **cfg):
    """A copy of a dictionary with other weights."""
    made = SAE(replace(sae.cfg, gates=[], **cfg))
    with torch.no_grad(): change(made)
    return made.eval()


def listed(f, row, rows):
    """A dense table of activations as a list."""
    at, feature = (f > 0).nonzero(as_tuple=True)
    return in_order(row[at], feature, f[at, feature], torch.bincount(row, minlength=rows), f.shape[1])


@pytest.fixture(scope="module")
def setup(world):
    return SeparationSetup(forget=world.text_sources("forget")[0], retain=world.text_sources("retain")[0],
                           dataset_size=120, seq_len=128, tokens_a_row=64)


@pytest.fixture(scope="module")
def readings(model, world): return Readings(model, world.layer)


@pytest.fixture(scope="module")
def tokens(readings, setup): return drawn(readings, setup)


@pytest.fixture(scope="module")
def dictionaries(trained, store, tokens):
    x, side = store.rows(0, 8192).x, tokens.forget[tokens.row]

    def channels(made):
        made.W_enc.copy_(torch.cat([torch.eye(192), -torch.eye(192)], 1))
        made.W_dec.copy_(made.W_enc.T)

    def doubled(made):
        made.W_enc.copy_(torch.cat([trained.W_enc] * 2, 1))
        made.b_enc.copy_(torch.cat([trained.b_enc] * 2))
        made.W_dec.copy_(torch.cat([trained.W_dec] * 2) / 2)
        made.b_dec.copy_(trained.b_dec)

    return dict(trained=trained, untrained=untrained(trained.cfg, x),
                identity=changed(trained, channels, d_sae=384), twice=changed(trained, doubled, d_sae=1024),
                ceiling=supervised_reference(trained.cfg, tokens.stream[side], tokens.stream[~side],
                                             clusters=40), dead=as_logged(trained.cfg))


@pytest.fixture(scope="module")
def results(model, setup, readings, dictionaries):
    return {name: evaluate(model, sae, setup, readings) for name, sae in dictionaries.items()}


@pytest.fixture(scope="module")
def headlines(results):
    return {name: headline(r) for name, r in results.items()}


def test_the_tokens_are_text_drawn_from_every_row(tokens, readings, setup):
    streams, keeps = (torch.cat([part[i] for side in ("forget", "retain")
                                 for part in readings.corpus(setup, side)]) for i in (1, 2))
    assert (torch.equal(tokens.stream, streams[tokens.row, tokens.position])
            and keeps[tokens.row, tokens.position].all())
    assert torch.equal(torch.bincount(tokens.row, minlength=len(keeps)), keeps.sum(1).clamp_max(64))
    assert len({(r, p) for r, p in zip(tokens.row.tolist(), tokens.position.tolist())}) == len(tokens.row)
    assert (tokens.forget.sum() == sum(len(t) for t, _, _ in readings.corpus(setup, "forget"))
            and tokens.position.max() > 100)
    assert drawn(readings, setup) is tokens
    assert not torch.equal(drawn(readings, replace(setup, random_seed=1)).position[:200],
                           tokens.position[:200])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 6), st.sampled_from([1, 2, 5, 1000]))
def test_auroc_with_ties_equals_sklearn(seed, count, features, levels):
    draw = np.random.default_rng(seed)
    f = torch.from_numpy(draw.integers(0, levels + 1, (count + 2, features))
                         * draw.integers(0, 2, (count + 2, features)) / 7).float()
    row = torch.from_numpy(np.r_[0, 1, draw.integers(0, 8, count)])
    forget = torch.tensor([True, False] + draw.integers(0, 2, 6).astype(bool).tolist())
    found = listed(f, row, 8)
    expected = [roc_auc_score(forget[row], f[:, i]) for i in range(features)]
    np.testing.assert_allclose(compare(found, forget).auroc, expected, atol=1e-12)
    np.testing.assert_allclose(compare(found, forget, entries=10).auroc, expected, atol=1e-12)
    np.testing.assert_allclose(compare(found, ~forget).auroc, 1 - np.array(expected), atol=1e-12)


def test_auroc_of_dictionaries_equals_sklearn(dictionaries, tokens):
    for name in ("trained", "identity"):
        sae = dictionaries[name]
        found = activations(sae, tokens)
        auroc = compare(found, tokens.forget).auroc
        with torch.no_grad(): f = sae.encode(tokens.stream)
        for i in range(0, found.features, 37):
            assert auroc[i] == pytest.approx(roc_auc_score(tokens.forget[tokens.row], f[:, i]),
                                             abs=1e-6), name
        means = torch.stack([f[tokens.row == r].mean(0) for r in range(len(tokens.forget))])
        auroc = compare(over_rows(found), tokens.forget).auroc
        for i in range(0, found.features, 37):
            assert auroc[i] == pytest.approx(roc_auc_score(tokens.forget, means[:, i]), abs=1e-4), name


def test_small_pieces_say_the_same(trained, tokens):
    found, small = activations(trained, tokens), activations(trained, tokens, chunk=512 * 999)
    torch.testing.assert_close(compare(small, tokens.forget, entries=5000).won,
                               compare(found, tokens.forget).won, atol=1e-3, rtol=1e-5)


def test_a_planted_feature_is_found(model, world, trained, setup, results):
    direction = torch.nn.functional.normalize(torch.randn(192, generator=torch.Generator().manual_seed(0)),
                                              dim=0)

    def look(made):
        made.load_state_dict(trained.state_dict())
        made.W_enc[:, 7], made.W_dec[7], made.b_enc[7] = direction, direction, -2 * trained.cfg.scale
    planted = changed(trained, look)
    readings = Planted(model, world.layer, 4 * trained.cfg.scale * direction)
    result, tokens = evaluate(model, planted, setup, readings), drawn(readings, setup)
    assert (compare(activations(planted, tokens), tokens.forget).auroc[7] > 0.999
            and result["eval_result_unstructured"]["tokens"]["best"]["auroc"][1] > 0.999)
    assert (headline(result)["separating features"][0] > 0 and headline(result)["importance overlap"][2]
            < headline(results["trained"])["importance overlap"][1])
    assert evaluate(model, planted, setup)["eval_result_unstructured"]["tokens"]["best"]["auroc"][2] < 0.9


def test_dictionaries_stand_where_they_must(headlines, results):
    value = lambda name, measure: headlines[name][measure][0]
    assert value("untrained", "separating features") == 0 and value("untrained", "best feature's AUROC") < 0.6
    for other in ("trained", "untrained", "identity"):
        assert (headlines["ceiling"]["features separating rows"][1]
                > headlines[other]["features separating rows"][2])
        assert headlines["ceiling"]["importance overlap"][2] < headlines[other]["importance overlap"][1]
    assert all(v == pytest.approx(headlines["trained"][k], abs=1e-6) for k, v in headlines["twice"].items())
    assert (headlines["dead"] == {"best feature's AUROC": (0.5, 0.5, 0.5)}
            and results["dead"]["eval_result_unstructured"]["alive"] == 0)


def test_sides_by_chance_mean_nothing(results, trained, tokens):
    found = activations(trained, tokens)
    judged = []
    for seed in range(6):
        lots = shuffled(tokens.forget, seed)
        assert lots.sum() == tokens.forget.sum() and not torch.equal(lots, tokens.forget)
        assert compare(found, lots).auroc.mean().item() == pytest.approx(0.5, abs=0.01)
        best = held_out(over_rows(found), lots)
        judged.append(best["auroc"][0])
        assert best["chosen_at"] > 0.6
    assert np.mean(judged) == pytest.approx(0.5, abs=0.1)
    for name in ("trained", "untrained", "identity", "ceiling"):
        ours = results[name]["eval_result_unstructured"]
        assert (ours["shuffled"]["overlap"][0] > ours["overlap"][0]
                and abs(ours["shuffled"]["tokens"]["best"]["auroc"][0] - 0.5) < 0.03)
        assert ours["shuffled"]["rows"]["above"] == 0


def test_the_best_of_many_by_chance_is_not_believed():
    draw = torch.Generator().manual_seed(0)
    rows, features = 40, 3000
    f, forget = torch.rand(rows, features, generator=draw), torch.arange(rows) % 4 < 2
    best = held_out(listed(f, torch.arange(rows), rows), forget)
    assert best["chosen_at"] > 0.9 and best["auroc"][1] < 0.5 < best["auroc"][2] and best["auroc"][0] < 0.75


def test_rows_drawn_again_against_sorting_again(trained, tokens):
    found, times = activations(trained, tokens), redraws(tokens.forget, 6)
    assert ((times[:, tokens.forget].sum(1) == tokens.forget.sum()).all()
            and (times[:, ~tokens.forget].sum(1) == (~tokens.forget).sum()).all() and times.max() > 1)
    compared = compare(found, tokens.forget)
    few = torch.cat([compared.auroc.argsort()[:3], compared.auroc.argsort()[-3:]])
    fast = redrawn(compared, times, few)
    with torch.no_grad(): f = trained.encode(tokens.stream)
    for t, row in zip(times, fast):
        for i, value in zip(few, row):
            assert value == pytest.approx(
                roc_auc_score(tokens.forget[tokens.row], f[:, i], sample_weight=t[tokens.row]), abs=2e-3)
    assert fast.std(0).min() > 2e-4


def test_overlap_by_hand(trained, tokens):
    forget = torch.tensor([True, True, False, False])
    apart, same = (torch.tensor([[2.0, 0], [1, 0], [0, 3], [0, 1]]).double(),
                   torch.tensor([[1.0, 2], [2, 4], [10, 20], [1, 2]]).double())
    half = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 2, 2], [0, 2, 2]]).double()
    assert (overlap(apart, forget)[0] == 0 and overlap(same, forget)[0] == pytest.approx(1)
            and overlap(half, forget) == pytest.approx((0.5, 0.5, 0.5)))
    assert overlap(torch.zeros(4, 2), forget) is None
    with torch.no_grad():
        f = trained.encode(tokens.stream) * trained.W_dec.norm(dim=1)
    side = tokens.forget[tokens.row]
    p, q = (f[s].double().mean(0) / f[s].double().mean(0).sum() for s in (side, ~side))
    found = activations(trained, tokens)
    mass = found.sums(found.value * trained.W_dec.detach().norm(dim=1)[found.feature])
    assert overlap(mass, tokens.forget)[0] == pytest.approx(torch.minimum(p, q).sum().item(), abs=1e-5)
    drawing = importance_histogram(importances(mass, tokens.forget))
    assert (np.minimum(drawing["forget"], drawing["retain"]).sum()
            == pytest.approx(overlap(mass, tokens.forget)[0], abs=1e-9))
    assert sum(drawing["forget"]) == pytest.approx(1) == sum(drawing["retain"])


def test_positions_reach_the_dictionary(tokens, trained):
    class EvenOnly(SAE):
        def encode(self, x, positions=None):
            return self.ungated(x) * (positions % 2 == 0)[..., None]
    even = EvenOnly(trained.cfg)
    even.load_state_dict(trained.state_dict())
    found = activations(even, tokens)
    with torch.no_grad():
        assert len(found.value) == (trained.encode(tokens.stream[tokens.position % 2 == 0]) > 0).sum()


def test_the_result_has_saebenchs_shape(results, setup):
    for result in results.values(): json.dumps(result, allow_nan=False)
    result = results["trained"]
    ours = result["eval_result_unstructured"]
    assert result["eval_type_id"] == "separation" and result["eval_config"]["tokens_a_row"] == 64
    assert (set(result["eval_result_metrics"]["separation"])
            == {"share_above", "best_auroc", "share_above_rows", "best_auroc_rows", "importance_overlap"})
    assert (sum(ours["tokens"]["histogram"]) == ours["alive"] <= 512
            and ours["rows"]["above"] == pytest.approx(ours["rows"]["share"][0] * ours["alive"]))
    assert ([l["auroc"] for l in ours["leading"]]
            == sorted((l["auroc"] for l in ours["leading"]), reverse=True) and len(ours["leading"]) == 10)


def test_the_leading_features_are_described(results, trained, tokens):
    first = results["trained"]["eval_result_unstructured"]["leading"][0]
    with torch.no_grad():
        f = trained.encode(tokens.stream)[:, first["feature"]]
    side = tokens.forget[tokens.row]
    assert first["auroc"] == pytest.approx(roc_auc_score(side, f), abs=1e-6)
    assert (first["forget_density"] == pytest.approx((f[side] > 0).float().mean().item(), abs=1e-3)
            and first["retain_density"] == pytest.approx((f[~side] > 0).float().mean().item(), abs=1e-3))


def test_a_model_in_half_precision(world, trained, setup, headlines):
    from saenb.data.sources import boot
    found = headline(evaluate(boot(world.path/"model", dtype="bfloat16"), trained, setup))
    for k in ("best feature's AUROC", "importance overlap"):
        assert found[k][0] == pytest.approx(headlines["trained"][k][0], abs=0.02)


def test_for_people(results):
    result = results["trained"]
    assert set(headline(result)) == {"separating features", "best feature's AUROC",
                                     "features separating rows", "importance overlap"}
    assert all(low <= value <= high for r in results.values() for value, low, high in headline(r).values())
    rows = table(result)
    assert [r["value"] for r in rows] == [result["eval_result_metrics"]["separation"][k] for k in (
        "share_above", "best_auroc", "share_above_rows", "best_auroc_rows", "importance_overlap")]
    reread = json.loads(json.dumps(result))
    assert (headline(reread) == headline(result) and table(reread) == rows
            and table(results["dead"])[0]["value"] is None)
    fig = plot({name: results[name] for name in ("trained", "dead", "ceiling")})
    assert (len(fig.axes) == 6 and "ceiling, overlap" in fig.axes[4].get_title()
            and [t.get_text() for t in fig.legends[0].get_texts()][:2] == ["retain", "forget"])


def test_bad_input(model, setup, readings, trained):
    with pytest.raises(SaenbError, match="width 64 and the model's is 192"):
        evaluate(model, SAE(SAEConfig(d_in=64, d_sae=8)), setup, readings)
    with pytest.raises(SaenbError, match="0 tokens_a_row"):
        evaluate(model, trained, replace(setup, tokens_a_row=0), readings)
    with pytest.raises(SaenbError, match=r"forget corpus gives [1-3] rows of 128 tokens"):
        evaluate(model, trained, replace(setup, dataset_size=12), readings)
    broken = as_logged(trained.cfg)
    with torch.no_grad(): broken.W_enc[0, 0] = float("nan")
    with pytest.raises(SaenbError, match="not finite"):
        evaluate(model, broken, setup, readings)
