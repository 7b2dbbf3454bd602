"""README's Python examples run in order, forget, and keep their budget."""

import pathlib
import re

import jax

from tests import readme_given

ROOT = pathlib.Path(__file__).parent.parent


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_examples_forget_within_their_budget(tmp_path, monkeypatch):
    """Each from the trained parameters on, with the names of those before it."""
    monkeypatch.chdir(tmp_path)
    names = {name: value for name, value in vars(readme_given).items() if not name.startswith("_")}
    whole = {"forget": readme_given.forget, "retain": readme_given.retain, "key": jax.random.key(0)}
    blocks = examples()
    assert blocks
    for block in blocks:
        names["params"] = readme_given.params
        exec(block, names)
        budget = float(re.search(r"\bBudget\(([\d.]+)", block).group(1))
        before, after = (
            names["losses_fn"](params, whole) for params in (readme_given.params, names["params"])
        )
        assert after.forget < 0.5 * before.forget
        # A tenth more is what the batches of so small a problem cannot tell.
        assert 0 < after.retain - before.retain <= 1.1 * budget
