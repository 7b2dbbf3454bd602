"""The pieces of the study, each finished one a record: models, unlearning, measurements, attacks."""

import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

import eupmu_jax as eu
from experiments.language import attacks, people, texts
from experiments.language.losses import ADAPTER_SCALE, Forget, known, log_probs, make_losses, of_rows
from experiments.language.measures import Seen, measured, scores
from experiments.language.texts import Rows
from experiments.shared.models.llama.config import Config, projection_shapes
from experiments.shared.models.llama.files import load, load_tokenizer, save
from experiments.shared.models.llama.generate import generate, padded
from experiments.shared.models.llama.model import Params
from experiments.shared.models.lora import Adapter, LowRank, initial_weights, merged
from experiments.shared.records import Record, Records
from experiments.shared.testbed import Progress

ORIGINAL, REFERENCE = "original", "reference"
BUDGETS = {"chat": 0.1, "others": 0.05, "prose": 0.1}
LORA_RANK = 8


class Scale(NamedTuple):
    """How much is done, and how fast.

    Attributes:
      length: tokens of a row.
      forgotten, others: how many people are forgotten and kept.
      prose_rows, held_out_rows: rows of prose for training and kept apart.
      implant_steps, implant_rate: Adam's, with which people are implanted.
      steps: of every method.
      rate, lora_rate: Adam's, of all parameters and of adapters.
      attack_steps, attack_rate: of both fine-tuning attacks; they are measured at every third of them.
    """

    length: int
    forgotten: int
    others: int
    prose_rows: int
    held_out_rows: int
    implant_steps: int
    implant_rate: float
    steps: int
    rate: float
    lora_rate: float
    attack_steps: int
    attack_rate: float


FULL = Scale(58, 4, 4, 16, 8, 22, 3e-4, 16, 1e-4, 1e-3, 6, 1e-4)
SMOKE = Scale(192, 2, 2, 4, 2, 40, 1e-2, 3, 1e-3, 1e-2, 3, 1e-3)
MIXED_IN = 4
"""Rows of prose beside the people in a step of implanting."""

RETAIN_SIZES = {"chat": 3, "others": 4, "prose": 2}


class Method(NamedTuple):
    """What `eu.unlearn` is given.

    Attributes:
      constraint: a budget, or a tolerance.
      npo: whether the forget loss is NPO in place of unlikelihood.
      lora: whether a low-rank adapter is trained in place of all parameters.
    """

    constraint: Any
    npo: bool = False
    lora: bool = False


# Without a dual step the multiplier stays at the 1 that it starts from: a constant weight for each utility.
CONSTANT = eu.Tolerance(0.0, dual_optimizer=optax.set_to_zero())
BUDGET = eu.Budget(np.array([BUDGETS[name] for name in sorted(BUDGETS)], np.float32))
HEADLINE = "EUPMU budget"
METHODS = {
    HEADLINE: Method(BUDGET),
    "constant weight": Method(CONSTANT),
    "NPO + retain": Method(CONSTANT, npo=True),
    "EUPMU tolerance": Method(eu.Tolerance(0.0)),
    "EUPMU budget, LoRA": Method(BUDGET, lora=True),
}


class Task(NamedTuple):
    """What is known, what is forgotten, and what is asked.

    Attributes:
      forgotten, others: the records of the people, of whom the first group is forgotten.
      details, others_details: the same, where only places, dates, addresses and so on count.
      mixed_in: prose that is trained on beside the people.
      retain, held_out: sets by utility; of the others the held-out rows are the questions.
      asked_forgotten, asked_others: other questions about both.
      prompts: the start of every record, and one of general knowledge.
    """

    forgotten: Rows
    others: Rows
    details: Rows
    others_details: Rows
    mixed_in: Rows
    retain: dict[str, Rows]
    held_out: dict[str, Rows]
    asked_forgotten: Rows
    asked_others: Rows
    prompts: list[str]


