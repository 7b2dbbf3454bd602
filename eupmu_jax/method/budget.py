"""The controller that spends a total budget: PID on log(multiplier), beside what is left to forget."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from eupmu_jax.method.losses import Losses
from eupmu_jax.method.state import SurgeryState
from eupmu_jax.method.types import Numbers

# In shares of the budget, the retain loss answers log(multiplier) with a gain near -1 whatever the model,
# the losses and the learning rate, so that one setting serves all (derived in
# experiments/budget/convergence.md).
PROPORTIONAL, INTEGRAL, DERIVATIVE = 3.0, 0.1, 10.0
# The multiplier that holds R falls while the forget loss does: the integral is so many times faster below the
# target, or the loop stays behind and the budget is not spent. Noise then lifts R a little above the target:
# what is over in the end can be taken back, what was not spent cannot be forgotten any more.
FASTER_BELOW = 3.0
SMOOTHING = 0.8
# The multiplier that holds R falls as what is left to forget does: this power of it, without waiting for R to
# tell. Near the least of a quadratic U a power above 1/2 would feed back on itself.
FORESIGHT_POWER, LEAST_LEFT = 0.5, 0.01
# The gains hold for observations whose noise is below this share of the budget; noisier ones lower them.
NOISE = 0.25
NOISE_MEMORY = 20
# What is aimed at, and what is no longer told apart from "far above" it, in shares of the budget.
TARGET, FAR_ABOVE, OUTLIER = 1.0, 4.0, 20.0
# Of the exponent: beyond these the weights hardly change, and coming back would take the longer.
LOWEST, HIGHEST = -5.0, 8.0
MEASURING_STEPS = 10
# Above this share of the budget, for any utility, nothing is forgotten: R comes first.
PAUSED = 2.0
# What the floor of a forget loss without one is let down by in a step, in shares of where it was found first,
# and what becomes of that each time when the budget is crossed again.
FIRST_PACE, SLOWER = 0.03, 0.7
# So many steps above the budget with the exponent above that, less twice those within it: infeasible.
STRAINED_STEPS, STRAINED = 50, 5.0


class BudgetState(NamedTuple):
    """O(K) scalars: where the run started, what the losses said, and the controller's memory.

    Attributes:
      baseline, forget_baseline: R_0 and U_0.
      forget, smoothed: moving averages of U and R.
      last: the last observed R, for the noise.
      noise: the variance of one observation of R, from successive differences.
      integral: I_t.
      strained_steps: the steps that R resisted the weight on it, less twice those within the budget.
      floor, pace: of a forget loss that has none of its own; see `floor_and_pace`.
      is_paused: whether this step descends the retain losses alone.
      steps: observations so far; negative while R_0 is being measured.
    """

    baseline: jax.Array
    forget_baseline: jax.Array
    forget: jax.Array
    last: jax.Array
    smoothed: jax.Array
    noise: jax.Array
    integral: jax.Array
    strained_steps: jax.Array
    floor: jax.Array
    pace: jax.Array
    is_paused: jax.Array
    steps: jax.Array


def init(multiplier: jax.Array, baseline: Numbers | None) -> BudgetState:
    """R_0 as it was given, or to be measured while `steps` counts up to 0."""
    zeros = lambda: jnp.zeros_like(multiplier)
    known = zeros() if baseline is None else jnp.asarray(baseline, multiplier.dtype)
    return BudgetState(
        baseline=known + zeros(),
        forget_baseline=jnp.zeros([], multiplier.dtype),
        forget=jnp.zeros([], multiplier.dtype),
        last=zeros(),
        smoothed=zeros(),
        noise=zeros(),
        integral=zeros(),
        strained_steps=jnp.zeros(multiplier.shape, jnp.int32),
        floor=jnp.asarray(-jnp.inf, multiplier.dtype),
        pace=jnp.zeros([], multiplier.dtype),
        is_paused=jnp.asarray(False),
        steps=jnp.asarray(-MEASURING_STEPS if baseline is None else 0, jnp.int32),
    )


def is_measuring(state: BudgetState) -> jax.Array:
    """Whether the latest observation went into R_0; a bool []."""
    return state.steps <= 0


def control(
    state: BudgetState, losses: Losses, budget: jax.Array, lowest: float = LOWEST
) -> tuple[jax.Array, BudgetState]:
    r"""The exponent x_t after U_t and R_t were observed, [] or [K], each utility for itself.

    .. math::
      e_t &= 0.8\, e_{t-1} + 0.2\, R_t, \qquad e_{-1} = R_0 \\
      v_t &= (e_t - R_0) / \delta - 1 \\
      g_t &= \min(1, 0.25\, \delta / \sigma_t) \\
      I_t &= I_{t-1} + 0.1\, g_t v_t\, (3 \text{ where } v_t < 0 \text{ else } 1) \\
      x_t &= g_t (3 v_t + 10 (e_t - e_{t-1}) / \delta) + I_t

    with sigma_t the standard deviation of one observation, from successive differences. v_t is kept
    in [-1, 4] and x_t in [lowest, 8], by stopping the integral there. I_0 = 3 g is what makes x = 0
    at R_0, and follows g while the noise gets known, for 20 steps; x_0 = 0 whatever the first batch shows.
    A rise counts as 20 budgets at most, in a difference 4, so that an outlier is soon forgotten.
    """
    measuring, first = state.steps < 0, state.steps == 0
    baseline = measured_baseline(state, losses.retain)
    seen = observed(state, losses.retain, baseline, budget)
    gain = noise_gain(seen.noise, budget)

    error = jnp.clip((seen.smoothed - baseline) / budget - TARGET, -TARGET, FAR_ABOVE)
    # R answers the multiplier late, the later the lower the rate: the rise of the moving average tells where
    # R is heading, and without it the loop swings around the budget.
    rise = (seen.smoothed - seen.before) / budget
    reaction = gain * (PROPORTIONAL * error + DERIVATIVE * rise)
    # From x = 0 at R_0, whatever the gain is. It is known once the noise is: until then I_0 follows it.
    known = jnp.where(first, 0, noise_gain(state.noise, budget))
    settling = jnp.where(state.steps < NOISE_MEMORY, PROPORTIONAL * TARGET * (gain - known), 0)
    # What the first batch does to the noise is forgotten with the second difference: nothing adds up before.
    is_known = state.steps > 1
    pull = INTEGRAL * gain * jnp.where(error < 0, FASTER_BELOW * error, error)
    integral = state.integral + settling + jnp.where(is_known, pull, 0)
    # An integral that went on while the exponent is at its end would have to come all the way back (wind-up).
    integral = jnp.where(is_known, jnp.clip(integral, lowest - reaction, HIGHEST - reaction), integral)
    exponent = jnp.clip(reaction + integral, lowest, HIGHEST)

    share = jnp.max((seen.smoothed - baseline) / budget)
    floor, pace = floor_and_pace(state, share, budget)

    stepped = BudgetState(
        baseline=baseline,
        forget_baseline=jnp.where(first, losses.forget, state.forget_baseline),
        forget=jnp.where(first, losses.forget, averaged(state.forget, losses.forget)),
        last=seen.retain_loss,
        smoothed=seen.smoothed,
        noise=seen.noise,
        integral=integral,
        strained_steps=resisted(state.strained_steps, exponent, seen.smoothed > baseline + budget),
        floor=floor,
        pace=pace,
        is_paused=~first & ((share > PAUSED) | (losses.forget < floor)),
        steps=state.steps + 1,
    )
    waiting = state._replace(baseline=baseline, steps=state.steps + 1)
    stepped = jax.tree.map(lambda new, old: jnp.where(measuring, old, new), stepped, waiting)
    return jnp.where(measuring | first, jnp.zeros_like(exponent), exponent), stepped


class Observation(NamedTuple):
    """R_t without its excess, its moving average before and after, and the variance of one observation."""

    retain_loss: jax.Array
    before: jax.Array
    smoothed: jax.Array
    noise: jax.Array


def measured_baseline(state: BudgetState, retain_loss: jax.Array) -> jax.Array:
    """R_0: the running mean of the first observations where none was given."""
    count = (state.steps + MEASURING_STEPS + 1).astype(retain_loss.dtype)
    mean = state.baseline + (retain_loss - state.baseline) / count
    return jnp.where(state.steps < 0, mean, state.baseline)


def observed(
    state: BudgetState, retain_loss: jax.Array, baseline: jax.Array, budget: jax.Array
) -> Observation:
    """R_t and what is known of it, in the loss's units."""
    first = state.steps == 0
    retain_loss = jnp.minimum(retain_loss, baseline + OUTLIER * budget)
    last = jnp.where(first, retain_loss, state.last)
    # Half the mean square of successive differences is the variance of one observation, even while R drifts.
    change = jnp.clip((retain_loss - last) / budget, -FAR_ABOVE, FAR_ABOVE) * budget
    # The second difference takes the place of the first, which is the first batch's.
    share = 1 / jnp.clip(state.steps - 1, 1, NOISE_MEMORY).astype(retain_loss.dtype)
    noise = state.noise + share * (change**2 / 2 - state.noise)
    before = jnp.where(first, baseline, state.smoothed)
    # The first batch is for the noise alone: R_0 is known better than one batch tells.
    smoothed = jnp.where(first, baseline, averaged(before, retain_loss))
    return Observation(retain_loss, before, smoothed, noise)


