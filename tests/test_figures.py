"""Each experiment's figures, from the committed records and from made-up ones."""
import json
import shutil

import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from conftest import ROOT
from saenb.base.files import write_json
from saenb.report.experiments.contrastive_report import feature_thresholds
from saenb.report.experiments.dual_objective_report import feature_importance
from saenb.report.experiments.positional_report import hard_to_soft, position_masks, positional_fidelity, specialisation_retained
from saenb.report.figures import figures_of
from saenb.report.plots import keep, run_style, smallest_letters, training_curves, unlearning_scores
from saenb.report.figures import Material, at_a_glance, draw_figures, everything, last_of_log, side_by_side, switched_off, titled

KEPT = ROOT/"runs"/"tiny-full"


def test_the_committed_records_give_every_figure(tmp_path):
    drawn = {p.relative_to(tmp_path).with_suffix("").as_posix() for p in draw_figures(KEPT, tmp_path)}
    assert {f"{experiment}/{name}" for experiment in ("orthogonality", "contrastive", "dual_objective") for name in figures_of(experiment)} <= drawn
    for name in drawn: assert (ROOT/"figures"/f"{name}.png").exists()


def test_what_is_missing_is_left_out(tmp_path):
    """A single run has no analyses to draw, and what it has is drawn all the same."""
    shutil.copytree(KEPT/"orthogonality"/"run_1", tmp_path/"few"/"orthogonality"/"run_1")
    drawn = {p.stem for p in draw_figures(tmp_path/"few", tmp_path/"figures")}
    assert drawn == {"unlearning_scores", "training_metrics", "feature_correlations", "pair_stability"}


