"""Optical flow on disk: two file formats, and the published data sets that use them.

A .flo file (Middlebury) is, little-endian, the float 202021.25 (the bytes "PIEH"), width and height as int32, and
float32 (x, y) of each pixel, row by row. Pixels whose flow is unknown hold values above 1e9.

A flow .png (KITTI) has three channels of 16 bits: x and y as 64 v + 2^15, and whether the pixel is known. Pillow gives
8 bits of such a file, so it is read twice, for the upper and the lower byte.

    FlyingChairs   root/data/00001_img1.ppm, 00001_img2.ppm, 00001_flow.flo, and root/FlyingChairs_train_val.txt
                   (or all of it in root) with a line for each pair: 1 for train, 2 for val
    AutoFlow       root/**/<sample>/ with two .png, in the order of time by their names (im0.png, im1.png), and one
                   .flo, as in static_40k_png_1_of_4.zip
    Sintel         root/training/clean (or final)/<scene>/frame_0001.png, root/training/flow/<scene>/frame_0001.flo
    KITTI 2015     root/training/image_2/000000_10.png, 000000_11.png, root/training/flow_occ/000000_10.png
"""

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Bool, Float, Num, UInt8
from PIL import Image, UnidentifiedImageError

from xattn.config import UsageError
from xattn.data.checks import check_image_size, check_root, check_split, read_text
from xattn.data.planes import flow_shapes

_MAGIC = b"PIEH"
_KNOWN = 1e9


def read_flo(path: str | os.PathLike) -> Float[np.ndarray, "H W 2"]:
    """The flow in a .flo file, (x, y) in pixels.

    Raises:
      UsageError: the file is missing, does not begin with the magic number, or is cut short.
    """
    data = _read(path)
    if data[:4] != _MAGIC:
        raise UsageError(f"'{path}' is no .flo file: it begins with {data[:4]!r} instead of {_MAGIC!r}.")
    width, height = struct.unpack("<ii", data[4:12]) if len(data) >= 12 else (0, 0)
    if min(width, height) < 1 or len(data) != 12 + 8 * width * height:
        raise UsageError(
            f"'{path}' says {width} x {height} pixels, which are {12 + 8 * width * height} bytes, "
            f"but has {len(data)}: it is damaged, so get it again."
        )
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2).astype(np.float32)


def write_flo(path: str | os.PathLike, flow: Num[np.ndarray, "H W 2"]) -> None:
    """Writes flow, (x, y) in pixels, as a .flo file."""
    height, width, _ = flow.shape
    Path(path).write_bytes(_MAGIC + struct.pack("<ii", width, height) + flow.astype("<f4").tobytes())


def read_flow_png(path: str | os.PathLike) -> tuple[Float[np.ndarray, "H W 2"], Bool[np.ndarray, "H W"]]:
    """The flow in a 16-bit .png, (x, y) in pixels, and where it is known.

    Raises:
      UsageError: the file is missing, or not a .png with three channels of 16 bits.
    """
    bytes_of_channels = []
    for rawmode in ("RGB;16B", "RGB;16L"):  # PNG is big-endian: the wrong order gives the lower byte
        try:
            with Image.open(path) as image:
                (tile,) = image.tile
                if image.format != "PNG" or tile[3] != "RGB;16B":
                    raise UsageError(f"'{path}' is no flow: it needs to be a .png with three channels of 16 bits.")
                image.tile = [tile._replace(args=rawmode)]
                bytes_of_channels.append(np.asarray(image).astype(np.uint16))
        except (OSError, SyntaxError) as error:
            raise _unreadable(path, error) from error
    values = 256 * bytes_of_channels[0] + bytes_of_channels[1]
    return (values[..., :2].astype(np.float32) - 2**15) / 64, values[..., 2] > 0


def write_flow_png(path: str | os.PathLike, flow: Num[np.ndarray, "H W 2"], valid: Bool[np.ndarray, "H W"]) -> None:
    """Writes flow, (x, y) in pixels within -512..512, as a 16-bit .png; it is rounded to 1/64 pixel."""
    height, width, _ = flow.shape
    values = np.where(valid[..., None], np.rint(64 * np.asarray(flow, np.float64)) + 2**15, 0).clip(0, 2**16 - 1)
    values = np.concatenate([values, valid[..., None]], -1).astype(">u2")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in values)  # filter 0: bytes as they are
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


