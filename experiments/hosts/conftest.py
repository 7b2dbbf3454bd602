"""Keras, Grain, Tunix and Gemma are no dependencies: pytest must not import their examples in search of doctests."""

collect_ignore = ["keras_jax.py", "grain_data.py", "tunix_peft.py", "gemma_kauldron.py"]
