"""GlyphFS: a few-shot data set that needs no download, drawn from the fonts that matplotlib ships.

A class is one letter; its 40 images show it in the fonts that have it (at least four of the 23 faces
below), each under its own random affine map. The splits divide the letters by script, so a model is
tested on scripts that it has never seen: 694 training classes (Canadian syllabics, Latin, Cyrillic,
Greek, Old Italic, Coptic), 73 for validation (Armenian, Lao) and 150 for testing (Georgian, Arabic,
Hebrew). Letters that look alike in any face (normalised cross-correlation above 0.92) were reduced to
one when the lists in `glyph_classes.json` were made; the lists are frozen, because that selection
depends on the version of the rasteriser.

Image j of a class uses face j mod n of its n faces. Its map, forward and about the centre, is

    R(theta) [[1, sh], [0, 1]] diag(s a, s / a), then a shift in output pixels,

drawn uniformly (theta, log s, sh, log a, shift x, shift y: one vector of 40 each, in this order) from
`np.random.default_rng([seed, code point])` within the limits that `JITTERS` gives. The glyph is drawn
large, cropped to its ink, scaled to 52 pixels on the longer side, centred in 64 x 64, and warped to
32 x 32 by the inverse map with bilinear sampling, 2 x 2 samples a pixel. Ink is 255, ground 0.
"""

import functools
import hashlib
import io
import itertools
import json
import os
import string
import time
from pathlib import Path

import jax
import matplotlib
import numpy as np
import PIL
from absl import logging
from jaxtyping import Int, Num, UInt8
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, features

from xattn import config
from xattn.data.transforms import image_shapes

SAMPLES_PER_CLASS = 40
RENDERER = 1  # part of the cache key: raise it with every change to the pixels
_FONT_SIZE, _MASTER, _INK, _SIZE = 128, 64, 52, 32

# Level: limits of theta (degrees), log s (low, high), sh, log a and the shift (pixels).
JITTERS = {
    "none": (0.0, (0.0, 0.0), 0.0, 0.0, 0.0),
    "mild": (8.0, (-0.08, 0.024), 0.1, 0.05, 1.0),
    "default": (15.0, (-0.15, 0.045), 0.2, 0.10, 2.0),
    "strong": (25.0, (-0.25, 0.075), 0.3, 0.15, 4.0),
}

# Family: its font files. The Computer Modern files differ in design, so each is a family of its own.
FAMILIES = {
    "DejaVuSans": tuple(f"DejaVuSans{s}" for s in ("", "-Bold", "-BoldOblique", "-Oblique")),
    "DejaVuSansMono": tuple(f"DejaVuSansMono{s}" for s in ("", "-Bold", "-BoldOblique", "-Oblique")),
    "DejaVuSerif": tuple(f"DejaVuSerif{s}" for s in ("", "-Bold", "-BoldItalic", "-Italic")),
    "STIXGeneral": tuple(f"STIXGeneral{s}" for s in ("", "Bol", "BolIta", "Italic")),
} | {name: (name,) for name in ("cmb10", "cmmi10", "cmr10", "cmss10", "cmsy10", "cmti10", "cmtt10")}

# Outside these characters the Computer Modern files are not coded in Unicode.
_CODED = {name: string.ascii_letters + string.digits for name in FAMILIES if name.startswith("cm")} | {
    "cmmi10": string.ascii_letters,
    "cmsy10": string.ascii_uppercase,
}


@functools.cache
def code_points(split: str) -> tuple[int, ...]:
    """The code points of a split's classes, in ascending order."""
    splits = json.loads(Path(__file__).with_name("glyph_classes.json").read_text())
    if split not in splits:
        raise config.UsageError(f"GlyphFS has no split '{split}': choose one of {', '.join(splits)}.")
    bounds = [[int(end, 16) for end in run.split("-")] for run in splits[split].split()]
    return tuple(itertools.chain.from_iterable(range(run[0], run[-1] + 1) for run in bounds))


