import csv
import json

import numpy as np
import pytest
from scipy.stats import ttest_rel

from saenb.report.compare import as_html, as_markdown, as_table, compare, differences, records_under, verdicts, write_comparison
from saenb.base.errors import SaenbError
from saenb.base.files import write_json

SCORES = {"orthogonality/0": [0.10, 0.20, 0.12], "orthogonality/1": [0.31, 0.38, 0.35], "orthogonality/2": [0.05, 0.30, 0.11]}


def record(root, run, seed, score, variant="", seconds=0.02, config=()):
    """A finished record with nothing in it but numbers."""
    experiment, number = run.split("/")
    folder = root/experiment/f"run_{number}{'@' * bool(variant)}{variant}"/f"seed_{seed}"
    write_json(folder/"config.json", dict(run=dict(id=run, title=f"Run {number}"), preset="made", seed=seed, variant=variant) | dict(config))
    write_json(folder/"final_info.json", dict(seconds_a_step=seconds * (1 + seed)))
    write_json(folder/"evals"/"unlearning.json", dict(eval_result_unstructured=dict(
        score=score, interval=[score / 2, min(1.0, score * 2)], selectivity=score / 2, selectivity_interval=[0, score])))
    return folder


@pytest.fixture
def root(tmp_path):
    for run, scores in SCORES.items():
        for seed, score in enumerate(scores): record(tmp_path, run, seed, score, seconds=0.04 if run.endswith("1") else 0.02)
    return tmp_path


def test_differences_are_paired_over_seeds(root):
    rows = {(r["run"], r["measure"]): r for r in compare(records_under([root]))}
    for run in ("orthogonality/1", "orthogonality/2"):
        row, against = rows[run, "score"], ttest_rel(SCORES[run], SCORES["orthogonality/0"]).confidence_interval(0.95)
        np.testing.assert_allclose([row["difference"], row["difference_low"], row["difference_high"]],
                                   [np.mean(np.subtract(SCORES[run], SCORES["orthogonality/0"])), against.low, against.high])
    assert rows["orthogonality/1", "score"]["differs"] is True and rows["orthogonality/2", "score"]["differs"] is False
    assert rows["orthogonality/0", "score"]["difference"] is None
    assert rows["orthogonality/1", "step seconds"]["difference"] == pytest.approx(2) and rows["orthogonality/2", "step seconds"]["difference"] == pytest.approx(1)


def test_one_seed_claims_nothing(tmp_path):
    record(tmp_path, "orthogonality/0", 0, 0.1)
    record(tmp_path, "orthogonality/1", 0, 0.9)
    row = next(r for r in compare(records_under([tmp_path])) if r["run"] == "orthogonality/1" and r["measure"] == "score")
    assert row["difference"] == pytest.approx(0.8) and row["difference_low"] is None and row["differs"] is None


def test_variants_are_compared_with_the_plain_baseline(root):
    for seed in range(3): record(root, "orthogonality/0", seed, 0.5, "lr=0.001")
    row = next(r for r in compare(records_under([root])) if r["variant"] and r["measure"] == "score")
    assert row["difference"] == pytest.approx(0.5 - np.mean(SCORES["orthogonality/0"])) and row["seeds"] == 3


