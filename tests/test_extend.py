"""What a person adds from a script of their own: in an empty folder, with nothing but the built wheel."""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT

HEAD = """\
import os
from dataclasses import dataclass, replace
import torch
import saenb
from saenb import Architecture, Evaluation, Experiment, Intervention, Mechanism, Run, TrainConfig
from saenb.evals.exam import Grid
from saenb.lab.preset_files import find_preset
assert saenb.__file__.startswith(os.environ["WHEEL"] + os.sep), saenb.__file__
"""

MECHANISM = HEAD + """
class RootPenalty(Mechanism):
    "Charges the square root of each activation."
    gradient_support = "active"
    def __init__(self, d_in, d_sae, weight=0.01):
        super().__init__(d_in, d_sae, weight=weight)
        self.weight = weight
    def penalty(self, step): return dict(root=self.weight * step.f.clamp_min(1e-6).sqrt().sum(1).mean())

MINE = Experiment("mine", "My ideas", runs=(
    Run("mine/1", "Root penalty", "Charges roots.", mechanisms=(("RootPenalty", dict(weight=0.01)),)),))
"""

ARCHITECTURE = HEAD + """
class Tied(Architecture):
    "Features read the directions that they write, each with a gain."
    name = "tied"
    def parameters(self, cfg): return dict(gain=torch.ones(cfg.d_sae))
    def encode(self, sae, x): return torch.relu((x - sae.b_dec) @ sae.W_dec.T * sae.gain + sae.b_enc)
    def losses(self, step): return dict(sparsity=0.01 * step.f.sum(1).mean())
"""

EVALUATION = HEAD + """
from matplotlib.figure import Figure
from saenb.evals.evaluation import CorpusSetup, as_saebench, corpus_config, encoded

@dataclass(frozen=True, kw_only=True)
class DensitySetup(CorpusSetup):
    "The corpora."

@torch.no_grad()
def evaluate(model, sae, setup, readings):
    active = torch.cat([(encoded(sae, x) > 0).float().mean((0, 1)) for _, x, _ in readings.corpus(setup, "forget")])
    ours = dict(density=active.mean().item())
    return as_saebench("forget_density", sae, setup, corpus_config(setup), dict(density=ours), ours)

def headline(result): return {"forget density": (result["eval_result_unstructured"]["density"],) * 3}
def table(result): return [dict(measure=name, value=v[0]) for name, v in headline(result).items()]
def plot(named): return Figure()

DENSITY = Evaluation("forget_density", "how dense are features on the forget corpus", DensitySetup, evaluate, headline, table, plot,
                     lambda given: DensitySetup(**given.corpora), dict(density=float), quick=True)
"""

INTERVENTION = HEAD + """
class Silence(Intervention):
    "Zero ablation."
    name = "silence"
    def change(self, f, values): return torch.zeros_like(f)
"""

PRESET = """
world = find_preset(os.environ["WORLD"])
grid = Grid(thresholds=(0.01,), n_features=(10,), multipliers=(8,), typical=True)
SHORT = replace(world, name="short", shares="tiny", recorded=("unlearning",), d_sae=64,
                evals=world.evals | dict(unlearning=replace(world.exam, grid=grid)),
                training=TrainConfig(steps=5, batch=256, log_every=1))
"""

