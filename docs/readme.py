"""Write README.md from nbs/index.ipynb, without Quarto; `--check` only tells whether it is in step."""
import posixpath
import re
import sys
from pathlib import Path

import nbformat

DIRECTIVE = re.compile(r"^#\|[ \t]*([\w-]+)(?::[ \t]*(\S+))?.*\n?", re.MULTILINE)
TARGET = re.compile(r"(?<=\]\()(?:\.\./[^)\s]+|[\w./-]+\.ipynb)")


def rooted(text):
    """Make links that start in nbs/ start in the folder above it."""
    return TARGET.sub(lambda match: posixpath.normpath(posixpath.join("nbs", match[0])), text)


def fenced(text, language=""):
    """Return text in a fence that none of its own can close."""
    fence = "`" * max([3] + [len(run) + 1 for run in re.findall("`{3,}", text)])
    return f"{fence}{language}\n{text}\n{fence}"


def shown(output):
    """Return an output as markdown; pictures, errors and what went to stderr are left out."""
    data = output.get("data", {})
    if any(kind.startswith("image/") for kind in data): return ""
    if "text/markdown" in data: return rooted(data["text/markdown"])
    text = output.text if output.get("name") == "stdout" else data.get("text/plain", "")
    return fenced(text.strip("\n")) if text.strip() else ""


def pieces(cell):
    """Yield the parts of the README that a cell becomes."""
    directives = dict(DIRECTIVE.findall(cell.source))
    if cell.cell_type == "markdown": yield rooted(cell.source)
    if cell.cell_type != "code" or "hide" in directives: return
    if directives.get("echo") != "false": yield fenced(DIRECTIVE.sub("", cell.source).strip("\n"), "python")
    yield from map(shown, cell.outputs)


def main():
    """Write README.md, or with `--check` exit with 1 if that would change it."""
    root = Path(__file__).parent.parent
    cells = nbformat.read(root / "nbs/index.ipynb", as_version=4).cells
    text = "\n\n".join(piece.strip() for cell in cells for piece in pieces(cell) if piece.strip()) + "\n"
    readme = root / "README.md"
    if "--check" not in sys.argv[1:]: readme.write_text(text, encoding="utf-8")
    elif not readme.exists() or readme.read_text(encoding="utf-8") != text:
        sys.exit("README.md is not what nbs/index.ipynb says; run `python docs/readme.py` and commit the result.")


if __name__ == "__main__":
    main()
