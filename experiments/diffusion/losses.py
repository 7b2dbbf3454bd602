"""The losses of the study: the concept is drawn as something else, what is kept stays as good as it was.

For every step the noise is drawn once, and both the model and the original see it: one pass of each over the
pictures to forget and those to retain together.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

import eupmu_jax as eu
from eupmu_jax import objectives
from experiments.shared.methods.method import LossFunctions
from experiments.shared.models.diffusion.network import Network, Params
from experiments.shared.models.diffusion.training import (
    Noised,
    Pictures,
    denoising_loss,
    noised_pictures,
)
from experiments.shared.models.lora import Adapter

Model = dict[str, Any]
"""What `unlearn` is given: "params", "adapter" (low-rank weights or nothing), and the frozen "original"."""


class Concept(Protocol):
    """What is forgotten: other labels in place of those that ask for it."""

    def redirected(self, labels: Any) -> Any: ...


Part = tuple[float, Callable[[Concept, jax.Array], jax.Array]]
"""A weight, and (concept, labels) -> labels."""


class Redirect(NamedTuple):
    """What is predicted in the concept's place: a weighted sum of the original's predictions for labels."""

    parts: tuple[Part, ...]


def nothing(concept: Concept, labels: jax.Array) -> jax.Array:
    return jnp.full_like(labels, -1)


TO_ANOTHER = Redirect(((1.0, lambda concept, labels: concept.redirected(labels)),))
TO_NOTHING = Redirect(((1.0, nothing),))
# Away from the concept by as much as guidance would go towards it (Gandikota et al., arXiv 2303.07345).
AWAY = Redirect(((2.0, nothing), (-1.0, lambda concept, labels: labels)))


def targets(
    network: Network, original: Params, concept: Concept, redirect: Redirect, forget: Noised, retain: Noised
) -> tuple[jax.Array, jax.Array]:
    """The original's predictions: the redirected ones to forget, and those of what is retained."""
    labels = [relabelled(concept, forget.labels) for _, relabelled in redirect.parts]
    several = len(labels)
    predicted = network.predict(
        original,
        jnp.concatenate([*[forget.x] * several, retain.x]),
        jnp.concatenate([*[forget.t] * several, retain.t]),
        network.embed(original, jnp.concatenate([*labels, retain.labels])),
    )
    *parts, kept = jnp.split(predicted, [len(forget.x) * (i + 1) for i in range(several)])
    weights = jnp.array([weight for weight, _ in redirect.parts])
    return jnp.tensordot(weights, jnp.stack(parts), 1), kept


def together(sets: Mapping[Any, Pictures] | Pictures) -> tuple[Pictures, list[int]]:
    """All retain sets as one, in sorted order, and how many pictures each has."""
    parts = [sets] if isinstance(sets, Pictures) else [sets[name] for name in sorted(sets)]
    joined = Pictures(*(jnp.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return joined, [len(part.x) for part in parts]


FURTHEST = 2.0
"""Of the vectors around a label's, the largest standard deviation; the labels' own entries are near 0.35."""


def around(key: jax.Array, asked: jax.Array) -> jax.Array:
    """Half of the vectors [B, width] as they are, half with noise added, of a random size up to FURTHEST."""
    sizes, noises = jax.random.split(key)
    size = FURTHEST * jnp.maximum(jax.random.uniform(sizes, (len(asked), 1), minval=-1), 0)
    return asked + size * jax.random.normal(noises, asked.shape)


def make_losses(
    network: Network,
    concept: Concept,
    redirect: Redirect,
    adapter_scale: float = 1.0,
    whatever_asked: bool = False,
) -> Callable[[Model, Any], eu.Losses]:
    """The redirect of velocities, and the rise of the denoising loss, of each set where retain is a dict.

    With `whatever_asked` the pictures of the concept are redirected for vectors around its label's as well.
    """

    def losses_fn(model: Model, batch: Any) -> eu.Losses:
        keys = jax.random.split(batch["key"])
        forget = noised_pictures(keys[0], batch["forget"])
        pictures, amounts = together(batch["retain"])
        retain = noised_pictures(keys[1], pictures)
        params = model["params"]
        adapters = [Adapter(adapter_scale, model["adapter"])] if model["adapter"] else []
        of_forget, of_retain = (network.embed(params, part.labels) for part in (forget, retain))
        if whatever_asked:
            of_forget = around(jax.random.fold_in(keys[0], 1), of_forget)
        predicted = network.predict(
            params,
            jnp.concatenate([forget.x, retain.x]),
            jnp.concatenate([forget.t, retain.t]),
            jnp.concatenate([of_forget, of_retain]),
            adapters,
        )
        forgotten, kept = jnp.split(predicted, [len(forget.x)])
        redirected, before = targets(network, model["original"], concept, redirect, forget, retain)
        rises = objectives.denoising_rise(kept, before, retain.target)
        ends = [sum(amounts[: i + 1]) for i in range(len(amounts) - 1)]
        means = jnp.stack([part.mean() for part in jnp.split(rises, ends)])
        return eu.Losses(
            objectives.velocity_prediction_redirect(forgotten, redirected).mean(),
            means[0] if isinstance(batch["retain"], Pictures) else means,
        )

    return losses_fn


def peer_losses(network: Network, original: Params, concept: Concept, redirect: Redirect) -> LossFunctions:
    """The same for methods that take the two losses of noised pictures apart."""

    def seen(examples: Noised | Pictures) -> Noised:
        # What a method prepares from the whole forget set comes as it is, without a step's noise.
        return examples if isinstance(examples, Noised) else noised_pictures(jax.random.key(0), examples)

    def forget(params: Params, examples: Noised) -> jax.Array:
        predicted = network.predict(params, examples.x, examples.t, network.embed(params, examples.labels))
        none = jax.tree.map(lambda leaf: leaf[:0], examples)
        redirected, _ = targets(network, original, concept, redirect, examples, none)
        return objectives.velocity_prediction_redirect(predicted, redirected).mean()

    def training(params: Params, examples: Noised | Pictures) -> jax.Array:
        return denoising_loss(network, params, seen(examples))

    def divergence(reference: Params, params: Params, examples: Noised) -> jax.Array:
        of = lambda p: network.predict(p, examples.x, examples.t, network.embed(p, examples.labels))
        return jnp.mean((of(params) - jax.lax.stop_gradient(of(reference))) ** 2)

    return LossFunctions(forget, training, divergence)
