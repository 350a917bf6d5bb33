"""The explorer in a real browser: it lists, sorts, filters, shows, and says nothing on the console."""
import base64
import csv
import json

import numpy as np
import pytest

from conftest import needs_browser, violations
from saenb.report.explorer import AFTER, BEFORE, BINS, packed, write_page

pytestmark = needs_browser

FEATURES, CONTEXTS, STRONGEST, WIDTH, NEAREST, WORDS = 16_384, 8, 6, BEFORE + 1 + AFTER, 8, 5
NAMED = {3: ["dog (canine)", 0.5, 0.9, 0.7, 0.3], 4000: ["tree (plant)", 0.25, 0.8, 0.6, 0.2]}


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
        context_tokens=packed(context, "uint16"), peak_tokens=packed(context[:, :STRONGEST, BEFORE], "uint16"),
        context_activations=packed(draw.integers(0, 256, context.shape), "uint8"),
        nearest=packed(draw.integers(0, FEATURES, (FEATURES, NEAREST)), "uint32"),
        cosines=packed(draw.random((FEATURES, NEAREST)), "float32"),
        **{name: packed(draw.integers(0, 3000, (FEATURES, WORDS)), "uint16") for name in ("promoted", "suppressed")},
        **{name: packed(draw.random((FEATURES, WORDS)), "float32") for name in ("promoted_by", "suppressed_by")})
    return dict(about="Made up.", features=FEATURES, contexts=CONTEXTS, strongest=STRONGEST, width=WIDTH, before=BEFORE, bins=BINS,
                nearest=NEAREST, quantiles=[0.9, 0.3], dictionary="abc",
                labels=[f"label {i}" for i in range(FEATURES)], names=NAMED, sizes=[1000, 2000], tokens=tokens, clamped=[4000, 5], arrays=arrays)


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
    for column, name in ((3, "forget"), (4, "retain"), (5, "auroc")):
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
    peaks = values(made, "peak_tokens").reshape(FEATURES, STRONGEST)
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


def test_it_sorts_and_filters_by_concept_and_label(page):
    page.query_selector_all("#head button")[2].click()
    assert listed(page)[:3] == [3, 4000, 0] # the best named first, those without a name last
    assert page.inner_text("#rows .row[data-feature='3'] .concept") == "dog (canine) · label 3"
    page.fill("#word", "LABEL 77")
    assert set(listed(page)) == {i for i in range(FEATURES) if f"label {i}".startswith("label 77")} & set(listed(page)) and listed(page)
    page.fill("#word", "plant")
    assert listed(page) == [4000]
    page.click("#rows .row")
    said = page.inner_text("#detail")
    assert "concept: tree (plant)" in said and "precision 0.60" in said and "responds to: label 4000" in said


def test_words_and_quantiles_are_shown(page, made):
    page.query_selector_all("#head button")[0].click()
    page.click("#rows .row[data-feature='7']")
    words = [w.inner_text() for w in page.query_selector_all("#detail .word")]
    ids = np.concatenate([values(made, k).reshape(FEATURES, WORDS)[7] for k in ("promoted", "suppressed")])
    assert [w.split()[0] for w in words] == [f"word{i}" for i in ids]
    sides = [e.inner_text() for e in page.query_selector_all("#detail .context .side")]
    assert [s.partition("stronger than ")[2].strip() for s in sides] == [""] * STRONGEST + ["90 % of its places", "30 % of its places"]


