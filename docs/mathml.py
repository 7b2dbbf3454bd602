"""Formulas as MathML: they need neither a script nor a network, and a wrong one fails the build."""

from docutils import nodes
from math_core import LatexToMathML
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

CONVERTER = LatexToMathML()


def inline(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(CONVERTER.convert_with_local_state(node.astext(), displaystyle=False))
    raise nodes.SkipNode


def display(writer: HTML5Translator, node: nodes.math_block) -> None:
    # A blank line separates formulas, as it does for Sphinx.
    for formula in node.astext().strip().split("\n\n"):
        if "\\\\" in formula or "&" in formula:
            formula = f"\\begin{{aligned}}{formula}\\end{{aligned}}"
        markup = CONVERTER.convert_with_local_state(formula, displaystyle=True)
        writer.body.append(f'<div class="math">{markup}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
