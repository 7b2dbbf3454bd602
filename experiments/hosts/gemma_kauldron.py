"""Kauldron's TrainStep: Gemma's NPO example under a budget, here with a small Gemma of random weights.

pip install kauldron gemma && python -m experiments.hosts.gemma_kauldron          (Python 3.12)
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from gemma import gm  # pyright: ignore[reportMissingImports]
from kauldron import kd, kontext  # pyright: ignore[reportMissingImports]

import eupmu_jax as eu

TOTAL = 0.1
FORGET, RETAIN, LENGTH, WORDS = 8, 24, 12, 64


# What is added to Gemma's example.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lagrangian(kd.losses.Loss):
    """Kauldron's losses, forget first, by the weights that lie beside the parameters."""

    forget: Any
    retain: Any
    weights: kontext.Key = "params.weights"

    def get_values(self, weights, losses):
        return jnp.dot(weights, losses)

    def get_state_from_context(self, context):
        weights = kontext.get_by_path(context, self.weights)
        losses = jnp.stack([loss(context=context) for loss in (self.forget, self.retain)])
        return self.State.from_values(values=self.get_values(weights, losses))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithWeights(kd.ckpts.InitTransform):
    """Puts the weights beside the parameters, which another transform may have loaded."""

    constraint: Any
    params: Any

    def transform(self, state):
        state = self.params.transform(state)
        weighted = eu.weighted(state.params, self.constraint)
        return state.replace(params=weighted.params | {"weights": weighted.weights})


def saddle_point(inner, constraint):
    """`eu.saddle_point` for a dict of parameters that has the weights among them."""
    tx = eu.saddle_point(inner, constraint)

    def as_weighted(params: Any) -> eu.Weighted:
        rest = {name: value for name, value in params.items() if name != "weights"}
        return eu.Weighted(rest, params["weights"])

    def update(updates, state, params=None):
        moves: Any
        moves, state = tx.update(as_weighted(updates), state, as_weighted(params))
        return moves.params | {"weights": moves.weights}, state

    return optax.GradientTransformation(lambda params: tx.init(as_weighted(params)), update)


# The losses of the example, and what should stay, of one batch with rows of both.

NPO = gm.losses.NpoLoss(
    tokens="batch.target", sequence_mask="batch.mask", policy_logits="preds.policy.logits",
    anchor_logits="preds.anchor.logits", tau=0.1, mask="batch.forget",
)  # fmt: skip
CROSS_ENTROPY = kd.losses.SoftmaxCrossEntropyWithIntLabels(
    logits="preds.policy.logits", labels="batch.target", mask="batch.retained"
)


# Everything below is the small example: a Gemma learns 32 texts, and forgets 8.


class Outcome(NamedTuple):
    """Tokens of the forgotten texts that are still named, of how many, and the rise of the others' loss."""

    named: int
    tokens: int
    rise: float


def small() -> Any:
    """Gemma 3's architecture: a sliding window and a global layer, norms before and behind."""
    kinds = gm.nn.AttentionType
    config = gm.nn.config.TransformerConfig(
        num_embed=WORDS, embed_dim=32, hidden_dim=64, num_heads=2, head_dim=16, num_kv_heads=1,
        final_logit_softcap=None, use_post_attn_norm=True, use_post_ffw_norm=True, use_qk_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL), sliding_window_size=8,
    )  # fmt: skip
    return gm.nn.Transformer(tokens="batch.input", config=config, dtype=jnp.float32)


def texts() -> dict[str, np.ndarray]:
    """All rows as one batch, as Gemma's Seq2SeqTask makes it; with a mask for each of the two sets."""
    tokens = np.random.default_rng(0).integers(1, WORDS, (FORGET + RETAIN, LENGTH + 1), np.int32)
    mask = np.ones((FORGET + RETAIN, LENGTH, 1), bool)
    mask[:, :2] = False  # the prompt
    forget = np.arange(FORGET + RETAIN)[:, None] < FORGET
    return {
        "input": tokens[:, :-1], "target": tokens[:, 1:, None], "mask": mask,
        "forget": forget, "retained": mask & ~forget[..., None], "all": mask,
    }  # fmt: skip


def train(losses, optimizer, transform, batch, steps) -> Any:
    """Kauldron's own step, with its own state."""
    step = kd.train.TrainStep(
        model=gm.nn.AnchoredPolicy(policy=small()), optimizer=optimizer, init_transform=transform,
        rng_streams=kd.train.RngStreams(seed=0), sharding=kd.sharding.ShardingStrategy(),
        aux=kd.train.Auxiliaries(losses=losses, metrics={}, summaries={}),
    )  # fmt: skip
    spec = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}
    state = step.init(spec)
    for _ in range(steps):
        state, _ = step.step(state, batch)
    return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(kd.ckpts.InitTransform):
    """The parameters of a model that is in memory."""

    params: Any

    def transform(self, state):
        return state.replace(params=jax.tree.map(jnp.copy, self.params))


@jax.jit
def measured(params, batch):
    """The loss of the texts to keep, and how many tokens of the others have the highest logit."""
    logits = small().apply({"params": params}, batch["input"]).logits
    target = batch["target"][..., 0]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    named = jnp.sum((jnp.argmax(logits, -1) == target) & batch["mask"][..., 0] & batch["forget"])
    return jnp.mean(losses, where=batch["retained"][..., 0]), named


def main(steps: int = 60) -> dict[str, Outcome]:
    batch = texts()
    knowing = {"all": dataclasses.replace(CROSS_ENTROPY, mask="batch.all")}
    learned = train(knowing, optax.adam(1e-2), kd.ckpts.NoopTransform(), batch, 150).params["policy"]
    before, known = measured(learned, batch)

    budget, inner = eu.Budget(TOTAL, baseline=before), optax.adam(1e-3)
    # Of the policy, which the loader copies into the anchor.
    anchored = gm.ckpts.AnchoredPolicyLoader(policy=Given(params=learned))
    runs = {
        "NPO alone": ({"npo": NPO}, inner, anchored),
        f"a budget of {TOTAL}": (
            {"lagrangian": Lagrangian(forget=NPO, retain=CROSS_ENTROPY)},
            saddle_point(inner, budget),
            WithWeights(constraint=budget, params=anchored),
        ),
    }
    tokens = int(batch["mask"][:FORGET].sum())
    print(f"Of the {tokens} tokens of the texts to forget it names {known}.")
    outcomes = {}
    for name, (losses, optimizer, transform) in runs.items():
        state = train(losses, optimizer, transform, batch, steps)
        after, named = measured(state.params["policy"], batch)
        outcomes[name] = outcome = Outcome(int(named), tokens, float(after - before))
        print(f"{name}: now {outcome.named}, and the loss on the others rose by {outcome.rise:.3f} nats.")
    return outcomes


if __name__ == "__main__":
    main()