def averaged(before: jax.Array, seen: jax.Array) -> jax.Array:
    """The moving average after one more observation."""
    return before + (1 - SMOOTHING) * (seen - before)


def noise_gain(noise: jax.Array, budget: jax.Array) -> jax.Array:
    """g_t: at full gain a loop whose batches err by more than a quarter of the budget would follow them."""
    return NOISE * budget / jnp.sqrt(jnp.maximum(noise, (NOISE * budget) ** 2))


def resisted(strained_steps: jax.Array, exponent: jax.Array, is_above: jax.Array) -> jax.Array:
    """Counts up while R is above the budget although the weight is on it, twice as fast down within it."""
    # Above the budget with little weight on R, as after an outlier, nothing can be told.
    change = jnp.where(is_above, jnp.where(exponent > STRAINED, 1, 0), -2)
    return jnp.clip(strained_steps + change, 0, 2 * STRAINED_STEPS)


def floor_and_pace(state: BudgetState, share: jax.Array, budget: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""U*, below which the forget loss is not pushed, and its pace downwards; -inf as long as it is unknown.

    A forget loss that turns negative, as in gradient ascent, has no floor: along R = const it falls for ever
    while the network is blown up, and no multiplier holds that. So it gets one from what was observed: where
    the smoothed U was when the budget was first spent. While R is below its budget the floor goes down in
    proportion to what is left of it, at a pace that every new crossing lowers: it settles where the budget
    is spent.

    .. math::
      U^*_{t+1} = \max(U^*_t, \bar U_t) \text{ above the budget, else }
        U^*_t - p_t \min(1, 1 - \text{share}_t)
    """
    is_over = (share > 1) & (state.forget < 0)
    was_over = jnp.any(state.smoothed > state.baseline + budget)
    is_first = is_over & jnp.isneginf(state.floor)
    slower = jnp.where(is_over & ~was_over, SLOWER * state.pace, state.pace)
    pace = jnp.where(is_first, FIRST_PACE * jnp.abs(state.forget), slower)
    floor = jnp.where(is_over, jnp.maximum(state.floor, state.forget), state.floor)
    return floor - pace * jnp.clip(1 - share, 0, 1), pace


def foresight(state: BudgetState) -> jax.Array:
    r"""The factor of the multiplier that follows from what is left to forget, [].

    .. math:: \lambda_t = \lambda_0 \sqrt{\bar U_t / U_0}\, e^{x_t}

    with U smoothed as R is and the ratio kept in [0.01, 1]; 1 where U_0 <= 0, as in gradient ascent.
    """
    baseline = state.forget_baseline
    left = state.forget / jnp.where(baseline > 0, baseline, jnp.ones_like(baseline))
    left = jnp.clip(left, LEAST_LEFT, 1) ** FORESIGHT_POWER
    return jnp.where(baseline > 0, left, jnp.ones_like(left))


def followed(state: SurgeryState, controlled: BudgetState, budget: jax.Array) -> SurgeryState:
    """`state` with what a step of the controller found."""
    # Signed, in the loss's units; 0 before the first observation.
    violation = controlled.smoothed - controlled.baseline - budget
    return state._replace(
        controller_state=controlled,
        violation=jnp.where(controlled.steps > 0, violation, jnp.zeros_like(violation)),
        infeasible=controlled.strained_steps >= STRAINED_STEPS,
    )
