import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from saenb.base.errors import SaenbError
from saenb.evals import evaluation, reconstruction
from saenb.evals.evaluation import Readings, encoded
from saenb.evals.controls import as_logged, principal_components, untrained
from saenb.evals.reconstruction import CoreSetup, dead_share, density_histogram, evaluate, headline, nearest_neighbour, plot, rebuilt, table, tally, unexplained
from saenb.sae.sae import SAE, SAEConfig

SIDES = ("forget", "retain")


def identity(cfg, size=1.0):
    """Each channel and its opposite, written back at `size`."""
    made = SAE(replace(cfg, d_sae=2 * cfg.d_in, gates=[]))
    with torch.no_grad():
        made.W_enc.copy_(torch.cat([torch.eye(cfg.d_in), -torch.eye(cfg.d_in)], 1))
        made.W_dec.copy_(made.W_enc.T * size)
    return made.eval()


def components(cfg, x, count):
    """The first principal components."""
    made = principal_components(cfg, x)
    with torch.no_grad():
        for sign in (0, 1): made.W_enc[:, sign * cfg.d_in + count:(sign + 1) * cfg.d_in] = 0
    return made


@pytest.fixture(scope="module")
def setup(world):
    return CoreSetup(forget=world.text_sources("forget")[0], retain=world.text_sources("retain")[0], dataset_size=80, seq_len=128, reconstruction_rows=10)


@pytest.fixture(scope="module")
def readings(model, world): return Readings(model, world.layer)


@pytest.fixture(scope="module")
def dictionaries(trained, store):
    x = store.rows(0, 8192).x
    return dict(trained=trained, untrained=untrained(trained.cfg, x), identity=identity(trained.cfg), shrunk=identity(trained.cfg, 0.8), dead=as_logged(trained.cfg)) | {
        f"components {n}": components(trained.cfg, x, n) for n in (2, 20, 80)}


@pytest.fixture(scope="module")
def results(model, setup, readings, dictionaries): return {name: evaluate(model, sae, setup, readings) for name, sae in dictionaries.items()}


@pytest.fixture(scope="module")
def ours(results): return {name: r["eval_result_unstructured"] for name, r in results.items()}


