import hashlib
import json
import logging

import numpy as np
import pytest

from xattn.config import UsageError
from xattn.data import glyphs
from xattn.data.episodes import fixed_episodes
from xattn.data.glyphs import FAMILIES, GlyphFS, code_points


@pytest.fixture
def three_letters(monkeypatch, tmp_path):
    """Shrinks every split to three letters and keeps the cache in a folder of its own."""
    monkeypatch.setattr(glyphs, "code_points", lambda split: (0x41, 0x5D0, 0x10D0))
    return tmp_path


def all_images(source):
    return source.images(np.arange(source.num_images))


@pytest.mark.parametrize(
    "split, count, digest",
    [
        ("train", 694, "693e83c070c9d0f9"),
        ("val", 73, "4dd794ca2d6993f1"),
        ("test", 150, "d172a5a27d8bc24b"),
    ],
)
def test_frozen_class_lists(split, count, digest):
    codes = code_points(split)
    assert len(codes) == count and list(codes) == sorted(set(codes))
    assert hashlib.sha256(",".join(f"{c:04X}" for c in codes).encode()).hexdigest().startswith(digest)


def test_splits_share_no_class():
    splits = [set(code_points(split)) for split in ("train", "val", "test")]
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_every_image_has_its_class_its_family_and_ink():
    source = GlyphFS("test")
    images = all_images(source)
    assert images.shape == (6000, 32, 32, 1) and images.dtype == np.uint8
    assert source.class_names[0] == "U+05D0" and len(source.class_names) == 150
    np.testing.assert_array_equal(np.bincount(source.labels), np.full(150, 40))
    assert images.reshape(6000, -1).max(1).min() > 100
    families = [set(source.groups[source.labels == label]) for label in range(150)]
    # Georgian, Arabic and Hebrew stand in the three DejaVu families only; 130 classes in more than one.
    assert set.union(*families) == {list(FAMILIES).index(f"DejaVu{s}") for s in ("Sans", "SansMono", "Serif")}
    assert sum(len(members) > 1 for members in families) == 130
    assert sum(map(len, families)) == 314


def centroid_accuracy(source, ways, shots, num_episodes, mode):
    """Mean and 95 % interval, in %, of the nearest class mean of raw pixels."""
    pixels = all_images(source).reshape(source.num_images, -1).astype(np.float32) / 255
    episodes = fixed_episodes(source, seed=0, ways=ways, shots=shots, queries=15, num_episodes=num_episodes, mode=mode)
    accuracy = []
    for support, query, labels in zip(episodes["support"], episodes["query"], episodes["query_labels"], strict=True):
        means = pixels[support].mean(1)
        distance = (means**2).sum(1) - 2 * pixels[query] @ means.T
        accuracy.append(100 * np.mean(distance.argmin(1) == labels))
    return np.mean(accuracy), 1.96 * np.std(accuracy) / np.sqrt(num_episodes)


# The figures of an independent implementation, each with its 95 % interval.
REFERENCE = {
    "none": [(90.90, 0.49), (97.93, 0.34), (81.38, 0.60), (84.47, 0.77)],
    "mild": [(83.72, 0.58), (95.67, 0.44), (68.77, 0.63), (76.82, 0.79)],
    "default": [(60.94, 0.65), (82.93, 0.76), (40.02, 0.55), (56.09, 0.70)],
    "strong": [(34.75, 0.44), (52.29, 0.80), (17.11, 0.33), (33.35, 0.46)],
}
SETTINGS = [(5, 1, 1000, "mixed"), (5, 5, 500, "mixed"), (20, 1, 300, "mixed"), (5, 1, 1000, "cross_family")]


@pytest.mark.parametrize(
    "jitter",
    ["strong", *(pytest.param(level, marks=pytest.mark.slow) for level in ("none", "mild", "default"))],
)
def test_pixel_centroids_score_as_measured(jitter):
    source = GlyphFS("test", jitter)
    for setting, (expected, interval) in zip(SETTINGS, REFERENCE[jitter], strict=True):
        mean, own = centroid_accuracy(source, *setting)
        assert abs(mean - expected) < interval + own, setting


