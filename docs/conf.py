"""Sphinx settings of the site; docs/build.py prepares the pages and starts the build."""
import re
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes

settings = ConfigParser()
settings.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")
project = html_title = settings["DEFAULT"]["title"]
author = settings["DEFAULT"]["author"]
version = release = settings["DEFAULT"]["version"]
copyright = author

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]  # the last brings MathJax into the site
nb_execution_mode = "off"  # the notebooks hold their outputs
nb_ipywidgets_js = {}  # no notebook shows a widget, and these scripts would come from another host
nb_render_markdown_format = "myst"
nb_code_prompt_show, nb_code_prompt_hide = "show code", "hide code"
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath", "html_image"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # show_doc heads with ### whatever level comes before

templates_path = ["_templates"]
html_static_path = ["_static"]
html_js_files = ["sortable.js"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_theme = "pydata_sphinx_theme"
html_sidebars = {"**": ["all-pages.html"]}
html_context = {"default_mode": "auto"}  # the theme complains in the console if it is left out
html_theme_options = {
    "navbar_center": [],
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_copy_source = html_show_sourcelink = False
html_show_search_summary = False  # summaries are fetched page by page, which browsers refuse where pages are opened as files


def keep_places(app, doctree):
    """Give each entry of the index a place of its own; in front of raw HTML or a cell its id would not be written."""
    for node in list(doctree.findall(nodes.Element)):
        ids = [name for name in node.get("ids", []) if re.fullmatch(r"index-\d+", name)]
        if ids and not isinstance(node, nodes.target):
            node["ids"] = [name for name in node["ids"] if name not in ids]
            node.parent.insert(node.parent.index(node), nodes.target("", "", ids=ids))


def setup(app):
    app.connect("doctree-read", keep_places)
