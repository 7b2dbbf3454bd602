"""Rules for the ``stop`` of a run."""

from collections.abc import Callable

import numpy as np

from eupmu_jax.method.types import Numbers

Rule = Callable[[dict], str | None]
"""Metrics -> why the run should end now, or None."""


def reached(name: str, *, at_most: float = np.inf, at_least: float = -np.inf) -> Rule:
    """A rule for ``stop``: the metric is where it should be.

    Args:
      name: a key of the metrics, for instance one that evaluate returns.
      at_most, at_least: its bounds, inclusive; one of them at least. Of a metric with a number for each
        utility all must be within.

    Returns:
      A rule: metrics -> why the run should end, or None.

    Raises:
      ValueError: neither bound.
      KeyError: from the rule, if there is no such metric.

    Example:
      >>> import eupmu_jax as eu
      >>> eu.reached("forget_accuracy", at_most=0.1)({"forget_accuracy": 0.08})
      'forget_accuracy reached 0.08'
    """
    if at_most == np.inf and at_least == -np.inf:
        raise ValueError(f"reached({name!r}) needs at_most or at_least")

    def rule(metrics):
        values = np.ravel(metrics[name])
        if not np.all((at_least <= values) & (values <= at_most)):
            return None
        return f"{name} reached {', '.join(f'{value:.4g}' for value in values)}"

    return rule


def exhausted(baseline: Numbers, budget: Numbers) -> Rule:
    r"""A rule for ``stop``: the mean retain loss since the last evaluation is above its budget.

    .. math:: \bar R - R_0 > \delta \quad\text{for any utility}

    Args:
      baseline: R_0, a float or [K], in the loss's units.
      budget: delta > 0, likewise.

    Returns:
      A rule: metrics -> why the run should end, or None.

    Example:
      >>> import eupmu_jax as eu
      >>> eu.exhausted(baseline=0.5, budget=0.1)({"retain_loss": 0.62})
      'the retain loss rose by 0.12, more than its budget 0.1'
    """

    def rule(metrics):
        rise = np.asarray(metrics["retain_loss"]) - baseline
        return (
            f"the retain loss rose by {np.max(rise):.4g}, more than its budget {budget}"
            if np.any(rise > budget)
            else None
        )

    return rule


def over_forgetting(forget: str, unseen: str, slack: float = 0.0) -> Rule:
    r"""A rule for ``stop``: the forget set does worse than data that was never trained on.

    .. math:: a_{\text{forget}} < a_{\text{unseen}} - \text{slack}

    which a retrained model would not show and an attacker can see.

    Args:
      forget, unseen: keys of two metrics of which more is better, such as accuracies of the forget set and of
        held-out data like it.
      slack: how much lower is allowed, in the metrics' units.

    Returns:
      A rule: metrics -> why the run should end, or None.

    Raises:
      KeyError: from the rule, if there is no such metric.

    Example:
      >>> import eupmu_jax as eu
      >>> eu.over_forgetting("forget", "test")({"forget": 0.7, "test": 0.8})
      'over-forgetting: forget 0.7 is below test 0.8'
    """

    def rule(metrics):
        if metrics[forget] >= metrics[unseen] - slack:
            return None
        return f"over-forgetting: {forget} {metrics[forget]:.4g} is below {unseen} {metrics[unseen]:.4g}"

    return rule