def test_what_is_seen_is_saved(page, made):
    page.fill("#most", "0.001")
    shown, tokens = page.evaluate("shown"), made["tokens"]
    with page.expect_download() as got: page.click("#csv")
    rows = list(csv.DictReader(open(got.value.path(), newline="", encoding="utf-8")))
    assert got.value.suggested_filename == "features.csv" and [int(r["feature"]) for r in rows] == shown and shown
    first = shown[0]
    assert float(rows[0]["AUROC"]) == pytest.approx(values(made, "auroc")[first], abs=1e-5) and rows[0]["label"] == f"label {first}"
    with page.expect_download() as got: page.click("#json")
    saved = json.loads(got.value.path().read_text(encoding="utf-8"))
    assert saved["dictionary"] == "abc" and [f["feature"] for f in saved["features"]] == shown
    context = values(made, "context_tokens").reshape(FEATURES, CONTEXTS, WIDTH)[first, 0]
    assert saved["features"][0]["texts"][0]["tokens"] == [tokens[t] for t in context] and len(saved["features"][0]["texts"]) == CONTEXTS
    assert page.evaluate("""["=1+1", "-x", "a,b", 'q"', -2, null].map(cell)""") == ["'=1+1", "'-x", '"a,b"', '"q"""', "-2", ""]


def test_it_leads_back(browser, made, tmp_path):
    page = browser.new_page()
    page.goto(write_page(made, tmp_path/"page.html", "A large dictionary", "../index.html").as_uri())
    assert page.get_attribute("#back a", "href") == "../index.html"
    page.close()


def test_ones_own_text_is_tried(browser, world, model):
    """With a server, the box asks it and the answer is painted; without one there is no box."""
    import threading
    import torch
    from saenb.evals.evaluation import Readings
    from saenb.report.explorer_server import server
    from saenb.sae.sae import SAE, SAEConfig
    sae = SAE(SAEConfig(d_in=model.cfg.d_model, d_sae=4)).initialise(torch.randn(64, model.cfg.d_model), 0)
    one = lambda shape, kind="uint16": packed(np.ones(shape), kind)
    arrays = {k: one(4, "float32") for k in ("forget", "retain", "auroc", "lost_forget", "lost_retain", "largest")}
    arrays |= dict(histogram=one((4, 2, BINS), "uint32"), peaks=one((4, 1), "float32"), context_side=one((4, 1), "uint8"), context_tokens=one((4, 1, WIDTH)), peak_tokens=one((4, 1)),
                   context_activations=one((4, 1, WIDTH), "uint8"), nearest=one((4, 1), "uint32"), cosines=one((4, 1), "float32"), promoted=one((4, 1)), suppressed=one((4, 1)),
                   promoted_by=one((4, 1), "float32"), suppressed_by=one((4, 1), "float32"))
    found = dict(about="", features=4, contexts=1, strongest=1, quantiles=[], width=WIDTH, before=BEFORE, bins=BINS, nearest=1, sizes=[1, 1], tokens=["a", "b"], labels=["x"] * 4, names={}, clamped=[],
                 dictionary="", arrays=arrays)
    running = server(found, "Tried", Readings(model, world.layer), sae)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"http://127.0.0.1:{running.server_port}/")
    page.fill("#text", "The following are <b>questions</b>")
    page.click("#try button")
    page.wait_for_selector("#mine")
    assert page.inner_text("#mine").startswith("The following are") and not page.query_selector("#mine b b")
    assert page.query_selector_all("#found .near")
    page.evaluate("choose(2)")
    page.wait_for_selector("#mine")
    assert not violations(page)
    assert not said
    page.close()
    running.shutdown()
    running.server_close()


def test_the_keyboard_chooses_and_axe_finds_nothing(page):
    """A row is reached and chosen without a mouse, and stays in hand; the page is read by a screen reader, in the light and in the dark."""
    page.focus("#rows .row:nth-child(3)")
    third = page.get_attribute("#rows .row:nth-child(3)", "data-feature")
    page.keyboard.press("Enter")
    assert page.inner_text("#detail h2").startswith(f"Feature {third}") and page.evaluate("document.activeElement.dataset.feature") == third
    assert not violations(page)


def test_it_reads_on_a_phone(browser, made, tmp_path):
    page = browser.new_page(viewport=dict(width=390, height=800))
    page.goto(write_page(made, tmp_path/"page.html", "A large dictionary").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
