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
from eupmu_jax.evaluation import min_k_log_probability, rouge_l, truth_ratio
from experiments.language import attacks, people, prompts, texts
from experiments.language.losses import (
    ADAPTER_SCALE,
    CONFIDENCE,
    NPO,
    UNLIKELIHOOD,
    before_unlearning,
    known,
)
from experiments.language.measures import Seen, measured, nats_of_answers, scores, seen_of_sets
from experiments.language.peers import Job, Unlearn, by_constraint, by_peer
from experiments.language.texts import Rows
from experiments.shared.methods.exact_surgery import exact_surgery
from experiments.shared.methods.pdu import pdu
from experiments.shared.methods.scalarisation import scalarisation
from experiments.shared.models.llama.config import Config, projection_shapes
from experiments.shared.models.llama.files import load, load_tokenizer, save
from experiments.shared.models.llama.generate import generate, padded
from experiments.shared.models.llama.model import Params
from experiments.shared.models.llama.peft import load_adapter, save_adapter
from experiments.shared.models.lora import Adapter, LowRank, initial_weights, merged
from experiments.shared.records import Record, Records
from experiments.shared.testbed import Progress

ORIGINAL, REFERENCE = "original", "reference"
BUDGETS = {"chat": 0.1, "others": 0.02, "prose": 0.1}
LORA_RANK = 8


class Method(NamedTuple):
    """How the original is unlearned.

    Attributes:
      unlearn: `eu.unlearn` under a constraint, or a peer.
      objective: the forget loss.
      lora: whether a low-rank adapter is trained in place of all parameters.
    """

    unlearn: Unlearn
    objective: str = CONFIDENCE
    lora: bool = False


BUDGET = eu.Budget(np.array([BUDGETS[name] for name in sorted(BUDGETS)], np.float32))
# A little below 0, for a look-ahead at 0 is satisfied by fitting the very batch.
LOOKAHEAD = eu.Tolerance(-0.02, measure="lookahead")
HEADLINE = "EUPMU budget"
METHODS = {
    HEADLINE: Method(by_constraint(BUDGET)),
    "EUPMU budget, LoRA": Method(by_constraint(BUDGET), lora=True),
    "EUPMU budget, unlikelihood": Method(by_constraint(BUDGET), UNLIKELIHOOD),
    "EUPMU tolerance, lagged": Method(by_constraint(eu.Tolerance(0.0))),
    "EUPMU tolerance, look-ahead": Method(by_constraint(LOOKAHEAD)),
    "constant weight": Method(by_peer(scalarisation, lambda job: {"weight": 1.0})),
    "NPO + retain": Method(by_peer(scalarisation, lambda job: {"weight": 1.0}), NPO),
    "PDU": Method(by_peer(pdu, lambda job: {"bound": job.bound, "dual_rate": 1.0})),
    "GRU (exact surgery)": Method(by_peer(exact_surgery, lambda job: {"demand": 0.0})),
}
DEFAULT_METHODS = (HEADLINE, "constant weight", "NPO + retain")
SMOKE_METHODS = (HEADLINE, "EUPMU budget, LoRA", "GRU (exact surgery)")


class Scale(NamedTuple):
    """How much is done, and how fast.

    Attributes:
      length: tokens of a row.
      forgotten, others, unseen: how many people are forgotten, kept, and never told of.
      prose_rows, held_out_rows: rows of prose for training and kept apart.
      implant_steps, implant_rate: Adam's, with which people are implanted.
      steps: of every method.
      rate, lora_rate: Adam's, of all parameters and of adapters.
      attack_steps, attack_rate: of both fine-tuning attacks; they are measured at every third of them.
      methods: names of `METHODS`.
    """

    length: int
    forgotten: int
    others: int
    unseen: int
    prose_rows: int
    held_out_rows: int
    implant_steps: int
    implant_rate: float
    steps: int
    rate: float
    lora_rate: float
    attack_steps: int
    attack_rate: float
    methods: tuple[str, ...]


