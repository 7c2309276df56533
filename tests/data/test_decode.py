"""The fast decoder against Pillow: close where it decodes itself, the same where it does not."""

import io
import math
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from xattn.config import UsageError
from xattn.data.decode import dct_eighths, fast_crop, fast_libraries, is_jpeg
from xattn.data.textures import Texture
from xattn.data.transforms import draw_crop


def smooth(height=150, width=200):
    """A picture without fine detail, in which errors of place and of scale show and those of filters don't."""
    texture = Texture.random(np.random.default_rng(0), shortest=24.0, longest=80.0)
    pixels = texture.draw(height, width, np.eye(2), np.zeros(2))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", "quality": 95} | options)
    return file.getvalue()


def with_pillow(data, box, size):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)).astype(int)


def whole_pixels(box, eighths):
    """The box in an image of 200 x 150 with its edges where the decoded image has some."""
    edges = (math.floor(edge * eighths / 8 + 0.5) * 8 / eighths for edge in box)
    return tuple(min(edge, side) for edge, side in zip(edges, (200, 150, 200, 150), strict=True))


@pytest.mark.parametrize("size", [40, 64, 112, 180])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
def test_crops_are_close_to_pillows(size, options):
    data = saved(smooth(), **options)
    for seed in range(12):
        box = draw_crop(200, 150, np.random.default_rng(seed))
        fast = fast_crop(data, lambda *sides, box=box: (box, False) if sides == (200, 150) else None, size)
        error = np.abs(fast - with_pillow(data, whole_pixels(box, dct_eighths(box, size)), size))
        assert fast.dtype == np.uint8 and error.mean() < 2.5 and np.percentile(error, 99) < 12, (box, error.mean())


def test_the_decoded_part_is_as_small_as_it_may_be_but_not_smaller(monkeypatch):
    parts, resize = [], cv2.resize

    def watched(part, *args, **kwargs):
        parts.append(part.shape)
        return resize(part, *args, **kwargs)

    monkeypatch.setattr(cv2, "resize", watched)
    data, size = saved(smooth(300, 403)), 36
    chosen = set()
    for seed in range(60):
        box = draw_crop(403, 300, np.random.default_rng(seed))
        sides = box[3] - box[1], box[2] - box[0]
        eighths = dct_eighths(box, size)
        chosen.add(eighths)
        fast_crop(data, lambda *_, box=box: (box, False), size)
        assert eighths == 8 or min(sides) * eighths >= 8 * size > min(sides) * eighths // 2 * (eighths > 1)
        for side, decoded in zip(sides, parts[-1], strict=False):
            assert abs(decoded - side * eighths / 8) < 1
        assert min(parts[-1][:2]) >= min(size, *sides)
    assert chosen == {1, 2, 4}


@pytest.mark.parametrize(
    "box, size, eighths",
    [((0, 0, 224, 300), 224, 8), ((5, 5, 452, 505), 224, 8), ((5, 5, 453, 505), 224, 4), ((0, 0, 1000, 895), 224, 4),
     ((0, 0, 1000, 896), 224, 2), ((0, 0, 1791, 1800), 224, 2), ((0, 0, 1792, 1800), 224, 1), ((0, 0, 1, 1), 224, 8)],
)  # fmt: skip
def test_the_scale_in_eighths(box, size, eighths):
    assert dct_eighths(box, size) == eighths


def test_mirrored_parts_are_the_same_from_right_to_left():
    for box in ((10, 10, 110, 110), (0, 0, 200, 150), (20, 30, 50, 70)):
        plain, mirrored = (fast_crop(saved(smooth()), lambda *_, d=(box, way): d, 48) for way in (False, True))
        np.testing.assert_array_equal(mirrored, plain[:, ::-1])


def test_grey_files_become_rgb():
    data = saved(smooth().convert("L"))
    fast = fast_crop(data, lambda *_: ((10, 10, 110, 110), False), 48)
    assert (fast == fast[..., :1]).all()
    assert np.abs(fast - with_pillow(data, (10, 10, 110, 110), 48)).mean() < 2.5


def test_cmyk_and_other_formats_go_pillows_way():
    box = (20, 30, 120, 140)
    gif = saved(smooth().convert("P"), format="GIF")
    for data in (saved(smooth().convert("CMYK")), saved(smooth(), format="PNG"), gif):
        part = Image.open(io.BytesIO(data)).convert("RGB").crop(box)
        expected = np.asarray(part.resize((32, 32), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(fast_crop(data, lambda *_: (box, False), 32), expected)
        np.testing.assert_array_equal(fast_crop(data, lambda *_: (box, True), 32), expected[:, ::-1])


def test_only_jpegs_are_called_so():
    assert is_jpeg(saved(smooth())) and not is_jpeg(saved(smooth(), format="PNG")) and not is_jpeg(b"")


@pytest.mark.parametrize("end", [0, 2, 40, 700, -2000])
def test_damaged_files_raise_as_with_pillow(end):
    with pytest.raises(OSError):
        fast_crop(saved(smooth())[:end], lambda *_: ((0, 0, 100, 100), False), 32)


def test_small_faults_that_pillow_forgives_are_forgiven_with_the_box_that_was_drawn():
    data = saved(smooth())
    data = data[:-2] + bytes(16) + data[-2:]  # bytes that belong to nothing before the end
    boxes = []

    def draw(width, height):
        boxes.append(draw_crop(width, height, np.random.default_rng(len(boxes))))
        return boxes[-1], True

    found = fast_crop(data, draw, 32)
    (box,) = boxes
    assert np.abs(found[:, ::-1] - with_pillow(data, box, 32)).mean() < 2.5


@pytest.mark.parametrize("package", ["cv2", "simplejpeg"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    fast_libraries.cache_clear()
    with pytest.raises(UsageError, match=f"the decoder 'fast' needs the package {package}: pip install 'xattn"):
        fast_crop(saved(smooth()), lambda *_: ((0, 0, 9, 9), False), 8)
