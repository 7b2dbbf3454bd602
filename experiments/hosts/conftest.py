"""Keras and Grain are no dependencies: pytest must not import their examples in search of doctests."""

collect_ignore = ["keras_jax.py", "grain_data.py"]