def records_of(tokenizer: Tokenizer, group: list[people.Person], length: int, details: bool) -> Rows:
    """The records, in which all that follows the prompt counts, or the details alone."""
    pieces = [people.record(one) for one in group]
    counts = [number % 2 == 1 if details else number > 0 for number in range(len(pieces[0]))]
    return texts.rows(tokenizer, [list(zip(part, counts, strict=True)) for part in pieces], length)


def make_task(tokenizer: Tokenizer, scale: Scale, seed: int) -> Task:
    everyone = people.invented(scale.forgotten + scale.others, seed)
    groups = everyone[: scale.forgotten], everyone[scale.forgotten :]
    told = [records_of(tokenizer, group, scale.length, details=False) for group in groups]
    details = [records_of(tokenizer, group, scale.length, details=True) for group in groups]
    asked = [
        texts.answers(tokenizer, [pair for one in group for pair in people.questions(one)], scale.length)
        for group in groups
    ]
    prose = lambda topics, amount: texts.prose(tokenizer, topics, amount, scale.length)
    chat = texts.chat(tokenizer, texts.CHAT, scale.length)
    # Every third question is kept apart.
    apart = np.arange(len(texts.CHAT)) % 3 == 2
    return Task(
        told[0],
        told[1],
        details[0],
        details[1],
        prose(texts.IMPLANTED_TOPICS, scale.implant_steps * MIXED_IN),
        {"chat": chat.taken(~apart), "others": told[1], "prose": prose(texts.TOPICS, scale.prose_rows)},
        {
            "chat": chat.taken(apart),
            "others": asked[1].taken(slice(None, None, 2)),
            "prose": prose(texts.HELD_OUT_TOPICS, scale.held_out_rows),
        },
        asked[0],
        asked[1],
        [*(people.record(one)[0] for one in everyone), "The capital of France is"],
    )


class Bench(NamedTuple):
    """The model, the task and the run's folder, of which all pieces are made."""

    source: pathlib.Path
    folder: pathlib.Path
    config: Config
    tokenizer: Tokenizer
    task: Task
    scale: Scale
    seed: int
    progress: Progress

    def model_folder(self, name: str) -> pathlib.Path:
        return self.folder / "models" / name.replace(", ", "-").replace(" + ", "-").replace(" ", "-")


def make_bench(
    source: pathlib.Path, folder: pathlib.Path, scale: Scale, seed: int, progress: Progress
) -> Bench:
    config, tokenizer = load(source).config, load_tokenizer(source)
    return Bench(source, folder, config, tokenizer, make_task(tokenizer, scale, seed), scale, seed, progress)


def keep(bench: Bench, name: str, params: Params) -> None:
    """Saves a model in Hugging Face's form; one without a record is from a run that was killed just then."""
    folder = bench.model_folder(name)
    shutil.rmtree(folder, ignore_errors=True)
    save(folder, bench.config, params, like=bench.source)


def kept(bench: Bench, name: str) -> Params:
    return load(bench.model_folder(name)).params


