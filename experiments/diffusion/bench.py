"""What all pieces of the study are made of: the task, what is compiled for it, and the run's folder."""

import pathlib
from typing import NamedTuple

from experiments.diffusion.attacks import Attacks, make_attacks
from experiments.diffusion.judge import Judge, make_judge
from experiments.diffusion.measures import Drawer, make_drawer
from experiments.diffusion.ready import JUDGE as JUDGE
from experiments.diffusion.tasks import Scale, Task
from experiments.shared.models.diffusion.network import Network, Params, make_network
from experiments.shared.models.diffusion.training import Train, make_trainer
from experiments.shared.models.files import load_params, save_params
from experiments.shared.testbed import Progress


class Bench(NamedTuple):
    """The task, the network and what is compiled for it, and the run's folder."""

    task: Task
    folder: pathlib.Path
    seed: int
    progress: Progress
    network: Network
    train: Train
    judge: Judge
    drawer: Drawer
    attacks: Attacks

    @property
    def scale(self) -> Scale:
        return self.task.scale

    def file(self, kind: str, name: str, suffix: str) -> pathlib.Path:
        return self.folder / kind / file_name(name, suffix)


def file_name(name: str, suffix: str) -> str:
    return name.replace(", ", "-").replace(" → ", "-to-").replace(" ", "-") + suffix


def make_bench(task: Task, folder: pathlib.Path, seed: int, progress: Progress) -> Bench:
    for kind in ("models", "samples"):
        (folder / kind).mkdir(exist_ok=True)
    network, scale = make_network(task.make), task.scale
    shape = task.train.x.shape[1:]
    return Bench(
        task,
        folder,
        seed,
        progress,
        network,
        make_trainer(network, scale.recipe),
        make_judge(task.sizes, shape, task.judge),
        make_drawer(network, shape, scale.samples // 3, scale.guidance),
        make_attacks(network, scale.relearning_rate, scale.search_rate),
    )


def keep(bench: Bench, name: str, params: Params) -> None:
    save_params(bench.file("models", name, ".safetensors"), params)


def kept(bench: Bench, name: str) -> Params:
    return load_params(bench.file("models", name, ".safetensors"))
