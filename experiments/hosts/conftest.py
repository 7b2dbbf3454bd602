"""These import what is no dependency: pytest must not look into them for doctests."""

collect_ignore = ["keras_jax.py", "grain_data.py", "tunix_peft.py", "gemma_kauldron.py"]