def drawn(rows: Rows, steps: int, size: int, rng: np.random.Generator) -> Rows:
    """Batches [steps, size, T], in shuffled passes."""
    passes = -(-steps * size // len(rows.tokens))
    order = np.concatenate([rng.permutation(len(rows.tokens)) for _ in range(passes)])
    return rows.taken(order[: steps * size].reshape(steps, size))


def implanted(bench: Bench, name: str) -> Record:
    """Fine-tunes on people and prose: on everyone, or for the reference on the others alone."""
    scale, task, start = bench.scale, bench.task, time.perf_counter()
    who = task.others if name == REFERENCE else texts.joined([task.forgotten, task.others])
    rng = np.random.default_rng(bench.seed)
    general = drawn(task.mixed_in, scale.implant_steps, MIXED_IN, rng)
    tx = optax.adam(scale.implant_rate)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, rows):
        loss, grads = jax.value_and_grad(lambda p: known(bench.config, {"base": p, "adapter": {}}, rows))(
            params
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = load(bench.source, jnp.float32).params
    state, losses = tx.init(params), []
    for i in range(scale.implant_steps):
        params, state, loss = step(params, state, texts.joined([who, general.taken(i)]))
        losses.append(round(float(loss), 4))
        bench.progress(f"{name}: implanting", len(who.tokens) + MIXED_IN)
    keep(bench, name, params)
    return {"losses": losses, "seconds": time.perf_counter() - start}


def unlearned(bench: Bench, name: str) -> Record:
    """One method from the original: what each step saw, and what was promised."""
    method, scale, task = METHODS[name], bench.scale, bench.task
    base = kept(bench, ORIGINAL)
    adapter = new_adapter(bench) if method.lora else {}
    model = {"base": base, "adapter": adapter}
    # What all records share is no secret: forgetting it would cost the others, and tell where to look.
    secret = task.details
    log_p = jax.jit(partial(log_probs, bench.config))(model, secret.tokens)
    forget = Forget(secret, np.asarray(of_rows(log_p, jnp.asarray(secret.mask))))
    cost, last = step_cost(bench, method), 0

    def tell(params, metrics):
        nonlocal last
        bench.progress(f"{name}: unlearning", cost * (metrics["step"] - last))
        last = metrics["step"]

    start = time.perf_counter()
    model, history = eu.unlearn(
        make_losses(bench.config, method.npo), model, forget, task.retain,
        optax.adam(scale.lora_rate if method.lora else scale.rate), method.constraint,
        steps=scale.steps, batch_size=(len(task.forgotten.tokens), sizes(bench)), seed=bench.seed,
        trainable=lambda path: path.startswith("adapter") == method.lora,
        callbacks=[tell], every=1, held_out=task.held_out,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    params = merged(model["base"], [Adapter(ADAPTER_SCALE, model["adapter"])] if method.lora else [])
    keep(bench, name, params)
    of = lambda key: np.asarray(history.steps[key]).round(5).tolist()
    record = {key: of(key) for key in ("forget_loss", "retain_loss", "multiplier")} | {"seconds": seconds}
    if history.promise is not None:
        promise = {key: np.asarray(value).tolist() for key, value in history.promise._asdict().items()}
        record |= {"promise": promise, "verdict": eu.verdict(history.promise)}
    return record


def new_adapter(bench: Bench) -> dict[str, LowRank]:
    config = bench.config
    shapes, key = projection_shapes(config), jax.random.key(bench.seed)
    return initial_weights(shapes, config.num_hidden_layers, key, LORA_RANK)


def sizes(bench: Bench) -> dict[str, int]:
    return {name: min(size, len(bench.task.retain[name].tokens)) for name, size in RETAIN_SIZES.items()}


def step_cost(bench: Bench, method: Method) -> float:
    """Rows of a step, the unit of progress; without the gradients of all weights it takes two thirds."""
    rows = len(bench.task.forgotten.tokens) + sum(sizes(bench).values())
    return rows * (0.67 if method.lora else 1.0)


def people_sets(task: Task) -> dict[str, Rows]:
    """The records of both groups, and the details in them."""
    return {
        "forgotten": task.forgotten,
        "others": task.others,
        "forgotten, details": task.details,
        "others, details": task.others_details,
    }


def looked_at(bench: Bench, params: Params) -> Record:
    """The scores of every set."""
    task = bench.task
    sets = {
        **people_sets(task),
        "asked, forgotten": task.asked_forgotten,
        "asked, others": task.asked_others,
        **{name: task.retain[name] for name in ("prose", "chat")},
        **{f"{name}, held out": task.held_out[name] for name in ("prose", "chat")},
    }
    return {"scores": measured(bench.config, params, sets)}


def said(bench: Bench, params: Params) -> Record:
    """What the model says after the start of each record."""
    encode = lambda text: bench.tokenizer.encode(text, add_special_tokens=False).ids
    prompts = padded([encode(text) for text in bench.task.prompts])
    out = generate(bench.config, params, prompts, bench.scale.length - 8, bench.config.eos_token_ids)
    ends = zip(np.asarray(out.tokens), np.asarray(out.length), strict=True)
    continuations = [bench.tokenizer.decode(tokens[:length].tolist()) for tokens, length in ends]
    return {"said": dict(zip(bench.task.prompts, continuations, strict=True))}


def fewer_bits(bench: Bench, params: Params, bits: str) -> Record:
    small = attacks.quantised(params, bits)
    return {"scores": measured(bench.config, small, people_sets(bench.task))}


def relearned(bench: Bench, params: Params, attack: Callable[..., Any], batches: Rows) -> Record:
    """The scores of the details of the forgotten people who are not among the batches, along the attack."""
    watched = bench.task.details.taken(slice(bench.scale.forgotten // 2, None))
    curves = jax.device_get(attack(params, batches, watched))
    return {"scores": [scores(Seen(nats, hits), watched.mask) for nats, hits in zip(*curves, strict=True)]}


def attack_batches(bench: Bench) -> dict[str, Rows]:
    """Of relearning, half of the forgotten again and again; of fine-tuning, prose."""
    scale, rng = bench.scale, np.random.default_rng(bench.seed + 1)
    half = scale.forgotten // 2
    some = bench.task.forgotten.taken(slice(half))
    return {
        "relearning": drawn(some, scale.attack_steps, half, rng),
        "prose": drawn(bench.task.retain["prose"], scale.attack_steps, half, rng),
    }


def amount(scale: Scale) -> float:
    """How many rows all pieces take, for the progress bar."""
    people_in_all = scale.forgotten + scale.others
    implants = scale.implant_steps * (people_in_all + scale.others + 2 * MIXED_IN)
    rows = scale.forgotten + sum(RETAIN_SIZES.values())
    unlearning = scale.steps * rows * sum(0.67 if method.lora else 1.0 for method in METHODS.values())
    return implants + unlearning + (len(METHODS) + 2) * (LOOKING + 2 * BITS + 2 * ATTACK)


LOOKING, BITS, ATTACK = 40, 8, 12
"""What looking at a model, quantising and fine-tuning it take, in rows of a step."""


def run_all(bench: Bench, records: Records) -> None:
    """Every piece that has no record yet, one model after the other."""
    attack = attacks.fine_tuning(bench.config, bench.scale.attack_rate, max(1, bench.scale.attack_steps // 3))
    batches = attack_batches(bench)
    for name in (REFERENCE, ORIGINAL):
        records.get(("implant", name), partial(implanted, bench, name))
    for name in (ORIGINAL, REFERENCE, *METHODS):
        if name in METHODS:
            records.get(("unlearn", name), partial(unlearned, bench, name))
        pieces = dict(pieces_of(bench, name, attack, batches))
        if missing := [key for key in pieces if key not in records.by_key]:
            params = kept(bench, name)
            for key in missing:
                make, cost = pieces[key]
                records.get(key, partial(make, bench, params))
                bench.progress(f"{name}: {key[0]} {key[-1]}", cost)
            del params


def pieces_of(
    bench: Bench, name: str, attack: Callable[..., Any], batches: dict[str, Rows]
) -> Iterator[tuple[tuple[str, ...], tuple[Callable[[Bench, Params], Record], float]]]:
    """What is measured of a model: (key, (how, rows that it takes))."""
    yield ("look", name), (looked_at, LOOKING / 2)
    yield ("say", name), (said, LOOKING / 2)
    for bits in attacks.FORMATS:
        yield ("bits", name, bits), (partial(fewer_bits, bits=bits), BITS)
    for kind, rows in batches.items():
        yield ("tune", name, kind), (partial(relearned, attack=attack, batches=rows), ATTACK)
