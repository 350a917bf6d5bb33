"""The figures on which saenb and SAEBench agreed, computed again on our side. `python
benchmarks/parity.py` makes them."""
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from saenb.evals import sparse_probing
from saenb.evals.evaluation import Readings
from saenb.evals.exam import REFERENCE, Exam
from saenb.evals.unlearning import score_of

ROOT = Path(__file__).parent.parent
AGREED = json.loads((ROOT/"tests"/"parity.json").read_text())
UNLEARNING, PROBING = AGREED["unlearning"], AGREED["sparse_probing"]


@pytest.fixture(scope="module")
def parity():
    return SimpleNamespace(**runpy.run_path(str(ROOT/"benchmarks"/"parity.py")))


@pytest.fixture(scope="module")
def tokens(parity, model): return parity.tokens(model)


@pytest.fixture(scope="module")
def asked(parity, world, model, baseline_made):
    "All of the world's questions, under the reference's settings."
    return Exam(model, parity.unlearning_setup(world), world.layer, cache=baseline_made/"tiny"/"cache")


@pytest.fixture(scope="module")
def answers(parity, asked, tokens):
    "Ours, by the features that SAEBench chose where they differ from our choice in equally dense ones alone."
    theirs = [list(map(int, row["features"].split())) for row in UNLEARNING["dictionaries"]["tokens"]["settings"]]
    return parity.all_answers(asked, tokens, theirs)


def test_three_dictionaries_or_more_agreed_on_every_question():
    found = UNLEARNING["dictionaries"]
    assert ({"untrained", "baseline", "sparse"} <= set(found) and all(d["equal"] for d in found.values())
            and UNLEARNING["equal_known"])
    assert all(len(d["settings"]) == 16 for d in found.values())
    assert (len({d["fingerprint"] for d in found.values()}) == len(found)
            == len({tuple(row["right"] for row in d["settings"]) for d in found.values()}))


def test_saebench_took_our_result_files():
    assert {"unlearning", "sparse_probing"} <= {k
                                                for k, taken in AGREED["taken_by_saebench"].items() if taken}


def test_the_figures_are_about_the_shipped_world(parity, world, tokens):
    assert AGREED["world"] == parity.about(world)
    assert (UNLEARNING["dictionaries"]["tokens"]["fingerprint"]
            == PROBING["dictionaries"]["tokens"]["fingerprint"] == tokens.fingerprint())
    assert (UNLEARNING["setup"] == parity.UNLEARNING
            and PROBING["setup"] == json.loads(json.dumps(parity.PROBING)))


def test_the_same_questions_are_known(asked):
    assert ({subject: " ".join(map(str, known)) for subject, known in asked.known.items()}
            == UNLEARNING["known"])


def test_every_setting_chooses_the_same_features_and_leaves_the_same_questions_right(parity, answers):
    agreed = UNLEARNING["dictionaries"]["tokens"]["settings"]
    for row, there in zip(answers, agreed, strict=True):
        assert ({k: row[k] for k in ("retain_threshold", "n_features", "multiplier")}
                == {k: there[k] for k in ("retain_threshold", "n_features", "multiplier")})
        assert (" ".join(map(str, row["features"])) == there["features"]
                and parity.packed(row["right"]) == there["right"])
    # the settings do different things, so there is something to get wrong
    assert len({row["right"] for row in agreed}) > 8


def test_the_score_is_the_same(answers, asked):
    score = UNLEARNING["dictionaries"]["tokens"]["score"]
    assert score_of(answers, asked, 0.99)["score"] == score > 0.1 and asked.setup.grid == REFERENCE


@pytest.mark.parametrize("dataset", ["canrager/amazon_reviews_mcauley_1and5_sentiment", "fancyzhx/ag_news"])
def test_probes_are_right_as_often(parity, world, model, tokens, dataset):
    "One text more or less may be right: where a probe is in two minds, processors round differently."
    result = sparse_probing.evaluate(model, tokens, parity.probing_setup(world, dataset), Readings(
        model, world.layer))["eval_result_unstructured"][f"{dataset}_results"]
    agreed = {metric: list(map(float, line.split()))
              for metric, line in PROBING["dictionaries"]["tokens"]["accuracies"][dataset].items()}
    assert result.keys() == agreed.keys()
    for metric, accuracies in agreed.items():
        assert (list(result[metric].values())
                == pytest.approx(accuracies, abs=1.5 / PROBING["setup"]["probe_test_set_size"])), metric