def test_text_csv_and_picture(root, tmp_path):
    rows = compare(records_under([root/"orthogonality"/"run_1", root/"orthogonality"/"run_2", root/"orthogonality"/"run_2"]))
    text, table, picture = write_comparison(rows, tmp_path/"out")
    assert text.read_text() == as_table(rows) + "\n" and "orthogonality/1" in text.read_text() and "differs" in text.read_text()
    read = list(csv.DictReader(table.open()))
    assert len(read) == len(rows) == 6 and float(read[0]["value"]) == pytest.approx(rows[0]["value"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_of_a_report(root):
    """A line a run; bold is what differs; columns from elsewhere get intervals of their own."""
    rows = compare(records_under([root]))
    lines = as_markdown(rows, ["score"], dict(cost={"orthogonality/1": [1.1, 1.2, 1.3]})).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["run", "score", "cost"] and [c[0] for c in cells[2:]] == [f"Run {i}<br>orthogonality/{i}" for i in range(3)]
    assert cells[3][1].startswith("**0.347**<br>") and cells[2][1].startswith("0.140<br>") and "**" not in cells[4][1]
    assert cells[3][2] == "1.20<br>0.95 to 1.45" and cells[4][2] == ""


def test_the_table_of_the_site(root):
    """Its cells hold the numbers that they are sorted by, and what a title holds is shown and not obeyed."""
    from html.parser import HTMLParser
    record(root, "orthogonality/1", 0, 0.5, "lr=<i>")
    rows = compare(records_under([root]))
    for r in rows: r["title"] = f"<script>{r['title']}"
    text = as_html(rows, ["score"], {"step cost": {"orthogonality/1": [1.0, 2.0]}})
    class Cells(HTMLParser):
        found, tags = [], set()
        def handle_starttag(self, tag, attributes):
            self.tags.add(tag)
            if tag == "tr": self.found.append([])
            if tag == "td": self.found[-1].append(dict(attributes).get("data-value"))
    reader = Cells()
    reader.feed(text)
    assert reader.tags <= {"table", "thead", "tbody", "tr", "th", "td", "b", "br", "small"} and "&lt;script&gt;Run 1" in text and "lr=&lt;i&gt;" in text
    body = reader.found[1:]
    assert sorted(float(line[0]) for line in body) == pytest.approx(sorted([*(np.mean(v) for v in SCORES.values()), 0.5]))
    assert [line[1] for line in body if float(line[0]) == np.mean(SCORES["orthogonality/1"])] == ["1.5"] and sum(line[1] is not None for line in body) == 1
    assert text.count("<b>") == 1 # of the three runs one differs


def test_differences_are_listed_with_what_luck_would_give(root):
    lines = differences(compare(records_under([root])), ["score", "selectivity"]).splitlines()
    assert [line.split(":")[0] for line in lines[:-2]] == ["- Run 1 (orthogonality/1)"] * 2 and "score +0.207 (" in lines[0]
    assert lines[-1].startswith("2 of 4 differences leave out zero; at 95 %, 0.2 ")


def test_verdicts_are_what_is_left_of_many_comparisons(root):
    """Runs 1 and 3 differ after Holm, run 5 after Benjamini and Hochberg alone, run 2 not."""
    for seed, score in enumerate((0.01, 0.105, 0.025)): record(root, "orthogonality/3", seed, score)
    for seed, score in enumerate((0.17, 0.30, 0.251)): record(root, "orthogonality/5", seed, score)
    record(root, "orthogonality/4", 0, 0.9) # one seed says nothing
    rows = compare(records_under([root]))
    p = {run[-1]: ttest_rel(SCORES[run], SCORES["orthogonality/0"]).pvalue for run in list(SCORES)[1:]}
    mine = {r["run"][-1]: r for r in rows if r["measure"] == "score" and r["p"] is not None}
    assert {number: mine[number]["p"] for number in p} == pytest.approx(p) and set(mine) == set("1235")
    assert mine["5"]["bh"] < 0.05 < mine["5"]["holm"] == pytest.approx(2 * mine["5"]["p"])
    lines = verdicts(rows, ("score",)).splitlines()
    assert {line.split("<br>")[1].split(" ")[0]: line.split("|")[-2].strip() for line in lines[2:]} == {
        "orthogonality/1": "helps", "orthogonality/2": "not told apart", "orthogonality/3": "harms", "orthogonality/5": "worth following"}
    assert "| +0.21<br>" in lines[2] and "worth following (Benjamini-Hochberg)" in as_table(rows)
    assert "Holm keeps 2 of them, Benjamini-Hochberg 3." in differences(rows, ["score"])


def test_one_training_under_two_names_is_compared_once(root):
    """Two experiments that hold the same results do not make each other's p-values larger."""
    once = {r["run"]: r["holm"] for r in compare(records_under([root])) if r["measure"] == "score"}
    for run in SCORES:
        for seed, score in enumerate(SCORES[run]):
            for name in (run, run.replace("orthogonality", "contrastive")):
                folder = record(root, name, seed, score)
                result = json.loads((folder/"evals"/"unlearning.json").read_text())
                write_json(folder/"evals"/"unlearning.json", result | dict(eval_id=f"{run} {seed}"))
    twice = {r["run"]: r["holm"] for r in compare(records_under([root])) if r["measure"] == "score"}
    assert len(twice) == 2 * len(once) and all(twice[run] == once[run] == twice[run.replace("orthogonality", "contrastive")] for run in once)


def test_run_2_stands_before_run_10(root):
    for number in (10, 11): record(root, f"orthogonality/{number}", 0, 0.3)
    assert list(dict.fromkeys(r.run for r in records_under([root]))) == [f"orthogonality/{n}" for n in (0, 1, 2, 10, 11)]


MADE = dict(d_sae=64, layer=0, model="made 1", training=dict(steps=300, tokens=None, batch=64, lr=0.001, balanced=False))


@pytest.mark.parametrize("change, words", [
    (dict(training=dict(steps=200)), ["training steps", "200 and 300", "saenb run orthogonality/0 --preset made --seed 0 --steps 200 --out "]),
    (dict(training=dict(lr=0.01)), ["learning rate", "0.01 and 0.001"]), (dict(training=dict(balanced=True)), ["balanced batches"]),
    (dict(training=dict(normalise="dimension")), ["normalisation", "dimension and length"]), (dict(d_sae=128), ["width", "128 and 64"]), (dict(layer=1), ["layer"]), (dict(model="made 2"), ["model", "made 2 and made 1"])])
def test_records_that_were_made_otherwise_are_not_compared(tmp_path, change, words, called, one_sentence):
    made = MADE | change | dict(training=MADE["training"] | change.get("training", {}))
    record(tmp_path, "orthogonality/0", 0, 0.1, config=MADE)
    folder = record(tmp_path, "orthogonality/1", 0, 0.2, config=made)
    with pytest.raises(SaenbError) as e: compare(records_under([tmp_path]))
    assert all(word in str(e.value) for word in words) and str(e.value).endswith(".")
    if "d_sae" in change: one_sentence(called("compare", folder), "width", "saenb run orthogonality/0")
    # what the run, or the variant, declares to change may differ
    name = next(iter(change.get("training", change)))
    value = change.get("training", change)[name]
    record(tmp_path, "orthogonality/1", 0, 0.2, config=made | dict(
        run=dict(id="orthogonality/1", title="Run 1", mechanisms=[], constants={name: value})))
    assert any(r["difference"] == pytest.approx(0.1) for r in compare(records_under([tmp_path])))
    record(tmp_path, "orthogonality/1", 0, 0.2, f"{name}={value}", config=made)
    assert any(r["variant"] and r["difference"] == pytest.approx(0.1) for r in compare(records_under([tmp_path])))


def test_a_setting_of_a_mechanism_is_no_condition(tmp_path):
    """A mechanism's own steps do not excuse a shorter training."""
    record(tmp_path, "orthogonality/0", 0, 0.1, config=MADE)
    run = dict(id="orthogonality/1", title="Run 1", mechanisms=[dict(name="A", settings=dict(steps=200))], constants=dict(steps=200))
    record(tmp_path, "orthogonality/1", 0, 0.2, config=MADE | dict(run=run, training=MADE["training"] | dict(steps=200)))
    with pytest.raises(SaenbError, match="200 and 300"): compare(records_under([tmp_path]))


def test_what_cannot_be_compared(root, tmp_path, called, one_sentence):
    with pytest.raises(SaenbError, match="no finished record in .*nowhere"): records_under([tmp_path/"nowhere"])
    lonely = record(tmp_path/"other", "positional/3", 1, 0.4)
    with pytest.raises(SaenbError, match="saenb run positional/0 --preset made --seed 1"): compare(records_under([lonely]))
    one_sentence(called("compare", lonely), "no baseline", "saenb run positional/0", f"--out {tmp_path}")
    foreign = record(tmp_path/"other", "elsewhere/3", 1, 0.4) # its baseline is not declared here
    with pytest.raises(SaenbError, match="declares the experiment elsewhere") as e: compare(records_under([foreign]))
    assert "saenb run" not in str(e.value)
    done = called("compare", root/"orthogonality", "--to", tmp_path/"there", "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 9 and (tmp_path/"there"/"compare.csv").exists()