FIGURES = """
if __name__ == "__main__":
    from saenb.report.figures import draw_figures
    record = saenb.run(%s, SHORT, out="runs", progress=False)
    print(record, *draw_figures(record.path.parents[2], "figures"))
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel that the sources build without a network, unpacked."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "settings.ini", "README.md", "LICENSE"): shutil.copy(ROOT/name, source)
    shutil.copytree(ROOT/"saenb", source/"saenb", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", folder, source],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    zipfile.ZipFile(next(folder.glob("saenb-*.whl"))).extractall(folder/"site")
    return folder/"site"


@pytest.fixture
def script(wheel, small, harvested, tmp_path):
    """Write my_ideas.py into an empty folder, and run something there that sees the wheel only."""
    def write(text):
        (tmp_path/"my_ideas.py").write_text(text)
        (tmp_path/"runs").mkdir()
        (tmp_path/"runs"/"tiny").symlink_to(harvested/"tiny")
        env = os.environ | dict(PYTHONPATH=str(wheel), WHEEL=str(wheel), WORLD=small, MPLBACKEND="agg")

        def call(*arguments):
            done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, env=env)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout
        return call
    return write


def holds_its_source(record, where):
    """The record keeps the file that made it, and its fingerprint."""
    text = (where/"my_ideas.py").read_text()
    config = json.loads((record/"config.json").read_text())
    assert (record/"source"/"my_ideas.py").read_text() == text
    assert config["source"] == {"my_ideas.py": hashlib.sha256(text.encode()).hexdigest()}
    assert (record/"final_info.json").exists()
    return config


def test_the_wheel_holds_the_world_and_no_notebook_tools(wheel):
    assert (wheel/"saenb"/"assets"/"world"/"model"/"model.safetensors").exists() and (wheel/"saenb"/"assets"/"explorer.html").exists()
    requires = next(wheel.glob("saenb-*.dist-info/METADATA")).read_text()
    assert (wheel/"saenb"/"py.typed").exists() and not list(wheel.rglob("_modidx*"))
    assert "nbdev" not in next(wheel.glob("saenb-*.dist-info/entry_points.txt")).read_text()
    assert not re.search(r"^Requires-Dist: (wandb|ray|gguf|tensorboard)[^;\n]*$", requires, re.MULTILINE) # not of a plain install
    assert "Requires-Dist: fastcore" in requires and "Requires-Dist: nbdev" not in requires.replace('; extra == "dev"', "").partition("nbdev")[0]


def test_a_mechanism(script, tmp_path):
    call = script(MECHANISM + PRESET)
    assert "Record(mine/1, seed 0" in call("-m", "saenb", "--use", "my_ideas.py", "run", "mine/1", "--preset", "short")
    record = tmp_path/"runs"/"short"/"mine"/"run_1"/"seed_0"
    assert holds_its_source(record, tmp_path)["run"]["mechanisms"] == [dict(name="RootPenalty", settings=dict(weight=0.01))]
    log = [json.loads(line) for line in (record/"train_log.jsonl").read_text().splitlines()]
    assert log[-1]["RootPenalty.root"] > 0
    drawn = call("-m", "saenb", "--use", "my_ideas.py", "figures", "--preset", "short", "--figures", "figures")
    assert "figures/mine/unlearning_scores.png" in drawn and (tmp_path/"figures"/"mine"/"unlearning_scores.png").exists()


def test_an_architecture(script, tmp_path):
    run = 'Run("mine/2", "Tied", "Features read what they write.", architecture="tied")'
    shown = script(ARCHITECTURE + PRESET + FIGURES % run + """
    sae = saenb.load_sae(record.path/"sae")
    print(sae.cfg.architecture, (sae.gain - 1).abs().max().item() > 0)
""")("my_ideas.py").split()
    assert shown[-2:] == ["tied", "True"]  # what is its own has been learned, and is read again
    assert "figures/mine/unlearning_scores.png" in shown  # though no experiment is declared
    assert holds_its_source(tmp_path/"runs"/"short"/"mine"/"run_2"/"seed_0", tmp_path)["run"]["architecture"] == "tied"


def test_an_evaluation(script, tmp_path):
    shown = script(EVALUATION + PRESET.replace('("unlearning",)', '("unlearning", "forget_density")') + FIGURES % '"orthogonality/0"' + """
    from saenb.report.compare import as_table, compare
    print(as_table(compare([record])))
""")("my_ideas.py")
    assert "figures/orthogonality/unlearning_scores.png" in shown and "forget density" in shown
    record = tmp_path/"runs"/"short"/"orthogonality"/"run_0"/"seed_0"
    holds_its_source(record, tmp_path)
    assert 0 < json.loads((record/"evals"/"forget_density.json").read_text())["eval_result_unstructured"]["density"] < 1


def test_an_intervention(script, tmp_path):
    call = script(INTERVENTION + PRESET + FIGURES.replace("SHORT", 'SHORT.with_intervention("silence")') % '"orthogonality/0"')
    assert "figures/orthogonality/unlearning_scores.png" in call("my_ideas.py")
    record = tmp_path/"runs"/"short-silence"/"orthogonality"/"run_0"/"seed_0"
    holds_its_source(record, tmp_path)
    assert json.loads((record/"evals"/"unlearning.json").read_text())["eval_config"]["intervention_method"] == "silence"


def test_a_preset(script, tmp_path):
    call = script(HEAD + PRESET + FIGURES % '"orthogonality/0"')
    assert "short" in call("-m", "saenb", "--use", "my_ideas.py", "list", "presets").split()
    assert "figures/orthogonality/unlearning_scores.png" in call("my_ideas.py")
    config = json.loads((tmp_path/"runs"/"short"/"orthogonality"/"run_0"/"seed_0"/"config.json").read_text())
    assert config["preset"] == "short" and config["d_sae"] == 64 and "source" not in config  # all that it says is in the configuration
