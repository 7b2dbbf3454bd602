"""The site: sphinx-build -W docs build/docs, which needs no network."""

import pathlib
import shutil
import sys

from sphinx.application import Sphinx

import eupmu_jax

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))  # for mathml.py
# The studies' own pages are the site's pages on them. Sphinx takes no document from outside of its folder.
shutil.rmtree(HERE / "experiments", ignore_errors=True)
for source in (HERE.parent / "experiments").rglob("*"):
    if source.suffix in (".csv", ".md", ".png", ".py"):
        copy = HERE / source.relative_to(HERE.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy)

project = "eupmu_jax"
author = "the eupmu_jax authors"
project_copyright = author
version = release = eupmu_jax.__version__

extensions = [
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = "index"

# A single backtick in a docstring names something of the package.
default_role = "py:obj"
highlight_language = "text"
smartquotes = False  # they would change what stands between them in a docstring
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
add_module_names = False

myst_enable_extensions = ["dollarmath", "attrs_block", "deflist"]
myst_heading_anchors = 3
# Sphinx reads a page again when the page has changed: build into a new folder to run all notebooks.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 1800
nb_merge_streams = True

html_title = f"eupmu_jax {release}"
html_theme = "furo"
pygments_dark_style = "monokai"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"sidebar_hide_name": False}
copybutton_exclude = ".linenos, .gp, .go"

linkcheck_ignore = [r"https?://"]


def setup(app: Sphinx) -> None:
    app.connect("source-read", as_page_of_the_site)


def as_page_of_the_site(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links lead to the copies of the studies; tables are reached from their pages, not by searching."""
    if not docname.startswith("experiments/"):
        source[0] = source[0].replace("../experiments/", "experiments/")
        return
    source[0] = source[0].replace("../docs/", "../")
    if "/results/" in docname:
        source[0] = "---\norphan: true\nnosearch: true\n---\n" + source[0]