FULL = Scale(58, 4, 4, 16, 16, 8, 22, 3e-4, 16, 1e-4, 1e-3, 6, 1e-4, DEFAULT_METHODS)
SMOKE = Scale(192, 2, 2, 2, 4, 2, 24, 1e-2, 3, 1e-3, 1e-2, 3, 1e-3, SMOKE_METHODS)
MIXED_IN = 4
"""Rows of prose beside the people in a step of implanting."""

RETAIN_SIZES = {"chat": 3, "others": 4, "prose": 2}


class Task(NamedTuple):
    """What is known, what is forgotten, and what is asked.

    Attributes:
      forgotten, others: the records of the people, of whom the first group is forgotten.
      details, others_details: the same, where only places, dates, addresses and so on count.
      mixed_in: prose that is trained on beside the people.
      unseen_details: details of people whom no model was told of.
      retain, held_out: sets by utility; of the others the held-out rows are questions in other words.
      asked: other ways to ask for details of the forgotten, by kind, and of the others.
      choices: (question and right answer [N], the same with wrong answers [N * WRONG]), of both groups.
      prompts: the start of every record, and one of general knowledge.
      told: what each record goes on with.
    """

    forgotten: Rows
    others: Rows
    details: Rows
    others_details: Rows
    unseen_details: Rows
    mixed_in: Rows
    retain: dict[str, Rows]
    held_out: dict[str, Rows]
    asked: dict[str, Rows]
    choices: dict[str, tuple[Rows, Rows]]
    prompts: list[str]
    told: dict[str, str]


def records_of(tokenizer: Tokenizer, group: list[people.Person], length: int, details: bool) -> Rows:
    """The records, in which all that follows the prompt counts, or the details alone."""
    pieces = [people.record(one) for one in group]
    counts = [number % 2 == 1 if details else number > 0 for number in range(len(pieces[0]))]
    return texts.rows(tokenizer, [list(zip(part, counts, strict=True)) for part in pieces], length)


WRONG = 3
"""Wrong answers beside each right one: the details of people who are never told of."""
ASKED_FOR = ("place", "address", "telephone")


def choices_of(
    tokenizer: Tokenizer, group: list[people.Person], unseen: list[people.Person], length: int
) -> tuple[Rows, Rows]:
    """Questions with the right answer, and with wrong ones, WRONG for each question."""
    right, wrong = [], []
    for number, person in enumerate(group):
        strangers = [unseen[(number + i) % len(unseen)] for i in range(WRONG)]
        for detail in ASKED_FOR:
            ((asked, told),) = prompts.prompts(person, [detail], each=1)[prompts.PARAPHRASE]
            right.append((asked, told))
            wrong += [(asked, f" {getattr(stranger, detail)}") for stranger in strangers]
    return texts.answers(tokenizer, right, length), texts.answers(tokenizer, wrong, length)


