import gzip
import json
import math
import os
import shutil
import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, strategies as st

from saenb.base.devices import device_name, find_device
from saenb.base.errors import SaenbError
from saenb.lab.reproduction import explored
from saenb.lab.runner import run
from saenb.report.figures import draw_figures
from saenb.lab.records import Record, find_records, over_seeds
from saenb.ideas.run import all_runs
from saenb.train.checkpoint import LONGEST

STEPS = 60


@pytest.fixture(scope="module")
def out(work):
    """One folder for all records here."""
    return work()


@pytest.fixture(scope="module")
def made(out, small):
    """Make or find a short record."""
    return lambda id, steps=STEPS, out=out, preset=small, **options: run(id, preset, out=out, steps=steps,
                                                                         progress=False, **options)


@pytest.fixture(scope="module")
def baseline(made): return made("orthogonality/0")


@pytest.fixture(scope="module")
def elsewhere(work):
    """Another folder of records; each test takes a seed of its own."""
    return work("elsewhere")


def weights(record):
    return (record.path/"sae"/"sae_weights.safetensors").read_bytes()


def files(folder):
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns)
            for p in folder.rglob("*") if p.is_file()}


def test_a_record_is_all_there(baseline, out):
    assert baseline.path == out/"tiny"/"orthogonality"/"run_0"/"seed_0"
    assert set(files(baseline.path)) == {"config.json", "final_info.json", "train_log.jsonl",
                                         "timing.json", "notes.md", "evals/unlearning.json",
                                         "evals/core.json", "evals/entanglement.json",
                                         "sae/cfg.json", "sae/sae_weights.safetensors"}
    assert baseline.finished and (baseline.run, baseline.seed, baseline.variant) == ("orthogonality/0", 0, "")
    assert (baseline.config["run"] == all_runs()["orthogonality/0"].as_dict()
            and baseline.config["training"]["steps"] == STEPS)
    assert [line["step"] for line in baseline.log] == [20, 40, 60]
    assert baseline.info["device"] == json.loads((baseline.path/"timing.json").read_text())["device"] == device_name(find_device())
    assert (baseline.sae.cfg.training_steps == STEPS
            and baseline.sae.cfg.about == dict(run="orthogonality/0", preset="tiny", seed=0))


def test_a_record_has_the_logs_fields(baseline, world):
    info = baseline.info
    assert {k: info[k] for k in ("training_steps", "layer", "learning_rate",
                                 "sparsity_penalty", "eval_type_id")} == dict(
                                     training_steps=STEPS, layer=world.layer, learning_rate=3e-4,
                                     sparsity_penalty=0.04, eval_type_id="unlearning")
    assert info["final_loss"] == baseline.log[-1]["loss"] < baseline.log[0]["loss"]
    assert info["dict_size"] == baseline.sae.cfg.d_sae
    assert (info["eval_config"] == baseline.result()["eval_config"]
            and info["eval_config"]["dataset_names"][0] == "wmdp-bio")
    assert info["eval_result_metrics"] == dict(unlearning=dict(unlearning_score=baseline.unlearning["score"]))
    low, high = info["interval"]
    assert 0 <= low <= high <= 1


def test_notes_tell_the_result(baseline):
    notes = (baseline.path/"notes.md").read_text()
    assert notes.startswith(f"# orthogonality/0: {all_runs()['orthogonality/0'].title} (seed 0, tiny)\n")
    assert f"training steps {STEPS}, final loss {baseline.info['final_loss']:.4g}" in notes
    assert f"unlearning score {baseline.unlearning['score']:.3f}" in notes


def test_a_record_is_made_once(made, baseline):
    before, began = files(baseline.path), time.perf_counter()
    assert made("orthogonality/0") == baseline
    assert time.perf_counter() - began < 1
    assert files(baseline.path) == before


def test_a_record_can_be_concluded_again_from_its_parts(made, baseline):
    """Stopped between the evaluation and the end: nothing is computed again, and the end is the same."""
    before = files(baseline.path)
    for name in ("final_info.json", "notes.md"): (baseline.path/name).unlink()
    assert not baseline.finished and repr(baseline).endswith("unfinished)")
    made("orthogonality/0")
    after = files(baseline.path)
    assert {k: v[0] for k, v in after.items()} == {k: v[0] for k, v in before.items()}
    assert {k for k in after if after[k] != before[k]} == {"config.json", "final_info.json", "notes.md"}


