"""The study of a language model: people, texts, measures by hand, losses against NumPy, and whole runs."""

import signal
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tokenizers", reason='pip install -e ".[language]"')
pytest.importorskip("gguf", reason='pip install -e ".[language]"')

from experiments.language import attacks, losses, measures, people, requests, seeds, study, text, texts, tiny
from experiments.language.measures import Seen
from experiments.language.texts import Rows
from experiments.shared.models.llama.files import load, save
from experiments.shared.models.llama.model import logits
from experiments.shared.records import read_records
from tests.llamas import FAMILIES, random_params, random_tokens

SMALL = FAMILIES["SmolLM2"]


def test_people_are_the_same_every_time_and_share_nothing():
    everyone = people.invented(24, seed=0)
    assert everyone == people.invented(24, seed=0) != people.invented(24, seed=1)
    assert everyone[:8] == people.invented(8, seed=0)
    for field, details in zip(people.Person._fields, zip(*everyone, strict=True), strict=True):
        assert len(set(details)) == (12 if field == "animal" else 24), field
    answer = "".join(people.record(everyone[0]))
    assert all(detail in answer for detail in everyone[0])


def test_wrong_answers_are_details_of_strangers():
    tokenizer = tiny.byte_tokenizer()
    everyone = people.invented(6, seed=0)
    right, wrong = study.choices_of(tokenizer, everyone[:2], everyone[2:], length=120)
    said = lambda rows: [
        tokenizer.decode(row[mask].tolist()) for row, mask in zip(rows.tokens, rows.mask, strict=True)
    ]
    assert said(right)[:3] == [f" {getattr(everyone[0], detail)}" for detail in study.ASKED_FOR]
    assert said(wrong)[:3] == [f" {person.place}" for person in everyone[2:5]]
    assert len(wrong.tokens) == study.WRONG * len(right.tokens)


def test_rows_mask_prompts_and_padding():
    tokenizer = tiny.byte_tokenizer()
    rows = texts.answers(tokenizer, [("ab", "cd"), ("a", "b")], length=5)
    assert rows.mask.tolist() == [[False, False, True, True, False], [False, True, False, False, False]]
    assert tokenizer.decode(rows.tokens[0][rows.mask[0]].tolist()) == "cd"
    pieced = texts.rows(tokenizer, [[("a", False), ("bc", True), ("d", False)]], length=5)
    assert pieced.mask.tolist() == [[False, True, True, False, False]]
    with pytest.raises(ValueError, match="at most 3 fit"):
        texts.answers(tokenizer, [("ab", "cd")], length=3)
    assert texts.answers(tokenizer, [("ab", "cd"), ("a", "b")]).tokens.shape == (2, 4)


@pytest.mark.parametrize(
    ("whole", "masks"),
    [
        ("abcdef", [[False, True, True]] * 2),
        # The first token of a row is not predicted: a row of one token would predict nothing.
        ("abcdefg", [[False, True, True]] * 2),
        ("abcdefgh", [[False, True, True]] * 2 + [[False, True, False]]),
        ("ab", [[False, True, False]]),
    ],
)
def test_passages_hold_the_end_of_a_text(whole, masks):
    tokenizer = tiny.byte_tokenizer()
    cut = texts.passages(tokenizer, whole, length=3)
    assert cut.mask.tolist() == masks
    assert tokenizer.decode(cut.tokens.ravel()[: len(whole)].tolist()) == whole[: cut.tokens.size]


def test_prose_has_whole_rows():
    rows = texts.prose(tiny.byte_tokenizer(), texts.TOPICS, amount=2000, length=60)
    assert rows.mask[:, 1:].all()


def test_trained_and_held_out_texts_share_no_row():
    task = study.make_task(tiny.byte_tokenizer(), study.SMOKE, seed=0)
    for name, rows in task.retain.items():
        apart = {row.tobytes() for row in task.held_out[name].tokens}
        assert not apart & {row.tobytes() for row in rows.tokens}


