"""Build the site into _docs/: nbdev processes the notebooks, this makes them readable for MyST-NB, Sphinx does the rest."""
import ast
import gc
import os
import re
import shutil
import sys
import warnings
from functools import cache
from pathlib import Path
from textwrap import dedent

import nbformat
import yaml
from nbdev.doclinks import _nbpath2html
from nbdev.serve import proc_nbs
from sphinx.cmd.build import build_main

DIRECTIVE = re.compile(r"\s*#\|\s*([\w-]+):\s*(.*)")
# The links that nbdev makes to a symbol's documentation and, in what show_doc prints, to its source and under its name.
SYMBOL = re.compile(r"\]\(/([\w/-]+)\.html#([\w.]+)\)")
SHOW_DOC = re.compile(r"---\n+(?:\[source\]\(/blob/\w+/(\S+)#L(\w+)\)\{.*?\}\n+)?(#+ (\S+)\n.*)", re.DOTALL)
TARGET = re.compile(r"^\((\S+)\)=$", re.MULTILINE)
EXPLORER = re.compile(r"\[([^\]]+)\]\((?:\.\./)+figures/explorer/(\w+\.html)\)")
FOLDED = re.compile(r"results$")  # pages that show what was found: their code is folded
REPORT = re.compile(r"(results|report)$")  # pages of figures
PAGE_WEIGHT, FIRST_WEIGHT = 2_500_000, 1_000_000  # bytes of a page and its own pictures, and of the first page
RUN = re.compile(r'^<details class="run" id="run-(\w+)"><summary>.*?: (.*?)<', re.MULTILINE)
PICTURE = re.compile(r'<img [^>]*?src="((?:\.\./)*_images/)(\w+)\.png"[^>]*?/?>')
CALLOUT = re.compile(r"^(:{3,}) *\{\.callout-(\w+).*\}", re.MULTILINE)
ELSEWHERE = re.compile(r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["']?(?:https?:)?//
                         | <link\b[^>]*\bhref=["']?(?:https?:)?// | @import\s+["'](?:https?:)?//
                         | url\(["']?(?:https?:)?//""", re.VERBOSE)
TAGS = {("echo", "false"): "remove-input", ("output", "false"): "remove-output", ("include", "false"): "remove-cell",
        ("warning", "false"): "remove-stderr", ("code-fold", "true"): "hide-input"}


@cache
def definitions(path):
    """Return a module's lines, and the definitions in it by the line on which they start."""
    text = Path(path).read_text(encoding="utf-8")
    nodes = [n for n in ast.walk(ast.parse(text)) if hasattr(n, "decorator_list")]
    return text.splitlines(), {n.lineno: n for n in reversed(nodes)}


def source(path, line):
    """Return the definition that starts at a line of a module, folded."""
    lines, found = definitions(path)
    start = min([line] + [d.lineno for d in found[line].decorator_list])
    code = dedent("\n".join(lines[start - 1:found[line].end_lineno]))
    return f"\n\n<details><summary>Source</summary>\n\n~~~~~~python\n{code}\n~~~~~~\n\n</details>"


def one_line(signature):
    """Return a signature in one line, if it is short and nothing is said of its parameters."""
    joined = re.sub(r"\(\s+", "(", " ".join(signature.split())).replace(" )", ")")
    return joined + "\n" if len(joined) <= 90 and "#" not in signature else signature


def show_doc(text, page):
    """Give what show_doc printed a target for links, and the source itself for a link to it."""
    match = SHOW_DOC.fullmatch(text)
    if not match: return text
    path, line, body, name = match.groups()
    folded = source(path, int(line)) if line and line.isdigit() else ""
    body = body.replace("__main__.", "")  # nbdev runs the cells, so their classes are main's to it
    def signature(match): return f"```{{code-block}} python\n:class: signature\n\n{one_line(match[1])}```"
    body = re.sub(r"^```python\n(.*?)^```", signature, body, flags=re.DOTALL | re.MULTILINE)
    return f"({page}:{name.lower()})=\n{body}{folded}"


def convert_code(cell, page, head=""):
    """Turn a code cell's directives into what MyST-NB knows; `output: asis` makes it the markdown that it printed.

    `fold: some words` folds code and outputs behind these words; pictures without words of their own are named by the `head` that they stand under."""
    lines, directives = cell.source.splitlines(), {}
    while lines and (match := DIRECTIVE.match(lines[0])):
        directives[match[1]] = match[2].strip(" \"'")
        lines.pop(0)
    if directives.get("output") == "asis":
        printed = [o.data["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {})]
        return nbformat.v4.new_markdown_cell("\n\n".join(show_doc(text, page) for text in printed), id=cell.id)
    cell.source = "\n".join(lines)
    cell.metadata = {"tags": [tag for (name, value), tag in TAGS.items() if directives.get(name) == value]}
    if FOLDED.search(page): cell.metadata["tags"].append("hide-input")
    caption, fold = directives.get("fig-cap"), directives.get("fold")
    image = {"alt": directives.get("fig-alt", caption or f"{head}: drawn by the cell above")}
    if REPORT.search(page): image["classes"] = "report"
    cell.metadata["mystnb"] = {"image": image} | ({"figure": {"caption": caption}} if caption else {})
    if fold:
        cell.metadata["tags"] = ["hide-cell"]
        cell.metadata["mystnb"] |= {"code_prompt_show": fold, "code_prompt_hide": fold}
    return cell


def headings(cells, title):
    """Return the heading that each cell stands under, without markup."""
    found = []
    for cell in cells:
        prose = re.sub(r"^```.*?^```", "", cell.source, flags=re.DOTALL | re.MULTILINE) if cell.cell_type == "markdown" else ""
        for line in prose.splitlines():
            if match := re.match(r"#+ (.*)", line): title = re.sub(r"[`*$]|\]\(.*?\)|\[", "", match[1])
        found.append(title)
    return found


def found_by(words):
    """Return entries of the index, which the search looks through; nothing of them is seen on the page."""
    return f"```{{index}} {', '.join(words)}\n```\n"


def found_run(page):
    """Return what puts a run into the index by its id and number, in front of its part of the page."""
    experiment = re.sub(r".*/|_results$", "", page)
    def entries(match):
        words = (f"{experiment}/{match[1]}", f"{experiment} {match[1]}", f"run {match[1]} of {experiment}", re.sub("[;,]", "", match[2]))
        return found_by(words) + "\n" + match[0]
    return entries


def opening(path):
    """Return what a notebook's first cell says after its title and sentence; nbdev keeps these two alone."""
    first = nbformat.read(path, as_version=4).cells[0]
    parts = re.split(r"^>.*\n(?:>.*\n)*", first.source + "\n", maxsplit=1, flags=re.MULTILINE)
    return parts[1].strip() if first.cell_type == "markdown" and len(parts) == 2 else ""


@cache
def synonyms():
    """Return the words that a page is also found by."""
    return yaml.safe_load(Path("docs/synonyms.yml").read_text(encoding="utf-8"))


def convert(nb, page, path):
    """Turn a notebook that nbdev has processed, and that lies at `path`, into one that MyST-NB reads."""
    front = yaml.safe_load(nb.cells[0].source.strip().strip("-")) if nb.cells[0].cell_type == "raw" else {}
    head = f"# {front['title']}\n\n{front.get('description', '')}" if "title" in front else ""
    if words := synonyms().get(page.split("/")[-1]): head += "\n\n" + found_by(words)
    if front: head += "\n\n" + opening(path)
    heads = headings(nb.cells, front.get("title", ""))
    nb.cells = [nbformat.v4.new_markdown_cell(head)] + [
        convert_code(cell, page, above) if cell.cell_type == "code" else cell
        for cell, above in zip(nb.cells, heads) if cell.cell_type != "raw"]
    seen = set()  # targets know no capitals: of a class and a function of one name, the first gets the links
    for cell in nb.cells:
        if cell.cell_type != "markdown": continue
        cell.source = CALLOUT.sub(r"\1{\2}", cell.source)
        cell.source = RUN.sub(found_run(page), cell.source)
        cell.source = TARGET.sub(lambda match: "" if match[0] in seen else seen.add(match[0]) or match[0], cell.source)
    nb.metadata = {"kernelspec": {"name": "python3", "display_name": "python3"},
                   "language_info": {"name": "python", "pygments_lexer": "ipython3"}}


def link(text, pages, targets, top):
    """Point nbdev's links at this site, at a symbol or its page; and links to explorer pages at copies, found by way of `top`."""
    def local(match):
        target = f"{match[1]}:{match[2]}"
        return f"](#{target})" if target in targets else f"](/{pages[match[1]]})"
    return EXPLORER.sub(rf'<a href="{top}explorer/\2">\1</a>', SYMBOL.sub(local, text))


def toctree(names):
    """Return the cell that lists the pages: part by part, each in the order of its numbers."""
    parts = {}
    def place(name): return [int(digits or -1) for digits in re.findall(r"(?:^|/)(\d*)", name)], name
    for name in sorted(names - {"index"}, key=place): parts.setdefault(os.path.dirname(name), []).append(name)
    def caption(part): return re.sub(r"^\d+_", "", part).replace("_", " ").capitalize() or "Pages"
    return nbformat.v4.new_markdown_cell("\n\n".join(
        f"```{{toctree}}\n:hidden:\n:caption: {caption(part)}\n\n" + "\n".join(members) + "\n```"
        for part, members in sorted(parts.items())))


def for_phones(site):
    """Let narrow screens have the picture that was drawn for them, where `figures/` holds one beside the wide one."""
    phones = {p.stem.removesuffix("_phone"): p for p in Path("figures").rglob("*_phone.png")}
    def picture(match):
        name = match[2]
        if name not in phones: return match[0]
        shutil.copy(phones[name], site / "_images")
        return f'<picture><source media="(max-width: 600px)" srcset="{match[1]}{phones[name].name}">{match[0]}</picture>'
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        if "_images/" in text: path.write_text(PICTURE.sub(picture, text), encoding="utf-8")


def weights(site):
    """Return the bytes of each page with its own pictures, the heaviest first; what all pages share is left out."""
    found = {}
    for path in site.rglob("*.html"):
        if "_static" in path.relative_to(site).parts: continue
        names = set(re.findall(r'(?:src|srcset)="([^":]+\.(?:png|jpg|svg))"', path.read_text(encoding="utf-8")))
        found[path.relative_to(site).as_posix()] = path.stat().st_size + sum((path.parent / n).stat().st_size for n in names)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def weigh(site):
    """Print what the first page and the heaviest weigh, and return 1 if one is too heavy."""
    found = weights(site)
    heavy = [name for name, size in found.items() if size > (FIRST_WEIGHT if name == "index.html" else PAGE_WEIGHT)]
    print(f"{len(found)} pages; with their own pictures, in kB:")
    for name in ["index.html", *[n for n in found if n != "index.html"][:10]]: print(f"{found[name] / 1000:8,.0f}  {name}")
    for name in heavy: print(f"{name} is too heavy: {found[name] / 1000:,.0f} kB", file=sys.stderr)
    return bool(heavy)


def main():
    """Build the site and return the exit status."""
    os.chdir(Path(__file__).parent.parent)
    warnings.filterwarnings("error", module="nbdev")
    gc.set_threshold(200_000, 50, 1000)  # nearly all that is made is kept to the end, and looking for the rest takes a third of the time
    # One process, so that what all the notebooks import is imported once; no cache, so that no page is out of date.
    folder = proc_nbs(force=True, n_workers=0)
    notebooks = {path: nbformat.read(path, as_version=4) for path in sorted(folder.rglob("*.ipynb"))}
    pages = {}  # by the name that nbdev links to: the notebook's without its number, which the site keeps
    for path, nb in notebooks.items():
        page = _nbpath2html(path.relative_to(folder)).with_suffix("").as_posix()
        pages[page] = path.relative_to(folder).as_posix()
        convert(nb, page, Path("nbs") / path.relative_to(folder))
    notebooks[folder / "index.ipynb"].cells.append(toctree({name.removesuffix(".ipynb") for name in pages.values()}))
    markdown = [cell for nb in notebooks.values() for cell in nb.cells if cell.cell_type == "markdown"]
    targets = {name for cell in markdown for name in TARGET.findall(cell.source)}
    for path, nb in notebooks.items():
        top = "../" * (len(path.relative_to(folder).parts) - 1)
        for cell in nb.cells:
            if cell.cell_type == "markdown": cell.source = link(cell.source, pages, targets, top)
            for output in cell.get("outputs", []):
                if "text/markdown" in output.get("data", {}):
                    output.data["text/markdown"] = link(output.data["text/markdown"], pages, targets, top)
        nbformat.write(nb, path)

    site = folder / ".sphinx/html"  # MyST-NB leaves a folder of its own beside this one
    status = build_main(["-W", "--keep-going", "-q", "-c", "docs", "-d", f"{site}/../doctrees", str(folder), str(site)])
    shutil.copytree("figures/explorer", site / "explorer", dirs_exist_ok=True)
    for_phones(site)
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        for match in ELSEWHERE.finditer(path.read_text(encoding="utf-8")):
            print(f"{path} loads from another host: {match[0]}", file=sys.stderr)
            status = 1
    status = status or weigh(site)
    if status == 0:
        shutil.rmtree("_docs", ignore_errors=True)
        shutil.move(site, "_docs")
    return status


if __name__ == "__main__":
    status = main()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)  # each notebook had a shell, and all these shells' farewells take longer than the build
