"""What a newcomer or a hostile user runs into: each is said in words that name it, and nothing is lost."""

import json
import multiprocessing.pool
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eupmu_jax as eu
from eupmu_jax import objectives
from eupmu_jax.cli import report

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)}


def rows(count, seed):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(count, 3)).astype(np.float32), "y": rng.integers(0, 2, count)}


FORGET, RETAIN = rows(40, 1), rows(100, 2)


def losses_fn(params, batch):
    logits = lambda part: part["x"] @ params["w"]
    forget, retain = batch["forget"], batch["retain"]
    return eu.Losses(
        objectives.kl_to_uniform(logits(forget)).mean(),
        objectives.cross_entropy(logits(retain), retain["y"]).mean(),
    )


def run(forget=FORGET, retain=RETAIN, fn=losses_fn, inner=None, constraint=None, **settings):
    inner, constraint = inner or optax.sgd(0.1), constraint or eu.Budget(0.1)
    return eu.unlearn(
        fn, PARAMS, forget, retain, inner, constraint, **{"steps": 6, "batch_size": 8} | settings
    )


def spoilt(data, row=17):
    x = data["x"].copy()
    x[row, 1] = np.nan
    return data | {"x": x}


@pytest.mark.parametrize("constraint", [eu.Budget(0.1), eu.Tolerance(0.01)], ids=["budget", "tolerance"])
@pytest.mark.parametrize("name", ["forget", "retain"])
def test_rows_that_are_not_finite_are_named_before_the_first_step(name, constraint):
    data = {"forget": FORGET, "retain": RETAIN}
    data[name] = spoilt(data[name])
    with pytest.raises(
        ValueError, match=f"{name} holds NaN or infinity in 1 of its .* rows, of which row 17"
    ):
        run(**data, constraint=constraint)


def test_rows_that_the_losses_mask_may_hold_anything():
    def masked(params, batch):
        part = batch["forget"]
        counts = jnp.isfinite(part["x"]).all(-1)
        kl = objectives.kl_to_uniform(jnp.where(counts[:, None], part["x"], 0) @ params["w"], counts)
        return losses_fn(params, batch)._replace(forget=objectives.masked_mean(kl, counts))

    _, history = run(spoilt(FORGET), fn=masked)
    assert history.steps["skipped_steps"][-1] == 0


def test_labels_out_of_range():
    with pytest.raises(ValueError, match="whole retain set is nan before the first step: look for labels"):
        run(retain=RETAIN | {"y": RETAIN["y"] + np.eye(100, dtype=int)[3] * 7})


def test_every_row_of_the_data_is_compared(tmp_path):
    forget = rows(3000, 3)
    run(forget, folder=tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        run(
            forget | {"x": forget["x"] * (np.arange(3000) != 1777)[:, None].astype(np.float32)},
            folder=tmp_path,
        )


@pytest.mark.parametrize(
    "change",
    [
        {"inner": optax.sgd(0.2)},
        {"inner": optax.adam(0.1)},
        {"fn": lambda params, batch: losses_fn(params, batch)._replace(forget=jnp.sum(params["w"] ** 2))},
    ],
    ids=["rate", "optimiser", "loss"],
)
def test_another_program_in_the_same_folder_is_noticed(tmp_path, change):
    run(folder=tmp_path)
    with pytest.raises(ValueError, match="other settings") as error:
        run(folder=tmp_path, **change)
    assert len(str(error.value)) < 600 + len(str(tmp_path))


def test_the_program_of_another_version_of_jax_is_not_compared(tmp_path):
    """It is written in other words."""
    run(folder=tmp_path)
    saved = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(saved | {"jax": "0.0.1", "crc32 of the step": 3}))
    run(folder=tmp_path)


