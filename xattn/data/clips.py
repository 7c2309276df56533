"""Short clips with sound and a label: rendered ones that need no download, and your own from folders.

    video uint8 [T, H, W, 3],   audio float32 [S, 1] in [-1, 1],   label int32

ClipFolders reads root/<split>/<class>/<clip>/ with frames frame_*.jpg (or .png), in the order of their names, and
audio.wav (16 bits, one channel or several that are averaged). Such a folder is made of a video file by

    ffmpeg -i clip.mp4 -vf fps=25 -q:v 2 DIR/frame_%05d.jpg -ac 1 -ar 48000 DIR/audio.wav
"""

import os
import wave
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from xattn.config import UsageError
from xattn.data.checks import check_image_size, check_root, check_split, subfolders
from xattn.data.episodes import SPLITS
from xattn.data.textures import Texture


class RenderedClips:
    """Clips of a textured flower that flies across the image, with a sound that belongs to its number of petals.

    A clip of class k shows a flower of k + 2 petals, r(angle) = R (1 + 0.35 cos((k + 2) angle)), on a plain ground. It
    moves along a line and turns, and its texture with it. Its sound is a tone with a period of 8 * 4^(k / num_classes)
    samples that swells 1 + (k mod 4) times in the clip, and a little noise; both parts have a random phase. Clip i of a
    split depends on (split, i) alone, and has class i mod num_classes.

    Args:
      split: "train", "val" or "test".
      frames: T.
      image_size: H and W.
      audio_length: S.
      num_classes: how many classes.
      num_examples: how many clips an epoch has.

    Raises:
      UsageError: there is no such split, a size is below 1, or image_size is no pair.
    """

    name = "rendered_clips"

    def __init__(
        self,
        split: str,
        frames: int = 4,
        image_size: tuple[int, int] = (32, 32),
        audio_length: int = 512,
        num_classes: int = 4,
        num_examples: int = 10_000,
    ):
        _check(self.name, split, frames, audio_length)
        if num_classes < 1 or num_examples < 1:
            raise UsageError(
                f"{self.name} needs at least 1 class and 1 example, but got {num_classes} and {num_examples}."
            )
        self.split = split
        self.num_classes = num_classes
        self.num_examples = num_examples
        self._frames, self._audio_length = frames, audio_length
        self._image_size = check_image_size(self.name, image_size)

    def example(self, index: int, seed: int | None) -> dict[str, np.ndarray]:
        """Clip number `index`; every clip is as good as another, so `seed` changes nothing."""
        del seed
        label = index % self.num_classes
        rng = np.random.default_rng([SPLITS.index(self.split), index])
        return {"video": self._video(label, rng), "audio": self._audio(label, rng), "label": np.array(label, np.int32)}

    @classmethod
    def shapes(
        cls, frames: int = 4, image_size: tuple[int, int] = (32, 32), audio_length: int = 512, **_: object
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields of one example."""
        return _clip_shapes(frames, *check_image_size(cls.name, image_size), audio_length)

    def _video(self, label: int, rng: np.random.Generator) -> UInt8[np.ndarray, "T H W 3"]:
        height, width = self._image_size
        size = min(height, width)
        texture = Texture.random(rng, shortest=max(4.0, size / 8), longest=max(8.0, size / 2))
        ground = rng.uniform(30, 90, 3)
        radius = size * rng.uniform(0.2, 0.28)
        start, end = rng.uniform(0.35, 0.65, (2, 2)) * [width, height]
        angle, turn = rng.uniform(-np.pi, np.pi), rng.uniform(-np.pi / 4, np.pi / 4)
        places = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1)
        video = []
        for time in np.linspace(0, 1, self._frames):
            centre = start + (end - start) * time
            now = angle + turn * time
            x, y = np.moveaxis(places - centre, -1, 0)
            border = radius * (1 + 0.35 * np.cos((label + 2) * (np.arctan2(y, x) - now)))
            cover = np.clip(border - np.hypot(x, y) + 0.5, 0, 1)[..., None]
            # The texture is fixed to the flower: it turns back what the flower has turned.
            back = np.array([[np.cos(now), np.sin(now)], [-np.sin(now), np.cos(now)]])
            drawn = np.clip(texture.draw(height, width, back, -back @ centre) + 40, 0, 255)
            video.append(np.rint(cover * drawn + (1 - cover) * ground))
        return np.stack(video).astype(np.uint8)

    def _audio(self, label: int, rng: np.random.Generator) -> Float[np.ndarray, "S 1"]:
        sample = np.arange(self._audio_length)
        period, beats = 8 * 4 ** (label / self.num_classes), 1 + label % 4
        swell_phase, tone_phase = rng.uniform(0, 2 * np.pi, 2)
        swell = 0.5 - 0.5 * np.cos(2 * np.pi * beats * sample / self._audio_length + swell_phase)
        tone = swell * np.sin(2 * np.pi * sample / period + tone_phase)
        audio = 0.8 * tone + 0.02 * rng.standard_normal(self._audio_length)
        return np.clip(audio, -1, 1).astype(np.float32)[:, None]


class ClipFolders:
    """Clips from folders, see above; labels number the classes of the split train by their sorted names.

    Training takes T frames in a row from a random one on, evaluation those in the middle, and the sound that belongs
    to them: S / T samples a frame. The central square of a frame is scaled to image_size (bilinear).

    Args:
      split: "train", "val" or "test".
      root: the folder that holds the splits.
      frames: T.
      image_size: H and W, which are equal.
      audio_length: S.
      sample_rate: that the sound files must have.

    Attributes:
      class_names: sorted; clips and labels: folder and label of each clip.

    Raises:
      UsageError: a folder is missing or has no clips, or the split has classes that train doesn't have.
    """

    name = "clip_folders"

    def __init__(
        self,
        split: str,
        root: str | os.PathLike = "",
        frames: int = 16,
        image_size: int = 224,
        audio_length: int = 30720,
        sample_rate: int = 48000,
    ):
        _check(self.name, split, frames, audio_length)
        root = check_root(root)
        folder = root / split
        if not folder.is_dir():
            raise UsageError(f"There is no folder '{folder}': expected {folder}/<class>/<clip>/frame_*.jpg.")
        train = root / "train"
        self.class_names = subfolders(train if train.is_dir() else folder)
        if unknown := set(subfolders(folder)) - set(self.class_names):
            raise UsageError(
                f"'{folder}' has {len(unknown)} classes that '{train}' doesn't have, such as '{min(unknown)}': "
                "both need the same class folders."
            )
        found = [
            (folder / name / clip, label)
            for label, name in enumerate(self.class_names)
            if (folder / name).is_dir()
            for clip in subfolders(folder / name)
        ]
        if not found:
            raise UsageError(f"'{folder}' has no clips: expected {folder}/<class>/<clip>/frame_*.jpg.")
        self.clips, self.labels = [clip for clip, _ in found], [label for _, label in found]
        self.split = split
        self.num_examples = len(found)
        self._frames, self._image_size = frames, image_size
        self._audio_length, self._sample_rate = audio_length, sample_rate

    def example(self, index: int, seed: int | None) -> dict[str, np.ndarray]:
        """Clip number `index`, from a random frame on if there is a seed, else its middle.

        Raises:
          UsageError: too few frames, an image or a sound that can't be read, or a sound that doesn't fit.
        """
        clip = self.clips[index]
        files = sorted(path for path in clip.glob("frame_*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        spare = len(files) - self._frames
        if spare < 0:
            raise UsageError(
                f"'{clip}' has {len(files)} frames, but {self._frames} are needed: remove it, or lower "
                "config.data.frames."
            )
        first = spare // 2 if seed is None else int(np.random.default_rng(seed).integers(spare + 1))
        video = np.stack([_read_square(path, self._image_size) for path in files[first : first + self._frames]])
        audio = self._audio(clip / "audio.wav", first)
        return {"video": video, "audio": audio, "label": np.array(self.labels[index], np.int32)}

    @staticmethod
    def shapes(
        frames: int = 16, image_size: int = 224, audio_length: int = 30720, **_: object
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields of one example, told without opening the data."""
        return _clip_shapes(frames, image_size, image_size, audio_length)

    def _audio(self, path: Path, first_frame: int) -> Float[np.ndarray, "S 1"]:
        samples = _read_wav(path, self._sample_rate)
        start = round(first_frame * self._audio_length / self._frames)
        part = samples[start : start + self._audio_length]
        missing = self._audio_length - len(part)
        # Sound tracks are often a little shorter than the pictures: up to one frame is filled up with silence.
        if missing > self._audio_length / self._frames:
            raise UsageError(
                f"'{path}' has {len(samples)} samples, but frames {first_frame} to {first_frame + self._frames - 1} "
                f"need {start + self._audio_length}: lower config.data.audio_length, or make it again."
            )
        return np.pad(part, (0, missing))[:, None]


def _read_square(path: Path, size: int) -> UInt8[np.ndarray, "S S 3"]:
    try:
        with Image.open(path) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side))
            return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))
    except OSError as error:
        raise UsageError(f"'{path}' can't be read as an image ({error}): replace or remove it.") from error


