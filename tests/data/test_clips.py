import wave

import jaxtyping
import numpy as np
import pytest
from PIL import Image

from xattn.config import UsageError
from xattn.data.clips import ClipFolders, RenderedClips

SMALL = {"frames": 3, "image_size": (40, 48), "audio_length": 512, "num_classes": 4}


def petals(frame):
    """How many petals a flower has: the strongest wave in the distance of its border around its centre."""
    ground = frame[0, 0].astype(int)
    flower = np.abs(frame.astype(int) - ground).sum(-1) > 12
    y, x = np.nonzero(flower)
    angle = np.arctan2(y - y.mean(), x - x.mean())
    distance = np.hypot(y - y.mean(), x - x.mean())
    sectors = ((angle + np.pi) / (2 * np.pi) * 36).astype(int) % 36
    border = np.array([distance[sectors == sector].max(initial=0) for sector in range(36)])
    return int(np.abs(np.fft.rfft(border))[2:].argmax()) + 2


def test_the_picture_tells_the_class():
    source = RenderedClips("train", frames=2, image_size=(96, 96), audio_length=64, num_classes=4)
    right = [petals(source.example(index, None)["video"][0]) == index % 4 + 2 for index in range(24)]
    assert np.mean(right) > 0.85


def test_the_sound_tells_the_class():
    source = RenderedClips("train", **SMALL)
    for index in range(16):
        example = source.example(index, None)
        label, audio = int(example["label"]), example["audio"][:, 0]
        assert label == index % 4 and np.abs(audio).max() <= 1
        spectrum = np.abs(np.fft.rfft(audio))
        assert abs(spectrum.argmax() - 512 / (8 * 4 ** (label / 4))) < 6
        # The square swells twice as often as the tone; its mean over a period is the swell squared.
        loudness = np.abs(np.fft.rfft(audio**2))[1:12]
        assert loudness.argmax() + 1 == 1 + label % 4


def test_the_flower_moves_along_a_line():
    source = RenderedClips("val", frames=5, image_size=(96, 96), audio_length=8)
    moved = []
    for index in range(8):
        video = source.example(index, None)["video"]
        masks = np.abs(video.astype(int) - video[0, 0, 0].astype(int)).sum(-1) > 12
        centres = np.array([[axis.mean() for axis in np.nonzero(mask)] for mask in masks])
        np.testing.assert_allclose(np.diff(centres, 2, axis=0), 0, atol=3)
        moved.append(np.abs(centres[-1] - centres[0]).max())
    assert max(moved) > 5


def test_rendered_clips_depend_on_split_and_index_alone():
    def clip(split, index, seed=None):
        example = RenderedClips(split, **SMALL).example(index, seed)
        return example["video"].tobytes() + example["audio"].tobytes()

    assert clip("train", 3) == clip("train", 3, seed=5)
    assert len({clip(split, index) for split in ("train", "val", "test") for index in (0, 4)}) == 6


FRAMES, LENGTH, RATE = 4, 40, 8000


def write_wav(path, samples, rate=RATE, channels=1, width=2):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples).astype("<i2" if width == 2 else "u1").tobytes())


def write_clip(folder, level, num_frames=9, extension="png"):
    """Frame k is filled with level + k, its sound with the number of each sample: ten a frame."""
    folder.mkdir(parents=True)
    for k in range(num_frames):
        Image.new("L", (20, 12), level + k).convert("RGB").save(folder / f"frame_{k + 1:05d}.{extension}", quality=100)
    write_wav(folder / "audio.wav", np.arange(10 * num_frames))


def build(split, root, **options):
    sizes = {"frames": FRAMES, "image_size": 8, "audio_length": LENGTH, "sample_rate": RATE}
    return ClipFolders(split, root, **sizes | options)


def write_clips(root):
    for i, split in enumerate(("train", "val")):
        for j, name in enumerate(("juggling", "yodelling")):
            for k, extension in enumerate(("png", "jpg")):
                write_clip(root / split / name / f"clip{k}", 100 * i + 40 * j + 20 * k, extension=extension)
    return root


def test_evaluation_takes_the_middle_of_clips_and_their_sound(tmp_path):
    source = build("val", write_clips(tmp_path))
    assert source.num_examples == 4 and source.class_names == ["juggling", "yodelling"]
    for index in range(4):
        example = source.example(index, None)
        assert example["label"] == index // 2
        assert (example["video"] == 100 + 20 * index + 2 + np.arange(4)[:, None, None, None]).all()
        np.testing.assert_allclose(example["audio"][:, 0] * 2**15, np.arange(20, 60))
    shapes = source.shapes(frames=FRAMES, image_size=8, audio_length=LENGTH)
    assert {name: (rows.shape, rows.dtype) for name, rows in example.items()} == {
        name: (field.shape, field.dtype) for name, field in shapes.items()
    }


def test_training_starts_anywhere_with_the_sound_of_its_frames(tmp_path):
    source = build("train", write_clips(tmp_path))
    starts = set()
    for seed in range(60):
        example = source.example(0, seed)
        start = int(example["video"][0, 0, 0, 0])
        starts.add(start)
        np.testing.assert_allclose(example["audio"][:, 0] * 2**15, np.arange(10 * start, 10 * start + LENGTH))
    assert starts == set(range(6))


