"""What benchmarks/agreement.py found, and one training step beside the gradients that other packages left in tests/agreement."""
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
THERE = ROOT/"tests"/"agreement"
FIGURES = json.loads((THERE/"figures.json").read_text())
STEPS = {row["file"]: row for row in FIGURES["steps"]}


@pytest.fixture(scope="module")
def program():
    sys.path.insert(0, str(ROOT/"benchmarks"))
    try:
        import agreement
        yield agreement
    finally: sys.path.remove(str(ROOT/"benchmarks"))


def test_every_architecture_was_exported_and_loaded(program):
    found = {(row["exported"], row["to"]) for row in FIGURES["exports"] if row["equal"] and row["largest"] <= 1e-5}
    assert found == set(program.EXPORTS) and {k for k, _ in found} == {"relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"}
    assert all(row["equal"] for row in FIGURES["exports"]) and FIGURES["bound"] == 1e-5
    assert {row["loaded as"] for row in FIGURES["exports"] if row["exported"] == "topk"} == {"TopKSAE", "AutoEncoderTopK", "SparseCoder"}


def test_every_step_was_the_same(program):
    assert {(row["beside"], row["one step"]) for row in FIGURES["steps"]} == set(program.STEPS)
    assert all(row["equal"] and max(row["loss"], row["gradients"]) <= 1e-5 for row in FIGURES["steps"])


@pytest.mark.parametrize("file", STEPS)
def test_a_step_is_that_of_the_other_package(program, file):
    there, row = load_file(THERE/file), STEPS[file]
    found = program.compared(row["beside"], row["one step"], there)
    assert max(found["loss"], found["gradients"]) <= 1e-5, found
    assert found["compared"] and set(found["compared"]) | set(program.DESIGN.get((row["beside"], row["one step"]), ("", ()))[1]) >= {"W_enc", "b_enc", "W_dec", "b_dec"}
    if row["one step"] == "jumprelu": assert "threshold" in found["compared"]
    for name, g in there.items(): assert not name.startswith("gradient.") or g.abs().max() > 0, name


def test_a_step_that_differs_is_noticed(program):
    file = next(iter(STEPS))
    there = load_file(THERE/file)
    there["gradient.W_enc"][0, 0] += 1e-3 * there["gradient.W_enc"].abs().max()
    assert program.compared(STEPS[file]["beside"], STEPS[file]["one step"], there)["gradients"] > 5e-4
    assert program.compared(STEPS[file]["beside"], STEPS[file]["one step"], there | dict(loss=torch.tensor(1.0)))["loss"] > 1e-3
