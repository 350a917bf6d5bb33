"""The book: every page in the index, the parts in order, numbers unique and consecutive."""
import re

import nbformat

from conftest import ROOT

PAGES = [p.relative_to(ROOT/"nbs").as_posix() for p in sorted((ROOT/"nbs").rglob("[0-9][0-9]*_*.ipynb")) if not any(part.startswith((".", "_")) for part in p.parts[len(ROOT.parts):])]


def book():
    """The cells of the index that go through the book part by part."""
    cells = [c.source for c in nbformat.read(ROOT/"nbs"/"index.ipynb", as_version=4).cells]
    return "\n".join(c for c in cells if c.startswith(("## The book", "**0")))


def test_every_page_is_in_the_index():
    linked = re.findall(r"\]\((\w+/\w+\.ipynb)\)", book())
    assert sorted(PAGES) == sorted(linked)


def test_numbers_are_unique_and_consecutive():
    assert sorted(int(re.match(r"\d+", page.rpartition("/")[2])[0]) for page in PAGES) == list(range(1, len(PAGES) + 1))


def test_the_parts_are_in_order():
    parts = re.findall(r"^\*\*(.+?)\.\*\*", book(), re.MULTILINE)
    assert parts == ["0 · Start", "1 · Data", "2 · Dictionary", "3 · Ideas", "4 · Evaluation", "5 · Laboratory", "6 · Extend", "Appendix"]