@pytest.fixture(scope="module")
def plain_model(world):
    """The model as anyone would load it."""
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(world.path/"model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def corpora(setup, readings, plain_model, world):
    """Tokens, text mask and stream of each side, the stream through the Hugging Face model."""
    found = {}
    for side in SIDES:
        tokens = torch.cat([t for t, _, _ in readings.corpus(setup, side)])
        with torch.no_grad(): x = plain_model(tokens, output_hidden_states=True).hidden_states[world.layer + 1]
        found[side] = tokens, (tokens > 2), x
    return found


def test_the_identity_loses_nothing(ours):
    for part in (*SIDES, "both"):
        o = ours["identity"][part]
        assert o["unexplained"][0] < 1e-6 and abs(o["divergence"][0]) < 1e-5 and o["dead"][0] == 0
        assert o["recovered"] == pytest.approx((1, 1, 1), abs=1e-5) and o["loss_rebuilt"] == pytest.approx(o["loss"], abs=1e-5)
        assert o["l0"] == pytest.approx((192, 192, 192), abs=0.01)


def test_the_dead_dictionary_loses_everything(ours, results, corpora):
    o, metrics = ours["dead"]["retain"], results["dead"]["eval_result_metrics"]
    x = corpora["retain"][2][corpora["retain"][1]].double()
    assert o["dead"][0] == 1 and o["l0"][0] == 0 and sum(o["density"]) == 0
    assert o["unexplained"][0] == pytest.approx((x.pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item(), rel=1e-4) and o["unexplained"][0] >= 1
    assert o["recovered"][0] < 0.5
    assert metrics["reconstruction_quality"]["cossim"] == metrics["shrinkage"]["relative_reconstruction_bias"] == -1 and metrics["shrinkage"]["l2_ratio"] == 0
    assert metrics["misc_metrics"]["frac_alive"] == 0
    assert results["dead"]["eval_result_details"][0]["consistent_activation_heuristic"] == -1


def test_more_components_lose_less(ours):
    few, some, many = (ours[f"components {n}"]["both"] for n in (2, 20, 80))
    for worse, better in ((few, some), (some, many)):
        assert worse["unexplained"][1] > better["unexplained"][2] and worse["recovered"][0] < better["recovered"][0]
        assert worse["divergence"][0] > better["divergence"][0] and worse["dead"][0] > better["dead"][0] and worse["l0"][0] < better["l0"][0]


def test_training_helps(ours):
    trained, untrained = (ours[name]["both"] for name in ("trained", "untrained"))
    assert trained["unexplained"][2] < untrained["unexplained"][1] and trained["recovered"][1] > untrained["recovered"][2] and trained["l0"][2] < untrained["l0"][1]


def test_shrinkage_is_the_size_of_the_decoder(ours, results, corpora):
    shrinkage = results["shrunk"]["eval_result_metrics"]["shrinkage"]
    assert shrinkage["l2_ratio"] == pytest.approx(0.8, abs=1e-5) and shrinkage["relative_reconstruction_bias"] == pytest.approx(0.8, abs=1e-5)
    x = torch.cat([x[text] for _, text, x in corpora.values()]).double()
    assert ours["shrunk"]["both"]["unexplained"][0] == pytest.approx((0.2**2 * x.pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item(), rel=1e-3)


def test_variance_sparsity_and_density_against_sklearn_and_numpy(ours, dictionaries, corpora):
    from sklearn.metrics import r2_score
    for name in ("trained", "components 20"):
        sae, seen = dictionaries[name], []
        for side in SIDES:
            _, text, x = corpora[side]
            with torch.no_grad(): f = sae.encode(x[text])
            o = ours[name][side]
            assert 1 - o["unexplained"][0] == pytest.approx(r2_score(x[text].double(), sae.decode(f).detach(), multioutput="variance_weighted"), abs=1e-5)
            assert o["l0"][0] == pytest.approx((f > 0).sum(1).float().mean().item(), abs=1e-3) and o["tokens"] == len(f)
            seen.append(f > 0)
        density = torch.cat(seen).double().mean(0).numpy()
        assert ours[name]["both"]["dead"][0] == pytest.approx((density == 0).mean(), abs=2 / len(density))
        counted = np.histogram(np.log10(density[density > 0]), reconstruction.EDGES)[0]
        assert np.abs(counted - ours[name]["both"]["density"]).sum() <= 4 and counted.sum() == pytest.approx(sum(ours[name]["both"]["density"]), abs=2)


def test_losses_against_a_forward_hook(ours, setup, dictionaries, corpora, plain_model, world):
    """The Hugging Face model in one go, its layer's output replaced by a hook."""
    layer, n = plain_model.model.layers[world.layer], setup.reconstruction_rows

    def logits(tokens, change):
        def hook(module, inputs, output): return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
        handle = layer.register_forward_hook(hook)
        with torch.no_grad(): found = plain_model(tokens).logits.double().log_softmax(-1)
        handle.remove()
        return found

    def loss(scores, tokens, text):
        told = torch.nn.functional.cross_entropy(scores[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return told[text[:, :-1]]

    for name in ("trained", "components 20", "dead"):
        sae, parts = dictionaries[name], []
        for side in SIDES:
            tokens, text = (column[:n] for column in corpora[side][:2])
            plain, zero = logits(tokens, lambda x: x), logits(tokens, torch.zeros_like)
            new = logits(tokens, lambda x: torch.where(text[..., None], sae(x), x))
            divergence = torch.nn.functional.kl_div(new, plain, reduction="none", log_target=True).sum(-1)[text]
            base, none, kept = (loss(scores, tokens, text) for scores in (plain, zero, new))
            o = ours[name][side]
            assert (o["loss"], o["loss_zero"], o["loss_rebuilt"]) == pytest.approx((base.mean().item(), none.mean().item(), kept.mean().item()), rel=1e-4)
            assert o["recovered"][0] == pytest.approx(((none.mean() - kept.mean()) / (none.mean() - base.mean())).item(), rel=1e-3)
            assert o["divergence"][0] == pytest.approx(divergence.mean().item(), rel=1e-3)
            parts.append((none, kept, base, divergence, torch.nn.functional.kl_div(zero, plain, reduction="none", log_target=True).sum(-1)[text]))
        none, kept, base, near, far = (torch.cat(column).mean().item() for column in zip(*parts))
        assert ours[name]["both"]["recovered"][0] == pytest.approx((none - kept) / (none - base), rel=1e-3)
        assert ours[name]["both"]["divergence"][0] == pytest.approx(near, rel=1e-3)


def test_saebenchs_numbers_by_its_formulas(results, dictionaries, corpora):
    """Batches of sixteen rows, written out plainly."""
    sae, metrics = dictionaries["trained"], results["trained"]["eval_result_metrics"]
    tokens, batches, active, prompts = {}, {}, 0, 0
    for ids, text, x in corpora.values():
        for keep, stream in zip(text.split(16), x.split(16)):
            with torch.no_grad(): f = sae.encode(stream) * keep[..., None]
            x, out = stream[keep], sae.decode(f).detach()[keep]
            sse = ((x - out)**2).sum(1)
            for k, v in dict(l2_norm_in=x.norm(dim=1), l2_norm_out=out.norm(dim=1), l2_ratio=out.norm(dim=1) / x.norm(dim=1), l0=(f[keep] != 0).sum(1).float(), l1=f[keep].sum(1),
                             mse=sse / len(x), cossim=torch.cosine_similarity(x, out), explained_variance_legacy=1 - sse / ((x - x.mean(0))**2).sum(1)).items():
                tokens.setdefault(k, []).append(v)
            for k, v in dict(relative_reconstruction_bias=(out**2).sum(1).mean() / (x * out).sum(1).mean(), error=sse.mean(), square=(x**2).sum(1).mean(), channel=(x**2).mean()).items():
                batches.setdefault(k, []).append(v.item())
            active, prompts = active + (f > 0).sum((0, 1)), prompts + (f > 0).any(1).sum(0)
    expected = {k: torch.cat(v).mean().item() for k, v in tokens.items()}
    error, square, channel = (np.mean(batches[k]) for k in ("error", "square", "channel"))
    expected |= dict(relative_reconstruction_bias=np.mean(batches["relative_reconstruction_bias"]), explained_variance=1 - error / (square - channel**2))
    found = {k: v for part in ("reconstruction_quality", "shrinkage", "sparsity") for k, v in metrics[part].items()}
    assert found == pytest.approx(expected, rel=1e-4) and found.keys() == expected.keys()

    density = active.double() / sum(int(text.sum()) for _, text, _ in corpora.values())
    details = results["trained"]["eval_result_details"]
    column = lambda k: torch.tensor([d[k] for d in details]).double()
    alive = prompts > 0
    torch.testing.assert_close(column("feature_density"), density, atol=2e-4, rtol=0)
    torch.testing.assert_close(column("consistent_activation_heuristic")[alive], (active / prompts).double()[alive], atol=0.1, rtol=0.01)
    assert metrics["misc_metrics"]["freq_over_1_percent"] == pytest.approx((density > 0.01).double().mean().item(), abs=0.005)
    assert metrics["misc_metrics"]["normalized_freq_over_10_percent"] == pytest.approx((density[density > 0.1].sum() / density.sum()).item(), abs=0.005)


def test_weights_against_plain_loops(results, trained):
    details = results["trained"]["eval_result_details"]
    looks, writes = trained.W_enc.detach().T.double(), trained.W_dec.detach().double()
    for i in (0, 255, 256, 300, 511):
        cosines = lambda d: [torch.cosine_similarity(d[i], d[j], 0).item() for j in range(len(d)) if j != i]
        assert details[i]["index"] == i and details[i]["encoder_bias"] == pytest.approx(trained.b_enc[i].item(), abs=1e-6)
        assert details[i]["max_decoder_cosine_sim"] == pytest.approx(max(cosines(writes)), abs=1e-5)
        assert details[i]["max_encoder_cosine_sim"] == pytest.approx(max(cosines(looks)), abs=1e-5)
        assert details[i]["encoder_norm"] == pytest.approx(looks[i].norm().item(), rel=1e-5)
        assert details[i]["encoder_decoder_cosine_sim"] == pytest.approx(torch.cosine_similarity(looks[i], writes[i], 0).item(), abs=1e-5)
    twice = torch.randn(3, 8).repeat(2, 1)
    assert nearest_neighbour(twice, part=4) == pytest.approx(torch.ones(6), abs=1e-5)


def test_the_result_has_saebenchs_fields(results):
    result = results["trained"]
    assert {k: set(v) for k, v in result["eval_result_metrics"].items()} == dict(
        model_behavior_preservation={"kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"},
        model_performance_preservation={"ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae"},
        reconstruction_quality={"explained_variance", "explained_variance_legacy", "mse", "cossim"}, shrinkage={"l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"},
        sparsity={"l0", "l1"}, token_stats={"total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"},
        misc_metrics={"freq_over_1_percent", "freq_over_10_percent", "normalized_freq_over_1_percent", "normalized_freq_over_10_percent", "average_max_encoder_cosine_sim",
                      "average_max_decoder_cosine_sim", "frac_alive"})
    assert result["eval_type_id"] == "core" and result["eval_config"]["context_size"] == 128
    rows = result["eval_result_unstructured"]["both"]["rows"]
    assert result["eval_result_metrics"]["token_stats"] == dict(total_tokens_eval_reconstruction=20 * 128, total_tokens_eval_sparsity_variance=rows * 128)
    for r in results.values(): json.dumps(r, allow_nan=False)


def test_details_can_be_left_out(model, trained, setup, readings, results):
    brief = evaluate(model, trained, replace(setup, per_feature=False), readings)
    assert brief["eval_result_details"] == [] and len(results["trained"]["eval_result_details"]) == trained.cfg.d_sae
    assert brief["eval_result_metrics"] == results["trained"]["eval_result_metrics"]


def test_special_tokens_keep_their_stream(trained, readings, setup):
    tokens, stream, keep = next(iter(readings.corpus(setup, "retain")))
    changed = rebuilt(trained, stream, keep)
    assert torch.equal(changed[~keep], stream[~keep]) and (~keep).sum() > len(tokens)
    torch.testing.assert_close(changed[keep], trained(stream[keep]).detach(), atol=1e-4, rtol=1e-4)


def test_small_batches_of_logits_say_the_same(model, trained, setup, ours, readings, monkeypatch):
    monkeypatch.setattr(reconstruction, "LOGITS", 3 * 128 * 344)
    monkeypatch.setattr(reconstruction, "REMEMBERED", 0)
    again = Readings(model, readings.layer)
    o = evaluate(model, trained, setup, again)["eval_result_unstructured"]["both"]
    for k in ("loss", "loss_rebuilt", "loss_zero", "recovered", "divergence"): assert o[k] == pytest.approx(ours["trained"]["both"][k], rel=1e-4)
    assert not any("logits" in key for key in again._kept)


def test_the_second_dictionary_runs_only_its_own_reconstruction(model, world, setup, dictionaries, monkeypatch):
    readings, passes, lower = Readings(model, world.layer), [], []
    go_on, stream_at = reconstruction.go_on, evaluation.stream_at
    monkeypatch.setattr(reconstruction, "go_on", lambda model, layer, stream: passes.append(len(stream)) or go_on(model, layer, stream))
    monkeypatch.setattr(evaluation, "stream_at", lambda *args: lower.append(1) or stream_at(*args))
    evaluate(model, dictionaries["trained"], setup, readings)
    first, below = sum(passes), len(lower)
    evaluate(model, dictionaries["untrained"], setup, readings)
    assert first == 3 * 20 and sum(passes) - first == 20 and len(lower) == below > 0


def test_positions_reach_the_dictionary(setup, readings, trained):
    class EvenOnly(SAE):
        def encode(self, x, positions=None): return self.ungated(x) * (positions % 2 == 0)[..., None]
    even = EvenOnly(trained.cfg)
    even.load_state_dict(trained.state_dict())
    batches = list(readings.corpus(setup, "retain"))
    expected = sum(int((encoded(trained, x)[:, ::2][keep[:, ::2]] > 0).sum()) for _, x, keep in batches)
    assert tally(even, batches).rows["active"].sum() == expected


def test_intervals(ours, trained, readings, setup):
    from scipy.stats import binomtest
    for o in ours.values():
        for k in ("unexplained", "l0", "recovered", "divergence", "dead"):
            value, low, high = o["both"][k]
            assert low - 1e-9 <= value <= high + 1e-9
    found = tally(trained, readings.corpus(setup, "retain"))
    found.active[:40] = 0
    share, low, high = dead_share(found)
    wilson = binomtest(int((found.active == 0).sum()), len(found.active)).proportion_ci(method="wilson")
    assert share >= 40 / 512 and (low, high) == pytest.approx((wilson.low, wilson.high), abs=1e-4)
    first, width = next(iter(readings.corpus(setup, "retain"))), lambda v: v[2] - v[1]
    few = [width(unexplained(tally(trained, [tuple(part[i:i + 4] for part in first)]))) for i in range(0, len(first[0]) - 3, 4)]
    assert sum(few) / len(few) > width(unexplained(found)) > 0


def test_every_living_feature_is_in_the_histogram(trained, readings, setup):
    found = tally(trained, readings.corpus(setup, "forget"))
    assert sum(density_histogram(found)) == int((found.active > 0).sum())
    found.active[:] = 0
    found.active[:7], found.active[7] = 1e-4, found.rows["tokens"].sum()
    assert density_histogram(found)[0] == 7 and density_histogram(found)[-1] == 1


def test_a_model_in_half_precision(world, trained, setup, ours):
    from saenb.data.sources import boot
    o = evaluate(boot(world.path/"model", dtype="bfloat16"), trained, setup)["eval_result_unstructured"]["both"]
    for k in ("unexplained", "l0", "recovered"): assert o[k][0] == pytest.approx(ours["trained"]["both"][k][0], rel=0.1)


def test_for_people(results):
    named = {name: results[name] for name in ("trained", "dead")}
    assert set(headline(results["trained"])) == {"unexplained variance", "L0", "CE recovered", "dead share"}
    assert headline(results["trained"])["L0"] == tuple(results["trained"]["eval_result_unstructured"]["both"]["l0"])
    rows = table(results["trained"])
    assert [r["corpus"] for r in rows] == ["forget", "retain", "both"] and rows[2]["tokens"] == rows[0]["tokens"] + rows[1]["tokens"]
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    reread = json.loads(json.dumps(results["trained"]))
    assert headline(reread) == headline(results["trained"]) and table(reread) == rows
    fig = plot(named)
    assert len(fig.axes) == 3 and [t.get_text() for t in fig.axes[2].get_yticklabels()] == list(named)
    assert [p.get_width() for p in fig.axes[2].patches] == [r["eval_result_unstructured"]["both"]["recovered"][0] for r in named.values()]


def test_a_dictionary_of_the_last_layer(model, setup, trained, plain_model, corpora):
    last = identity(replace(trained.cfg, hook_layer=model.cfg.n_layers - 1), 0.8)
    o = evaluate(model, last, replace(setup, reconstruction_rows=4))["eval_result_unstructured"]["retain"]
    tokens, text, _ = (column[:4] for column in corpora["retain"])
    with torch.no_grad(): logits = plain_model(tokens).logits
    told = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")[text[:, :-1]].mean().item()
    assert o["loss"] == pytest.approx(told, rel=1e-4) and o["loss_rebuilt"] == pytest.approx(told, rel=1e-3) # a norm comes before the logits and undoes the shrinking


def test_what_cannot_be_recovered_has_no_number(results):
    result = json.loads(json.dumps(results["trained"]))
    result["eval_result_unstructured"]["both"]["recovered"] = None
    assert "CE recovered" not in headline(result) and table(result)[2]["recovered"] is None and len(plot({"a": result}).axes[2].patches) == 0


def test_bad_input(model, setup, readings, trained):
    with pytest.raises(SaenbError, match="width 64 and the model's is 192"): evaluate(model, SAE(SAEConfig(d_in=64, d_sae=8)), setup, readings)
    with pytest.raises(SaenbError, match="0 reconstruction_rows"): evaluate(model, trained, replace(setup, reconstruction_rows=0), readings)
    broken = as_logged(trained.cfg)
    with torch.no_grad(): broken.W_dec[0, 0] = float("nan")
    with pytest.raises(SaenbError, match="not finite"): evaluate(model, broken, setup, readings)
