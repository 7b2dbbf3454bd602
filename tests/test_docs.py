"""The site: every public name has its entry, and the code of the guides runs."""

import pathlib
import re

import pytest

from tests.test_public_api import METHODS, PUBLIC

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = sorted(
    path for room in ("start", "choose", "guides", "method", "api") for path in (DOCS / room).glob("*.md")
)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(<?([^)\s>#:]+)(?:#[^)\s]*)?>?\)|^```\{figure\} (\S+)$", re.MULTILINE)
WITH_CODE = {path.stem: blocks for path in PAGES if (blocks := BLOCK.findall(path.read_text()))}


def test_every_public_name_has_one_entry():
    entries = []
    for page in (DOCS / "api").glob("*.md"):
        entries += re.findall(r"^\.\. auto(?:class|function):: (\S+)$", page.read_text(), re.MULTILINE)
    assert sorted(entries) == sorted(PUBLIC)


def test_methods_are_shown():
    names = {name.partition(".")[2] for name in METHODS}
    (shown,) = re.findall(r"TrainState\n +:members: (.*)", (DOCS / "api" / "flax.md").read_text())
    assert set(shown.split(", ")) == names


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """Its blocks in order, in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in WITH_CODE[page]:
        exec(block, names)


def test_every_page_is_reached_from_the_index():
    toctrees = re.findall(
        r"^```\{toctree\}\n(.*?)^```$", (DOCS / "index.md").read_text(), re.DOTALL | re.MULTILINE
    )
    listed = {line for tree in toctrees for line in tree.splitlines() if line and not line.startswith(":")}
    root = DOCS.parent
    studies = {str(path.relative_to(root).with_suffix("")) for path in root.glob("experiments/**/README.md")}
    own = {str(path.relative_to(DOCS).with_suffix("")) for path in PAGES if path.parent.name != "api"}
    assert own | studies <= listed


def test_links_lead_to_what_is_kept():
    """In a checkout and on the site, whose copy of the studies is not kept."""
    root = DOCS.parent
    kept = [*root.glob("*.md"), *PAGES, *DOCS.glob("*.md"), *root.glob("experiments/**/*.md")]
    links = [(page, a or b) for page in kept for a, b in LINK.findall(page.read_text())]
    assert len(links) > 100
    targets = [(page, (page.parent / link).resolve()) for page, link in links]
    assert not [
        (str(page), str(target))
        for page, target in targets
        if not target.exists() or target.is_relative_to(DOCS / "experiments")
    ]
