"""Keras is no dependency: pytest must not import its example in search of doctests."""

collect_ignore = ["keras_jax.py"]