def test_messages_are_short(tmp_path):
    run(folder=tmp_path)
    many = {f"layer{i}": jnp.ones((3, 2)) for i in range(500)}
    with pytest.raises(ValueError, match="other settings") as error:
        eu.unlearn(
            lambda params, batch: losses_fn({"w": params["layer0"]}, batch), many, FORGET, RETAIN,
            optax.sgd(0.1), eu.Budget(0.1), steps=6, batch_size=8, folder=tmp_path,
        )  # fmt: skip
    assert len(str(error.value)) < 600 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"seed": 2**70}, ValueError, "seed must be at most"),
        ({"steps": 10**18}, ValueError, "steps must be at most"),
        (
            {"evaluate": lambda params: 0.5},
            TypeError,
            "evaluate must return a dict of numbers by name, got float",
        ),
        (
            {"evaluate": lambda params: {"accuracy": np.ones(3)}},
            TypeError,
            r"evaluate, of 'accuracy', must return numbers, got an array \(3,\)",
        ),
        ({"score": lambda metrics: "x"}, TypeError, "score must return numbers, got 'x'"),
        (
            {"score": lambda metrics: metrics["accuracy"]},
            ValueError,
            "score asks for 'accuracy', but the metrics",
        ),
        (
            {"stop": lambda metrics: metrics["accuracy"]},
            ValueError,
            "stop asks for 'accuracy', but the metrics",
        ),
        ({"constraint": eu.Budget([0.1, 0.1])}, ValueError, r"budget total must .* shape \(2,\)"),
        ({"constraint": eu.Tolerance([0.1, 0.1])}, ValueError, r"tolerance eps must .* shape \(2,\)"),
        ({"initial_multiplier": [1.0, 1.0]}, ValueError, r"initial_multiplier must .* shape \(2,\)"),
        ({"steps": None, "epochs": True}, ValueError, "epochs must be a number > 0, got True"),
        ({"fn": lambda params, batch: (1.0, 2.0)}, TypeError, "losses_fn must return .*Losses.*got tuple"),
    ],
)
def test_messages_name_the_argument(settings, error, message):
    with pytest.raises(error, match=message):
        run(**settings)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"evaluate": lambda params: 1 / 0}, "in evaluate, after 0 steps"),
        ({"score": lambda metrics: 1 / 0}, "in score, after 2 steps"),
        ({"stop": lambda metrics: 1 / 0}, "in stop, after 2 steps"),
        ({"callbacks": [lambda params, metrics: 1 / metrics["step"]]}, "in a callback, after 0 steps"),
    ],
)
def test_an_error_of_a_function_says_where_in_the_run_it_was(settings, where):
    with pytest.raises(ZeroDivisionError) as error:
        run(every=2, **settings)
    assert where in " ".join(error.value.__notes__)


def test_an_infinite_score_is_the_highest():
    _, history = run(every=2, score=lambda metrics: np.inf if metrics["step"] == 2 else 0.0)
    assert history.best_step == 2


def test_the_first_batch_is_drawn_once():
    """A function may be a slow loader."""
    asked = []
    source = lambda data: lambda step: asked.append(step) or {k: v[:8] for k, v in data.items()}
    run(source(FORGET), source(RETAIN), steps=3)
    assert sorted(asked) == [0, 0, 1, 1, 2, 2]


def test_a_finished_run_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    params, history = run(folder=tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    read, seen = run(folder=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert seen.promise == history.promise
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()} == before


def test_the_message_on_a_long_list_is_short():
    with pytest.raises(ValueError, match=r"forget must be arrays .* and 1996 more") as error:
        eu.unlearn(
            losses_fn, {"w": jnp.ones((3, 2))}, [1.0] * 2000, RETAIN, optax.sgd(0.1), eu.Budget(0.1), steps=6
        )
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("total", [1e-30, 1e38])
def test_budgets_beyond_arithmetic(total):
    with pytest.raises(ValueError, match=r"budget total must lie in \[1e-12, 1e12\]"):
        eu.Budget(total)


def test_of_many_that_race_for_a_folder_one_gets_it(tmp_path):
    def start(seed):
        try:
            run(folder=tmp_path / "run", seed=seed)
        except ValueError as error:
            return str(error)
        return "done"

    with multiprocessing.pool.ThreadPool(4) as pool:
        answers = pool.map(start, range(4))
    assert "done" in answers
    assert all("in use" in answer or "other settings" in answer for answer in answers if answer != "done")


@pytest.mark.parametrize("edit", ["duplicate", "negative", "swapped", "no step", "number"])
def test_edited_metrics_are_refused(tmp_path, edit):
    run(folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    places = [place for place, line in enumerate(lines) if "evaluation" not in line]
    first, second = places[:2]
    match edit:
        case "duplicate":
            lines[second] = lines[first]
        case "negative":
            lines[second]["step"] = -2
        case "swapped":
            lines[first], lines[second] = lines[second], lines[first]
        case "no step":
            del lines[first]["step"]
        case "number":
            lines[first] = 3
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        run(folder=tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", '{"constraint": 3, "steps": 6}'),
        ("run.json", '{"constraint": {}, "steps": "many"}'),
        ("metrics.jsonl", '{"step": 1}\n'),
        ("metrics.jsonl", "3\n"),
        ("metrics.jsonl", '{"step": 1, "forget_loss": "high"}\n'),
        ("promise.json", "[]"),
        ("promise.json", '{"rise": 3}'),
        ("evaluation.json", "3"),
    ],
)
def test_the_report_of_edited_files_is_an_error_in_words(tmp_path, file, content):
    run(folder=tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        report.write(tmp_path)


def test_links_are_not_followed(tmp_path):
    run(folder=tmp_path / "run")
    secret = tmp_path / "secret"
    secret.write_text("mine")
    for name in ("report.html", "report.html.partial", "promise.json", "params.safetensors.partial"):
        path = tmp_path / "run" / name
        path.unlink(missing_ok=True)
        path.symlink_to(secret)
    run(folder=tmp_path / "run")
    report.write(tmp_path / "run")
    assert secret.read_text() == "mine"


def test_a_model_that_would_be_refused_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match=r"apply calls .* compute it beforehand"):
        eu.export_model(tmp_path, lambda params, x: x @ jnp.linalg.qr(params["w"])[0], PARAMS, FORGET["x"])
