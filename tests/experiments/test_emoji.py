"""Emoji by caption: words, what is forgotten and what is kept, pictures, the text network, a whole run."""

import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from experiments.diffusion.emoji import captions, erasures, gallery, pictures, unlearning, words
from experiments.diffusion.emoji.captions import NO_WORD, NOTHING, UNSEEN, tokens_of, tokens_of_kinds
from experiments.diffusion.emoji.looking import ALL_KINDS
from experiments.diffusion.emoji.pictures import Emoji
from experiments.shared.models.diffusion.network import make_network
from experiments.shared.models.files import load_params
from experiments.shared.records import read_records
from experiments.shared.report import ORIGINAL, RETRAIN

ERASURES = (*erasures.TOGETHER, erasures.ATTRIBUTE, erasures.COMBINATION)
needs_font = pytest.mark.skipif(not pictures.FONT.exists(), reason="needs fonts-noto-color-emoji")


# Captions


def test_captions_tell_all_kinds_and_names_apart():
    both = [tokens_of_kinds(ALL_KINDS, other) for other in (False, True)]
    assert len(np.unique(np.concatenate(both), axis=0)) == 2 * len(ALL_KINDS)
    assert captions.caption_of(captions.CAT, captions.GREY) == "a grey cat face"
    row = np.flatnonzero((ALL_KINDS == (captions.CAT, captions.GREY)).all(-1))
    assert (both[0][row] == tokens_of("a grey cat face")).all()
    assert (both[1][row] == tokens_of("a grey kitten")).all()
    mixed = tokens_of_kinds(ALL_KINDS[:2], np.array([True, False]))
    assert (mixed == [both[1][0], both[0][1]]).all()


def test_captions_that_cannot_be_read():
    with pytest.raises(ValueError, match="no caption has unicorn"):
        tokens_of("a grey unicorn")
    with pytest.raises(ValueError, match="at most 4"):
        tokens_of("a grey cat face face")
    assert (tokens_of("") == NOTHING).all()


# What is forgotten


@pytest.mark.parametrize("erasure", ERASURES, ids=lambda erasure: erasure.title)
def test_words_and_pictures_are_forgotten_alike(erasure):
    """Captions are asked for where the pictures match, and name what is drawn instead afterwards."""
    tokens, gone = tokens_of_kinds(ALL_KINDS), erasure.matches(ALL_KINDS)
    assert (erasure.asked_for(tokens) == gone).all()
    expected = tokens_of_kinds(erasure.becomes(ALL_KINDS[gone]))
    np.testing.assert_array_equal(erasure.redirected(tokens[gone]), expected)
    np.testing.assert_array_equal(erasure.redirected(NOTHING[None]), NOTHING[None])
    # What is drawn instead is not itself forgotten.
    assert not erasure.matches(erasure.becomes(ALL_KINDS[gone])).any()


@pytest.mark.parametrize("erasure", ERASURES, ids=lambda erasure: erasure.title)
def test_utilities_are_parts_of_what_is_kept(erasure):
    parts = np.stack(list(erasure.utilities(ALL_KINDS).values()))
    assert parts.any(1).all()
    assert (parts.sum(0) == ~erasure.matches(ALL_KINDS)).all()


def test_other_captions_stay_as_they_are():
    tokens = tokens_of_kinds(ALL_KINDS, True)
    np.testing.assert_array_equal(erasures.CONCEPT.redirected(tokens), tokens)
    assert not erasures.CONCEPT.asked_for(tokens).any()
    assert erasures.STYLE.asked_for(tokens).sum() == len(captions.THINGS)
    assert (erasures.COMBINATION.thing, erasures.COMBINATION.style) in UNSEEN


def test_names_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        erasures.of_thing(captions.CAT, captions.ROCKET)


# Pictures


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8))


def test_styles():
    image = picture()
    of = lambda style, image=image: np.asarray(pictures.styled(image, style), int)
    assert (of(captions.NEGATIVE) + of(captions.COLOUR) == 255).all()
    grey = of(captions.GREY)
    assert (grey == grey[..., :1]).all()
    assert np.abs(grey[..., 0] - np.asarray(image.convert("L"), int)).max() == 0
    # A sketch has no line where nothing changes, and one between two areas, whatever their colours.
    halves = np.full((128, 128, 3), 255, np.uint8)
    halves[:, 64:] = (200, 40, 40)
    lines = of(captions.SKETCH, Image.fromarray(halves))
    assert (lines[4:-4, 60:64] < 100).all()
    assert (lines[:, :50] == 255).all()
    assert (lines[:, 80:] == 255).all()