class GlyphFS:
    """GlyphFS, rendered once into the cache folder and memory-mapped from there.

    Args:
      split: "train", "val" or "test".
      jitter: a key of `JITTERS`; "strong" is the benchmark ("none" is solved by comparing pixels).
      seed: of the affine maps.
      cache_dir: where the rendered images are kept; `xattn.config.cache_dir()` by default.

    Attributes:
      class_names: "U+10A0" and so on, in the order of the code points; a label is an index into it.
      labels: int32 [n]; groups: int32 [n], the font family of each image, an index into `FAMILIES`.

    Raises:
      UsageError: there is no such split or jitter.
    """

    name = "glyphs"
    image_shape = (_SIZE, _SIZE, 1)

    def __init__(self, split: str, jitter: str = "strong", seed: int = 0, cache_dir: str | os.PathLike | None = None):
        if jitter not in JITTERS:
            raise config.UsageError(f"GlyphFS has no jitter '{jitter}': choose one of {', '.join(JITTERS)}.")
        if seed < 0:
            raise config.UsageError(f"GlyphFS needs a seed of at least 0, but got {seed}.")
        self.split = split
        self._images, families = load_or_render(
            code_points(split), jitter, seed, Path(cache_dir or config.cache_dir()) / "glyphs", split
        )
        self.class_names = [f"U+{code:04X}" for code in code_points(split)]
        self.num_images = len(self._images)
        self.labels = np.repeat(np.arange(len(self.class_names), dtype=np.int32), SAMPLES_PER_CLASS)
        order = list(FAMILIES)
        self.groups = np.concatenate(
            [np.resize([order.index(family) for family in row], SAMPLES_PER_CLASS) for row in families]
        ).astype(np.int32)

    @staticmethod
    def shapes(**_: object) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields of one image, told without rendering."""
        return image_shapes(_SIZE, _SIZE, 1)

    def images(
        self, indices: Int[np.ndarray, "*A"], seeds: Int[np.ndarray, "*A"] | None = None
    ) -> UInt8[np.ndarray, "*A H W C"]:
        """The images at `indices`; the jitter is part of the data, so `seeds` change nothing."""
        del seeds
        return np.asarray(self._images[indices])


def load_or_render(
    codes: tuple[int, ...], jitter: str, seed: int, cache: Path, split: str
) -> tuple[np.ndarray, list[list[str]]]:
    """The images [n, 32, 32, 1] and, for every class, the families of its faces in order."""
    recipe = {
        "split": split,
        "jitter": jitter,
        "seed": seed,
        "renderer": RENDERER,
        "classes": ",".join(f"{code:04X}" for code in codes),
        "matplotlib": matplotlib.__version__,
        "pillow": PIL.__version__,
        "freetype": features.version("freetype2"),
    }
    folder = cache / hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    images_file, meta_file = folder / "images.npy", folder / "meta.json"
    if meta_file.exists():
        try:
            meta = json.loads(meta_file.read_text())
            if meta["sha256"] == hashlib.sha256(images_file.read_bytes()).hexdigest():
                return np.load(images_file, mmap_mode="r"), meta["families"]
        except (OSError, ValueError, KeyError):
            pass
        logging.warning("The glyph cache %s is damaged; it is rendered again.", folder)

    logging.info("Rendering GlyphFS %s (%s jitter, %d classes) into %s, once.", split, jitter, len(codes), folder)
    start = time.monotonic()
    glyphs = [_masters(code) for code in codes]
    images = np.concatenate(
        [
            _warp(np.stack([master for _, master in faces]), code, jitter, seed)
            for code, faces in zip(codes, glyphs, strict=True)
        ]
    )
    families = [[family for family, _ in faces] for faces in glyphs]
    buffer = io.BytesIO()
    np.save(buffer, images)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    # Two processes that render at once write the same bytes, so whichever comes last changes nothing.
    folder.mkdir(parents=True, exist_ok=True)
    config.write_atomically(images_file, buffer.getvalue())
    config.write_atomically(meta_file, json.dumps(recipe | {"sha256": digest, "families": families}).encode())
    logging.info("Rendered %d images in %.1f s.", len(images), time.monotonic() - start)
    return np.load(images_file, mmap_mode="r"), families


@functools.cache
def _faces() -> list[tuple[str, ImageFont.FreeTypeFont, frozenset[int]]]:
    """(family, font, code points that it holds) of every face."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = []
    for family, names in FAMILIES.items():
        for name in names:
            path = str(folder / f"{name}.ttf")
            held = frozenset(FT2Font(path).get_charmap())
            if name in _CODED:
                held &= frozenset(map(ord, _CODED[name]))
            # The basic layout draws the same Arabic outlines with and without a text shaper installed.
            font = ImageFont.truetype(path, _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
            faces.append((family, font, held))
    return faces


def _masters(code: int) -> list[tuple[str, np.ndarray]]:
    """(family, master image [64, 64]) of every face that holds the character and leaves ink."""
    masters = []
    for family, font, held in _faces():
        canvas = Image.new("L", (4 * _FONT_SIZE, 3 * _FONT_SIZE))
        if code in held:
            ImageDraw.Draw(canvas).text((_FONT_SIZE, _FONT_SIZE), chr(code), font=font, fill=255)
        if (box := canvas.getbbox()) is None:
            continue
        width, height = box[2] - box[0], box[3] - box[1]
        scale = _INK / max(width, height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        master = Image.new("L", (_MASTER, _MASTER))
        glyph = canvas.resize(size, Image.Resampling.BILINEAR, box=box)
        master.paste(glyph, ((_MASTER - size[0]) // 2, (_MASTER - size[1]) // 2))
        masters.append((family, np.asarray(master)))
    return masters


def _warp(masters: Num[np.ndarray, "F M M"], code: int, jitter: str, seed: int) -> UInt8[np.ndarray, "S H W 1"]:
    """The 40 images of a class from the master images of its faces."""
    max_theta, log_s_limits, max_sh, max_log_a, max_shift = JITTERS[jitter]
    rng = np.random.default_rng([seed, code])
    theta = np.deg2rad(rng.uniform(-max_theta, max_theta, SAMPLES_PER_CLASS))
    s = np.exp(rng.uniform(*log_s_limits, SAMPLES_PER_CLASS))
    sh = rng.uniform(-max_sh, max_sh, SAMPLES_PER_CLASS)
    a = np.exp(rng.uniform(-max_log_a, max_log_a, SAMPLES_PER_CLASS))
    shift_x = rng.uniform(-max_shift, max_shift, SAMPLES_PER_CLASS)
    shift_y = rng.uniform(-max_shift, max_shift, SAMPLES_PER_CLASS)
    cos, sin = np.cos(theta), np.sin(theta)
    # R(theta) [[1, sh], [0, 1]] diag(s a, s / a), stacked over the images; its inverse fetches.
    forward = np.stack(
        [np.stack([cos * s * a, (cos * sh - sin) * s / a], -1),
         np.stack([sin * s * a, (sin * sh + cos) * s / a], -1)],
        axis=-2,
    )  # fmt: skip
    inverse = np.linalg.inv(forward).astype(np.float32)[:, :, :, None, None]

    ratio = _MASTER // _SIZE
    grid = (np.arange(2 * _SIZE, dtype=np.float32) + 0.5) / 2 - _SIZE / 2
    x = grid[None, None, :] - shift_x.astype(np.float32)[:, None, None]
    y = grid[None, :, None] - shift_y.astype(np.float32)[:, None, None]
    source_x = ratio * (inverse[:, 0, 0] * x + inverse[:, 0, 1] * y) + (_MASTER - 1) / 2
    source_y = ratio * (inverse[:, 1, 0] * x + inverse[:, 1, 1] * y) + (_MASTER - 1) / 2
    # The border of a master is empty, so holding coordinates at the border reads ground.
    source_x = np.clip(source_x, 0, _MASTER - 1 - 1e-3)
    source_y = np.clip(source_y, 0, _MASTER - 1 - 1e-3)
    left, top = source_x.astype(np.int32), source_y.astype(np.int32)
    right_part, low_part = source_x - left, source_y - top

    face = np.arange(SAMPLES_PER_CLASS, dtype=np.int32)[:, None, None] % len(masters)
    flat = masters.astype(np.float32).ravel()
    corner = (face * _MASTER + top) * _MASTER + left
    upper = flat[corner] * (1 - right_part) + flat[corner + 1] * right_part
    lower = flat[corner + _MASTER] * (1 - right_part) + flat[corner + _MASTER + 1] * right_part
    samples = upper * (1 - low_part) + lower * low_part
    images = samples.reshape(SAMPLES_PER_CLASS, _SIZE, 2, _SIZE, 2).mean((2, 4))
    return np.rint(images).astype(np.uint8)[..., None]