def test_groups_are_drawn_with_their_values():
    material = Material(KEPT, "orthogonality")
    figure = side_by_side({"none": material.of(0), "basic": material.of(1)}, ["score", "selectivity"])
    for ax, key in zip(figure.axes, ("score", "selectivity")):
        drawn = sorted(tuple(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2 and line.get_color() == "0.7")
        assert drawn == sorted((a.unlearning[key], b.unlearning[key]) for a, b in zip(material.of(0), material.of(1)))


def test_a_measure_that_records_lack_is_left_out():
    """Records of the sweep in other worlds hold two evaluations only."""
    material = Material(ROOT/"runs"/"seed-0-full", "orthogonality")
    figure = side_by_side({"baseline": material.of(0)}, ["score", "absorption fraction", "L0"])
    assert [ax.get_title() for ax in figure.axes if ax.axison] == ["score", "L0"]


def test_thresholds_are_those_of_the_runs(tmp_path):
    """Declared in the run, or the last of the log; runs that have none get no bar."""
    runs = {0: ([], {}), 1: ([dict(name="ContrastiveGroups", settings=dict(percentile=75))], {"ContrastiveGroups.threshold": 0.25}),
            3: ([dict(name="ImportantFeatures", settings=dict(threshold=0.01))], {"ContrastiveGroups.threshold": 0.5, "ImportantFeatures.pruned": 0.1})}
    for number, (mechanisms, last) in runs.items():
        folder = tmp_path/"contrastive"/f"run_{number}"/"seed_0"
        write_json(folder/"config.json", dict(run=dict(id=f"contrastive/{number}", title=f"Run {number}", mechanisms=mechanisms), preset="made", seed=0, variant=""))
        write_json(folder/"final_info.json", {})
        (folder/"train_log.jsonl").write_text(json.dumps(dict(step=20, loss=1.0) | last) + "\n")
    heights = [[bar.get_width() for bar in ax.patches] for ax in feature_thresholds(Material(tmp_path, "contrastive")).axes]
    assert heights == [[0.01], [0.1], [0.25, 0.5]]


def test_parts_switched_off_stand_beside_the_whole():
    material = Material(KEPT, "contrastive")
    names = [label.get_text().replace("\n", " ") for label in switched_off(material).axes[0].get_yticklabels()]
    assert names == ["Baseline SAE", "Adaptive Selection †", "Adaptive Selection without SideDivergence", "Hierarchical + MI †", "Hierarchical + MI † without SideDivergence"]
    assert switched_off(Material(KEPT, "orthogonality")) is None # of which nothing was switched off


def test_the_end_of_the_log_as_a_table():
    """Means over seeds; the baseline, whose log has none of it, is left out."""
    material = Material(KEPT, "contrastive")
    lines = last_of_log(titled(material), {"groups": "Groups.groups", "pruned": (".pruned", ".silenced")}).splitlines()
    assert lines[0] == "| run | groups | pruned |" and len(lines) == 2 + 4
    wanted = sum(r.log[-1]["ContrastiveGroups.groups"] for r in material.of(3)) / 3
    title, groups, pruned = lines[4].strip("| ").split(" | ")
    assert title == "Adaptive Selection †" and float(groups) == round(wanted, 1) and 0 < float(pruned) <= 0.1
    assert lines[2].endswith("|  |") # nothing is pruned in the first run


def test_importance_is_drawn_for_the_baseline_and_the_last_run():
    material = Material(KEPT, "dual_objective")
    figure = feature_importance(material)
    assert [ax.get_title() for ax in figure.axes] == ["Baseline SAE †", "Per-Feature Attention †"]
    for ax, number in zip(figure.axes, (0, 5)):
        drawn = {patch.get_label(): sum(patch.get_data().values) for patch in ax.patches}
        assert drawn == {side: sum(material.of(number)[0].result("separation")["eval_result_unstructured"]["importance"][side]) for side in ("retain", "forget")}


def positional_record(root, number, mechanisms=(), profiles=None, fidelity=None, score=0.2, seed=0, variant=""):
    """A record of the positional experiment that holds what its figures ask for."""
    folder = root/"positional"/f"run_{number}{'@' * bool(variant)}{variant}"/f"seed_{seed}"
    write_json(folder/"config.json", dict(run=dict(id=f"positional/{number}", title=f"Run {number}", mechanisms=list(mechanisms)), preset="made", seed=seed, variant=variant))
    write_json(folder/"final_info.json", {})
    (folder/"train_log.jsonl").write_text(json.dumps(dict(step=20, loss=1.0)) + "\n")
    kept = next((KEPT/"positional"/"run_0").glob("seed_*"))
    for name in ("unlearning", "positional"):
        result = json.loads((kept/"evals"/f"{name}.json").read_text())
        ours = result["eval_result_unstructured"]
        if name == "unlearning": ours["score"] = score
        else:
            ours["profiles"] = profiles
            ours["features"]["fidelity"] = fidelity
        write_json(folder/"evals"/f"{name}.json", result)


def test_masks_are_shown_where_there_are_some(tmp_path):
    positional_record(tmp_path, 0)
    assert position_masks(Material(tmp_path, "positional")) is None and positional_fidelity(Material(tmp_path, "positional")) is None
    positional_record(tmp_path, 1, profiles=[[1.0, 0.0], [0.0, None]], fidelity=[0.5, None, -0.25, 1.0])
    figure = position_masks(Material(tmp_path, "positional"))
    shown = figure.axes[0].images[0].get_array()
    assert figure.axes[0].get_title() == "Run 1" and shown.filled(-1).tolist() == [[1, 0], [0, -1]]
    left, right = positional_fidelity(Material(tmp_path, "positional")).axes
    assert left.lines[0].get_ydata().tolist() == [1.0, 0.5, -0.25] and left.lines[0].get_xdata().tolist() == [0, 0.25, 0.5]
    assert [t.get_text() for t in right.get_yticklabels()] == ["Run 0", "Run 1"]


def test_temperatures_stand_in_order_from_hard_to_none(tmp_path):
    soft = lambda t: [dict(name="SoftMask", settings=dict(temperature=t))]
    positional_record(tmp_path, 0, score=0.9)
    positional_record(tmp_path, 1, score=0.1)
    positional_record(tmp_path, 3, soft(0.5), score=0.4)
    assert hard_to_soft(Material(tmp_path, "positional")) is None # two temperatures are no row
    positional_record(tmp_path, 2, soft(0.1), score=0.2)
    positional_record(tmp_path, 3, soft(2.0), score=0.7, variant="temperature=2.0")
    ax = hard_to_soft(Material(tmp_path, "positional")).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0 (hard)", "0.1", "0.5", "2", "no mask"]
    assert [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "|"] == [0.1, 0.2, 0.4, 0.7, 0.9]


def test_the_title_tells_when_runs_have_different_numbers_of_seeds(tmp_path):
    for seed in range(3): positional_record(tmp_path, 0, seed=seed)
    assert Material(tmp_path, "positional").title == "positional, made, 3 seeds"
    positional_record(tmp_path, 1)
    assert Material(tmp_path, "positional").title == "positional, made, 1 to 3 seeds"


def test_specialisation_is_drawn_along_training(tmp_path):
    positional_record(tmp_path, 1)
    assert specialisation_retained(Material(tmp_path, "positional")) is None
    write_json(tmp_path/"positional"/"specialisation_along.json", {"positional/1": dict(steps=[0, 10, 100], bits=[0.5, 0.3, 0.2], retention=[1.0, 0.8, None])})
    bits, kept = specialisation_retained(Material(tmp_path, "positional")).axes
    assert list(bits.lines[0].get_ydata()) == [0.5, 0.3, 0.2] and list(kept.lines[0].get_ydata()[:2]) == [1.0, 0.8] and [t.get_text() for t in kept.get_xticklabels()] == ["0", "10", "100"]


def test_all_runs_stand_beside_their_baselines_and_the_controls(tmp_path):
    figure = everything(KEPT)
    assert [ax.get_title() for ax in figure.axes] == ["score", "selectivity"]
    titles = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    for experiment in ("orthogonality", "contrastive", "dual_objective"):
        for title, records in titled(Material(KEPT, experiment)).items():
            assert title in titles
            drawn = {line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"}
            assert any(abs(sum(r.unlearning["score"] for r in records) / len(records) - x) < 1e-9 for x in drawn)
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {"supervised reference", "principal components", "untrained", "single words", "bag of 16 words", "matched random features"}
    positional_record(tmp_path, 0)
    assert everything(tmp_path) is None # one experiment has figures of its own


def test_a_baseline_that_is_the_same_training_stands_in_for_another(tmp_path):
    """Only where everything but the mechanisms is alike; batches that take half their rows from each corpus make another training."""
    real = ROOT/"runs"/"gemma-3-270m-full"
    for run in ("orthogonality/run_0", "contrastive/run_1", "dual_objective/run_1"):
        shutil.copytree(real/run/"seed_0", tmp_path/run/"seed_0")
    assert [r.run for r in Material(tmp_path, "contrastive").baseline] == ["orthogonality/0"]
    assert Material(tmp_path, "dual_objective").baseline == []
    assert [r.run for r in Material(KEPT, "contrastive").baseline] == ["contrastive/0"] * 3
    assert Material(tmp_path, "unknown").baseline == []


def test_every_runs_score_is_seen_at_a_glance(tmp_path):
    """Every run by name, wide and on a phone; bars are means, dots are seeds, and intervals stay within the scores' range."""
    named = {title: records for e in ("orthogonality", "positional", "contrastive", "dual_objective") for title, records in titled(Material(KEPT, e)).items()}
    for phone, columns in ((False, 3), (True, 1)):
        axes = at_a_glance(KEPT, phone=phone).axes
        assert len(axes) == columns
        bars = [p for ax in axes for p in ax.patches if isinstance(p, Rectangle) and p.get_height() < 1 and p.get_x() == 0]
        shown = [t.get_text() for ax in axes for t in ax.get_yticklabels()]
        assert set(named) <= set(shown) and len(bars) == len(shown) - 4 # but the experiments' names
        assert {round(bar.get_width(), 9) for bar in bars} >= {round(sum(r.unlearning["score"] for r in records) / len(records), 9) for records in named.values()}
        lines = [line for ax in axes for line in ax.lines]
        assert all(0 <= min(line.get_xdata()) and max(line.get_xdata()) <= 1 for line in lines)
        assert sum(line.get_marker() == "x" for line in lines) == 29 # neither baselines nor static slicing stand in a log
        ends = [(ax.get_ylim()[0], max(bar.get_y() for bar in ax.patches if isinstance(bar, Rectangle) and bar.get_height() < 1)) for ax in axes]
        assert all(low > last for low, last in ends)
    positional_record(tmp_path, 0)
    assert at_a_glance(tmp_path) is None


@pytest.mark.parametrize("records, name", [("tiny-full", "at_a_glance"), ("tiny-cues-full", "second_edition")])
def test_the_first_pictures_are_those_of_the_records(records, name, tmp_path):
    """Byte for byte, wide and for a phone."""
    for phone, ending in ((False, ""), (True, "_phone")):
        drawn = keep(at_a_glance(ROOT/"runs"/records, phone=phone), tmp_path/f"{name}.png")
        assert drawn.read_bytes() == (ROOT/"figures"/"overview"/f"{name}{ending}.png").read_bytes(), f"draw {name}{ending}.png again"


def test_every_letter_is_read_on_a_phone():
    """Nothing is smaller than 7 points where a picture is 380 pixels wide."""
    small = {(e, name): size for e in ("orthogonality", "contrastive", "dual_objective", "positional") for name, draw in figures_of(e).items()
             if (figure := draw(Material(KEPT, e))) and (size := smallest_letters(figure)) < 7}
    assert not small and smallest_letters(at_a_glance(KEPT, phone=True)) >= 7 and smallest_letters(everything(KEPT)) >= 7


def test_a_run_has_one_color_everywhere():
    """Its experiment's hue, by its id alone: in curves and in bars."""
    material = Material(KEPT, "contrastive")
    for r in material.records:
        color = run_style(r.run)["color"]
        assert any(line.get_color() == color and line.get_label() == r.label for line in training_curves(material.records, ["reconstruction"]).axes[0].lines)
        assert any(bar.get_facecolor()[:3] == to_rgb(color) for bar in unlearning_scores(material.records, []).axes[0].patches)
    assert len({to_rgb(run_style(f"{e}/{n}")["color"]) for e in ("orthogonality", "positional") for n in range(1, 11)}) == 20


def test_whole_losses_have_a_scale_each():
    """A run's penalties make its loss a quantity of its own."""
    figure = figures_of("contrastive")["training_losses"](Material(KEPT, "contrastive"))
    drawn = [ax for ax in figure.axes if ax.lines]
    assert [len(ax.lines) for ax in drawn] == [1] * 5 and len({ax.get_ylim() for ax in drawn}) > 2


def test_routes_are_not_shown_as_masks(tmp_path):
    positional_record(tmp_path, 1, profiles=[[1.0, 0.0]], fidelity=[1.0] + [None] * 20)
    assert position_masks(Material(tmp_path, "positional")) is None and positional_fidelity(Material(tmp_path, "positional")) is None