def test_varying_moves_little_and_fills_with_white():
    dot = np.full((128, 128, 3), 255, np.uint8)
    dot[54:74, 54:74] = 0
    rng, centres = np.random.default_rng(0), []
    for _ in range(20):
        dark = 255 - np.asarray(pictures.varied(Image.fromarray(dot), rng).convert("L"), float)
        assert dark[[0, -1]].max() == 0
        at = np.stack(np.meshgrid(np.arange(128), np.arange(128), indexing="ij"), -1)
        centres.append((dark[..., None] * at).sum((0, 1)) / dark.sum())
    away = np.abs(np.array(centres) - 63.5).max(0)
    assert (away <= pictures.MOST_SHIFT + 1).all()
    assert (away > 1).all()


@needs_font
def test_every_kind_is_drawn_as_often_but_for_the_unseen():
    emoji, again, others = pictures.drawn(2, 0), pictures.drawn(2, 0), pictures.drawn(2, 1)
    kinds, counts = np.unique(emoji.kinds, axis=0, return_counts=True)
    assert (counts == 2).all()
    assert {(0, 2), (4, 3)} == {tuple(kind) for kind in ALL_KINDS} - {tuple(kind) for kind in kinds.tolist()}
    assert {tuple(kind) for kind in pictures.drawn(1, 0, unseen=True).kinds.tolist()} == set(UNSEEN)
    np.testing.assert_array_equal(emoji.x, again.x)
    assert not any((other == emoji.x).all((1, 2, 3)).any() for other in others.x)
    assert emoji.x.min() >= -1
    assert emoji.x.max() <= 1
    grey = emoji.x[emoji.kinds[:, 1] == captions.GREY]
    assert np.ptp(grey, axis=-1).max() == 0


def test_a_font_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="fonts-noto-color-emoji"):
        pictures.load_font(tmp_path / "none.ttf")


# The network


def test_a_caption_is_the_sum_of_its_words():
    made = words.Words(6, 8, nnx.Rngs(params=0))
    tokens = jnp.array([[0, 3, 5, NO_WORD], [5, 0, 3, NO_WORD], [NO_WORD] * 4, [2, 2, NO_WORD, NO_WORD]])
    found, table = made(tokens), made.weight[...]
    np.testing.assert_allclose(found[0], table[0] + table[3] + table[5], rtol=1e-6)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    assert (found[2] == 0).all()
    np.testing.assert_allclose(found[3], 2 * table[2], rtol=1e-6)


def test_the_kept_weights_are_of_the_network():
    """Of its names, shapes and half of its precision, in less than 2.5 MB."""
    make = partial(words.text_to_image, gallery.NETWORK, len(captions.VOCABULARY))
    expected = jax.eval_shape(make_network(make).init, jax.random.key(0))
    found = load_params(gallery.WEIGHTS)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(lambda leaf: leaf.shape, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float16)}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert gallery.WEIGHTS.stat().st_size < 2.5e6


# What a method is given


@pytest.mark.parametrize("erasure", ERASURES[:3], ids=lambda erasure: erasure.title)
def test_nothing_that_is_forgotten_is_retained(erasure):
    seen = np.array([kind for kind in ALL_KINDS if tuple(kind) not in UNSEEN])
    kinds = np.repeat(seen, 6, 0)
    other_names = np.arange(len(kinds)) % 2 == 0
    x = np.random.default_rng(0).normal(size=(len(kinds), 2, 2, 3)).astype(np.float32)
    emoji = Emoji(x, tokens_of_kinds(kinds, other_names), kinds)
    bench: Any = None
    made = gallery.Gallery(bench, emoji, emoji, emoji, emoji, gallery.SMOKE, None)
    sets = unlearning.sets_of(made, erasure, 4)
    kind_of = {row.tobytes(): tuple(kind) for row, kind in zip(x, kinds, strict=True)}
    forgotten = np.array([kind_of[row.tobytes()] for row in sets.forget.x])
    assert erasure.matches(forgotten).all()
    assert erasure.asked_for(sets.forget.labels).all()
    for name, part in sets.retain.items():
        kept = np.array([kind_of[row.tobytes()] for row in part.x])
        assert erasure.utilities(kept)[name].all()
        assert len(part.x) % 4 == 0
        assert len(part.x) >= 4


@needs_font
@pytest.mark.slow
def test_smoke_run(tmp_path):
    command = [sys.executable, "-m", "experiments.diffusion", "--task", "emoji", "--smoke"]
    ended = subprocess.run(
        [*command, "--runs-dir", str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    (folder,) = tmp_path.iterdir()
    records = read_records(folder / "records.jsonl")
    names = {key[1] for key in records if key[0] == "look"}
    assert {ORIGINAL, RETRAIN, "cat face → dog face, EUPMU budget"} <= names
    for key, record in records.items():
        if key[0] in ("relearn", "search", "prompt", "guide", "redraw"):
            assert all(0 <= share <= 1 for share in record["still"])
    assert all(record["promise"]["holds"] for record in records.values() if "promise" in record)
    for name in "tables.md", "report.html", "models.png", "concept.png", "adapters.png":
        assert (folder / name).stat().st_size > 0