def test_other_settings_do_not_overwrite_a_record(made, baseline):
    before = files(baseline.path)
    with pytest.raises(SaenbError, match="holds a record of other settings; choose another --out"):
        made("orthogonality/0", STEPS + 1)
    assert files(baseline.path) == before


def test_an_unknown_run_or_preset_offers_the_nearest(made, out):
    with pytest.raises(SaenbError, match="no run called 'ortogonality/0'; did you mean orthogonality/0"):
        made("ortogonality/0")
    with pytest.raises(SaenbError, match="no preset called 'tinny'; did you mean tiny"):
        made("orthogonality/0", preset="tinny")
    assert not (out/"tinny").exists()


def test_runs_of_one_recipe_share_a_dictionary(made, baseline):
    twin = made("positional/0")
    assert weights(twin) == weights(baseline)
    for name in ("train_log.jsonl", "evals/unlearning.json", "evals/core.json", "timing.json"):
        assert (twin.path/name).read_bytes() == (baseline.path/name).read_bytes()
    assert (twin.info["run"] == "positional/0"
            and twin.info["eval_result_metrics"] == baseline.info["eval_result_metrics"])
    assert twin.sae.cfg.about["run"] == "orthogonality/0" # taken over, not trained again
    balanced = made("dual_objective/0")
    assert weights(balanced) != weights(baseline) and balanced.sae.cfg.about["run"] == "dual_objective/0"
    assert balanced.config["training"]["balanced"] and not twin.config["training"]["balanced"]


def test_a_change_makes_a_variant_beside_the_run(made, baseline, out):
    narrow = made("orthogonality/0", change=dict(d_sae=128, lr=1e-3))
    assert narrow.path == out/"tiny"/"orthogonality"/"run_0@d_sae=128,lr=0.001"/"seed_0"
    assert narrow.sae.cfg.d_sae == 128 == narrow.info["dict_size"] and narrow.info["learning_rate"] == 1e-3
    assert narrow.variant == "d_sae=128,lr=0.001" and narrow.variant in repr(narrow)
    assert baseline.sae.cfg.d_sae == 768


def test_the_order_of_the_data_can_be_changed_alone(made, baseline, work):
    other, elsewhere = (made("orthogonality/0", out=work(), **o) for o in (dict(change=dict(seed=1)), dict(seed=1)))
    assert other.variant == "seed=1" and other.config["seed"] == 0 and other.config["training"]["seed"] == 1
    assert other.sae.cfg.initial == baseline.sae.cfg.initial != elsewhere.sae.cfg.initial
    assert weights(other) != weights(baseline)


def test_records_are_found_by_run_and_variant(made, baseline, out):
    for id in ("positional/0", "dual_objective/0"): made(id)
    narrow = made("orthogonality/0", change=dict(d_sae=128, lr=1e-3))
    assert [r.run for r in find_records(out/"tiny")] == ["dual_objective/0", "orthogonality/0",
                                                         "positional/0"]
    assert find_records(out/"tiny", "orthogonality/0") == [baseline]
    assert find_records(out/"tiny", "orthogonality/0", variant=None) == [baseline, narrow]
    assert find_records(out/"tiny", variant=narrow.variant) == [narrow]
    assert find_records(out/"nowhere") == [] == find_records(out/"tiny", "contrastive/0")


def test_records_are_sorted_by_number_and_seed(baseline, tmp_path):
    for number, seed in ((10, 0), (2, 1), (2, 0), ("static", 0)):
        folder = tmp_path/"positional"/f"run_{number}"/f"seed_{seed}"
        shutil.copytree(baseline.path, folder, ignore=shutil.ignore_patterns("sae"))
        config = baseline.config | dict(seed=seed)
        ((folder/"config.json")
         .write_text(json.dumps(config | dict(run=config["run"] | dict(id=f"positional/{number}")))))
    (tmp_path/"positional"/"run_3"/"seed_0").mkdir(parents=True) # begun, not finished
    (tmp_path/"positional"/"run_3"/"seed_0"/"config.json").write_text("{}")
    assert ([(r.run, r.seed) for r in find_records(tmp_path)]
            == [("positional/2", 0), ("positional/2", 1), ("positional/10", 0), ("positional/static", 0)])


