import struct
import zlib

import jaxtyping
import numpy as np
import pytest
from PIL import Image

from xattn.config import UsageError
from xattn.data.flow_files import (
    AutoFlow,
    FlyingChairs,
    Kitti,
    Sintel,
    read_flo,
    read_flow_png,
    write_flo,
    write_flow_png,
)

H, W = 6, 8


def make_flow(number, height=H, width=W):
    return np.random.default_rng(number).normal(0, 3, (height, width, 2)).astype(np.float32)


def write_frame(path, level, height=H, width=W):
    """Pixels that say where they are: red is the column, green the row, blue the level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:height, :width]
    Image.fromarray(np.stack([x, y, np.full_like(x, level)], -1).astype(np.uint8)).save(path)


def test_the_published_frame_sizes():
    """What batches are planned for before any file is opened; the other tests use small frames."""
    assert PUBLISHED == [(384, 512), (448, 576), (436, 1024), (376, 1242)]


PUBLISHED = [source.frame_size for source in (FlyingChairs, AutoFlow, Sintel, Kitti)]


@pytest.fixture(autouse=True)
def small_frames(monkeypatch):
    for source in (AutoFlow, FlyingChairs, Sintel, Kitti):
        monkeypatch.setattr(source, "frame_size", (H, W))


# A .flo of one row of two pixels, (1, -2) and (0.5, 0), written out by hand.
FLO = b"PIEH" + bytes.fromhex("02000000 01000000 0000803f 000000c0 0000003f 00000000")


def test_flo_files_are_the_bytes_of_the_format(tmp_path):
    path = tmp_path / "a.flo"
    flow = np.array([[[1, -2], [0.5, 0]]], np.float32)
    write_flo(path, flow)
    assert path.read_bytes() == FLO and struct.unpack("<f", FLO[:4]) == (202021.25,)
    np.testing.assert_array_equal(read_flo(path), flow)
    write_flo(path, make_flow(0))
    np.testing.assert_array_equal(read_flo(path), make_flow(0))


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"HEIP" + FLO[4:], "is no .flo file: it begins with b'HEIP' instead of b'PIEH'."),
        (b"", "is no .flo file: it begins with b'' instead of b'PIEH'."),
        (FLO[:-4], "says 2 x 1 pixels, which are 28 bytes, but has 24: it is damaged, so get it again."),
        (FLO[:9], "says 0 x 0 pixels, which are 12 bytes, but has 9: it is damaged, so get it again."),
    ],
)
def test_damaged_flo_files_are_named(tmp_path, data, sentence):
    path = tmp_path / "a.flo"
    path.write_bytes(data)
    with pytest.raises(UsageError) as error:
        read_flo(path)
    assert str(error.value) == f"'{path}' {sentence}"
    with pytest.raises(UsageError, match="'.*none.flo' can't be read"):
        read_flo(tmp_path / "none.flo")


# A 16-bit RGB .png of one row of two pixels, (1, -2) known and unknown, written out by hand and compressed by zlib.
ROW = bytes.fromhex("00 8040 7f80 0001 0000 0000 0000")


def png(width, height, rows, bits=16):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_flow_png_files_are_the_bytes_of_the_format(tmp_path):
    path = tmp_path / "a.png"
    write_flow_png(path, np.array([[[1, -2], [7, 7]]], np.float32), np.array([[True, False]]))
    assert path.read_bytes() == png(2, 1, ROW)
    flow, valid = read_flow_png(path)
    assert flow[0, 0].tolist() == [1, -2] and valid.tolist() == [[True, False]]
    write_flow_png(path, make_flow(1), np.ones((H, W), bool))
    flow, valid = read_flow_png(path)
    np.testing.assert_allclose(flow, make_flow(1), atol=1 / 128)
    assert valid.all() and flow.dtype == np.float32


def test_flow_png_files_may_use_every_filter(tmp_path):
    """What other programs write: each row as the difference to a prediction from its neighbours."""
    values = np.random.default_rng(0).integers(2**16, size=(5, 7, 3), dtype=np.uint16)
    raw = np.frombuffer(values.astype(">u2").tobytes(), np.uint8).reshape(5, 42).astype(int)
    rows, above = [], np.zeros(42, int)
    for kind, row in enumerate(raw):
        left, corner = np.pad(row, (6, 0))[:-6], np.pad(above, (6, 0))[:-6]
        guess = left + above - corner
        distance = np.abs(np.stack([guess - left, guess - above, guess - corner]))
        paeth = np.choose(distance.argmin(0), [left, above, corner])
        prediction = [np.zeros(42, int), left, above, (left + above) // 2, paeth][kind]
        rows.append(bytes([kind]) + ((row - prediction) % 256).astype(np.uint8).tobytes())
        above = row
    (tmp_path / "a.png").write_bytes(png(7, 5, b"".join(rows)))
    flow, valid = read_flow_png(tmp_path / "a.png")
    np.testing.assert_array_equal(64 * flow + 2**15, values[..., :2])
    np.testing.assert_array_equal(valid, values[..., 2] > 0)


def test_other_images_are_no_flow(tmp_path):
    write_frame(tmp_path / "a.png", 1)
    with pytest.raises(UsageError, match="is no flow: it needs to be a .png with three channels of 16 bits"):
        read_flow_png(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png(2, 1, ROW)[:-28])
    with pytest.raises(UsageError, match="b.png' can't be read"):
        read_flow_png(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("text")
    with pytest.raises(UsageError, match=r"c.png' can't be read \(not an image\)"):
        read_flow_png(tmp_path / "c.png")


def write_chairs(root, folder="data"):
    for number in range(1, 5):
        for frame in (1, 2):
            write_frame(root / folder / f"{number:05d}_img{frame}.ppm", 10 * number + frame)
        write_flo(root / folder / f"{number:05d}_flow.flo", make_flow(number))
    (root / "FlyingChairs_train_val.txt").write_text("1\n2\n1\n1\n")


def levels(example):
    return example["frames"][:, 0, 0, 2].tolist()


@pytest.mark.parametrize("folder", ["data", "."])
def test_flying_chairs(tmp_path, folder):
    write_chairs(tmp_path, folder)
    train, val = FlyingChairs("train", tmp_path), FlyingChairs("val", str(tmp_path))
    assert [levels(train.example(index, None)) for index in range(train.num_examples)] == [[11, 12], [31, 32], [41, 42]]
    example = val.example(0, None)
    assert val.num_examples == 1 and levels(example) == [21, 22]
    np.testing.assert_array_equal(example["flow"], make_flow(2))
    assert example["valid"].all() and example["valid"].dtype == bool


def test_autoflow(tmp_path):
    names = [f"table_{number}_batch_0" for number in range(1000)]
    names = names[:12] + [name for name in names[12:] if zlib.crc32(name.encode()) % 100 == 0][:2]
    for number, name in enumerate(names):
        folder = tmp_path / f"static_40k_png_{number % 4 + 1}_of_4" / name
        write_frame(folder / "im0.png", number)
        write_frame(folder / "im1.png", number + 100)
        write_flo(folder / "forward.flo", make_flow(number))
    found = {}
    for split in ("train", "val"):
        source = AutoFlow(split, tmp_path)
        found[split] = {levels(source.example(index, None))[0] for index in range(source.num_examples)}
        example = source.example(0, None)
        assert levels(example)[1] == levels(example)[0] + 100
        np.testing.assert_array_equal(example["flow"], make_flow(levels(example)[0]))
    assert found == {"train": set(range(12)), "val": {12, 13}}
    write_frame(folder / "im2.png", 0)
    with pytest.raises(UsageError, match="has 3 .png files beside the flow, but needs two"):
        AutoFlow("val", tmp_path)


def test_sintel(tmp_path):
    for render, offset in (("clean", 0), ("final", 100)):
        for scene, start in (("alley_1", 0), ("bamboo_1", 50)):
            for frame in range(1, 4):
                write_frame(tmp_path / "training" / render / scene / f"frame_{frame:04d}.png", offset + start + frame)
    for scene, start in (("alley_1", 0), ("bamboo_1", 50)):
        (tmp_path / "training" / "flow" / scene).mkdir(parents=True)
        for frame in (1, 2):
            path = tmp_path / "training" / "flow" / scene / f"frame_{frame:04d}.flo"
            write_flo(path, make_flow(start + frame))
    for render, offset in (("clean", 0), ("final", 100)):
        source = Sintel("test", tmp_path, render=render)
        pairs = [levels(source.example(index, None)) for index in range(source.num_examples)]
        assert pairs == [[offset + first, offset + first + 1] for first in (1, 2, 51, 52)]
        np.testing.assert_array_equal(source.example(3, None)["flow"], make_flow(52))
    with pytest.raises(UsageError, match="sintel has no render 'albedo': choose one of clean, final"):
        Sintel("test", tmp_path, render="albedo")
    with pytest.raises(UsageError, match="sintel has no split 'train': choose test"):
        Sintel("train", tmp_path)


def test_kitti_frames_are_filled_up_where_no_flow_is_valid(tmp_path, monkeypatch):
    for number, (height, width) in enumerate([(H, W), (H - 1, W - 2)]):
        for frame in (10, 11):
            path = tmp_path / "training" / "image_2" / f"{number:06d}_{frame}.png"
            write_frame(path, 10 * number + frame, height, width)
        known = np.ones((height, width), bool)
        known[0, 0] = False
        (tmp_path / "training" / "flow_occ").mkdir(exist_ok=True)
        truth = tmp_path / "training" / "flow_occ" / f"{number:06d}_10.png"
        write_flow_png(truth, make_flow(number, height, width), known)
    source = Kitti("test", tmp_path)
    example = source.example(1, None)
    assert levels(example) == [20, 21] and example["frames"].shape == (2, H, W, 3)
    assert example["frames"][0, -1, -1, :2].tolist() == [W - 3, H - 2]
    expected = np.zeros((H, W), bool)
    expected[: H - 1, : W - 2] = True
    expected[0, 0] = False
    np.testing.assert_array_equal(example["valid"], expected)
    assert not example["flow"][~expected].any()
    np.testing.assert_allclose(example["flow"][expected], make_flow(1, H - 1, W - 2)[expected[:-1, :-2]], atol=1 / 128)
    monkeypatch.setattr(Kitti, "padding", 1)
    with pytest.raises(UsageError, match=r"has 5 x 6 pixels, but the frames of kitti have 6 x 8: scale it, or remove"):
        source.example(1, None)


def test_training_shows_the_same_part_of_both_frames_and_of_the_flow(tmp_path):
    write_chairs(tmp_path)
    source = FlyingChairs("train", tmp_path, (4, 5))
    corners = set()
    for seed in range(100):
        example = source.example(0, seed)
        left, top = example["frames"][0, 0, 0, :2].tolist()
        corners.add((left, top))
        y, x = np.mgrid[top : top + 4, left : left + 5]
        np.testing.assert_array_equal(example["frames"][..., :2], np.stack([np.stack([x, y], -1)] * 2))
        np.testing.assert_array_equal(example["flow"], make_flow(1)[top : top + 4, left : left + 5])
    assert corners == {(left, top) for left in range(4) for top in range(3)}
    assert source.example(0, None)["flow"].shape == (H, W, 2)
    assert source.shapes(image_size=(4, 5))["frames"].shape == source.example(0, 1)["frames"].shape


def test_unknown_flow_is_not_valid(tmp_path):
    write_chairs(tmp_path)
    flow = make_flow(2)
    flow[1, 2, 0], flow[3, 3] = 1.6667e9, np.nan
    write_flo(tmp_path / "data" / "00002_flow.flo", flow)
    example = FlyingChairs("val", tmp_path).example(0, None)
    assert np.argwhere(~example["valid"]).tolist() == [[1, 2], [3, 3]]
    assert not example["flow"][~example["valid"]].any()


@pytest.mark.parametrize("image_size", [4, 0, (4,), (4, 5, 3), (0, 5)])
def test_an_image_size_that_is_no_pair_is_named(tmp_path, image_size, monkeypatch):
    # Without the checked annotations of tests, as users run it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    write_chairs(tmp_path)
    for make in (
        lambda: FlyingChairs("train", tmp_path, image_size),
        lambda: FlyingChairs.shapes(image_size=image_size),
    ):
        with pytest.raises(UsageError, match="flying_chairs needs the height and the width of images as image_size"):
            make()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UsageError, match="folder of the data set is not given: add --config.data.root=DIR"):
        AutoFlow("train")
    with pytest.raises(UsageError, match="There is no folder '.*/none': give the folder"):
        Kitti("test", tmp_path / "none")
    for source, split in ((AutoFlow, "val"), (Sintel, "test"), (Kitti, "test")):
        with pytest.raises(UsageError, match=rf"has no pairs for the split '{split}': `xattn.data.flow_files` shows"):
            source(split, tmp_path)
    with pytest.raises(UsageError, match="autoflow has no split 'test': choose one of train, val"):
        AutoFlow("test", tmp_path)
    with pytest.raises(UsageError, match="'.*FlyingChairs_train_val.txt' can't be read"):
        FlyingChairs("train", tmp_path)
    write_chairs(tmp_path)
    with pytest.raises(UsageError, match="frames of 6 x 8, but parts of 7 x 8 were asked for: give a smaller"):
        FlyingChairs("train", tmp_path, (7, 8))
    (tmp_path / "data" / "00001_img2.ppm").unlink()
    with pytest.raises(UsageError, match="'.*00001_img2.ppm' can't be read"):
        FlyingChairs("train", tmp_path).example(0, None)
    write_flo(tmp_path / "data" / "00003_flow.flo", make_flow(0, H, W + 1))
    with pytest.raises(UsageError, match="00003_img1.ppm' has 6 x 8 pixels, but '.*00003_flow.flo' has 6 x 9: they"):
        FlyingChairs("train", tmp_path).example(1, None)
    (tmp_path / "FlyingChairs_train_val.txt").write_text("1\n2\n1\n")
    with pytest.raises(UsageError, match=r"has 3 lines, but '.*data' has 4 \*_flow.flo"):
        FlyingChairs("train", tmp_path)
