"""What all evaluations share, and that each of them has the common shape."""
import json
from dataclasses import replace

import pytest
import torch

from saenb.base.errors import SaenbError
from saenb.evals.evaluation import Readings, as_text, corpus_rows, encoded, ratio_interval, result_id
from saenb.evals.controls import untrained
from saenb.evals.evaluation import evaluation, evaluations
from saenb.data.harvest import is_text
from saenb.lab.runner import evaluate_sae
from saenb.sae.sae import SAE, SAEConfig

FIELDS = {"eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics", "eval_result_details", "sae_bench_commit_hash",
          "sae_lens_id", "sae_lens_release_id", "sae_lens_version", "sae_cfg_dict", "eval_result_unstructured"}
HERE = [name for name in evaluations() if name != "neighbours"] # which the embedded world has none of
OTHERS = [name for name in HERE if name != "unlearning"] # which has tests of its own, and is slower


@pytest.fixture(scope="module")
def setting(setting):
    """With features at random drawn once, which says as much of what is common to all."""
    return replace(setting, evals=setting.evals | dict(random_choice=replace(setting.evals["random_choice"], draws=1)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("judged")


@pytest.fixture(scope="module")
def results(fresh, setting, folder): return evaluate_sae(fresh(d_sae=128), setting, folder, OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_every_evaluation_has_the_common_shape(results, name):
    from matplotlib.figure import Figure
    module, result = evaluation(name), results[name]
    assert set(result) == FIELDS
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    numbers = module.headline(result)
    assert 1 <= len(numbers) <= 5
    for measure, (value, low, high) in numbers.items(): assert measure and (value is None or low is None or low - 1e-9 <= value <= high + 1e-9), measure
    assert as_text(module.table(result)) and isinstance(module.plot({"one": result, "other": result}), Figure)


def test_headlines_do_not_share_names(results):
    names = [measure for name in OTHERS for measure in evaluation(name).headline(results[name])] + ["score", "selectivity"]
    assert len(names) == len(set(names))


def test_results_are_kept_and_not_computed_twice(results, fresh, setting, folder):
    kept = evaluate_sae(fresh(d_sae=128), setting, folder, OTHERS)
    assert kept == results
    again = evaluate_sae(fresh(d_sae=128), setting, folder, ["core"], force=True)["core"]
    assert again["datetime_epoch_millis"] > results["core"]["datetime_epoch_millis"] and again["eval_id"] == results["core"]["eval_id"]
    other = evaluate_sae(fresh(seed=1, d_sae=128), setting, folder, ["core"])["core"]
    assert other["eval_id"] != again["eval_id"]


def test_a_dictionary_of_another_width(setting):
    sae = SAE(SAEConfig(d_in=64, d_sae=8, hook_layer=setting.layer))
    for name in OTHERS:
        with pytest.raises(SaenbError, match="width 64 and the model's is 192"): evaluate_sae(sae, setting, names=[name])


@pytest.mark.parametrize("name", HERE)
def test_a_dictionary_that_is_not_finite(setting, fresh, name):
    sae = fresh(d_sae=8)
    sae.b_enc.data[3] = torch.inf
    with pytest.raises(SaenbError, match=r"weights are not finite \(b_enc\)"): evaluate_sae(sae, setting, names=[name])


def test_an_unknown_evaluation(fresh, setting):
    with pytest.raises(SaenbError, match="did you mean separation"): evaluate_sae(fresh(), setting, names=["separaton"])


def test_texts_are_read_once_and_as_the_model_reads_them(model, setting):
    read = []
    class Counting(Readings):
        def rows(self, tokens):
            read.append(len(tokens))
            return super().rows(tokens)
    readings = Counting(model, setting.layer)
    first, second = (list(readings.corpus(setting.exam, "forget")) for _ in range(2))
    assert len(read) == 2 and all(a[1] is b[1] for a, b in zip(first, second)) # the very same tensors
    tokens, stream, keep = first[0]
    expected = model.original_model(tokens[:2], output_hidden_states=True).hidden_states[setting.layer + 1]
    torch.testing.assert_close(stream[:2], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(keep, is_text(tokens, model.tokenizer)) and not keep[:, 0].any()


def test_what_does_not_fit_is_read_again(model, setting):
    small = Readings(model, setting.layer, room=0)
    one, other = (next(iter(small.corpus(setting.exam, "retain"))) for _ in range(2))
    assert one[1] is not other[1] and torch.equal(one[1], other[1])


def test_rows_of_a_setup_are_the_same_every_time(model, setting):
    rows, again = (corpus_rows(model.tokenizer, setting.exam) for _ in range(2))
    assert all(torch.equal(rows[s], again[s]) for s in rows)
    few = corpus_rows(model.tokenizer, replace(setting.exam, dataset_size=5))
    assert len(few["retain"]) == 5 and 1 <= len(few["forget"]) <= 5 # the forget corpus is cut from so many texts


def test_a_results_name_hangs_on_content_alone(fresh, setting, tmp_path, world):
    import shutil
    sae, asked = fresh(), setting.exam
    shutil.copy(asked.forget.path, tmp_path/"forget.jsonl.gz")
    moved = replace(asked, forget=replace(asked.forget, path=str(tmp_path/"forget.jsonl.gz")))
    assert result_id(sae, asked) == result_id(sae, moved) != result_id(sae, replace(asked, seq_len=64))
    assert result_id(sae, asked) != result_id(fresh(seed=1), asked)


def test_an_interval_over_rows_covers_as_often_as_it_says():
    """Rows whose tokens agree with each other: an interval over tokens would be far too narrow."""
    draw = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        share = (torch.rand(60, generator=draw) < 0.3).float()
        _, low, high = ratio_interval(share * 50, torch.full((60,), 50.0), draws=300, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_positions_reach_the_gates(fresh):
    class Gate(torch.nn.Module):
        def gate(self, x, f, positions): return f * (positions < 2).unsqueeze(-1)
    sae, x = fresh(), torch.randn(3, 5, 192)
    sae.gates.append(Gate())
    f = encoded(sae, x)
    assert f[:, :2].any() and not f[:, 2:].any()


def test_controls_are_judged_by_everything_too(store, fresh, setting):
    """An untrained dictionary reconstructs nothing; that is what core is for."""
    sae = untrained(fresh().cfg, store.rows(0, 8192).x)
    value, low, high = evaluation("core").headline(evaluate_sae(sae, setting, names=["core"])["core"])["unexplained variance"]
    assert value > 0.5 and low <= value <= high
