"""Ten requests to forget, one after the other, each within budgets of its own: what they come to together."""

import dataclasses
import pathlib
import shutil

import optax
import pandas as pd

import eupmu_jax as eu
from eupmu_jax.run.files import write_whole
from experiments.language import study, texts, tiny
from experiments.language.fetch import model_path
from experiments.language.losses import before_unlearning, make_losses
from experiments.language.measures import measured
from experiments.language.peers import told_of_steps
from experiments.language.people import Person, invented, record
from experiments.language.study import BUDGET, BUDGETS, ORIGINAL, Bench
from experiments.language.texts import Rows
from experiments.shared import command
from experiments.shared.records import Record, RecordsByKey, open_records
from experiments.shared.report import Frame, saved_config
from experiments.shared.terminal import progress_bar


@dataclasses.dataclass(frozen=True)
class Config:
    """Make the model of a finished run forget ten things, one request after the other.

    Each request is two details of one of the people to forget, and starts from the model that the one
    before it left. Each has the study's budgets, so that after n requests the retain losses may have risen
    by n budgets. Writes requests.md to the run's folder, and the last model; about 6 min on two cores.
    Started again, it goes on after the last request that was finished.
    """

    run: pathlib.Path
    """The folder of a finished run of `python -m experiments.language`."""

    requests: int = 10
    """How many."""

    steps: int = 4
    """Of each request."""


DETAILS = (("place", "date"), ("address", "telephone"), ("animal", "pet"))


def masked(bench: Bench, person: Person, details: tuple[str, ...]) -> Rows:
    """The person's record, of which those details count."""
    wanted = {f" {getattr(person, detail)}" for detail in details}
    # The record tells of the pet and its kind together.
    wanted |= {f" {person.animal} {person.pet}"} if "pet" in details else set()
    pieces = [[(part, part in wanted) for part in record(person)]]
    return texts.rows(bench.tokenizer, pieces, bench.scale.length)


def asked_for(bench: Bench, amount: int) -> list[tuple[Person, tuple[str, ...]]]:
    """(person, details) of each request: every person's first details, then everyone's second..."""
    forgotten = invented(bench.scale.forgotten, bench.seed)
    every = [(person, details) for details in DETAILS for person in forgotten]
    if not 1 <= amount <= len(every):
        raise ValueError(f"--requests must lie in [1, {len(every)}], got {amount}")
    return every[:amount]


def granted(bench: Bench, number: int, steps: int, all_rows: list[Rows], unseen: list[Person]) -> Record:
    """One request, from the model that the one before left."""
    person, details = asked_for(bench, number + 1)[-1]
    model = {"base": study.kept(bench, name_of(number - 1)), "adapter": {}}
    strangers = texts.joined(masked(bench, stranger, details) for stranger in unseen)
    forget = before_unlearning(bench.config, model, all_rows[number], strangers)
    model, history = eu.unlearn(
        make_losses(bench.config, study.CONFIDENCE), model, forget, bench.task.retain,
        optax.adam(bench.scale.rate), BUDGET, steps=steps, batch_size=(1, study.sizes(bench)),
        seed=bench.seed + number,
        callbacks=[told_of_steps(lambda: bench.progress(f"request {number + 1}", 1))], every=1,
    )  # fmt: skip
    study.keep(bench, name_of(number), model["base"])
    sets = {"requested": texts.joined(all_rows[: number + 1]), **bench.task.retain}
    found = measured(bench.config, model["base"], sets)
    assert history.promise is not None
    return {
        "request": f"{person.name}: {' and '.join(details)}",
        "holds": history.promise.holds,
        "repair_steps": history.promise.repair_steps,
        "scores": found,
    }


def name_of(number: int) -> str:
    return ORIGINAL if number < 0 else f"request {number + 1}"


def table(records: RecordsByKey) -> Frame:
    """What is known after each request, and what all of them together cost."""
    before = records["requests", "before"]["scores"]
    lines = []
    for number in range(len(records) - 1):
        record = records["requests", number]
        of, count = record["scores"], number + 1
        rises = {part: of[part]["nats"] - before[part]["nats"] for part in sorted(BUDGETS)}
        lines.append(
            {
                "request": record["request"],
                "requested so far: greedy": f"{of['requested']['memorised']:.3f}",
                "nats": f"{of['requested']['nats']:.2f}",
                **{
                    f"{part}: rise (of {BUDGETS[part]:g} each)": f"{rise:+.3f} of {count * BUDGETS[part]:.2f}"
                    for part, rise in rises.items()
                },
                "its own budgets kept": "yes" if record["holds"] else "no: nothing was forgotten",
            }
        )
    return pd.DataFrame(lines, index=range(1, len(lines) + 1))


def verdict(records: RecordsByKey) -> str:
    """What all requests came to, in a sentence."""
    before, last = records["requests", "before"]["scores"], records["requests", len(records) - 2]
    count = len(records) - 1
    shares = {
        part: (last["scores"][part]["nats"] - before[part]["nats"]) / (count * BUDGETS[part])
        for part in BUDGETS
    }
    worst = max(shares, key=lambda part: shares[part])
    said = (
        f"After {count} requests the worst utility, {worst}, has spent {shares[worst]:.0%} of all its budgets"
    )
    greedy = last["scores"]["requested"]["memorised"]
    return f"{said}; of what was asked for, greedy decoding gives {greedy:.1%}."


def main(config: Config) -> None:
    saved = saved_config(config.run, "language")
    scale = study.SMOKE if saved["smoke"] else study.FULL
    source = (
        tiny.make(config.run / "tiny", saved["seed"]) if saved["smoke"] else saved["model"] or model_path()
    )
    with command.working_in(config.run) as console:
        with (
            open_records(config.run / "requests.jsonl") as records,
            progress_bar(console, config.requests * config.steps) as progress,
        ):
            bench = study.make_bench(pathlib.Path(source), config.run, scale, saved["seed"], progress)
            if not bench.model_folder(ORIGINAL).exists():
                raise FileNotFoundError(f"{config.run}: there is no model yet: finish that run first")
            wanted = [masked(bench, person, details) for person, details in asked_for(bench, config.requests)]
            unseen = invented(scale.forgotten + scale.others + scale.unseen, saved["seed"])[-scale.unseen :]
            sets = {"requested": texts.joined(wanted), **bench.task.retain}
            before = lambda: {"scores": measured(bench.config, study.kept(bench, ORIGINAL), sets)}
            records.get(("requests", "before"), before)
            for number in range(config.requests):
                records.get(
                    ("requests", number), lambda n=number: granted(bench, n, config.steps, wanted, unseen)
                )
                if number and bench.model_folder(name_of(number - 1)).exists():
                    shutil.rmtree(bench.model_folder(name_of(number - 1)))
            lines = table(records.by_key)
            end = verdict(records.by_key)
        write_whole(config.run / "requests.md", f"{lines.to_markdown()}\n\n{end}\n")
        console.print(lines.to_markdown(), highlight=False, soft_wrap=True)
        console.print(end, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command.run(main, Config, resumable=False)
