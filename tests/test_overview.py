"""One table of all runs, from the committed records and from made-up rows."""
import re

from conftest import ROOT
from saenb.report.overview import WORDS, overview, overview_html, word

KEPT = ROOT/"runs"/"tiny-full"


def test_a_word_says_how_sure_a_run_is():
    row = dict(p=0.001, difference=0.3, low=0.8, holm=0.01, bh=0.01)
    said = [word(row | change, 0.75) for change in (
        {}, dict(low=0.7), dict(holm=0.2), dict(holm=0.2, bh=0.2), dict(difference=-0.3), dict(holm=0.2, difference=-0.3), dict(p=None, difference=None))]
    assert said == ["helps", "above the baseline, not beyond the controls", "worth following", "not told apart", "harms", "worth following (below)", "baseline"]
    assert set(said) <= set(WORDS)


def test_a_shared_baseline_has_one_row():
    rows = overview(KEPT)
    assert len(rows) == 32 and [r["runs"] for r in rows if len(r["runs"]) > 1] == [["orthogonality/0", "positional/0", "contrastive/0"]]
    text = overview_html(rows)
    assert text.count("<tr ") == 32 and 'data-experiments="orthogonality positional contrastive"' in text
    shown = re.findall(r"(?:<br>|<td>)([a-z][a-z ,()]*)</td>", text)
    assert len(shown) > 40 and {s.replace("&#x27;", "'") for s in shown} <= set(WORDS)