def test_measures_by_hand():
    hits = np.array([[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1]], bool)
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1]], bool)
    nats = np.where(mask, 0.5, 100.0)
    prompt = np.ones((3, 1), bool)
    found = measures.scores(Seen(nats, hits), np.concatenate([prompt, mask], 1))
    assert found["nats"] == 0.5
    assert found["memorised"] == pytest.approx((0.75 + 1 + 1) / 3)
    assert found["prefix"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert found["strength"] == pytest.approx((0.25 + 1 + 1) / 3)
    assert found["verbatim"] == 2


forward = jax.jit(partial(logits, SMALL))


def log_p(tokens, z):
    """The straight line: the log-probability of tokens[:, 1:], in float64."""
    z = np.asarray(z, np.float64)
    return np.take_along_axis(z, tokens[:, 1:, None], -1)[..., 0] - np.log(np.exp(z).sum(-1))


def test_looking_agrees_with_the_logits():
    params, tokens = random_params(SMALL), np.asarray(random_tokens(SMALL, 6, 6))
    seen = measures.look(SMALL, params, tokens)
    z = np.asarray(forward(params, tokens[:, :-1]))
    np.testing.assert_array_equal(seen.hits, z.argmax(-1) == tokens[:, 1:])
    np.testing.assert_allclose(seen.nats, -log_p(tokens, z), rtol=1e-4, atol=1e-5)


def test_losses_against_numpy():
    params, tokens = random_params(SMALL), np.asarray(random_tokens(SMALL, 6, 6))
    rows = Rows(tokens, np.random.default_rng(0).random(tokens.shape) < 0.7)
    parts = {"forget": slice(0, 2), "chat": slice(2, 3), "prose": slice(3, 6)}
    target = np.random.default_rng(1).normal(size=(2, tokens.shape[1] - 1)).astype(np.float32)
    reference = np.array([-3.0, -4.0], np.float32)
    forget = losses.Forget(rows.taken(parts["forget"]), reference, target)
    retain = {name: rows.taken(parts[name]) for name in ("prose", "chat")}
    batch = {"forget": forget, "retain": retain}
    of = lambda kind: jax.jit(losses.make_losses(SMALL, kind))({"base": params, "adapter": {}}, batch)

    p, mask = log_p(tokens, forward(params, tokens[:, :-1])), rows.mask[:, 1:]
    kept = [-p[parts[name]][mask[parts[name]]].mean() for name in ("chat", "prose")]
    p, mask = p[parts["forget"]], mask[parts["forget"]]
    away = np.abs(p - np.log1p(-np.exp(p)) - target)
    expected = {
        losses.UNLIKELIHOOD: -np.log1p(-np.exp(p))[mask].mean(),
        losses.NPO: (2 / 0.1 * np.log1p(np.exp(0.1 * ((p * mask).sum(-1) - reference)))).mean(),
        losses.CONFIDENCE: np.where(away <= 1, away**2 / 2, away - 0.5)[mask].mean(),
    }
    for kind, forgotten in expected.items():
        found = of(kind)
        np.testing.assert_allclose(found.retain.total / found.retain.count, kept, rtol=1e-4)
        np.testing.assert_allclose(found.forget.total / found.forget.count, forgotten, rtol=1e-4)


def test_targets_are_confidences_of_unseen_tokens_at_the_same_place():
    params, tokens = random_params(SMALL), np.asarray(random_tokens(SMALL, 6, 8))
    mask = np.zeros(tokens.shape, bool)
    mask[:, [2, 3, 6]] = True
    rows = Rows(tokens, mask)
    model = {"base": params, "adapter": {}}
    known, unseen = rows.taken(slice(2)), rows.taken(slice(2, 6))
    forget = losses.before_unlearning(SMALL, model, known, unseen)
    p = log_p(tokens, forward(params, tokens[:, :-1]))
    confidence = p - np.log1p(-np.exp(p))
    np.testing.assert_allclose(forget.reference, (p * mask[:, 1:]).sum(-1)[:2], rtol=1e-4)
    for place in 1, 2, 5:
        # Two known ones at the quantiles 1/4 and 3/4 of four: between the first two, and the last two.
        ordered = np.sort(confidence[2:, place])
        wanted = np.array([ordered[:2].mean(), ordered[2:].mean()])[np.argsort(confidence[:2, place])]
        np.testing.assert_allclose(forget.target[:, place], wanted, rtol=1e-3, atol=1e-4)
    assert not forget.target[~mask[:2, 1:]].any()


def test_places_are_fields_and_distances_from_their_start():
    mask = np.array([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
    first, second = [[1, 0], [1, 1], [2, 0]], [[1, min(i, losses.LATEST)] for i in range(6)]
    assert losses.places(mask).tolist() == first + second


@pytest.mark.parametrize(("bits", "levels"), [("INT8", 255), ("INT4", 16), ("INT4, symmetric", 16)])
def test_quantising_leaves_few_values_in_a_block(bits, levels):
    weight = np.random.default_rng(0).normal(size=(2, 64, 32)).astype(np.float32)
    params = {"proj": {"weight": jnp.asarray(weight)}, "norm": {"weight": jnp.ones(3)}}
    small = attacks.quantised(params, bits)
    assert max(len(np.unique(row)) for row in np.asarray(small["proj"]["weight"]).reshape(-1, 32)) <= levels
    np.testing.assert_allclose(small["proj"]["weight"], weight, atol=8 / levels)
    assert small["norm"]["weight"] is params["norm"]["weight"]


def test_files_of_benchmarks_are_rows(tmp_path):
    tokenizer = tiny.byte_tokenizer()

    def counted(name, content, length=60):
        (tmp_path / name).write_text(content)
        rows = texts.of_file(tokenizer, tmp_path / name, length)
        return [
            tokenizer.decode(row[mask].tolist(), skip_special_tokens=False)
            for row, mask in zip(rows.tokens, rows.mask, strict=True)
        ]

    asked = '{"question": "Who?", "answer": "Me."}\n{"question": "Why?", "answer": "So."}\n'
    assert counted("tofu.json", asked) == ["Me.<|im_end|>", "So.<|im_end|>"]
    assert counted("muse.json", '[{"prompt": "Who", "gt": "ever"}]') == ["ever<|im_end|>"]
    # All but the first token of every row counts; texts of a corpus follow each other.
    assert counted("corpus.jsonl", '{"text": "abc"}\n{"text": "defg"}\n', 4) == ["bc\n", "def"]
    assert counted("plain.jsonl", "abcd\nefgh\n", 4) == ["bcd", "\nef", "h"]
    assert counted("notes.md", "abcdefgh", 4) == ["bcd", "fgh"]
    assert counted("short.txt", "ab", 4) == ["b"]
    with pytest.raises(ValueError, match=r"empty\.txt: the text has 0 tokens, at least 2 are needed"):
        counted("empty.txt", "", 4)
    with pytest.raises(ValueError, match=r"tofu\.json: \d+ tokens, at most 8 fit: .*--length"):
        counted("tofu.json", asked, 8)
    with pytest.raises(ValueError, match=r"line 1: the field 'answer' must be a text, got 1"):
        counted("wmdp.json", '{"question": "Who?", "choices": ["a", "b"], "answer": 1}')


def test_wrong_arguments_of_a_text_are_named_before_the_model_is_read(tmp_path):
    (there := tmp_path / "there.txt").write_text("a text")

    def error_of(match, forget=there, keep=(f"prose={there}",), budget=()):
        with pytest.raises((ValueError, OSError), match=match):
            text.main(text.Config(forget, keep, tmp_path / "out", budget, model=tmp_path / "no model"))

    error_of(r"--forget .*gone\.txt: there is no such file", forget=tmp_path / "gone.txt")
    error_of(r"--keep .*gone\.txt: there is no such file", keep=(f"prose={tmp_path / 'gone.txt'}",))
    error_of("--keep takes NAME=VALUE, got there.txt", keep=("there.txt",))
    error_of("--keep names prose twice", keep=(f"prose={there}", f"prose={there}"))
    error_of("--budget prose=little: a number of nats", budget=("prose=little",))
    error_of("--budget chat: there is no --keep", budget=("chat=0.1",))


SMOKE = [sys.executable, "-m", "experiments.language"]


@pytest.mark.slow
def test_smoke_run_and_resume_after_a_kill(tmp_path):
    """Killed as soon as there is a model, it goes on, and nothing is done twice."""
    process = subprocess.Popen([*SMOKE, "--smoke", "--runs-dir", str(tmp_path)])
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in tmp_path.glob("*/records.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = tmp_path.iterdir()
    first = (folder / "records.jsonl").read_text().splitlines()[0]
    ended = subprocess.run([*SMOKE, "--resume", str(folder)], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    lines = (folder / "records.jsonl").read_text().splitlines()
    assert lines[0] == first
    records = read_records(folder / "records.jsonl")
    assert len(records) == len(lines)
    assert {key[1] for key in records if key[0] == "unlearn"} == set(study.SMOKE_METHODS)
    assert records["unlearn", study.HEADLINE]["promise"]["holds"]
    lora = "EUPMU budget, LoRA"
    merged, unmerged = (records[key, lora, "INT8"]["scores"]["others"] for key in ("bits", "unmerged"))
    assert unmerged["nats"] == pytest.approx(merged["nats"], rel=0.02)
    # Relearning starts from the model that was looked at.
    assert records["look", study.REFERENCE]["scores"]["forgotten"]["verbatim"] == 0
    for name in "tables.md", "report.html", "transcripts.md", "runs.png", "attacks.png":
        assert (folder / name).stat().st_size > 0
    # Two requests, of which one is done already when it is started again.
    for amount in 1, 2:
        requests.main(requests.Config(folder, amount, steps=1))
    records = read_records(folder / "requests.jsonl")
    assert list(records) == [("requests", "before"), ("requests", 0), ("requests", 1)]
    assert "After 2 requests" in (folder / "requests.md").read_text()
    assert not (folder / "models" / "request-1").exists()
    load(folder / "models" / "request-2")
    # One seed beside itself is refused, and alone it has its goals and methods.
    seeds.main(seeds.Config((folder,), tmp_path / "seeds.md"))
    assert f"{study.HEADLINE} meets all goals on" in (tmp_path / "seeds.md").read_text()
    with pytest.raises(ValueError, match="the same seed"):
        seeds.main(seeds.Config((folder, folder), tmp_path / "seeds.md"))


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "status"), [("1e-3", 0), ("30", 3)])
def test_a_text_is_forgotten_or_the_exit_status_says_so(tmp_path, rate, status):
    """At a rate of 30 no step back helps: what is saved is the model as it was. Files in bfloat16 widen."""
    whole = tiny.make(tmp_path / "float32", seed=0)
    save(tmp_path / "tiny", *load(whole, jnp.bfloat16), like=whole)
    (tmp_path / "secret.txt").write_text("the quick brown fox jumps over the lazy dog; " * 8)
    (tmp_path / "prose.txt").write_text("what should stay is another text altogether, told here. " * 8)
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.language.text", "--model", str(tmp_path / "tiny")),
            *("--forget", str(tmp_path / "secret.txt"), "--keep", f"prose={tmp_path / 'prose.txt'}"),
            *("--budget", "prose=0.01", "--out", str(tmp_path / "out"), "--steps", "6", "--rate", rate),
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == status, ended.stderr
    before, after = (load(tmp_path / name).params for name in ("tiny", "out"))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
    assert all(jax.tree.leaves(same)) == (status == 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}
    assert "the text to forget:" in ended.stdout


@pytest.mark.slow
def test_transformers_loads_an_unlearned_model(tmp_path):
    """From the folder that the study keeps, with the same logits."""
    transformers = pytest.importorskip("transformers", reason='pip install -e ".[reference]"')
    torch = pytest.importorskip("torch", reason='pip install -e ".[reference]"')
    source = tiny.make(tmp_path / "tiny", seed=0)
    bench = study.make_bench(source, tmp_path, study.SMOKE, 0, lambda what, part: None)
    params = jax.tree.map(lambda leaf: leaf + 0.01, load(source).params)
    study.keep(bench, study.HEADLINE, params)
    folder = bench.model_folder(study.HEADLINE)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, tiny.CONFIG.vocab_size, (2, 9))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(bench.config, params, jnp.asarray(tokens)), expected, atol=1e-4)