def make_task(tokenizer: Tokenizer, scale: Scale, seed: int) -> Task:
    everyone = people.invented(scale.forgotten + scale.others + scale.unseen, seed)
    forgotten, others = everyone[: scale.forgotten], everyone[scale.forgotten : -scale.unseen]
    unseen, known_people = everyone[-scale.unseen :], everyone[: -scale.unseen]
    told = lambda group, details: records_of(tokenizer, group, scale.length, details)
    asked = lambda group, kind: [
        pair for person in group for pair in prompts.prompts(person, ASKED_FOR, each=1)[kind]
    ]
    kinds = {f"forgotten, {kind}": asked(forgotten, kind) for kind in prompts.PROMPTS}
    kinds["others, paraphrase"] = asked(others, prompts.PARAPHRASE)
    together = texts.answers(tokenizer, [pair for pairs in kinds.values() for pair in pairs])
    ends = np.cumsum([len(pairs) for pairs in kinds.values()])
    asked_rows = dict(zip(kinds, texts.split(together, ends), strict=True))
    prose = lambda topics, amount: texts.prose(tokenizer, topics, amount, scale.length)
    chat = texts.chat(tokenizer, texts.CHAT, scale.length)
    # Every third question is kept apart.
    apart = np.arange(len(texts.CHAT)) % 3 == 2
    choice_length = together.tokens.shape[1] + 8
    records = {person: people.record(person) for person in known_people}
    return Task(
        told(forgotten, False),
        told(others, False),
        told(forgotten, True),
        told(others, True),
        told(unseen, True),
        prose(texts.IMPLANTED_TOPICS, scale.implant_steps * MIXED_IN),
        {
            "chat": chat.taken(~apart),
            "others": told(others, False),
            "prose": prose(texts.TOPICS, scale.prose_rows),
        },
        {
            "chat": chat.taken(apart),
            "others": texts.answers(tokenizer, kinds["others, paraphrase"], scale.length),
            "prose": prose(texts.HELD_OUT_TOPICS, scale.held_out_rows),
        },
        asked_rows,
        {
            "forgotten": choices_of(tokenizer, forgotten, unseen, choice_length),
            "others": choices_of(tokenizer, others, unseen, choice_length),
        },
        [*(record[0] for record in records.values()), "The capital of France is"],
        {record[0]: "".join(record[1:]) for record in records.values()},
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


def unlearned(bench: Bench, name: str, before: Record) -> Record:
    """One method from the original, whose scores are `before`: what each step saw, and what was promised."""
    method, scale, task = METHODS[name], bench.scale, bench.task
    base = kept(bench, ORIGINAL)
    adapter = new_adapter(bench) if method.lora else {}
    model = {"base": base, "adapter": adapter}
    # What all records share is no secret: forgetting it would cost the others, and tell where to look.
    forget = before_unlearning(bench.config, model, task.details, task.unseen_details)
    job = Job(
        bench.config, method.objective, forget, task.retain, task.held_out, sizes(bench),
        bound=float(np.mean([before["scores"][part]["nats"] + BUDGETS[part] for part in BUDGETS])),
        rate=scale.lora_rate if method.lora else scale.rate, steps=scale.steps,
        trains=lambda path: path.startswith("adapter") == method.lora, seed=bench.seed,
    )  # fmt: skip
    start, cpu = time.perf_counter(), time.process_time()
    cost = step_cost(bench, method)
    model, seen = method.unlearn(job, model, lambda: bench.progress(f"{name}: unlearning", cost))
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    adapters = [Adapter(ADAPTER_SCALE, model["adapter"])] if method.lora else []
    keep(bench, name, merged(model["base"], adapters))
    for trained in adapters:
        # Beside the merged model it would be added to it once more by whoever loads the folder.
        save_adapter(bench.model_folder(name) / "adapter", trained, str(bench.model_folder(ORIGINAL)))
    of = lambda key: np.asarray(seen[key], float).round(5).tolist()
    record = {key: of(key) for key in ("forget_loss", "retain_loss", "multiplier")} | spent
    if promise := seen.get("promise"):
        record["promise"] = {key: np.asarray(value).tolist() for key, value in promise.items()}
        record["verdict"] = eu.verdict(eu.Promise(**promise), list(BUDGETS))
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
    """The scores of every set, the truth ratio of every question, and how familiar every person looks."""
    task = bench.task
    sets = {
        **people_sets(task),
        "unseen, details": task.unseen_details,
        **{name: task.retain[name] for name in ("prose", "chat")},
        **{f"{name}, held out": task.held_out[name] for name in ("prose", "chat")},
    }
    seen = seen_of_sets(bench.config, params, sets)
    found = {name: scores(seen[name], rows.mask) for name, rows in sets.items()}
    found |= measured(bench.config, params, task.asked)
    familiar = {
        who: min_k_log_probability(-seen[f"{who}, details"].nats, sets[f"{who}, details"].mask[:, 1:])
        for who in ("forgotten", "unseen")
    }
    return {
        "scores": found,
        "truth_ratio": {who: truth_ratios(bench, params, *rows) for who, rows in task.choices.items()},
        "min_k": {who: values.round(5).tolist() for who, values in familiar.items()},
    }


def truth_ratios(bench: Bench, params: Params, right: Rows, wrong: Rows) -> list[float]:
    """Of each question."""
    sets = {"right": right, "wrong": wrong}
    seen = seen_of_sets(bench.config, params, sets)
    nats, length = zip(*(nats_of_answers(seen[name], sets[name].mask) for name in sets), strict=True)
    per_question = lambda values: values.reshape(-1, WRONG)
    ratios = truth_ratio(-nats[0], length[0], per_question(-nats[1]), per_question(length[1]))
    return ratios.round(5).tolist()


def said(bench: Bench, params: Params) -> Record:
    """What the model says after the start of each record, and how much of the record it recalls."""
    encode = lambda text: bench.tokenizer.encode(text, add_special_tokens=False).ids
    start = padded([encode(text) for text in bench.task.prompts])
    out = generate(bench.config, params, start, bench.scale.length - 8, bench.config.eos_token_ids)
    ends = zip(np.asarray(out.tokens), np.asarray(out.length), strict=True)
    continuations = [bench.tokenizer.decode(tokens[:length].tolist()) for tokens, length in ends]
    said = dict(zip(bench.task.prompts, continuations, strict=True))
    recall = [rouge_l(told, said[prompt]).recall for prompt, told in bench.task.told.items()]
    amount = bench.scale.forgotten
    rouge = {"forgotten": float(np.mean(recall[:amount])), "others": float(np.mean(recall[amount:]))}
    return {"said": said, "rouge_l": rouge}


def fewer_bits(bench: Bench, params: Params, bits: str) -> Record:
    small = attacks.quantised(params, bits)
    return {"scores": measured(bench.config, small, people_sets(bench.task))}


def unmerged(bench: Bench, params: Params, name: str, bits: str) -> Record:
    """The original in fewer bits, and the adapter beside it as it was trained."""
    del params
    small = attacks.quantised(kept(bench, ORIGINAL), bits)
    adapter = load_adapter(bench.model_folder(name) / "adapter", bench.config)
    return {"scores": measured(bench.config, small, people_sets(bench.task), [adapter])}


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
    unlearning = scale.steps * rows * sum(0.67 if METHODS[name].lora else 1.0 for name in scale.methods)
    return (
        implants
        + unlearning
        + (len(scale.methods) + 2) * (LOOKING + len(attacks.FORMATS) * BITS + 2 * ATTACK)
        + sum(METHODS[name].lora for name in scale.methods) * len(attacks.FORMATS) * BITS
    )


LOOKING, BITS, ATTACK = 60, 8, 12
"""What looking at a model, quantising and fine-tuning it take, in rows of a step."""


def run_all(bench: Bench, records: Records) -> None:
    """Every piece that has no record yet, one model after the other."""
    attack = attacks.fine_tuning(bench.config, bench.scale.attack_rate, max(1, bench.scale.attack_steps // 3))
    batches = attack_batches(bench)
    for name in (REFERENCE, ORIGINAL):
        records.get(("implant", name), partial(implanted, bench, name))
    for name in (ORIGINAL, REFERENCE, *bench.scale.methods):
        if name in METHODS:
            before = records.by_key["look", ORIGINAL]
            records.get(("unlearn", name), partial(unlearned, bench, name, before))
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
        if name in METHODS and METHODS[name].lora:
            yield ("unmerged", name, bits), (partial(unmerged, name=name, bits=bits), BITS)
    for kind, rows in batches.items():
        yield ("tune", name, kind), (partial(relearned, attack=attack, batches=rows), ATTACK)
