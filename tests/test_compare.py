import csv
import json

import numpy as np
import pytest
from scipy.stats import ttest_rel

from saenb.report.compare import as_html, as_markdown, as_table, compare, differences, records_under, verdicts, write_comparison
from saenb.base.errors import SaenbError
from saenb.base.files import write_json

SCORES = {"orthogonality/0": [0.10, 0.20, 0.12], "orthogonality/1": [0.31, 0.38, 0.35], "orthogonality/2": [0.05, 0.30, 0.11]}


def record(root, run, seed, score, variant="", seconds=0.02):
    """A finished record with nothing in it but numbers."""
    experiment, number = run.split("/")
    folder = root/experiment/f"run_{number}{'@' * bool(variant)}{variant}"/f"seed_{seed}"
    write_json(folder/"config.json", dict(run=dict(id=run, title=f"Run {number}"), preset="made", seed=seed, variant=variant))
    write_json(folder/"final_info.json", dict(seconds_a_step=seconds * (1 + seed)))
    write_json(folder/"evals"/"unlearning.json", dict(eval_result_unstructured=dict(
        score=score, interval=[score / 2, score * 2], selectivity=score / 2, selectivity_interval=[0, score])))
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


def test_verdicts_are_what_the_intervals_say(root):
    for seed, score in enumerate((0.01, 0.02, 0.015)): record(root, "orthogonality/3", seed, score)
    record(root, "orthogonality/4", 0, 0.9) # one seed says nothing
    lines = verdicts(compare(records_under([root])), ("score",)).splitlines()
    assert {line.split("<br>")[1].split(" ")[0]: line.split("|")[-2].strip() for line in lines[2:]} == {
        "orthogonality/1": "helps", "orthogonality/2": "no difference that 3 seeds show", "orthogonality/3": "harms"}
    assert "| +0.21<br>" in lines[2]


def test_what_cannot_be_compared(root, tmp_path, saenb, one_sentence):
    with pytest.raises(SaenbError, match="no finished record in .*nowhere"): records_under([tmp_path/"nowhere"])
    lonely = record(tmp_path/"other", "positional/3", 1, 0.4)
    with pytest.raises(SaenbError, match="saenb run positional/0 --preset made --seed 1"): compare(records_under([lonely]))
    one_sentence(saenb("compare", lonely), "no baseline", "saenb run positional/0")
    done = saenb("compare", root/"orthogonality", "--to", tmp_path/"there", "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 9 and (tmp_path/"there"/"compare.csv").exists()
