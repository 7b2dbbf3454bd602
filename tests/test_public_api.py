"""What the package promises at its surface: documented names, a small state, strict arithmetic."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import eupmu_jax as eu
import eupmu_jax.flax
from eupmu_jax import evaluation, objectives
from eupmu_jax.flax import TrainState

ROOT = pathlib.Path(__file__).parent.parent

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (eu, evaluation, objectives)
    for name in module.__all__
} | {
    f"eupmu_jax.flax.{name}": thing
    for name, thing in vars(eupmu_jax.flax).items()
    if getattr(thing, "__module__", None) == "eupmu_jax.flax" and not name.startswith("_")
}
METHODS = {f"TrainState.{name}": getattr(TrainState, name) for name in ("create", "apply_gradients")}
RITUALS = re.compile(r"^\s*(Source: (ours|standard)\b|Raises:\s+Nothing|Returns:\s+None)", re.MULTILINE)


def entries(doc: str, section: str) -> list[str]:
    """The names that a section describes, in order; "a, b: ..." describes two."""
    body = re.search(rf"^{section}:\n((?:  .*\n|\n)*)", doc + "\n", re.MULTILINE)
    heads = re.findall(r"^  (\*{0,2}\w+(?:, \*{0,2}\w+)*): ", body.group(1), re.MULTILINE) if body else []
    return [name for head in heads for name in head.split(", ")]


def in_signature(thing) -> list[str]:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    # The class of NNX modules hides their own signature.
    made_by = vars(thing).get("__init__", thing) if inspect.isclass(thing) else thing
    parameters = inspect.signature(made_by).parameters.values()
    return [stars.get(each.kind, "") + each.name for each in parameters if each.name != "self"]


@pytest.mark.parametrize("name", PUBLIC | METHODS)
def test_docstring_describes_what_the_signature_takes(name):
    thing = (PUBLIC | METHODS)[name]
    doc = inspect.getdoc(thing)
    assert doc
    summary, *rest = doc.split("\n")
    assert summary.endswith(".")
    assert rest[:1] in ([], [""]), "the summary is one line"
    described = entries(doc, "Args") + (entries(doc, "Attributes") if inspect.isclass(thing) else [])
    assert described == in_signature(thing)
    assert not RITUALS.findall(doc)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_has_an_example(name):
    """Which runs as a doctest."""
    _, found, example = inspect.getdoc(PUBLIC[name]).partition("\nExample:\n")
    assert found
    assert ">>> " in example


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if not inspect.isclass(thing)])
def test_docstring_says_what_is_returned(name):
    doc = inspect.getdoc(PUBLIC[name])
    returns_nothing = inspect.signature(PUBLIC[name]).return_annotation is None
    assert ("\nReturns:\n" in doc) != returns_nothing


def test_state_is_small_and_made_of_arrays():
    params = {"w": jnp.ones((100, 100))}
    losses_fn = lambda params, batch: eu.Losses(1.0, jnp.ones(3))
    for constraint, most in ((eu.Tolerance(0.0), 22), (eu.Budget(1.0), 40)):
        tx = eu.eupmu(losses_fn, optax.sgd(0.1), constraint, initial_multiplier=jnp.ones(3))
        leaves = jax.tree.leaves(tx.init(params))
        assert all(isinstance(leaf, jax.Array) and not leaf.weak_type for leaf in leaves)
        assert sum(leaf.size for leaf in leaves) <= most


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("utilities", [(), (3,)])
@pytest.mark.parametrize("log_losses", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_own_arithmetic_is_strict(utilities, log_losses, dtype):
    """Every transformation under strict dtype and rank promotion, in mixed precision."""
    params = {"w": jnp.ones((2, 3), dtype)}
    eps, multiplier, batch = jnp.zeros(utilities), jnp.ones(utilities), jnp.float32(2)

    def losses_fn(params, batch):
        retain = jnp.sum(params["w"] ** 2).astype(jnp.float32)
        return eu.Losses(jnp.sum(params["w"]), jnp.broadcast_to(retain, utilities) * batch)

    def tolerance(measure):
        return eu.Tolerance(eps, measure=measure, dual_optimizer=optax.sgd(0.1), log_losses=log_losses)

    budget = eu.Budget(jnp.ones(utilities), baseline=jnp.full(utilities, 12.0))
    for constraint in (*map(tolerance, ("lookahead", "lagged", "directional")), budget):
        tx = eu.eupmu(losses_fn, optax.sgd(0.1), constraint, initial_multiplier=multiplier)
        state = tx.init(params)
        for _ in range(2):
            _, state = jax.jit(tx.update)(params, state, params, batch=batch)
        assert int(eu.surgery_info(state).skipped_steps) == 0
    for constraint in (tolerance("lagged"), budget):
        surgery = eu.implicit_surgery(constraint, initial_multiplier=multiplier)
        state = surgery.init(params)
        losses, grads = surgery.value_and_grad(losses_fn)(params, batch, state)
        surgery.update(grads, state, params, losses=losses)
    losses, forget_grads, retain_grads = eu.forget_and_retain_grads(losses_fn)(params, batch)
    for constraint in (eu.Tolerance(eps), budget):
        exact = eu.explicit_surgery(constraint)
        given = {"retain_grads": retain_grads, "losses": losses}
        exact.update(forget_grads, exact.init(params), params, **given)


@pytest.mark.parametrize("page", ["experiments/classification/README.md", "experiments/knobs/README.md"])
def test_tables_show_the_committed_results(page):
    """Every row of figures in a README stands in a committed table."""
    rows = lambda path: {
        " | ".join(cell.strip() for cell in line.strip("|").split("|"))
        for line in path.read_text().splitlines()
        if line.startswith("|")
    }
    committed = set().union(*map(rows, (ROOT / "experiments").glob("*/results/**/tables.md")))
    of_figures = re.compile(r"[^|]+(\| [\d.±/() -]+)+")
    figures = {row for row in rows(ROOT / page) if of_figures.fullmatch(row) and "." in row}
    assert len(figures) > 15
    assert not figures - committed
