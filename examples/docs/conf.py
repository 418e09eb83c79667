"""How Sphinx builds the site: `make docs`. It needs nothing from the network."""

from __future__ import annotations

import re
from importlib.metadata import version as installed_version
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "hf_flerm"
author = "The hf_flerm authors"
project_copyright = author
release = version = installed_version("hf_flerm")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = "hf_flerm"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

nitpicky = True
# What other projects document; their inventories would have to be downloaded.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(accelerate|collections|dataclasses|datasets|huggingface_hub|matplotlib|nn|numpy|os|pathlib|torch|transformers|typing)\..*",
    ),
    (r"py:.*", r"[A-Z]\w*"),
    (r"py:.*", r"hf_flerm\.rates\.(totals\.\w+|measurement\.Key)"),  # inner parts
]


def visit_math(self: Any, node: nodes.math) -> None:
    """Write a formula as MathML, which browsers show without a script."""
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self: Any, node: nodes.math_block) -> None:
    """Write a formula on lines of its own."""
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>\n')
    raise nodes.SkipNode


def plain_google(
    app: Any, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Tell napoleon what our docstrings mean: code is in single backticks or indented, a colon in `Returns` is no type."""
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", "\n".join(lines))
    text = re.sub(r"^(Returns|Yields):\n( +)", r"\1:\n\2: ", text, flags=re.MULTILINE)
    text = re.sub(r":\n\n(?= {4}\S)", "::\n\n", text)
    lines[:] = ((": " if what == "property" else "") + text).split("\n")


def setup(app: Any) -> None:
    """Add the renderer of formulas and the reader of docstrings."""
    app.connect("autodoc-process-docstring", plain_google, priority=100)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
