"""Unlearning methods, one file each: functions of a model's losses, an optimiser and their own settings."""
