"""Wrong arguments by the hundred: each is refused by this package, in words, before anything is lost."""

import pathlib
import traceback
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eupmu_jax as eu

PACKAGE = pathlib.Path(eu.__file__).parent
ROWS = np.ones((20, 3), np.float32)


def losses_fn(params, batch):
    forget, retain = (jnp.mean((rows @ params["w"] - 1) ** 2) for rows in (batch["forget"], batch["retain"]))
    return eu.Losses(forget, retain)


GOOD = {
    "losses_fn": losses_fn,
    "params": {"w": jnp.ones(3)},
    "forget": ROWS,
    "retain": ROWS,
    "inner": optax.sgd(0.1),
    "steps": 2,
    "batch_size": 4,
}
loss = lambda params: jnp.sum(params["w"])
NOT_A_COUNT = [0, -1, 1.5, "ten", np.nan, [3], {}, 2 + 1j, object()]
BAD = {
    "losses_fn": [
        None,
        3,
        "losses_fn",
        lambda params, batch: loss(params),
        lambda params, batch: (loss(params), loss(params)),
        lambda params, batch: {"forget": loss(params), "retain": loss(params)},
        lambda params, batch: eu.Losses(params["w"], loss(params)),
        lambda params, batch: eu.Losses(loss(params), jnp.ones((2, 2))),
        lambda params, batch: eu.Losses(loss(params), None),
        lambda params, batch: eu.Losses("high", loss(params)),
        lambda params, batch: eu.Losses(loss(params), 1j * loss(params)),
        lambda params, batch: eu.Losses(jnp.int32(3), loss(params)),
        lambda params, batch: eu.Losses(loss(params), jnp.zeros(0)),
        lambda params, batch: eu.Losses(eu.Mean(loss(params), None), loss(params)),
        lambda params, batch: eu.Losses(eu.Mean(loss(params), jnp.ones(5)), loss(params)),
    ],
    "params": [
        None,
        {},
        [],
        3,
        "w",
        {"w": "weights"},
        {"w": None},
        {"w": jnp.ones(3, jnp.int32)},
        {"w": jnp.ones(3, jnp.complex64)},
        {"w": np.array(["a", "b"])},
        {"w": object()},
    ],
    "forget": [
        None,
        {},
        [],
        3.0,
        "images",
        np.zeros((0, 3)),
        np.ones((3, 3)),
        {"x": ROWS, "y": np.ones(19)},
        {"x": ROWS, "y": np.float32(1)},
        np.array([["a"] * 3] * 20),
        np.array([object()] * 20),
        lambda step: 1 / 0,
        lambda: ROWS[:4],
        lambda step: ROWS[: 4 + step],
        lambda step: None if step else ROWS[:4],
        lambda step: ["a"],
    ],
    "inner": [None, 0.1, "adam", optax.sgd, jax.nn.relu],
    "steps": [None, *NOT_A_COUNT],
    "batch_size": [None, *NOT_A_COUNT, 21, (4,), (4, 4, 4), (4, 0), (4, "four"), (4, 21)],
    "seed": [None, -1, 1.5, "zero", [1, 2]],
    "every": NOT_A_COUNT,
    "epochs": [1, "two", -1.0],
    "evaluate": [3, "accuracy", {}],
    "score": [3, "accuracy"],
    "stop": [3, "early"],
    "callbacks": [3, "print", [3], print],
    "folder": [3, object(), "/dev/null", "/proc/nowhere"],
    "mesh": ["data", 8, (8,)],
    "trainable": [3, "w", lambda path: False],
    "constraint": [None, 0.1, "budget", (0.1,), eu.Budget, {"total": 0.1}],
    "initial_multiplier": [-1.0, np.nan, "one", np.ones((2, 2)), np.zeros(0), np.ones(2), None],
    # Of a Tolerance, then of a Budget.
    "measure": [None, "", "ahead", 3],
    "eps": [np.nan, "tight", np.ones(2), None, 1j],
    "dual_optimizer": [3, "adam", optax.adam],
    "total": [0.0, -0.1, np.nan, np.inf, "all", np.ones(2), [[0.1]], 1j],
    "baseline": [np.inf, np.nan, "low", np.ones(2), [[0.1]]],
}
OF_TOLERANCE, OF_BUDGET = {"measure", "eps", "dual_optimizer"}, {"total", "baseline"}
# Columns of different lengths could be two retain sets: losses_fn is asked, see test_retain_sets.py.
BAD["retain"] = [value for value in BAD["forget"] if not isinstance(value, dict) or not value]


def inputs(amount):
    """Every bad value alone, then pairs of them at random."""
    single = [{name: value} for name, values in BAD.items() for value in values]
    rng = np.random.default_rng(0)
    while len(single) < amount:
        first, second = (list(BAD)[i] for i in rng.choice(len(BAD), 2, replace=False))
        pair = {name: BAD[name][rng.integers(len(BAD[name]))] for name in (first, second)}
        constraints = [bool(names & pair.keys()) for names in ({"constraint"}, OF_TOLERANCE, OF_BUDGET)]
        # Two constraints cannot be given at once; epochs are wrong with steps only.
        if sum(constraints) < 2 and {"epochs", "steps"} != set(pair):
            single.append(pair)
    return single


def constraint_of(settings):
    """The constraint that is given, or made of the fields that are; made here, it may raise."""
    if "constraint" in settings:
        return settings.pop("constraint")
    fields = lambda names: {name: settings.pop(name) for name in names if name in settings}
    if OF_TOLERANCE & settings.keys():
        return eu.Tolerance(**{"eps": 0.1} | fields(OF_TOLERANCE))
    return eu.Budget(**{"total": 0.1} | fields(OF_BUDGET))


INPUTS = inputs(520)
PARTS = 8


@pytest.mark.parametrize("part", range(PARTS))
def test_bad_input_is_refused_in_words(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = Counter()
    for number, bad in list(enumerate(INPUTS))[part::PARTS]:
        shown = {name: str(value)[:40] for name, value in bad.items()}
        settings = {"folder": tmp_path / str(number)} | GOOD | bad
        args = [settings.pop(name) for name in ("losses_fn", "params", "forget", "retain", "inner")]
        try:
            eu.unlearn(*args, constraint_of(settings), **settings)
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = pathlib.Path(frames[-1].filename).is_relative_to(PACKAGE)
            words = {"losses_fn": "oss", "initial_multiplier": "multiplier", "folder": "folder"}
            named = any(words.get(name, name) in str(error) for name in bad)
            if not ours or not named:
                wrong[f"{shown}: {type(error).__name__} from {frames[-1].filename}: {str(error)[:100]}"] += 1
        except Exception as error:
            wrong[f"{shown}: {type(error).__name__}: {str(error)[:100]}"] += 1
        else:
            wrong[f"{shown}: accepted"] += 1
    assert not wrong, "\n" + "\n".join(wrong)