def _read_wav(path: Path, sample_rate: int) -> Float[np.ndarray, "S"]:
    try:
        with wave.open(str(path)) as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise UsageError(f"'{path}' can't be read as a .wav file ({error}): put it there, or make it again.") from error
    if rate != sample_rate or width != 2:
        raise UsageError(
            f"'{path}' has {rate} samples a second of {8 * width} bits, but {sample_rate} of 16 bits are needed: "
            "convert it, or change config.data.sample_rate."
        )
    if len(data) % (width * channels):
        raise UsageError(f"'{path}' is cut off in the middle of a sample: make it again.")
    return np.frombuffer(data, "<i2").reshape(-1, channels).mean(1, dtype=np.float32) / 2**15


def _check(name: str, split: str, frames: int, audio_length: int) -> None:
    check_split(name, split)
    if frames < 1 or audio_length < 1:
        raise UsageError(
            f"{name} needs frames and audio_length of at least 1, but got {frames} and {audio_length}: raise them."
        )


def _clip_shapes(frames: int, height: int, width: int, audio_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "video": jax.ShapeDtypeStruct((frames, height, width, 3), np.uint8),
        "audio": jax.ShapeDtypeStruct((audio_length, 1), np.float32),
        "label": jax.ShapeDtypeStruct((), np.int32),
    }
