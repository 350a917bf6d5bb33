"""Run logs, from the committed records and from made-up ones."""
import re
import shutil

import numpy as np
import pytest
from scipy.stats import ttest_rel

from conftest import ROOT
from saenb.report.figures import Material
from saenb.report.logbook import run_log, run_section, write_logs
from saenb.ideas.run import all_runs, experiments

KEPT = ROOT/"runs"/"tiny-full"


@pytest.mark.parametrize("experiment", experiments())
def test_every_run_has_its_four_parts(experiment):
    log = run_log(Material(KEPT, experiment))
    sections = re.split(r"^<details .*<summary>Run ", log, flags=re.MULTILINE)[1:]
    assert [s.split(":")[0] for s in sections] == [run.number for run in all_runs().values()
                                                   if run.experiment == experiment]
    for section, run in zip(sections, [r for r in all_runs().values() if r.experiment == experiment]):
        parts = re.findall(r"^\*\*(\w+)\.\*\*", section, re.MULTILINE)
        assert parts == ["Description", "Configuration", "Result", "Analysis"] and run.idea in section
        for name, settings in run.mechanisms:
            assert f"- {name}: " in section and all(f"{k} {v}" in section for k, v in settings.items())


def test_numbers_are_those_of_the_records():
    material = Material(KEPT, "contrastive")
    section, records, base = run_section(material, "3"), material.of(3), material.of(0)
    for r in records:
        line = next(line for line in section.splitlines() if line.startswith(f"| {r.seed} |"))
        assert (f"{r.unlearning['score']:.3f}" in line and f"{r.unlearning['selectivity']:.3f}" in line
                and f"{r.unlearning['best']['forget_share']:.1%}" in line)
    for measure in ("score", "selectivity"):
        mine, other = ([r.unlearning[measure] for r in them] for them in (records, base))
        low, high = ttest_rel(mine, other).confidence_interval(0.95)
        assert f"{measure} {np.mean(np.subtract(mine, other)):+.3f} ({low:+.3f} to {high:+.3f})" in section
    assert ("it is above the baseline: score" in section and "It builds on run 2." in section
            and "Beside run 2, which it builds on: " in section)
    assert ("SideDivergence resemblance "
            f"{np.mean([r.log[-1]['SideDivergence.resemblance'] for r in records]):.3g}" in section)


def test_one_seed_claims_nothing(tmp_path):
    for number in (0, 3):
        shutil.copytree(KEPT/"contrastive"/f"run_{number}"/"seed_1",
                        tmp_path/"contrastive"/f"run_{number}"/"seed_1")
    section = run_section(Material(tmp_path, "contrastive"), "3")
    assert ("One seed has no interval: score +" in section
            and not any(word in section for word in ("helps", "harms", "differs", "which it builds on")))


def test_a_run_without_a_baseline_of_its_seeds_is_compared_with_nothing(tmp_path):
    for number, seeds in ((0, [0]), (3, [0, 1])):
        for seed in seeds:
            shutil.copytree(KEPT/"contrastive"/f"run_{number}"/f"seed_{seed}",
                            tmp_path/"contrastive"/f"run_{number}"/f"seed_{seed}")
    section = run_section(Material(tmp_path, "contrastive"), "3")
    assert "| 1 | " in section and "baseline of the same seeds" not in section


def test_logs_lie_beside_the_seeds(tmp_path):
    for name in ("contrastive/run_1", "orthogonality/run_2"):
        shutil.copytree(KEPT/name, tmp_path/name)
    written = write_logs(tmp_path)
    assert (sorted(p.relative_to(tmp_path).as_posix() for p in written)
            == ["contrastive/run_1/notes.md", "orthogonality/run_2/notes.md"])
    for path in written:
        assert path.read_text().startswith(f"# {path.parts[-3]} {path.parts[-2][4:]}: ")


def test_the_committed_logs_are_those_of_the_committed_records(tmp_path):
    shutil.copytree(KEPT, tmp_path/"tiny-full", ignore=shutil.ignore_patterns("notes.md"))
    for path in write_logs(tmp_path/"tiny-full"):
        assert (path.read_text() == (KEPT/path.relative_to(tmp_path/"tiny-full"))
                .read_text()), f"make it again: {path}"


def test_every_run_of_a_log_has_its_equation_and_its_place_in_it():
    logged = [e for e in experiments().values() if e.log]
    assert {e.name for e in logged} == {"orthogonality", "positional", "contrastive", "dual_objective"}
    for e in logged:
        log = run_log(Material(KEPT, e.name))
        for run in e.runs:
            assert run.source and all(part in log for part in run.equation.split(r", \qquad ")) and f'from the log "{e.log}", {run.source}:' in log, run.id
            assert run.equation.count("{") == run.equation.count("}") and run.equation.count(r"\Big(") == run.equation.count(r"\Big)")