def test_one_seed_gives_one_dictionary(made, baseline, elsewhere):
    again, other = made("orthogonality/0", out=elsewhere), made("orthogonality/0", out=elsewhere, seed=1)
    assert weights(again) == weights(baseline) != weights(other)
    assert (again.path/"train_log.jsonl").read_bytes() == (baseline.path/"train_log.jsonl").read_bytes()
    def judged(record):
        return {k: v for k, v in record.unlearning.items() if k != "work"}
    assert judged(again) == judged(baseline)


def test_no_steps_may_be_asked_for_by_name(made, elsewhere):
    record = made("orthogonality/0", 0, elsewhere, seed=2)
    assert record.info["training_steps"] == 0 == record.sae.cfg.training_steps
    assert (record.unlearning["score"] == 0.0
            == record.info["eval_result_metrics"]["unlearning"]["unlearning_score"])
    assert record.info["final_loss"] is None and record.log == []
    assert "training steps 0, final loss none" in (record.path/"notes.md").read_text()
    # shared, though there is no log to share
    assert made("positional/0", 0, elsewhere, seed=2).info["training_steps"] == 0


@pytest.mark.parametrize("seed, lost", [(3, ["sae/cfg.json", "timing.json", "evals"]), (5, ["evals"])],
                         ids=lambda v: "-".join(v) if isinstance(v, list) else "")
def test_a_record_without_its_last_files_is_made_whole(made, elsewhere, seed, lost):
    """What a kill leaves while the last files are written; the runs that share the dictionary can go on
    from it too."""
    record = made("orthogonality/0", out=elsewhere, seed=seed)
    before = {k: v[0] for k, v in files(record.path).items()}
    for name in ("final_info.json", "notes.md", *lost):
        (shutil.rmtree if (record.path/name).is_dir() else os.remove)(record.path/name)
    made("orthogonality/0", out=elsewhere, seed=seed)
    twin = made("positional/0", out=elsewhere, seed=seed)
    for name in ("config.json", "train_log.jsonl", "sae/cfg.json", "sae/sae_weights.safetensors"):
        assert (record.path/name).read_bytes() == before[name], name
    assert record.finished and twin.finished and weights(twin) == weights(record)


def test_a_dictionary_half_taken_over_is_taken_over_again(made, elsewhere):
    """What a kill leaves while a dictionary is copied: each file whole or absent."""
    record = made("orthogonality/0", out=elsewhere, seed=7)
    twin = made("positional/0", out=elsewhere, seed=7)
    for left in ([], ["cfg.json"], ["sae_weights.safetensors"]):
        (twin.path/"final_info.json").unlink()
        for name in {"cfg.json", "sae_weights.safetensors"} - set(left):
            (twin.path/"sae"/name).unlink()
        made("positional/0", out=elsewhere, seed=7)
        assert weights(twin) == weights(record) and twin.finished, left


def test_a_damaged_dictionary_is_named(made, elsewhere):
    record = made("orthogonality/0", out=elsewhere, seed=8)
    path = record.path/"sae"/"sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SaenbError, match="sae_weights.safetensors is not a readable dictionary"):
        record.sae


@pytest.mark.parametrize("seed", [-1, 0.5, "0"])
def test_a_seed_is_a_whole_number(made, tmp_path, seed):
    with pytest.raises(SaenbError, match="seed"):
        made("orthogonality/0", out=tmp_path, seed=seed)
    assert not list(tmp_path.iterdir())


