"""Each experiment's figures, from the committed records and from made-up ones."""
import json
import shutil

from conftest import ROOT
from saenb.core import write_json
from saenb.figures import FIGURES, Material, draw_figures, feature_thresholds, side_by_side

KEPT = ROOT/"runs"/"tiny-full"


def test_the_committed_records_give_every_figure(tmp_path):
    drawn = {p.relative_to(tmp_path).with_suffix("").as_posix() for p in draw_figures(KEPT, tmp_path)}
    assert {f"{experiment}/{name}" for experiment in ("orthogonality", "contrastive") for name in FIGURES[experiment]} <= drawn
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
        drawn = sorted(tuple(line.get_ydata()) for line in ax.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o")
        assert drawn == sorted((a.unlearning[key], b.unlearning[key]) for a, b in zip(material.of(0), material.of(1)))


def test_a_measure_that_records_lack_is_left_out():
    """Records of the sweep in other worlds hold two evaluations only."""
    material = Material(ROOT/"runs"/"seed-0-full", "orthogonality")
    figure = side_by_side({"baseline": material.of(0)}, ["score", "absorption fraction", "L0"])
    assert [ax.get_title() for ax in figure.axes] == ["score", "L0"]


def test_thresholds_are_those_of_the_runs(tmp_path):
    """Declared in the run, or the last of the log; runs that have none get no bar."""
    runs = {0: ([], {}), 1: ([dict(name="ContrastiveGroups", settings=dict(percentile=75))], {"ContrastiveGroups.threshold": 0.25}),
            3: ([dict(name="ImportantFeatures", settings=dict(threshold=0.01))], {"ContrastiveGroups.threshold": 0.5, "ImportantFeatures.pruned": 0.1})}
    for number, (mechanisms, last) in runs.items():
        folder = tmp_path/"contrastive"/f"run_{number}"/"seed_0"
        write_json(folder/"config.json", dict(run=dict(id=f"contrastive/{number}", title=f"Run {number}", mechanisms=mechanisms), preset="made", seed=0, variant=""))
        write_json(folder/"final_info.json", {})
        (folder/"train_log.jsonl").write_text(json.dumps(dict(step=20, loss=1.0) | last) + "\n")
    heights = [[bar.get_height() for bar in ax.patches] for ax in feature_thresholds(Material(tmp_path, "contrastive")).axes]
    assert heights == [[0.01], [0.1], [0.25, 0.5]]