@pytest.mark.parametrize("jitter", ["none", "strong"])
def test_warp_moves_points_by_the_documented_map(jitter):
    """A dot at p (from the centre, in output pixels) lands at A p + shift in every image."""
    x, y = 5, -3
    master = np.zeros((1, 64, 64), np.uint8)
    master[0, 32 + 2 * y - 2 : 32 + 2 * y + 2, 32 + 2 * x - 2 : 32 + 2 * x + 2] = 255
    images = glyphs._warp(master, 0x41, jitter, 7)[..., 0].astype(float)
    mass = images.sum((1, 2))
    grid = np.arange(32) + 0.5 - 16
    found = np.stack([(images.sum(1) @ grid) / mass, (images.sum(2) @ grid) / mass], -1)

    theta_max, s_limits, sh_max, a_max, shift_max = glyphs.JITTERS[jitter]
    rng = np.random.default_rng([7, 0x41])
    theta = np.deg2rad(rng.uniform(-theta_max, theta_max, 40))
    s = np.exp(rng.uniform(*s_limits, 40))
    sh = rng.uniform(-sh_max, sh_max, 40)
    a = np.exp(rng.uniform(-a_max, a_max, 40))
    shift = np.stack([rng.uniform(-shift_max, shift_max, 40), rng.uniform(-shift_max, shift_max, 40)], -1)
    for j in range(40):
        rotation = np.array([[np.cos(theta[j]), -np.sin(theta[j])], [np.sin(theta[j]), np.cos(theta[j])]])
        matrix = rotation @ np.array([[1, sh[j]], [0, 1]]) @ np.diag([s[j] * a[j], s[j] / a[j]])
        np.testing.assert_allclose(found[j], matrix @ [x, y] + shift[j], atol=0.1)
        np.testing.assert_allclose(mass[j], 4 * 255 * np.linalg.det(matrix), rtol=0.08)


def test_image_j_shows_face_j_mod_n_centred_and_52_of_64_large(three_letters):
    source = GlyphFS("test", "none", cache_dir=three_letters)
    images = all_images(source).reshape(3, 40, 32, 32)
    meta = json.loads(next(three_letters.glob("glyphs/*/meta.json")).read_text())
    for label, families in enumerate(meta["families"]):
        faces = len(families)
        np.testing.assert_array_equal(images[label, faces:], images[label, : 40 - faces])
        own = source.groups[source.labels == label]
        assert [list(FAMILIES)[group] for group in own[:faces]] == families
    rows, columns = (images > 0).any(3), (images > 0).any(2)
    longest = np.maximum(rows.sum(2), columns.sum(2))
    assert longest.min() >= 26 and longest.max() <= 27


def test_seed_and_jitter_change_the_images_and_nothing_else_does(three_letters):
    def render(split="test", **options):
        return GlyphFS(split, cache_dir=three_letters, **options)

    first = all_images(render())
    np.testing.assert_array_equal(first, all_images(render()))
    assert (first != all_images(render(seed=1))).any()
    assert (first != all_images(render(jitter="mild"))).any()
    indices = np.array([[3, 50], [119, 0]])
    picked = render().images(indices, seeds=np.arange(4).reshape(2, 2))
    np.testing.assert_array_equal(picked, first[indices])


def test_rendered_once_then_read_from_the_cache(three_letters, monkeypatch):
    monkeypatch.setenv("XATTN_CACHE", str(three_letters))
    first = all_images(GlyphFS("test"))
    monkeypatch.setattr(glyphs, "_masters", None)
    np.testing.assert_array_equal(first, all_images(GlyphFS("test")))
    assert sorted(path.name for path in three_letters.glob("glyphs/*/*")) == ["images.npy", "meta.json"]


def test_an_interrupted_rendering_is_never_read(three_letters, monkeypatch):
    def die_half_way(path, data):
        path.with_name(f"{path.name}.0.tmp").write_bytes(data[: len(data) // 2])
        raise KeyboardInterrupt

    expected = all_images(GlyphFS("test", cache_dir=three_letters / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(glyphs.config, "write_atomically", die_half_way)
        GlyphFS("test", cache_dir=three_letters)
    assert len(list(three_letters.glob("glyphs/*/*.tmp"))) == 1
    np.testing.assert_array_equal(expected, all_images(GlyphFS("test", cache_dir=three_letters)))


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "missing", "meta truncated", "meta emptied"])
def test_a_damaged_cache_is_rendered_again_with_a_warning(three_letters, caplog, damage):
    expected = all_images(GlyphFS("test", cache_dir=three_letters)).copy()
    images = next(three_letters.glob("glyphs/*/images.npy"))
    meta = images.with_name("meta.json")
    data = images.read_bytes()
    match damage:
        case "truncated":
            images.write_bytes(data[: len(data) // 2])
        case "flipped bit":
            images.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "missing":
            images.unlink()
        case "meta truncated":
            meta.write_text(meta.read_text()[:100])
        case "meta emptied":
            meta.write_text("{}")
    with caplog.at_level(logging.WARNING, "absl"):
        np.testing.assert_array_equal(expected, all_images(GlyphFS("test", cache_dir=three_letters)))
        GlyphFS("test", cache_dir=three_letters)
    assert [record.getMessage() for record in caplog.records] == [
        f"The glyph cache {images.parent} is damaged; it is rendered again."
    ]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("training",), "GlyphFS has no split 'training': choose one of train, val, test."),
        (("test", "hard"), "GlyphFS has no jitter 'hard': choose one of none, mild, default, strong."),
        (("test", "strong", -1), "GlyphFS needs a seed of at least 0, but got -1."),
    ],
)
def test_mistakes_are_named(arguments, sentence):
    with pytest.raises(UsageError) as error:
        GlyphFS(*arguments)
    assert str(error.value) == sentence
