"""No unlearning at all: a network learns new digits while its loss on the old ones may rise by a budget.

python -m experiments.hosts.continual [picture.png]
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import eupmu_jax as eu
from eupmu_jax.objectives import cross_entropy
from experiments.hosts import task
from experiments.hosts.optax_alone import initial, predict

STEPS, TOTAL = 400, 0.1
CONSTRAINTS = {
    # A multiplier that starts at 0 and stays there: the old digits do not count.
    "new digits alone": (eu.Tolerance(0.0, dual_optimizer=optax.set_to_zero()), 0.0),
    f"under a budget of {TOTAL}": (eu.Budget(TOTAL), 1.0),
}


def load() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """The digits 0 to 4 and 5 to 9, each in images to train on and unseen ones."""
    x, y = (np.concatenate([part[name] for part in task.SETS.values()]) for name in "xy")
    unseen = np.random.default_rng(0).uniform(size=len(y)) < 0.25
    part = lambda chosen: {"x": x[chosen], "y": y[chosen]}
    return {
        name: {"train": part(rows & ~unseen), "test": part(rows & unseen)}
        for name, rows in {"old": y < 5, "new": y >= 5}.items()
    }


def loss(params: Any, rows: Any) -> jax.Array:
    return cross_entropy(predict(params, rows["x"]), rows["y"]).mean()


def losses_fn(params: Any, batch: Any) -> eu.Losses:
    """What is minimised comes first, whether it forgets or learns."""
    return eu.Losses(forget=loss(params, batch["forget"]), retain=loss(params, batch["retain"]))


def learned(rows: Any) -> Any:
    """A network trained on the old digits, with outputs for all ten."""
    nothing, multiplier = CONSTRAINTS["new digits alone"]
    return eu.unlearn(
        losses_fn, initial(), rows, rows, optax.adam(3e-3), nothing, steps=300, initial_multiplier=multiplier
    )[0]


def main(picture: str = "continual.png") -> dict[str, eu.History]:
    data = load()
    before = learned(data["old"]["train"])

    @jax.jit
    def measured(params):
        right = lambda rows: jnp.mean(jnp.argmax(predict(params, rows["x"]), -1) == rows["y"])
        accuracies = {name: right(data[name]["test"]) for name in data}
        return accuracies | {"loss": loss(params, data["old"]["train"])}

    evaluate = lambda params: {name: float(value) for name, value in measured(params).items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    found, was = {}, evaluate(before)
    for color, (name, (constraint, multiplier)) in zip(("C1", "C0"), CONSTRAINTS.items(), strict=True):
        params, found[name] = eu.unlearn(
            losses_fn, before, data["new"]["train"], data["old"]["train"], optax.adam(1e-3), constraint,
            steps=STEPS, initial_multiplier=multiplier, evaluate=evaluate, every=10,
        )  # fmt: skip
        now = evaluate(params)  # what a budget took back at the end included
        change = lambda which, now=now: f"{was[which]:.1%} -> {now[which]:.1%}"
        print(f"{name}: unseen old digits {change('old')}, unseen new digits {change('new')}")
        print(f"  The loss on the old digits rose by {now['loss'] - was['loss']:.3f} nats.")
        seen = {key: [row[key] for row in found[name].evaluations] for key in ("step", "loss", *data)}
        left.plot(seen["step"], np.subtract(seen["loss"], was["loss"]), color, label=name)
        right.plot(seen["step"], seen["old"], color, label=f"old, {name}")
        right.plot(seen["step"], seen["new"], color, linestyle="--", label=f"new, {name}")
    print(eu.verdict(list(found.values())[-1].promise))
    left.axhline(TOTAL, color="black", linestyle=":", label="the budget")
    left.set(xlabel="step", ylabel="rise of the old digits' loss, nats")
    right.set(xlabel="step", ylabel="accuracy on unseen images", ylim=(0, 1))
    left.legend()
    right.legend(fontsize="small")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