class FlowFiles:
    """Pairs of frames with their flow from files: frames uint8 [2, H, W, 3], flow float32 [H, W, 2], valid bool [H, W].

    Training shows a random part of image_size, evaluation the whole frames. Flow that is not known is 0 and not valid.

    Args:
      split: "train", "val" or "test".
      pairs: (first frame, second frame, flow) of each example.
      image_size: H and W of the part, by default the whole frame.

    Raises:
      UsageError: there are no pairs, image_size is no pair, or the part is larger than the frames.
    """

    name = "flow_files"
    frame_size = (0, 0)
    padding = 0  # how many pixels smaller a frame may be

    def __init__(self, split: str, pairs: Sequence[tuple[Path, Path, Path]], image_size: tuple[int, int] | None):
        height, width = self.frame_size if image_size is None else check_image_size(self.name, image_size)
        if height > self.frame_size[0] or width > self.frame_size[1]:
            raise UsageError(
                f"{self.name} has frames of {self.frame_size[0]} x {self.frame_size[1]}, but parts of "
                f"{height} x {width} were asked for: give a smaller image_size."
            )
        self.split = split
        self.image_size = (height, width)
        self.pairs = pairs
        self.num_examples = len(pairs)

    def example(self, index: int, seed: int | None) -> dict[str, np.ndarray]:
        """Pair number `index`, whole, or a random part of it if there is a seed.

        Raises:
          UsageError: a file is missing, damaged, or of another size than the data set's frames.
        """
        first, second, truth = self.pairs[index]
        frames = np.stack([_read_image(first), _read_image(second)])
        if truth.suffix == ".flo":
            flow = read_flo(truth)
            valid = np.all(np.abs(flow) < _KNOWN, axis=-1)
        else:
            flow, valid = read_flow_png(truth)
        if frames.shape[1:3] != flow.shape[:2]:
            raise UsageError(
                f"'{first}' has {frames.shape[1]} x {frames.shape[2]} pixels, but '{truth}' has "
                f"{flow.shape[0]} x {flow.shape[1]}: they don't belong together."
            )
        fields = self._framed(first, frames, np.where(valid[..., None], flow, 0).astype(np.float32), valid)
        if seed is None or self.image_size == self.frame_size:
            return fields
        rng = np.random.default_rng(seed)
        (height, width), (whole_height, whole_width) = self.image_size, self.frame_size
        top, left = int(rng.integers(whole_height - height + 1)), int(rng.integers(whole_width - width + 1))
        rows, columns = slice(top, top + height), slice(left, left + width)
        return {
            "frames": fields["frames"][:, rows, columns],
            "flow": fields["flow"][rows, columns],
            "valid": fields["valid"][rows, columns],
        }

    @classmethod
    def shapes(cls, image_size: tuple[int, int] | None = None, **_: object) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields of one example in training, told without opening the data."""
        return flow_shapes(*(cls.frame_size if image_size is None else check_image_size(cls.name, image_size)))

    def _framed(self, path: Path, frames: np.ndarray, flow: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
        """The fields, filled up below and on the right to the size that all frames get."""
        missing = [whole - part for whole, part in zip(self.frame_size, valid.shape, strict=True)]
        if min(missing) < 0 or max(missing) > self.padding:
            raise UsageError(
                f"'{path}' has {valid.shape[0]} x {valid.shape[1]} pixels, but the frames of {self.name} have "
                f"{self.frame_size[0]} x {self.frame_size[1]}: scale it, or remove it."
            )
        below, right = (0, missing[0]), (0, missing[1])
        return {
            "frames": np.pad(frames, ((0, 0), below, right, (0, 0)), mode="edge"),
            "flow": np.pad(flow, (below, right, (0, 0))),
            "valid": np.pad(valid, (below, right)),
        }


class FlyingChairs(FlowFiles):
    """FlyingChairs (Dosovitskiy et al., 2015): 22,232 pairs to train, 640 for val, frames of 384 x 512.

    Args:
      split: "train" or "val".
      root: the folder with the list and the files, see above.
      image_size: H and W of the random part in training; evaluation shows whole frames.
    """

    name = "flying_chairs"
    frame_size = (384, 512)

    def __init__(self, split: str, root: str | os.PathLike = "", image_size: tuple[int, int] | None = None):
        check_split(self.name, split, ("train", "val"))
        part = {"train": "1", "val": "2"}[split]
        folder = check_root(root)
        table = folder / "FlyingChairs_train_val.txt"
        parts = read_text(table).split()
        files = folder / "data" if (folder / "data").is_dir() else folder
        flows = sorted(files.glob("*_flow.flo"))
        if len(flows) != len(parts):
            raise UsageError(f"'{table}' has {len(parts)} lines, but '{files}' has {len(flows)} *_flow.flo.")
        names = [path.name.removesuffix("flow.flo") for path, own in zip(flows, parts, strict=True) if own == part]
        pairs = [(files / f"{name}img1.ppm", files / f"{name}img2.ppm", files / f"{name}flow.flo") for name in names]
        super().__init__(split, _some(pairs, files, split), image_size)


class AutoFlow(FlowFiles):
    """AutoFlow (arXiv 2104.14544): 40,000 static pairs, frames of 448 x 576; Perceiver IO trains on parts of 368 x 496.

    Args:
      split: "train" or "val": a sample is in val if `crc32(name of its folder) mod 100` is 0, so about 400 are.
      root: the folder below which the samples lie, see above.
      image_size: H and W of the random part in training; evaluation shows whole frames.
    """

    name = "autoflow"
    frame_size = (448, 576)

    def __init__(self, split: str, root: str | os.PathLike = "", image_size: tuple[int, int] | None = None):
        check_split(self.name, split, ("train", "val"))
        folder, pairs = check_root(root), []
        for flow in sorted(folder.rglob("*.flo")):
            if (zlib.crc32(flow.parent.name.encode()) % 100 == 0) == (split == "val"):
                frames = sorted(flow.parent.glob("*.png"))
                if len(frames) != 2:
                    raise UsageError(f"'{flow.parent}' has {len(frames)} .png files beside the flow, but needs two.")
                pairs.append((frames[0], frames[1], flow))
        super().__init__(split, _some(pairs, folder, split), image_size)


class Sintel(FlowFiles):
    """MPI Sintel: 1041 pairs with published flow, frames of 436 x 1024. It is for evaluation.

    Args:
      split: "test" is all of these pairs, which is what papers report of models that were trained on other data.
      root: the folder that holds training/, see above.
      image_size: H and W of the random part where a seed asks for one.
      render: "clean", or "final" with blur and fog.
    """

    name = "sintel"
    frame_size = (436, 1024)

    def __init__(
        self,
        split: str,
        root: str | os.PathLike = "",
        image_size: tuple[int, int] | None = None,
        render: str = "clean",
    ):
        if split != "test":
            raise UsageError(f"{self.name} has no split '{split}': choose test, which is all pairs of training/.")
        if render not in ("clean", "final"):
            raise UsageError(f"{self.name} has no render '{render}': choose one of clean, final.")
        folder = check_root(root) / "training"
        pairs = []
        for flow in sorted((folder / "flow").glob("*/*.flo")):
            scene = folder / render / flow.parent.name
            number = int(flow.stem.removeprefix("frame_"))
            pairs.append((scene / f"{flow.stem}.png", scene / f"frame_{number + 1:04d}.png", flow))
        super().__init__(split, _some(pairs, folder / "flow", split), image_size)


class Kitti(FlowFiles):
    """KITTI 2015: 200 pairs with flow at some of the pixels, frames of up to 376 x 1242. It is for evaluation.

    Frames that are smaller are filled up by repeating their last row and column, where no flow is valid.

    Args:
      split: "test" is all of these pairs, which is what papers report of models that were trained on other data.
      root: the folder that holds training/, see above.
      image_size: H and W of the random part where a seed asks for one.
    """

    name = "kitti"
    frame_size = (376, 1242)
    padding = 20

    def __init__(self, split: str, root: str | os.PathLike = "", image_size: tuple[int, int] | None = None):
        if split != "test":
            raise UsageError(f"{self.name} has no split '{split}': choose test, which is all pairs of training/.")
        folder = check_root(root) / "training"
        flows = sorted((folder / "flow_occ").glob("*_10.png"))
        frames = folder / "image_2"
        pairs = [(frames / flow.name, frames / flow.name.replace("_10", "_11"), flow) for flow in flows]
        super().__init__(split, _some(pairs, folder / "flow_occ", split), image_size)


def _some(pairs: list, folder: Path, split: str) -> list:
    if not pairs:
        raise UsageError(
            f"'{folder}' has no pairs for the split '{split}': `xattn.data.flow_files` shows the layouts that are read."
        )
    return pairs


def _read(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike, error: Exception) -> UsageError:
    why = "not an image" if isinstance(error, UnidentifiedImageError) else error
    return UsageError(f"'{path}' can't be read ({why}): put it there, or get it again.")
