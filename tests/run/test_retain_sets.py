"""Several retain sets, one for each utility, of their own lengths and batch sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eupmu_jax as eu
from eupmu_jax.run.batches import in_order, retain_sets

RNG = np.random.default_rng(0)
FORGET = RNG.normal(size=(30, 3)).astype(np.float32)
LONG, SHORT = (
    {"x": RNG.normal(size=(n, 3)).astype(np.float32), "y": RNG.normal(size=n).astype(np.float32)}
    for n in (50, 7)
)
PARAMS = {"w": jnp.ones(3)}


def squares(params, rows):
    return jnp.mean((rows["x"] @ params["w"] - rows["y"]) ** 2)


def losses_fn(params, batch):
    retain = batch["retain"]
    parts = retain.values() if isinstance(retain, dict) else retain
    forget = jnp.mean((batch["forget"] @ params["w"]) ** 2)
    return eu.Losses(forget, jnp.stack([squares(params, rows) for rows in parts]))


def unlearned(retain, batch_size=5, fn=losses_fn, constraint=None, **settings):
    return eu.unlearn(
        fn, PARAMS, FORGET, retain, optax.sgd(0.01), constraint or eu.Budget(0.5),
        **{"steps": 6, "batch_size": batch_size} | settings,
    )  # fmt: skip


@pytest.mark.parametrize("batch_size", [5, (8, 5), (8, [10, 3])])
def test_a_list_of_sets(batch_size):
    _, history = unlearned([LONG, SHORT], batch_size)
    assert history.steps["multiplier"].shape == (6, 2)


@pytest.mark.parametrize("batch_size", [5, (8, {"short": 3, "long": 10})])
def test_a_dict_of_sets(batch_size):
    _, history = unlearned({"long": LONG, "short": SHORT}, batch_size)
    assert history.steps["multiplier"].shape == (6, 2)


@pytest.mark.parametrize("names", [("short", "long"), ("long", "short"), ("b", "a")])
def test_utilities_of_a_dict_are_in_the_order_of_its_sorted_keys(names, tmp_path):
    """In which JAX hands the dict to losses_fn, however it was written."""
    sets = dict(zip(names, (SHORT, LONG), strict=True))
    baseline = unlearned(sets, (8, dict.fromkeys(names, 3)))[1].promise.baseline
    np.testing.assert_allclose(baseline, [squares(PARAMS, sets[name]) for name in sorted(names)], rtol=1e-5)


@pytest.mark.parametrize("retain", [[LONG], {"a": LONG}])
def test_one_set_with_a_size_of_its_own_stays_in_its_container(retain):
    sizes = [10] if isinstance(retain, list) else {"a": 10}
    assert unlearned(retain, (8, sizes))[1].steps["multiplier"].shape == (6, 1)


def test_batches_have_the_sizes_of_their_sets():
    shapes = []

    def fn(params, batch):
        shapes.append([rows["x"].shape[0] for rows in batch["retain"]])
        return losses_fn(params, batch)

    unlearned([LONG, SHORT], (8, [10, 3]), fn)
    assert all(sizes in ([10, 3], [10, 1]) for sizes in shapes)


def test_the_baseline_of_each_utility_is_the_mean_of_its_whole_set(tmp_path):
    import json

    unlearned([LONG, SHORT], (8, [10, 3]), folder=tmp_path)
    baseline = json.loads((tmp_path / "run.json").read_text())["constraint"]["baseline"]
    np.testing.assert_allclose(baseline, [squares(PARAMS, LONG), squares(PARAMS, SHORT)], rtol=1e-6)


@pytest.mark.parametrize("sizes", [[10, 3], [50, 7], [1, 7], [7, 2]])
def test_every_row_counts_once(sizes):
    seen = [[], []]
    for batches, amounts in in_order(retain_sets([LONG, SHORT], sizes)):
        for part, rows, amount in zip(seen, batches, amounts, strict=True):
            part += rows["y"][:amount].tolist()
            assert len(rows["y"]) >= amount
    assert seen[0] == LONG["y"].tolist()
    assert seen[1] == SHORT["y"].tolist()


def test_one_set_in_a_dict_or_list_stays_one_set():
    """Columns of one length: their rows belong together."""
    for retain in (LONG, [LONG["x"], LONG["y"]], {"nested": LONG}):
        assert len(retain_sets(retain, 5).sets) == 1
    seen = []
    fn = lambda params, batch: eu.Losses(squares(params, batch["retain"]), squares(params, batch["retain"]))
    _, history = unlearned(LONG, fn=fn, callbacks=[lambda params, metrics: seen.append(metrics)])
    assert history.steps["multiplier"].shape == (6,)


def test_sets_of_one_length_may_be_drawn_together_or_apart():
    other = jax.tree.map(lambda leaf: leaf[::-1].copy(), LONG)
    for batch_size in (5, (5, [5, 4])):
        assert unlearned([LONG, other], batch_size)[1].steps["multiplier"].shape == (6, 2)


def test_functions_among_the_sets():
    draw = lambda step: jax.tree.map(lambda leaf: leaf[step : step + 5], LONG)
    constraint = eu.Budget([0.5, 0.5], baseline=[4.0, 4.0])
    assert unlearned([draw, SHORT], constraint=constraint)[1].steps["multiplier"].shape == (6, 2)


@pytest.mark.parametrize(
    ("retain", "batch_size", "fn", "message"),
    [
        ([LONG, SHORT], (8, [10]), losses_fn, "one for each retain set"),
        ([LONG, SHORT], (8, {"a": 1, "b": 2}), losses_fn, "one for each retain set"),
        ([LONG, SHORT], (8, [10, 8]), losses_fn, r"batch_size 8 is larger than the retain\[1\] set"),
        (LONG, (8, [1, 2, 3]), losses_fn, "one for each retain set"),
        ({"a": LONG, "b": {"x": np.zeros((0, 3)), "y": np.zeros(0)}}, 5, losses_fn,
         r"retain\['b'\] is empty"),
        ([LONG, SHORT], 5, lambda params, batch: eu.Losses(jnp.sum(params["w"]), jnp.sum(params["w"])),
         r"retain holds 2 sets, .* shape \(2,\), got \(\)"),
        ({"x": np.zeros((9, 3)), "y": np.zeros(8)}, 5,
         lambda params, batch: eu.Losses(*[jnp.sum(params["w"])] * 2), "arrays of one set have one length"),
    ],
)  # fmt: skip
def test_bad_sets(retain, batch_size, fn, message):
    with pytest.raises(ValueError, match=message):
        unlearned(retain, batch_size, fn)


def test_resumed(tmp_path):
    def interrupt(params, metrics):
        if metrics["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unlearned([LONG, SHORT], folder=tmp_path, every=2, callbacks=[interrupt])
    resumed = unlearned([LONG, SHORT], folder=tmp_path, every=2)[0]
    np.testing.assert_array_equal(resumed["w"], unlearned([LONG, SHORT], every=2)[0]["w"])
