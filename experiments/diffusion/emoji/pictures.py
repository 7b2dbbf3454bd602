"""Emoji in four styles: drawn large, turned, shifted and tinted a little, then made small."""

import pathlib
import unicodedata
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from experiments.diffusion.emoji.captions import (
    COLOUR,
    NEGATIVE,
    SKETCH,
    STYLES,
    THINGS,
    UNSEEN,
    tokens_of_kinds,
)

FONT = pathlib.Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
# The only size that the font's pictures have.
FONT_SIZE = 109
LARGE, SIZE = 128, 24
MOST_DEGREES, SMALLEST, MOST_SHIFT, MOST_TINT = 10.0, 0.85, 5, 0.2
WHITE = (255, 255, 255)


class Emoji(NamedTuple):
    """Pictures with all that is known of them.

    Attributes:
      x: [N, SIZE, SIZE, 3], float32 in [-1, 1].
      tokens: the words of the captions, int32 [N, LENGTH].
      kinds: (thing, style), int32 [N, 2].
    """

    x: np.ndarray
    tokens: np.ndarray
    kinds: np.ndarray

    def taken(self, rows: np.ndarray | slice) -> "Emoji":
        return Emoji(self.x[rows], self.tokens[rows], self.kinds[rows])


def load_font(path: pathlib.Path) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(path, FONT_SIZE)
    except OSError as error:
        raise ValueError(
            f"no colour emoji font at {path}: apt-get install fonts-noto-color-emoji, or name the folder of "
            f"NotoColorEmoji.ttf with --data-dir"
        ) from error


def drawn_large(font: ImageFont.FreeTypeFont, name: str) -> Image.Image:
    """The emoji with that Unicode name in the middle of a white square."""
    image = Image.new("RGB", (2 * LARGE, 2 * LARGE), WHITE)
    ImageDraw.Draw(image).text(
        (LARGE // 2, LARGE // 2), unicodedata.lookup(name), font=font, embedded_color=True
    )
    left, top, right, bottom = ImageOps.invert(image).getbbox() or (0, 0, *image.size)
    x, y = (left + right - LARGE) // 2, (top + bottom - LARGE) // 2
    return image.crop((x, y, x + LARGE, y + LARGE))


def styled(image: Image.Image, style: int) -> Image.Image:
    if style == NEGATIVE:
        return ImageOps.invert(image)
    if style == COLOUR:
        return image
    grey = ImageOps.grayscale(image)
    if style == SKETCH:
        # The filter leaves the outermost pixels as they are.
        edges = grey.filter(ImageFilter.GaussianBlur(1.5)).filter(ImageFilter.FIND_EDGES)
        edges = ImageOps.expand(ImageOps.crop(edges, 1), 1, 0)
        lines = np.asarray(edges.filter(ImageFilter.GaussianBlur(1.5)), int)
        grey = Image.fromarray(np.maximum(0, 255 - 9 * lines).astype(np.uint8))
    return grey.convert("RGB")


def varied(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirrored or not, turned, shrunk, shifted and tinted by a random little."""
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    angle, zoom = rng.uniform(-MOST_DEGREES, MOST_DEGREES), rng.uniform(SMALLEST, 1.0)
    shift = rng.uniform(-MOST_SHIFT, MOST_SHIFT, 2)
    inverse = np.array([[np.cos(a := np.deg2rad(angle)), np.sin(a)], [-np.sin(a), np.cos(a)]]) / zoom
    offset = LARGE / 2 - inverse @ (LARGE / 2 + shift)
    matrix = (*inverse[0], offset[0], *inverse[1], offset[1])
    image = image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=WHITE
    )
    return ImageEnhance.Color(image).enhance(rng.uniform(1 - MOST_TINT, 1 + MOST_TINT))


def drawn(amount: int, seed: int, font: pathlib.Path = FONT, unseen: bool = False) -> Emoji:
    """So many pictures of every thing in every style but for those of UNSEEN, or of those alone."""
    rng, loaded = np.random.default_rng(seed), load_font(font)
    large = [drawn_large(loaded, thing.unicode) for thing in THINGS]
    kinds = [
        (thing, style)
        for thing in range(len(THINGS))
        for style in range(len(STYLES))
        if ((thing, style) in UNSEEN) == unseen
    ]
    kinds = np.repeat(np.array(kinds, np.int32), amount, 0)
    kinds = kinds[rng.permutation(len(kinds))]
    images = [
        np.asarray(styled(varied(large[thing], rng), style).resize((SIZE, SIZE), Image.Resampling.BOX))
        for thing, style in kinds
    ]
    x = np.stack(images).astype(np.float32) / 127.5 - 1
    return Emoji(x, tokens_of_kinds(kinds, rng.random(len(kinds)) < 0.5), kinds)