def test_labels_number_the_classes_of_train(tmp_path):
    write_clips(tmp_path)
    write_clip(tmp_path / "test" / "yodelling" / "only", 0)
    assert int(build("test", tmp_path).example(0, None)["label"]) == 1


def test_the_central_square_of_a_frame_is_taken(tmp_path):
    folder = tmp_path / "train" / "a" / "b"
    write_clip(folder, 0, num_frames=4)
    pixels = np.zeros((12, 20, 3), np.uint8)
    pixels[:, 4:16] = 255
    Image.fromarray(pixels).save(folder / "frame_00001.png")
    assert (build("train", tmp_path).example(0, None)["video"][0] == 255).all()


def test_channels_are_averaged_and_a_little_silence_is_added(tmp_path):
    folder = tmp_path / "train" / "a" / "b"
    write_clip(folder, 0, num_frames=4)
    write_wav(folder / "audio.wav", np.stack([np.full(35, 1000), np.full(35, 3000)], -1), channels=2)
    audio = build("train", tmp_path).example(0, None)["audio"][:, 0]
    np.testing.assert_allclose(audio * 2**15, [2000] * 35 + [0] * 5)
    write_wav(folder / "audio.wav", np.full(29, 5))
    with pytest.raises(UsageError, match="audio.wav' has 29 samples, but frames 0 to 3 need 40: lower"):
        build("train", tmp_path).example(0, None)


@pytest.mark.parametrize("channels, cut", [(1, 1), (2, 1), (2, 2), (2, 3)])
def test_a_sound_that_is_cut_off_within_a_sample_is_named(tmp_path, channels, cut):
    folder = tmp_path / "train" / "a" / "b"
    write_clip(folder, 0, num_frames=4)
    write_wav(folder / "audio.wav", np.zeros((45, channels)), channels=channels)
    sound = (folder / "audio.wav").read_bytes()
    (folder / "audio.wav").write_bytes(sound[:-cut])
    with pytest.raises(UsageError, match="audio.wav' is cut off in the middle of a sample: make it again"):
        build("train", tmp_path).example(0, None)


@pytest.mark.parametrize("image_size", [32, (32,), (32, 32, 3), (32, 0), "32"])
def test_an_image_size_that_is_no_pair_is_named(image_size, monkeypatch):
    # Without the checked annotations of tests, as users run it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for make in (lambda: RenderedClips("train", image_size=image_size), lambda: RenderedClips.shapes(2, image_size)):
        with pytest.raises(UsageError, match="rendered_clips needs the height and the width of images as image_size"):
            make()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UsageError, match="folder of the data set is not given: add --config.data.root=DIR"):
        ClipFolders("train")
    with pytest.raises(UsageError, match="There is no folder '.*/none': give the folder that holds the data set"):
        build("train", tmp_path / "none")
    with pytest.raises(UsageError, match=r"There is no folder '.*/train': expected .*/train/<class>/<clip>/frame_"):
        build("train", tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(UsageError, match="has no clips: expected"):
        build("train", tmp_path)
    clip = tmp_path / "train" / "a" / "b"
    write_clip(clip, 0, num_frames=3)
    source = build("train", tmp_path)
    with pytest.raises(UsageError, match="'.*/a/b' has 3 frames, but 4 are needed: remove it, or lower config.data"):
        source.example(0, None)
    (clip / "frame_00004.png").write_text("no image")
    with pytest.raises(UsageError, match="frame_00004.png' can't be read as an image"):
        source.example(0, None)
    Image.new("RGB", (9, 9)).save(clip / "frame_00004.png")
    write_wav(clip / "audio.wav", np.zeros(40), rate=44100)
    with pytest.raises(UsageError, match="has 44100 samples a second of 16 bits, but 8000 of 16 bits are needed"):
        source.example(0, None)
    write_wav(clip / "audio.wav", np.zeros(40), width=1)
    with pytest.raises(UsageError, match="has 8000 samples a second of 8 bits, but 8000 of 16 bits are needed"):
        source.example(0, None)
    (clip / "audio.wav").write_bytes(b"RIFF")
    with pytest.raises(UsageError, match="audio.wav' can't be read as a .wav file"):
        source.example(0, None)
    (clip / "audio.wav").unlink()
    with pytest.raises(UsageError, match="audio.wav' can't be read as a .wav file"):
        source.example(0, None)
    write_clip(tmp_path / "val" / "c" / "b", 0)
    with pytest.raises(UsageError, match="has 1 classes that '.*train' doesn't have, such as 'c'"):
        build("val", tmp_path)
    with pytest.raises(UsageError, match="clip_folders needs frames and audio_length of at least 1, but got 0 and 40"):
        build("train", tmp_path, frames=0)
    with pytest.raises(UsageError, match="rendered_clips has no split 'dev'"):
        RenderedClips("dev")
    with pytest.raises(UsageError, match="rendered_clips needs at least 1 class and 1 example, but got 0 and 10000"):
        RenderedClips("train", num_classes=0)
