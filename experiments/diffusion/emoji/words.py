"""A diffusion transformer that is asked in words: a caption is the sum of the vectors of its words."""

import jax
from flax import nnx

from experiments.shared.models.diffusion import dit


class Words(nnx.Module):
    """The sum of a vector for each word, in whatever order; -1 is no word, and a caption of none is 0."""

    def __init__(self, vocabulary: int, width: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.3 * jax.random.normal(rngs.params(), (vocabulary, width)))
        self.vocabulary = vocabulary

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, width] of tokens [B, LENGTH]."""
        return jax.nn.one_hot(tokens, self.vocabulary).sum(1) @ self.weight[...]


def text_to_image(config: dit.Config, vocabulary: int, rngs: nnx.Rngs) -> dit.DiT:
    """The transformer with words in place of labels."""
    network = dit.DiT(config, rngs)
    network.embed_labels = Words(vocabulary, config.width, rngs)  # pyright: ignore[reportAttributeAccessIssue]
    return network