def test_a_record_without_weights_is_still_a_record(made, baseline, tmp_path):
    folder = tmp_path/"tiny"/"orthogonality"/"run_0"/"seed_0"
    shutil.copytree(baseline.path, folder, ignore=shutil.ignore_patterns("sae"))
    record = made("orthogonality/0", out=tmp_path)
    assert (record == Record(folder) and record.unlearning == baseline.unlearning
            and record.log == baseline.log)
    with pytest.raises(SaenbError, match="are not here .records are kept without them."):
        record.sae


def test_a_damaged_record_is_named(made, baseline, tmp_path):
    folder = tmp_path/"tiny"/"orthogonality"/"run_0"/"seed_0"
    shutil.copytree(baseline.path, folder)
    (folder/"config.json").write_text((folder/"config.json").read_text()[:40])
    with pytest.raises(SaenbError, match="config.json is not a readable record"):
        made("orthogonality/0", out=tmp_path)


def test_an_unknown_change_is_named(made, out):
    with pytest.raises(SaenbError, match="learning_rate"):
        made("orthogonality/0", change=dict(learning_rate=1e-3))
    with pytest.raises(SaenbError, match="share"):
        made("orthogonality/0", change=dict(share=0.01)) # it has no mechanism that takes it
    assert not list((out/"tiny").glob("*/run_*learning_rate*"))


def test_a_mechanisms_settings_can_be_changed(made):
    found = {r.variant: r for r in (made("orthogonality/1", steps=20),
                                    made("orthogonality/1", steps=20, change=dict(share=0.01)))}
    assert found.keys() == {"", "share=0.01"} and found["share=0.01"].path.parent.name == "run_1@share=0.01"
    assert ([r.config["run"]["mechanisms"][0]["settings"]["share"] for r in found.values()] == [0.001, 0.01]
            and all_runs()["orthogonality/1"].as_dict()["constants"]["share"] == 0.001)
    assert weights(found[""]) != weights(found["share=0.01"])


def test_a_run_can_be_made_without_one_of_its_mechanisms(made):
    whole, part = (made("contrastive/3", steps=20),
                   made("contrastive/3", steps=20, change=dict(without="SideDivergence")))
    assert (part.variant == "without=SideDivergence"
            and part.path.parent.name == "run_3@without=SideDivergence")
    assert ([m["name"] for m in whole.config["run"]["mechanisms"]]
            == ["ContrastiveGroups", "ImportantFeatures", "SideDivergence"])
    assert part.config["run"]["mechanisms"] == whole.config["run"]["mechanisms"][:2]
    assert {k for k in whole.log[0] if k not in part.log[0]} == {"SideDivergence.resemblance"}
    with pytest.raises(SaenbError,
                       match="no mechanism of this run called 'SideDivergenze'; did you mean SideDivergence"):
        made("contrastive/3", change=dict(without="SideDivergenze"))


def test_a_setting_that_several_mechanisms_have_is_named_with_its_own(made):
    with pytest.raises(SaenbError, match="weight"):
        made("contrastive/3", steps=20, change=dict(weight=1.0))
    assert [settings.get("weight") for _, settings in all_runs()["contrastive/3"].but(
        **{"SideDivergence.weight": 1.0}).mechanisms] == [0.2, None, 1.0]
    assert all_runs()["contrastive/3"].as_dict()["constants"]["ContrastiveGroups.weight"] == 0.2


def test_an_interval_over_seeds_is_the_t_interval():
    values = [0.31, 0.27, 0.4, 0.33]
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=np.mean(values),
                                       scale=scipy.stats.sem(values))
    assert over_seeds(values) == pytest.approx((np.mean(values), low, high))
    assert over_seeds([0.2]) == (0.2, -math.inf, math.inf)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(-5, 5))
def test_an_interval_moves_with_its_values(values, by):
    mean, low, high = over_seeds(values)
    assert low <= mean <= high
    assert over_seeds([v + by for v in values]) == pytest.approx((mean + by, low + by, high + by), abs=1e-6)
    assert over_seeds(values[::-1]) == pytest.approx((mean, low, high), abs=1e-9)


