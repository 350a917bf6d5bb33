"""The site as readers meet it: built from the notebooks, opened page by page in a real browser."""
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from conftest import ROOT, needs_browser, violations

FOUND = ("Where no list of words helps", "What was found")  # what a report begins with


class Page(HTMLParser):
    """A page's links, and the names that a link may point at."""
    def __init__(self, text):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.names |= {found.get("id"), found.get("name")}
        self.links += [found[k] for k in ("href", "src", "srcset") if found.get(k)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built by `make docs` in a copy of what is committed."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("docs", "nbs", "saenb", "figures", "settings.ini", "README.md", "setup.py"):
        source = ROOT/name
        shutil.copytree(source, folder/name, ignore=shutil.ignore_patterns(
            "__pycache__", ".ipynb_checkpoints")) if source.is_dir() else shutil.copy(source, folder)
    done = subprocess.run([sys.executable, "docs/build.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder/"_docs"


@pytest.fixture(scope="module")
def pages(site):
    return {p.relative_to(site).as_posix(): Page(p.read_text(encoding="utf-8"))
            for p in sorted(site.rglob("*.html")) if "_static" not in p.relative_to(site).parts}


def test_every_notebook_has_a_page(pages):
    notebooks = {p.relative_to(ROOT/"nbs").with_suffix(".html").as_posix()
                 for p in (ROOT/"nbs").rglob("*.ipynb")
                 if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT/"nbs").parts)}
    assert notebooks <= pages.keys() and {"explorer/baseline.html", "explorer/best.html"} <= pages.keys()


def test_pages_begin_with_all_that_their_notebooks_begin_with(pages):
    """What comes before and after, and what has to be known before any number, stands in a notebook's first cell."""
    followed = 0
    for path in (ROOT/"nbs").rglob("[0-9]*.ipynb"):
        first = nbformat.read(path, as_version=4).cells[0].source
        page = pages[path.relative_to(ROOT/"nbs").with_suffix(".html").as_posix()]
        for link in re.findall(r"\]\(([\w./-]+\.ipynb)[^)]*\)", first):
            followed += 1
            assert any(to.partition("#")[0].endswith(link.replace(".ipynb", ".html").lstrip("./")) for to in page.links), f"{path} lacks {link}"
    assert followed > 200


def test_every_internal_link_leads_somewhere(site, pages):
    lost, followed = [], 0
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (site/name).parent/unquote(parts.path) if parts.path else site/name
            followed += 1
            if not target.resolve().is_file(): lost.append((name, link))
            elif (parts.fragment and target.suffix == ".html" and unquote(parts.fragment)
                  not in pages[target.resolve().relative_to(site.resolve()).as_posix()].names):
                lost.append((name, link))
    assert not lost and followed > 1000


def test_nothing_is_loaded_from_elsewhere(pages):
    """Links may lead to other hosts; what a page is made of may not."""
    text = "\n".join(link for page in pages.values() for link in page.links if re.match(r"(https?:)?//", link)
                     and re.search(r"\.(js|css|png|svg|woff2?)(\?|$)", link))
    assert not text


@pytest.fixture
def opened(browser):
    """Open pages; whatever the console says, fails or comes from the network fails the test."""
    page, said = browser.new_page(viewport=dict(width=1280, height=800)), []
    page.on("console", lambda message: message.type in ("error", "warning") and said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed",  # but for what was still under way when the page was left
            lambda request: "ABORTED" in (request.failure or "") or said.append(f"failed: {request.url}"))
    page.on("request",
            lambda request: request.url.startswith(("file:", "data:", "blob:")) or said.append(request.url))
    yield page
    page.close()
    assert not said, said


@needs_browser
def test_every_page_opens_wide_and_narrow(opened, site, pages):
    """Pages of findings and figures end before 8,000 pixels; those that define functions may be longer, up to a limit."""
    def height(): return opened.evaluate("document.documentElement.scrollHeight")
    widths = [1280, 390]
    for name in pages:
        opened.goto((site/name).as_uri())
        assert opened.title()
        limit = 8_000 if re.search("index|result|report|real_model", name) else 18_000
        for width in widths:
            if opened.viewport_size["width"] != width: opened.set_viewport_size(dict(width=width, height=800))
            beyond = opened.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert beyond <= 0, f"{name} is {beyond} pixels wider than a screen of {width}"
            if width == 1280 and height() >= limit: # on a wider screen it may be lower
                opened.set_viewport_size(dict(width=1400, height=900))
                assert height() < limit, f"{name} is {height()} pixels high"
        widths.reverse() # the next page opens as this one was left: laying a page out once more takes a quarter of its time


@needs_browser
def test_the_search_finds_offline(opened, site):
    """Words of the text, synonyms of a page's, and runs by their numbers."""
    for query, page in (("clamp", "unlearning"), ("gpu", "presets"), ("cuda", "check"), ("orthogonality/3", "52_orthogonality_results"),
                        ("contrastive 4", "59_contrastive_results"), ("dictionary learning", "21_sae")):
        opened.goto((site/"search.html").as_uri() + f"?q={query}")
        opened.wait_for_selector(f"#search-results li a[href*='{page}']") # results come one by one
    opened.goto((site/"search.html").as_uri() + "?q=clamp")
    opened.wait_for_selector("#search-results li a[href*=unlearning]")
    opened.click("#search-results li a")
    assert "clamp" in opened.inner_text("main").lower()


@needs_browser
def test_reports_open_with_what_was_found(opened, site):
    """Their code and their run logs are folded, and an address that leads to a run unfolds it."""
    opened.set_viewport_size(dict(width=1400, height=900))
    for page in ("52_orthogonality_results", "56_positional_results", "59_contrastive_results", "62_dual_objective_results"):
        opened.goto((site/"3_ideas"/f"{page}.html").as_uri())
        assert opened.inner_text("main h2").startswith(FOUND)
        assert not any(code.is_visible() for code in opened.query_selector_all("main .cell_input"))
    opened.goto((site/"3_ideas"/"59_contrastive_results.html").as_uri() + "#run-3")
    assert opened.eval_on_selector("#run-3", "e => e.open") and not opened.eval_on_selector("#run-4", "e => e.open")


@needs_browser
@pytest.mark.parametrize("name", ["index", "0_start/03_results", "3_ideas/59_contrastive_results", "2_dictionary/27_trainer", "5_laboratory/121_overview",
                                  "explorer/best"])
def test_axe_finds_nothing_wrong(opened, site, name):
    """Contrast, labels, landmarks, heads of tables, names of pictures: in the light and in the dark."""
    opened.goto((site/f"{name}.html").as_uri())
    assert not violations(opened)


def test_pages_are_light(site, pages):
    """The first page is read over a slow line, and no page is heavier than a large picture; pictures count, what all pages share does not."""
    for name, page in pages.items():
        own = {link for link in page.links if re.search(r"\.(png|jpe?g|svg|webp)$", link)}
        weight = (site/name).stat().st_size + sum(((site/name).parent/unquote(link)).stat().st_size for link in own)
        assert weight < (1_000_000 if name == "index.html" else 2_500_000), f"{name} weighs {weight:,} bytes"
        assert len(own) > 1 or name != "index.html"


@needs_browser
def test_the_sidebar_shows_parts_and_folds_them(opened, site):
    opened.set_viewport_size(dict(width=1400, height=900))
    opened.goto((site/"3_ideas"/"59_contrastive_results.html").as_uri())
    parts = opened.query_selector_all(".bd-docs-nav li.toctree-l0")
    assert len(parts) == 8 and [p.query_selector("details").get_attribute("open") is not None for p in parts].count(True) == 1
    assert opened.eval_on_selector("link[rel=icon]", "e => e.href").endswith("favicon.svg")


@needs_browser
def test_signatures_are_shown_whole(opened, site):
    opened.goto((site/"2_dictionary"/"27_trainer.html").as_uri())
    beyond = opened.eval_on_selector_all(".signature pre", "all => all.map(e => e.scrollWidth - e.clientWidth)")
    assert len(beyond) > 3 and max(beyond) <= 1 and "# what it is to explain" in opened.inner_text(".signature pre")


@needs_browser
def test_figures_turn_dark(opened, site):
    opened.emulate_media(color_scheme="dark")
    opened.goto((site/"3_ideas"/"59_contrastive_results.html").as_uri())
    assert "invert" in opened.eval_on_selector("main .cell_output img", "e => getComputedStyle(e).filter")


@needs_browser
def test_a_phone_gets_its_own_first_picture(opened, site):
    chosen = {}
    for width in (390, 1280):
        opened.set_viewport_size(dict(width=width, height=800))
        opened.goto((site/"index.html").as_uri())
        opened.wait_for_function("document.querySelector('main img').complete")
        chosen[width] = opened.eval_on_selector("main img", "e => e.currentSrc")
    assert chosen[390].endswith("_phone.png") and chosen[1280].endswith("second_edition.png")


@needs_browser
def test_the_table_of_all_runs_sorts(opened, site):
    opened.goto((site/"0_start"/"03_results.html").as_uri())
    def column(i):
        return opened.eval_on_selector_all("table.sortable tbody tr",
                                           f"rows => rows.map(r => parseFloat(r.cells[{i}].dataset.value))")
    before = column(1)
    assert len(before) > 30
    opened.click("table.sortable th:nth-child(2) button")
    assert column(1) == sorted(before, reverse=True)
    opened.click("table.sortable th:nth-child(2) button")
    assert column(1) == sorted(before)
    opened.click("table.sortable th:nth-child(1) button")
    assert column(1) == before


@needs_browser
def test_the_landing_page_says_it_in_one_screen(opened, site):
    opened.goto((site/"index.html").as_uri())
    def bottom(selector):
        return opened.eval_on_selector(selector, "e => e.getBoundingClientRect().bottom")
    assert "make reproduce" in opened.inner_text("main pre") and "make test" in opened.inner_text("main pre")
    assert max(bottom("main h1"), bottom("main pre"), bottom("main img")) <= 800
    assert opened.eval_on_selector("main img", "e => e.complete && e.naturalWidth > 0")


@needs_browser
def test_the_explorer_is_reached_and_used(opened, site):
    opened.goto((site/"index.html").as_uri())
    opened.click("main a[href='explorer/best.html']")
    rows = opened.query_selector_all("#rows .row")
    assert len(rows) > 10 and "Features of" in opened.title()
    rows[3].click()
    assert opened.inner_text("#detail").strip()
    for name in ("best", "baseline"):
        opened.goto((site/"explorer"/f"{name}.html").as_uri())
        opened.click("#back a")
        assert "results" in opened.url and opened.inner_text("main h2").startswith(FOUND)


@needs_browser
def test_it_reads_in_the_dark(opened, site):
    """The theme follows the reader's system; letters stand out from what is behind them."""
    opened.emulate_media(color_scheme="dark")
    opened.goto((site/"index.html").as_uri())
    dark = opened.evaluate(
        """() => ["color", "backgroundColor"].map(k =>
        getComputedStyle(document.body)[k].match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0))""")
    assert dark[0] - dark[1] > 300
