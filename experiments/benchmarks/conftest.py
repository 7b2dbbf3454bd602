"""PyTorch is no dependency: pytest must not look into its steps for doctests."""

collect_ignore = ["torch_models.py", "torch_steps.py"]
