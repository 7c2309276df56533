import io

import numpy as np
import pytest
from PIL import Image

from xattn.config import UsageError
from xattn.data import labelled_images
from xattn.data.labelled_images import LabelledImages
from xattn.data.transforms import draw_crop, image_transform

IMAGE = Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8))


class Shelf(LabelledImages):
    """A source of what it is given."""

    name = "shelf"

    def __init__(self, *entries, **options):
        self.entries = entries
        super().__init__("train", root=".", image_size=16, **options)

    def _find(self, folder):
        return len(self.entries)

    def _entry(self, index):
        return self.entries[index], index, f"entry {index}"


def png():
    file = io.BytesIO()
    IMAGE.save(file, "png")
    return file.getvalue()


def test_files_their_bytes_and_images_give_the_same(tmp_path):
    path = tmp_path / "0.png"
    path.write_bytes(png())
    source = Shelf(path, png(), IMAGE)
    for seed in (None, 0, 1):
        first, *others = (source.example(index, seed) for index in range(3))
        assert first["image"].shape == (16, 16, 3) and first["image"].dtype == np.uint8
        for index, other in enumerate(others, start=1):
            np.testing.assert_array_equal(first["image"], other["image"])
            assert other["label"] == index and other["label"].dtype == np.int32


def mirrored(image, rng):
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


@pytest.mark.parametrize("options", [None, {"name": "timm", "scale": (0.2, 0.5), "num_layers": 1}])
def test_training_cuts_out_a_part_by_the_seed_and_evaluation_shows_the_centre(options):
    source = Shelf(IMAGE, transform=options)
    transform = image_transform(options)
    trained = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        part = mirrored(IMAGE.crop(draw_crop(60, 40, rng, transform.scale)), rng)
        trained.append(source.example(0, seed)["image"])
        np.testing.assert_array_equal(trained[-1], np.asarray(transform.train(part, 16, rng)))
    assert len({pixels.tobytes() for pixels in trained}) == 8
    np.testing.assert_array_equal(source.example(0, None)["image"], transform.evaluate(IMAGE, 16))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_images_of_other_modes_become_colours(mode):
    image = IMAGE.convert(mode)
    for seed in (None, 3):
        np.testing.assert_array_equal(
            Shelf(image).example(0, seed)["image"], Shelf(image.convert("RGB")).example(0, seed)["image"]
        )


@pytest.mark.parametrize("num_layers", [0, 2])
def test_the_fast_decoder_reads_files_to_train_with_and_nothing_else(monkeypatch, tmp_path, num_layers):
    """It is handed the draw of box and mirror, and the size; what it returns is augmented as ever."""
    draws = []

    def fast_crop(data, draw, size):
        draws.append(draw(60, 40))
        assert data == png() and size == 16
        return np.asarray(IMAGE.crop((0, 0, 16, 16)))

    monkeypatch.setattr(labelled_images, "fast_libraries", lambda: None)
    monkeypatch.setattr(labelled_images, "fast_crop", fast_crop)
    path = tmp_path / "0.png"
    path.write_bytes(png())
    options = {"name": "timm", "scale": (0.3, 0.4), "num_layers": num_layers}
    fast, exact = (Shelf(path, png(), IMAGE, transform=options, decoder=decoder) for decoder in ("fast", "pillow"))
    for index in (0, 1):
        rng = np.random.default_rng(5)
        drawn = draw_crop(60, 40, rng, (0.3, 0.4)), rng.random() < 0.5
        expected = image_transform(options).train(IMAGE.crop((0, 0, 16, 16)), 16, rng)
        with monkeypatch.context() as patch:
            if not num_layers:
                patch.setattr(fast._transform, "train", None)  # there is nothing to do
            np.testing.assert_array_equal(fast.example(index, 5)["image"], np.asarray(expected))
        assert draws.pop() == drawn
    for index, seed in ((0, None), (1, None), (2, None), (2, 5)):
        np.testing.assert_array_equal(fast.example(index, seed)["image"], exact.example(index, seed)["image"])
    assert not draws


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="config.data.decoder must be one of pillow, fast, but is 'turbo'"):
        Shelf(IMAGE, decoder="turbo")
    with pytest.raises(UsageError, match="config.data.transform has no key 'layers': did you mean 'num_layers'"):
        Shelf(IMAGE, transform={"name": "timm", "layers": 2})
    with pytest.raises(UsageError, match="entry 1 can't be read as an image .*or set config.data.skip_damaged"):
        Shelf(IMAGE, b"no image").example(1, None)
    assert Shelf(IMAGE, b"no image", skip_damaged=True).example(1, None)["label"] == 0
