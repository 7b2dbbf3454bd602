"""The command line and the models that it takes: whole runs, and bad input that ends in words."""

import contextlib
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import eupmu_jax as eu
from eupmu_jax.cli import exported, report
from eupmu_jax.cli.evaluate import look, scores
from eupmu_jax.cli.main import main
from eupmu_jax.run.leaves import by_path

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 4)).astype(np.float32)
Y = (X[:, 0] > 0) + (X[:, 1] > 0).astype(int)
TOKENS = RNG.integers(0, 6, (60, 5))
WEIGHTS = {"w": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)}
EMBEDDING = {"e": jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two models, of classes and of next tokens, and sets for both."""
    folder = tmp_path_factory.mktemp("files")
    eu.export_model(folder / "model", lambda params, x: x @ params["w"], WEIGHTS, X)
    eu.export_model(folder / "tokens", lambda params, x: params["e"][x], EMBEDDING, TOKENS)
    for name, rows in {"forget": slice(0, 30), "retain": slice(30, 90), "test": slice(90, 120)}.items():
        np.savez(folder / f"{name}.npz", x=X[rows], y=Y[rows])
        rows = slice(rows.start // 2, rows.stop // 2)
        mask = np.arange(5) < RNG.integers(1, 6, (rows.stop - rows.start, 1))
        y = np.where(mask, np.roll(TOKENS, -1, 1)[rows], -100)
        np.savez(folder / f"{name}_tokens.npz", x=TOKENS[rows], y=y, mask=mask)
    return folder


def arguments(files, folder, kind="", **settings):
    """The arguments of eupmu unlearn, None for one that is left out."""
    defaults = {"model": files / (kind or "model"), "folder": folder, "steps": 20, "batch_size": 8}
    sets = {name: files / f"{name}{f'_{kind}' if kind else ''}.npz" for name in ("forget", "retain", "test")}
    given = defaults | sets | {"learning_rate": 0.1} | settings
    named = [(f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None]
    return ["unlearn", *(f"{name}={value}" for name, value in named)]


# Models.


def test_a_model_comes_back(tmp_path):
    """Linen, NNX and one bare array: values, and the gradient."""
    dense = linen.Sequential([linen.Dense(3), linen.relu, linen.Dense(2)])
    graph, weights, rest = nnx.split(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param, ...)
    for i, (apply, params) in enumerate(
        [
            (dense.apply, dense.init(jax.random.key(0), X)),
            (lambda weights, x: nnx.merge(graph, weights, rest)(x), weights),
            (lambda w, x: x @ w, jnp.ones((4, 2), jnp.bfloat16)),
        ]
    ):
        eu.export_model(tmp_path / str(i), apply, params, X)
        loaded, named = eu.load_model(tmp_path / str(i))
        np.testing.assert_allclose(loaded(named, X[:7]), apply(params, X[:7]), rtol=1e-6)
        total = lambda weights, apply: jnp.sum(jnp.sin(apply(weights, X)))
        expected, got = jax.grad(total)(params, apply), jax.grad(total)(named, loaded)
        by_name = [got[name] for name in by_path(params)]
        for a, b in zip(jax.tree.leaves(expected), by_name, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5)


def test_what_cannot_be_exported(tmp_path):
    for apply in (
        lambda p, x: x[0] @ p["w"],
        lambda p, x: (x @ p["w"],) * 2,
        lambda p, x: x.reshape(120, 2, 2),
    ):
        with pytest.raises(ValueError, match=r"apply (must return logits|cannot be exported)"):
            eu.export_model(tmp_path / "no", apply, WEIGHTS, X)
    with pytest.raises(ValueError, match="two arrays have the same path"):
        eu.export_model(tmp_path / "no", lambda p, x: x, {"a": {"b": 1.0}, "a.b": 1.0}, X)
    assert not (tmp_path / "no").exists()


def test_a_model_that_could_run_code_is_refused(tmp_path, files):
    """A call out of XLA, forward or in the gradient only, written with the check of jax.export off."""
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    evil = lambda: jax.ffi.ffi_call("evil", shape)()
    apply = lambda named, x: x @ named["w"]
    hidden = jax.custom_vjp(apply)
    hidden.defvjp(
        lambda named, x: (apply(named, x), (named, x)), lambda kept, g: jax.vjp(apply, *kept)[1](g + evil())
    )
    checks = [jax.export.DisabledSafetyCheck.custom_call("evil")]
    eu.export_model(tmp_path, apply, WEIGHTS, X)
    for function in (lambda named, x: apply(named, x) + evil(), hidden):
        export = jax.export.export(jax.jit(function), platforms=["cpu"], disabled_checks=checks)
        (tmp_path / "apply.stablehlo").write_bytes(export(WEIGHTS, X[:2]).serialize(vjp_order=1))
        with pytest.raises(ValueError, match="calls evil, which could run any code"):
            eu.load_model(tmp_path)


def test_damaged_models(tmp_path, files):
    for name, content, message in [
        ("apply.stablehlo", b"no", "is not a function that jax.export wrote"),
        ("params.safetensors", b"no", "cannot be read"),
        ("params.safetensors", None, "holds no params.safetensors"),
        (
            "params.safetensors",
            (files / "tokens" / "params.safetensors").read_bytes(),
            r"does not go with .* w: None",
        ),
    ]:
        eu.export_model(tmp_path, lambda params, x: x @ params["w"], WEIGHTS, X)
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            eu.load_model(tmp_path)


# Commands.


def test_a_whole_run(files, tmp_path, capsys):
    folder = tmp_path / "run"
    main(arguments(files, folder))
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("apply.stablehlo", "checkpoints", "config.json", "curves.png", "evaluation.json"),
        *("metrics.jsonl", "params.safetensors", "promise.json", "report.html", "run.json"),
    }
    found = json.loads((folder / "evaluation.json").read_text())
    apply, params = eu.load_model(folder)
    accuracy = lambda params: float((np.argmax(apply(params, X[:30]), -1) == Y[:30]).mean())
    assert found["after"]["forget"]["accuracy"] == pytest.approx(accuracy(params))
    assert found["before"]["forget"]["accuracy"] == pytest.approx(accuracy(WEIGHTS))
    assert json.loads((folder / "config.json").read_text())["made by"]["versions"]["jax"] == jax.__version__
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "20 of 20 steps." in page
    # The promise, the data by its checksum, the attack that was not run, the command.
    crc = json.loads((folder / "run.json").read_text())["forget"]["crc32"]
    for said in (
        "(measured on 60 examples)",
        f"{crc:08x}",
        "No membership attack was run",
        "eupmu unlearn run/",
    ):
        assert said in page
    assert "after: forget" in capsys.readouterr().out

    # The same command again has nothing to do; another one is refused.
    before = (folder / "params.safetensors").read_bytes()
    main(arguments(files, folder))
    assert (folder / "params.safetensors").read_bytes() == before
    with pytest.raises(
        SystemExit, match=r"other settings \(objective: random-labels there, unlikelihood now\)"
    ):
        main(arguments(files, folder, objective="unlikelihood"))

    # The settings of a run are a file to go on with it, also where it was moved, and to start others from.
    moved = folder.rename(tmp_path / "moved")
    main(["unlearn", str(moved / "config.json")])
    assert (moved / "params.safetensors").read_bytes() == before
    folder = moved.rename(folder)
    main(["unlearn", str(folder / "config.json"), f"--folder={tmp_path / 'again'}"])
    assert (tmp_path / "again" / "params.safetensors").read_bytes() == before

    sets = [f"--{name}={files / name}.npz" for name in ("forget", "retain", "test")]
    main(["evaluate", f"--model={folder}", f"--reference={files / 'model'}", *sets])
    found = json.loads((folder / "evaluation.json").read_text())
    assert set(found) == {"before", "after", f"model {folder}", f"reference {files / 'model'}"}
    assert 0 <= found[f"model {folder}"]["forget"]["taken for unseen"] <= 100
    (folder / "report.html").unlink()
    main(["report", str(folder)])
    page = (folder / "report.html").read_text()
    assert "reference " in page
    assert "is a weak one" in page


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        ("random-labels", "tokens"),
        ("unlikelihood", ""),
        ("gradient-ascent", "tokens"),
        pytest.param("kl-to-uniform", "", marks=pytest.mark.slow),
        pytest.param("npo", "", marks=pytest.mark.slow),
        pytest.param("npo", "tokens", marks=pytest.mark.slow),
        pytest.param("simnpo", "tokens", marks=pytest.mark.slow),
    ],
)
def test_objectives_forget_classes_and_tokens(files, tmp_path, objective, kind):
    bounded = objective != "gradient-ascent"
    negative = contextlib.nullcontext() if bounded else pytest.warns(UserWarning, match="is negative")
    with negative:
        main(arguments(files, tmp_path / "run", kind, objective=objective, budget=5, test=None))
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    if objective != "kl-to-uniform":  # to which this model, that never learnt, can only come nearer
        assert found["after"]["forget"]["cross_entropy"] > found["before"]["forget"]["cross_entropy"]
    steps = report.read(tmp_path / "run")[1]
    assert not steps["skipped_steps"].any()
    assert steps["forget_loss"][-3:].mean() < steps["forget_loss"][:3].mean()


def test_a_tolerance_in_place_of_a_budget(files, tmp_path, capsys):
    main(arguments(files, tmp_path / "run", tolerance=-0.01, measure="lookahead"))
    constraint = json.loads((tmp_path / "run" / "run.json").read_text())["constraint"]
    assert (constraint["type"], constraint["eps"], constraint["measure"]) == ("Tolerance", -0.01, "lookahead")
    with pytest.raises(SystemExit) as error:
        main(arguments(files, tmp_path / "both", tolerance=0.1, budget=0.1))
    assert error.value.code == 2
    assert "--budget" in capsys.readouterr().err
    main(arguments(files, tmp_path / "budget"))
    constraint = json.loads((tmp_path / "budget" / "run.json").read_text())["constraint"]
    assert (constraint["type"], constraint["total"]) == ("Budget", 0.1)
    assert constraint["baseline"] > 0


def test_it_stops_where_told(files, tmp_path, capsys):
    main(arguments(files, tmp_path / "run", stop_at=0.99, every=5))
    assert "5 steps; forget_accuracy reached" in capsys.readouterr().out
    assert "Ended early" in (tmp_path / "run" / "report.html").read_text()


def test_a_broken_model_is_no_success(files, tmp_path):
    settings = {"learning_rate": 3e38, "optimizer": "sgd", "objective": "gradient-ascent", "steps": 60}
    warned = lambda text: pytest.warns(UserWarning, match=text)
    with warned("is negative"), warned("were skipped"), pytest.raises(SystemExit, match="is broken"):
        main(arguments(files, tmp_path / "run", tolerance=0.1, **settings))
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert any(np.isnan(value) for row in found["after"].values() for value in row.values())
    rows = {"y": np.zeros(2, int)}
    nothing = scores(*look(jnp.full((2, 3), jnp.nan), rows), rows)
    assert np.isnan(nothing["accuracy"]), "the first class is not what NaN predicts"


def test_a_few_rows_of_logits_exist_at_a_time(monkeypatch):
    """Of a text set all of them would be gigabytes; what comes of them is the same."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(9, 9)), jnp.float32)
    x = rng.integers(0, 9, (10, 4))
    rows = {"x": x, "y": rng.integers(0, 9, (10, 4)), "mask": rng.random((10, 4)) < 0.7}
    seen = []

    def apply(params, x):
        seen.append(len(x))
        return params[x]

    expected = look(apply(table, x), rows)
    seen.clear()
    monkeypatch.setattr(exported, "LOGITS_AT_ONCE", 3 * 4 * 9 + 5)
    for got, whole in zip(exported.in_batches(look, apply)(table, rows), expected, strict=True):
        np.testing.assert_allclose(got, whole, rtol=1e-6)
    assert set(seen) == {1, 3}


def test_a_budget_that_is_not_kept_ends_with_3_and_the_model_that_came_in(files, tmp_path, capsys):
    settings = {"learning_rate": 3e38, "optimizer": "sgd", "steps": 4}
    with pytest.warns(UserWarning, match="could not be kept"), pytest.raises(SystemExit) as error:
        main(arguments(files, tmp_path / "run", **settings))
    assert error.value.code == 3
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["after"] == found["before"]
    assert "nothing is forgotten" in capsys.readouterr().out
    assert "nothing is forgotten" in (tmp_path / "run" / "report.html").read_text()


def test_the_bound_of_a_settings_file_can_be_replaced_by_the_other_kind(files, tmp_path):
    main(arguments(files, tmp_path / "run"))
    again = [str(tmp_path / "run" / "config.json"), f"--folder={tmp_path / 'other'}", "--tolerance=0.1"]
    main(["unlearn", *again])
    constraint = json.loads((tmp_path / "other" / "run.json").read_text())["constraint"]
    assert constraint["type"] == "Tolerance"


def test_inputs_of_another_width(files, tmp_path):
    """float64 for float32 and int16 for int32 are the same numbers."""
    apply, params = eu.load_model(files / "model")
    np.testing.assert_array_equal(apply(params, X.astype(np.float64)), apply(params, X))
    apply, params = eu.load_model(files / "tokens")
    np.testing.assert_array_equal(
        apply(params, TOKENS.astype(np.int16)), apply(params, TOKENS.astype(np.int32))
    )


def test_the_report_of_a_run_with_several_utilities(tmp_path):
    def losses_fn(x, batch):
        retain = jnp.mean((x - batch["retain"]) ** 2)
        return eu.Losses(jnp.mean((x - batch["forget"]) ** 2), jnp.stack([retain, 2 * retain]))

    sets = np.ones(8, np.float32), np.zeros(8, np.float32)
    sgd, budget = optax.sgd(0.1), eu.Budget([0.1, 0.2])
    eu.unlearn(losses_fn, jnp.array(0.0), *sets, sgd, budget, steps=300, batch_size=4, folder=tmp_path)
    assert report.write(tmp_path) == tmp_path / "report.html"
    with pytest.raises(ValueError, match="is not the folder of a run"):
        report.write(tmp_path / "checkpoints")


@pytest.mark.slow
def test_installed(tmp_path):
    """As a program, whose help and errors are words."""
    program = str(pathlib.Path(sys.executable).parent / "eupmu")
    run = lambda *args: subprocess.run([program, *args], capture_output=True, text=True, cwd=tmp_path)
    assert "eupmu_jax.export_model" in run("unlearn", "--help").stdout
    failed = run("report", "nowhere")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: nowhere is not the folder of a run")


# Bad input.

BAD_SETTINGS = {
    "model": ["/nowhere", "/dev/null"],
    "folder": ["/dev/null", "/proc/nowhere"],
    "steps": [0, -3, 1.5, "many"],
    "batch_size": [0, -1, 31, "big"],
    "retain_batch_size": [0, 61, "big"],
    "stop_at": [1, 2, -0.1, "nan"],
    "learning_rate": [0, -1, "nan", "inf", "fast"],
    "budget": [0, -0.1, "nan", "inf", "all"],
    "tolerance": ["nan", "inf", "tight"],
    "measure": ["lagged", "lookahead", "directional", "ahead"],
    "every": [0, -1, 0.5],
    "seed": [-1, 0.5],
    "beta": [0.1, 0, "nan"],
    "objective": ["", "forget", "os.system", "jax.numpy.sum"],
    "optimizer": ["lion", "optax.adam"],
}
ROWS = {"x": X[:20], "y": Y[:20]}
BAD_SETS = [
    {},
    {"x": X},
    {"y": Y},
    ROWS | {"x": X[:19]},
    ROWS | {"x": X[:20, :3]},
    ROWS | {"x": X[:20].astype(int)},
    ROWS | {"x": X[:20].astype(complex)},
    ROWS | {"x": np.array([["a"] * 4] * 20)},
    ROWS | {"x": X[0, 0]},
    ROWS | {"y": Y[:20].astype(float)},
    ROWS | {"y": Y[:20, None]},
    ROWS | {"y": np.full(20, 3)},
    ROWS | {"y": np.full(20, -1)},
    ROWS | {"y": np.array([object()] * 20)},
    ROWS | {"mask": np.ones(20)},
    ROWS | {"mask": np.ones(19, bool)},
    ROWS | {"mask": np.zeros(20, bool)},
    {"x": X[:0], "y": Y[:0]},
    {"x": X[:3], "y": Y[:3]},
]
BAD_FILES = [
    b"", b"[]", b"{", b"3", b'{"steps": [1]}', b'{"steps": true}', b'{"import": "os"}', b'{"config": 3}',
    b'{"objective": "os.system"}', b'{"steps": "10; rm"}', b'{"optimizer": {"name": "adam"}}', b"\xff\xfe",
]  # fmt: skip


def bad_commands(files, folder):
    """Every bad value alone, and pairs of them at random."""
    single = [{name: value} for name, values in BAD_SETTINGS.items() for value in values]
    for i, rows in enumerate(BAD_SETS):
        path = folder / f"{i}.npz"
        np.savez(path, **rows)
        single += [{"forget": path}, {"retain": path}]
    pairs = []
    rng = np.random.default_rng(0)
    while len(pairs) < 60:
        one, other = (single[i] for i in rng.choice(len(single), 2, replace=False))
        # A set that is too small only for the other's batch, a beta that goes with the other's objective.
        pairs += [one | other] if one.keys() != other.keys() else []
    places = [{"folder": folder / f"run{i}"} for i in range(len(single + pairs))]
    commands = [arguments(files, **place | bad) for place, bad in zip(places, single + pairs, strict=True)]
    for i, content in enumerate(BAD_FILES):
        (folder / f"{i}.json").write_bytes(content)
        # Later arguments would override what the file says of them.
        rest = arguments(files, folder / f"json{i}", steps=None)[1:]
        commands.append(["unlearn", str(folder / f"{i}.json"), *rest])
    return commands


def test_bad_commands_end_in_words(files, tmp_path, capsys):
    """No traceback, no result, whatever the setting, set or file; and nothing is unpickled or imported."""
    wrong = []
    for command in bad_commands(files, tmp_path):
        try:
            main(command)
        except SystemExit as error:
            # tyro prints what is wrong and ends with 2.
            in_words = error.code == 2 or str(error.code).startswith("error: ")
            wrong += [] if in_words else [f"{command}: {error.code}"]
        else:
            wrong.append(f"{command}: accepted")
        capsys.readouterr()
    assert not wrong, "\n".join(wrong)


def test_a_set_that_cannot_be_read_is_named_with_its_option(files, tmp_path):
    (text := tmp_path / "text.npz").write_text("hello")
    np.savez(shorter := tmp_path / "shorter.npz", **ROWS | {"x": X[:19]})
    np.savez(empty := tmp_path / "empty.npz", x=X[:0], y=Y[:0])
    np.savez(
        broken := tmp_path / "broken.npz", **ROWS | {"x": np.where(np.arange(20) == 7, np.nan, X[:20].T).T}
    )
    np.savez(unnamed := tmp_path / "unnamed.npz", X[:20], Y[:20])
    for path, message in {
        tmp_path / "gone.npz": "there is no such file",
        text: "is no .npz file of arrays, as numpy.savez(path, x=x, y=y) writes it",
        shorter: "x, y and mask must have as many rows, got {'x': 19, 'y': 20}",
        empty: "forget is empty: it must have at least one example",
        broken: "x holds NaN or infinity in 1 of its 20 rows, of which row 7 is the first",
        unnamed: "must hold arrays x and y, got ['arr_0', 'arr_1']",
    }.items():
        model, retain = f"--model={files / 'model'}", f"--retain={files / 'retain.npz'}"
        for command in (
            arguments(files, tmp_path / "run", forget=path),
            ["evaluate", model, retain, f"--forget={path}"],
        ):
            with pytest.raises(SystemExit) as error:
                main(command)
            assert str(error.value).startswith(f"error: --forget {path}")
            assert message in str(error.value)
