"""The steps of PyTorch's users: one weighted loss, EUPMU written by hand, TorchJD's aggregators, cooper."""

# pyright: reportMissingImports=false

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import torch.nn.functional as F

from experiments.benchmarks.models import Model
from experiments.benchmarks.peers import AGGREGATORS, COOPER, TORCH_FLOOR, TORCH_LAGGED, TORCH_LOOKAHEAD
from experiments.benchmarks.timing import CORES, Block
from experiments.benchmarks.torch_models import outputs_of


class Task(NamedTuple):
    """A model of its own, the losses of its batch, and its optimiser.

    Attributes:
      at_once: how many losses TorchJD differentiates together; None for all.
    """

    params: list[torch.Tensor]
    forget_loss: Callable[[], torch.Tensor]
    retain_loss: Callable[[], torch.Tensor]
    optimizer: torch.optim.Optimizer
    at_once: int | None


def as_tensors(tree: Any) -> Any:
    """A copy of every array."""
    return jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), tree)


def task_of(model: Model) -> Task:
    (trained, frozen), batch = as_tensors(model.init()), as_tensors(model.batch)
    params = [leaf.requires_grad_() for leaf in jax.tree.leaves(trained)]
    outputs, forget, retain = outputs_of(model), batch["forget"], batch["retain"]

    def uniform(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # KL(u || p), as `objectives.kl_to_uniform`.
        return -F.log_softmax(logits, -1).mean() - math.log(logits.shape[-1])

    def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, -2), y)

    if model.kind == "dit":
        of_forget, of_retain = F.mse_loss, F.mse_loss
    else:
        of_forget, of_retain = uniform, cross_entropy
        retain["y"] = retain["y"].long().flatten()

    def forget_loss() -> torch.Tensor:
        return of_forget(outputs(trained, frozen, forget["x"]), forget["y"])

    def retain_loss() -> torch.Tensor:
        return of_retain(outputs(trained, frozen, retain["x"]), retain["y"])

    # The fused optimisers are PyTorch's fastest on a CPU.
    optimizer = {
        "sgd": lambda: torch.optim.SGD(params, 1e-4, momentum=0.9, fused=True),
        "adamw": lambda: torch.optim.AdamW(params, 1e-6, weight_decay=1e-4, fused=True),
    }[model.inner]()
    # PyTorch cannot vmap the backward pass of convolutions whose channels come last, and takes a slow way
    # through that of attention.
    return Task(params, forget_loss, retain_loss, optimizer, None if model.kind == "mlp" else 1)


def descend(task: Task, loss: torch.Tensor) -> None:
    task.optimizer.zero_grad()
    loss.backward()
    task.optimizer.step()


def scalarised(task: Task) -> Callable[[], None]:
    return lambda: descend(task, 0.5 * task.forget_loss() + 0.5 * task.retain_loss())


class Dual(NamedTuple):
    """A multiplier >= 0 and Adam, which moves it along the violation."""

    multiplier: torch.Tensor
    optimizer: torch.optim.Optimizer

    def ascend(self, violation: torch.Tensor) -> None:
        self.multiplier.grad = -violation
        self.optimizer.step()
        with torch.no_grad():
            self.multiplier.clamp_(min=0)

    def weighted(self, forget: torch.Tensor, retain: torch.Tensor) -> torch.Tensor:
        multiplier = self.multiplier.detach()
        return (forget + multiplier * retain) / (1 + multiplier)


def dual() -> Dual:
    multiplier = torch.ones([], requires_grad=True)
    return Dual(multiplier, torch.optim.Adam([multiplier], lr=0.05))


def lagged(task: Task) -> Callable[[], None]:
    """EUPMU whose violation is the rise of the retain loss since the last step."""
    of, last = dual(), None

    def step() -> None:
        nonlocal last
        forget, retain = task.forget_loss(), task.retain_loss()
        if last is not None:
            of.ascend(retain.detach() - last)
        last = retain.detach()
        descend(task, of.weighted(forget, retain))

    return step


def look_ahead(task: Task) -> Callable[[], None]:
    """EUPMU whose violation is the rise of the retain loss on the batch in this step."""
    of = dual()

    def step() -> None:
        forget, retain = task.forget_loss(), task.retain_loss()
        descend(task, of.weighted(forget, retain))
        with torch.no_grad():
            ahead = task.retain_loss()
        of.ascend(ahead - retain.detach())

    return step


def aggregated(task: Task, name: str) -> Callable[[], None]:
    """TorchJD: the Jacobian of both losses, combined by one of its aggregators."""
    from torchjd import aggregation
    from torchjd.autojac import backward, jac_to_grad

    aggregator = getattr(aggregation, name)()

    def step() -> None:
        task.optimizer.zero_grad()
        backward([task.forget_loss(), task.retain_loss()], parallel_chunk_size=task.at_once)
        jac_to_grad(task.params, aggregator)
        task.optimizer.step()

    return step


def cooper_lagrangian(task: Task) -> Callable[[], None]:
    """cooper: the forget loss under a bound of the retain loss, a Lagrangian with simultaneous updates."""
    import cooper

    class Problem(cooper.ConstrainedMinimizationProblem):
        def __init__(self):
            super().__init__()
            multiplier = cooper.multipliers.DenseMultiplier(num_constraints=1)
            self.bound = cooper.Constraint(
                constraint_type=cooper.ConstraintType.INEQUALITY, multiplier=multiplier
            )

        def compute_cmp_state(self) -> cooper.CMPState:
            violation = cooper.ConstraintState(violation=task.retain_loss()[None] - 1.0)
            return cooper.CMPState(loss=task.forget_loss(), observed_constraints={self.bound: violation})

    problem = Problem()
    optimizer = cooper.optim.SimultaneousOptimizer(
        cmp=problem,
        primal_optimizers=task.optimizer,
        dual_optimizers=torch.optim.SGD(problem.dual_parameters(), lr=0.01, maximize=True),
    )
    return lambda: optimizer.roll()


class Peer(NamedTuple):
    """A step of its own task."""

    task: Task
    step: Callable[[], None]


def peers_of(model: Model, lacking: Iterable[str] = ()) -> dict[str, Peer]:
    """The peers by name, each on a copy of the parameters."""
    make: dict[str, Callable[[Task], Callable[[], None]]] = {
        TORCH_FLOOR: scalarised,
        TORCH_LAGGED: lagged,
        TORCH_LOOKAHEAD: look_ahead,
        COOPER: cooper_lagrangian,
    }
    for name, aggregator in AGGREGATORS.items():
        make[name] = partial(aggregated, name=aggregator)
    tasks = {name: task_of(model) for name in make if name not in lacking}
    return {name: Peer(task, make[name](task)) for name, task in tasks.items()}


def blocks_of(model: Model, lacking: Iterable[str] = ()) -> dict[str, Block]:
    torch.set_num_threads(CORES)

    def block_of(step: Callable[[], None]) -> Block:
        def block(count: int) -> None:
            for _ in range(count):
                step()

        return block

    return {name: block_of(peer.step) for name, peer in peers_of(model, lacking).items()}
