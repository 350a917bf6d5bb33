"""The explorer in a real browser: it lists, sorts, filters, shows, and says nothing on the console."""
import base64

import numpy as np
import pytest

from conftest import needs_browser
from saenb.report.explorer import AFTER, BEFORE, BINS, packed, write_page

pytestmark = needs_browser

FEATURES, CONTEXTS, WIDTH, NEAREST = 16_384, 6, BEFORE + 1 + AFTER, 8


@pytest.fixture(scope="module")
def made():
    """As much as the page of a large dictionary holds."""
    draw = np.random.default_rng(0)
    lost = np.full(FEATURES, np.nan)
    lost[[5, 77, 4000]] = 0.5, 0.25, 0.75
    tokens = [f" word{i}" for i in range(3000)] + ["\n", "</script><img src=x>"]
    context = draw.integers(0, 3000, (FEATURES, CONTEXTS, WIDTH))
    context[123, 0, BEFORE] = 3001
    largest = draw.random(FEATURES) + 0.5
    arrays = dict(
        forget=packed(draw.random(FEATURES), "float32"), retain=packed(draw.random(FEATURES), "float32"),
        auroc=packed(draw.random(FEATURES), "float32"), lost_forget=packed(lost, "float32"),
        lost_retain=packed(lost / 10, "float32"), largest=packed(largest, "float32"),
        histogram=packed(draw.integers(0, 100, (FEATURES, 2, BINS)), "uint32"),
        peaks=packed(np.repeat(largest[:, None], CONTEXTS, 1), "float32"),
        context_side=packed(draw.integers(0, 2, (FEATURES, CONTEXTS)), "uint8"),
        context_tokens=packed(context, "uint16"), peak_tokens=packed(context[:, :, BEFORE], "uint16"),
        context_activations=packed(draw.integers(0, 256, context.shape), "uint8"),
        nearest=packed(draw.integers(0, FEATURES, (FEATURES, NEAREST)), "uint32"),
        cosines=packed(draw.random((FEATURES, NEAREST)), "float32"))
    return dict(about="Made up.", features=FEATURES, contexts=CONTEXTS, width=WIDTH, before=BEFORE, bins=BINS,
                nearest=NEAREST, sizes=[1000, 2000], tokens=tokens, clamped=[4000, 5], arrays=arrays)


def values(made, name):
    return np.frombuffer(base64.b64decode(made["arrays"][name]["bytes"]), made["arrays"][name]["kind"])


@pytest.fixture
def page(browser, made, tmp_path):
    """The page, opened; whatever the console says and whatever is asked of the network fails the test."""
    page, said = browser.new_page(viewport=dict(width=1280, height=800)), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: request.url.startswith("file:") or said.append(request.url))
    page.goto(write_page(made, tmp_path/"page.html", "A large dictionary").as_uri())
    yield page
    page.close()
    assert not said


def listed(page):
    return [int(row.get_attribute("data-feature")) for row in page.query_selector_all("#rows .row")]


def test_it_begins_with_what_does_most_to_the_answers(page):
    assert listed(page)[:3] == [4000, 5, 77] and page.inner_text("#count") == "16384 of 16384 features"
    assert (page.inner_text("#detail h2") == "Feature 4000 · clamped by the evaluation"
            and "75.0 % of the forget answers" in page.inner_text("#detail .numbers"))
    assert len(page.query_selector_all("#rows .row")) < 100 # the rest is not in the page


def test_columns_sort_both_ways(page, made):
    for column, name in ((1, "forget"), (2, "retain"), (3, "auroc")):
        order = values(made, name).argsort(kind="stable")
        button = page.query_selector_all("#head button")[column]
        button.click()
        assert listed(page)[:20] == order[::-1][:20].tolist()
        page.query_selector_all("#head button")[column].click()
        assert listed(page)[:20] == order[:20].tolist()


def test_it_scrolls_to_the_last_row(page, made):
    page.query_selector_all("#head button")[0].click()
    page.evaluate("document.getElementById('list').scrollTop = 1e9")
    page.wait_for_selector(f"#rows .row[data-feature='{FEATURES - 1}']")
    assert listed(page)[-1] == FEATURES - 1


def test_filters_leave_what_is_asked_for(page, made):
    forget, retain = values(made, "forget"), values(made, "retain")
    page.fill("#least", "0.9")
    page.fill("#most", "0.1")
    assert (page.inner_text("#count")
            == f"{((forget >= np.float32(0.9)) & (retain <= np.float32(0.1))).sum()} of 16384 features")
    for box in ("#least", "#most"): page.fill(box, "")
    page.check("#marked")
    assert sorted(listed(page)) == [5, 4000]
    page.uncheck("#marked")
    page.fill("#token", "WORD2999")
    peaks = values(made, "peak_tokens").reshape(FEATURES, CONTEXTS)
    assert page.inner_text("#count") == f"{(peaks == 2999).any(1).sum()} of 16384 features"


def test_a_feature_is_shown_and_its_neighbours_lead_on(page, made):
    page.query_selector_all("#head button")[0].click()
    page.click("#rows .row[data-feature='7']")
    assert page.inner_text("#detail h2") == "Feature 7" and page.url.endswith("#7")
    assert (len(page.query_selector_all("#detail .context")) == CONTEXTS
            and len(page.query_selector_all("#detail rect")) == 2 * BINS)
    near = values(made, "nearest").reshape(FEATURES, NEAREST)[7]
    page.query_selector_all("#detail .near")[2].click()
    assert page.inner_text("#detail h2").startswith(f"Feature {near[2]}")


def test_what_tokens_hold_is_shown_and_not_obeyed(page):
    page.evaluate("location.hash = '#123'")
    page.wait_for_function("document.querySelector('#detail h2').textContent === 'Feature 123'")
    assert (page.inner_text("#detail .context .peak") == "</script><img src=x>"
            and not page.query_selector("img"))


def test_it_reads_on_a_phone(browser, made, tmp_path):
    page = browser.new_page(viewport=dict(width=390, height=800))
    page.goto(write_page(made, tmp_path/"page.html", "A large dictionary").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