def test_figures_are_the_same_bytes_for_the_same_records(made, baseline, out, tmp_path):
    made("positional/0")
    drawn = [draw_figures(out/"tiny", tmp_path/name) for name in ("a", "b")]
    assert {str(p.relative_to(tmp_path/"a")) for p in drawn[0]} >= {
        "orthogonality/unlearning_scores.png", "orthogonality/training_metrics.png",
        "orthogonality/feature_correlations.png",
        "positional/unlearning_scores.png", "positional/training_losses.png"}
    for a, b in zip(*drawn):
        assert a.relative_to(tmp_path/"a") == b.relative_to(tmp_path/"b")
        assert a.read_bytes() == b.read_bytes() and a.read_bytes().startswith(b"\x89PNG")
    assert ((tmp_path/"a"/"orthogonality"/"unlearning_scores.png").read_bytes()
            != (tmp_path/"a"/"positional"/"unlearning_scores.png").read_bytes())


def test_figures_need_no_weights(baseline, tmp_path):
    shutil.copytree(baseline.path, tmp_path/"few"/"orthogonality"/"run_0"/"seed_0",
                    ignore=shutil.ignore_patterns("sae"))
    shutil.copytree(baseline.path, tmp_path/"all"/"orthogonality"/"run_0"/"seed_0")
    for a, b in zip(draw_figures(tmp_path/"few", tmp_path/"a"), draw_figures(tmp_path/"all", tmp_path/"b")):
        assert a.read_bytes() == b.read_bytes()


def test_there_is_nothing_to_draw_in_an_empty_folder(tmp_path):
    with pytest.raises(SaenbError, match="no finished record below .*saenb reproduce"):
        draw_figures(tmp_path, tmp_path/"figures")
    assert not (tmp_path/"figures").exists()


def test_a_page_is_of_the_best_run_or_not_made(baseline, setting, tmp_path):
    """A better run whose weights are not here leaves the best run's page as it is; a page that shows its
    dictionary already is kept."""
    for name, kept in (("run_0", ()), ("run_3", ("sae",))):
        folder = tmp_path/"tiny"/"contrastive"/name/"seed_0"
        shutil.copytree(baseline.path, folder, ignore=shutil.ignore_patterns(*kept))
        (folder/"config.json").write_text(json.dumps(
            baseline.config | dict(run=baseline.config["run"] | dict(id=f"contrastive/{name[4:]}"))))
    result = json.loads((folder/"evals"/"unlearning.json").read_text())
    result["eval_result_unstructured"]["selectivity"] = 0.9
    (folder/"evals"/"unlearning.json").write_text(json.dumps(result))
    pages = tmp_path/"pages"
    pages.mkdir()
    for name in ("baseline", "best"):
        ((pages/f"{name}.html")
         .write_text(f"{name} {baseline.sae.fingerprint() if name == 'baseline' else 'of another run'}"))
    before = files(pages)
    assert explored(setting, tmp_path, pages) == [pages/"baseline.html"] and files(pages) == before
    assert explored(setting, tmp_path/"nowhere", pages) == []


def test_a_log_that_was_sound_is_looked_at_again_once_it_changes(tmp_path):
    (tmp_path/"train_log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    record = Record(tmp_path)
    assert record.log == record.log == [dict(step=1, loss=0.5)]
    (tmp_path/"train_log.jsonl").write_text('{"step": 1, "loss": "a"}\n') # of the same length
    with pytest.raises(SaenbError, match="line 1: loss is 'a'"): record.log


def test_a_log_may_be_compressed(tmp_path):
    """Read as it was; cut short, or endless when unpacked, one sentence says so."""
    lines = [dict(step=i, loss=0.5) for i in range(1, 40)]
    whole = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    packed, record = tmp_path/"train_log.jsonl.gz", Record(tmp_path)
    assert record.log == []
    packed.write_bytes(whole)
    assert record.log == lines
    for spoiled in (whole[:-20], b"no gzip", whole[:40] + b"00" + whole[42:], gzip.compress(bytes(LONGEST + 1))):
        packed.write_bytes(spoiled)
        with pytest.raises(SaenbError, match="train_log.jsonl.gz is not a readable training log"): record.log
    (tmp_path/"train_log.jsonl").write_text('{"step": 1, "loss": 0.25}\n') # a training's own comes first
    assert record.log == [dict(step=1, loss=0.25)]
