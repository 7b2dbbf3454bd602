"""Llama and its kin in JAX: the model, its files, low-rank adapters, generation."""
