"""Saving and restoring, also after the things that happen to files."""

import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xattn.checkpoints import Checkpoints, DamagedCheckpoint, manager
from xattn.config import UsageError
from xattn.parallel.mesh import make_mesh

# What Orbax leaves behind when a read fails in one of its threads.
leftovers = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def items(seed: int = 0) -> tuple[dict, dict]:
    """What a run saves: every dtype that occurs, empty dicts, optax's tuples and masked nodes.

    The kernel is too large to be kept in Orbax's index, which has checksums of its own.
    """
    rng = np.random.default_rng(seed)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(8, 2)), jnp.bfloat16),
        "deep": {"bias": jnp.asarray([np.nan, -0.0, np.inf, 1e-40], jnp.float32)},
    }
    model_state = {"batch_stats": {"seen": jnp.asarray(rng.random(8) < 0.5), "count": jnp.int32(seed)}}
    optimizer = optax.chain(
        optax.masked(optax.set_to_zero(), {"kernel": False, "half": True, "deep": False}), optax.adam(0.1)
    )
    opt_state = jax.tree.map(lambda x: x + seed, optimizer.init(params))
    model = {"params": params, "model_state": model_state, "ema": {}}
    return model, {"opt_state": opt_state, "step": jnp.int32(seed)}


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_bits(found: Any, expected: Any) -> None:
    """Equal structures, types, shapes and bits (NaN and the sign of zero included)."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def opened(tmp_path):
    """Opens checkpoints of the test's workdir, and closes them at the end."""
    made = []

    def open_(**options: Any) -> Checkpoints:
        made.append(Checkpoints(options.pop("workdir", tmp_path), **options))
        return made[-1]

    yield open_
    for checkpoints in made:
        checkpoints.close()


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory) -> Path:
    """A workdir with checkpoints 1 and 2, to be copied."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    checkpoints = Checkpoints(workdir, metric="accuracy")
    for step in (1, 2):
        checkpoints.save(step, *items(step), {"config_hash": "abc"}, {"accuracy": step / 10})
    checkpoints.close()
    return workdir


# Round trips.


def test_what_is_restored_is_what_was_saved(opened):
    checkpoints = opened()
    assert checkpoints.restore_latest(*map(abstract, items())) is None
    checkpoints.save(3, *items(3), {})
    checkpoints.wait()
    for again in (checkpoints, opened()):
        step, model, training = again.restore_latest(*map(abstract, items()))
        assert step == 3
        assert_bits((model, training), items(3))
    assert_bits(checkpoints.restore_model(3), items(3)[0])


def test_arrays_may_be_reused_as_soon_as_save_returns(opened):
    checkpoints = opened()
    model, training = items(1)
    checkpoints.save(1, model, training, {})
    jax.tree.map(lambda x: x.delete(), (model, training))  # as donation does
    checkpoints.wait()
    assert_bits(checkpoints.restore_model(1), items(1)[0])


def test_a_checkpoint_moves_between_meshes(opened):
    """Eight devices to two times four to one."""

    def put_on(*sizes):
        mesh = make_mesh(*sizes)

        def put(x):
            axes = zip(x.shape, ("data", "fsdp"), strict=False)
            spec = [axis if size % mesh.shape[axis] == 0 else None for size, axis in axes]
            return jax.device_put(x, NamedSharding(mesh, P(*spec)))

        return jax.tree.map(put, items(5))

    saved = put_on(8)
    assert saved[0]["params"]["kernel"].addressable_shards[0].data.shape == (8, 32)
    checkpoints = opened()
    checkpoints.save(5, *saved, {})
    checkpoints.wait()
    for target in (put_on(2, 4), items(5)):
        _, model, training = checkpoints.restore_latest(*map(abstract, target))
        assert_bits((model, training), items(5))
        jax.tree.map(lambda x, y: x.sharding == y.sharding or pytest.fail(str(x.sharding)), (model, training), target)
    assert checkpoints.restore_model(5)["params"]["kernel"].devices() == {jax.devices()[0]}


def test_other_floating_point_types_are_rounded_to_and_checked_before(opened, two_steps, tmp_path):
    """float32 to bfloat16 and back to float32, on a mesh; what is no floating-point number stays what it is."""
    mesh = make_mesh(2, 4)

    def asked(x):
        dtype = {jnp.dtype("float32"): jnp.bfloat16, jnp.dtype("bfloat16"): jnp.float32}.get(x.dtype, x.dtype)
        spec = P("data", "fsdp") if x.shape == (64, 32) else P()
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(mesh, spec))

    target = jax.tree.map(asked, items())
    checkpoints = opened(workdir=two_steps, read_only=True)
    _, model, training = checkpoints.restore_latest(*target)
    assert_bits((model, training), jax.tree.map(lambda x, like: x.astype(like.dtype), items(2), target))
    assert model["params"]["kernel"].sharding == target[0]["params"]["kernel"].sharding

    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    flip(largest_data_file(workdir / "checkpoints" / "2"))
    assert opened(workdir=workdir).restore_latest(*target)[0] == 1


def test_other_arrays_than_the_models_are_told_apart_from_damage(opened, two_steps):
    """A checkpoint of another model, or of another version of it, is not moved away."""
    for change, words in (
        (lambda params: params.pop("half"), ["bfloat16[8, 2]", "model/params/half", "nothing"]),
        (lambda params: params.update(more=jnp.zeros(3)), ["nothing", "model/params/more", "float32[3]"]),
        (lambda params: params.update(kernel=jnp.zeros((64, 33))), ["float32[64, 32]", "float32[64, 33]"]),
        (lambda params: params.update(kernel=jnp.zeros((64, 32), jnp.int32)), ["float32[64, 32]", "int32[64, 32]"]),
    ):
        model, training = items()
        change(model["params"])
        with pytest.raises(UsageError) as error:
            opened(workdir=two_steps, read_only=True).restore_latest(abstract(model), abstract(training))
        for word in (*words, "checkpoints/2"):
            assert word in str(error.value)
    assert not (two_steps / "damaged").exists()


# Which ones are kept, and which one is best.


def test_the_latest_and_the_best_are_kept_also_by_a_continued_run(opened):
    checkpoints = opened(keep=2, metric="accuracy")
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.1), (4, None)):
        checkpoints.save(step, *items(step), {}, accuracy and {"accuracy": accuracy, "loss": -step})
    checkpoints.close()
    assert checkpoints.steps() == [2, 3, 4]
    continued = opened(keep=2, metric="accuracy")
    assert continued.best_first()[0] == 2
    continued.save(5, *items(5), {}, {"accuracy": 0.3})
    continued.save(6, *items(6), {})
    continued.close()
    assert continued.steps() == [2, 5, 6]
    assert {path.name for path in continued.folder.iterdir()} == {"2", "5", "6"}
    again = opened(keep=2, metric="accuracy")
    again.save(7, *items(7), {}, {"accuracy": 0.95})
    again.close()
    assert again.steps() == [6, 7]


@pytest.mark.parametrize(
    ("metric", "scores", "best"),
    [
        ("accuracy", (0.2, 0.7, 0.7, 0.1), [3, 2, 1, 4]),
        ("accuracy", (0.9, float("nan"), 0.1, None), [1, 3, 4, 2]),
        ("accuracy", (float("nan"), None, None, None), [4, 3, 2, 1]),
        ("loss", (0.2, 0.7, 0.7, 0.1), [4, 1, 3, 2]),
        ("-loss", (0.2, 0.7, 0.7, 0.1), [3, 2, 1, 4]),
        (None, (0.2, 0.7, 0.7, 0.1), [4, 3, 2, 1]),
    ],
)
def test_best_is_the_largest_or_smallest_and_the_later_of_two(opened, metric, scores, best):
    checkpoints = opened(keep=9, metric=metric)
    tiny = {"x": jnp.zeros(())}
    for step, score in enumerate(scores, start=1):
        checkpoints.save(step, tiny, tiny, {}, None if score is None else {"accuracy": score, "loss": -score})
    checkpoints.wait()
    assert checkpoints.best_first() == best
    assert opened(keep=9, metric=metric, read_only=True).best_first() == best


def test_a_metric_that_validation_does_not_give_is_an_error(opened):
    tiny = {"x": jnp.zeros(())}
    with pytest.raises(UsageError, match="no validation metric 'acuracy': did you mean 'accuracy'"):
        opened(metric="acuracy").save(1, tiny, tiny, {}, {"accuracy": 0.5})


def test_a_step_that_is_there_already_is_not_passed_over_silently(opened):
    checkpoints = opened()
    checkpoints.save(2, *items(2), {})
    checkpoints.wait()
    for step in (1, 2):
        with pytest.raises(RuntimeError, match=f"refused to save step {step}"):
            checkpoints.save(step, *items(step), {})


# Damage.


def largest_data_file(folder: Path) -> Path:
    return max(folder.glob("**/d/*"), key=lambda path: path.stat().st_size)


def flip(path: Path, bit: int = 0x10) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= bit
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "a byte of the data flipped": lambda step: flip(largest_data_file(step)),
    "data truncated": lambda step: truncate(largest_data_file(step)),
    "data deleted": lambda step: largest_data_file(step).unlink(),
    "our metadata deleted": lambda step: (step / "meta" / "metadata").unlink(),
    "our metadata truncated": lambda step: truncate(step / "meta" / "metadata"),
    "our metadata flipped": lambda step: flip(step / "meta" / "metadata", bit=0x01),
    "Orbax's metadata truncated": lambda step: truncate(step / "training" / "_METADATA"),
    "the index deleted": lambda step: (step / "model" / "manifest.ocdbt").unlink(),
    "an item deleted": lambda step: shutil.rmtree(step / "training"),
}


@leftovers
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(damage, two_steps, tmp_path, opened, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    damage(workdir / "checkpoints" / "2")
    checkpoints = opened(workdir=workdir, metric="accuracy")
    with caplog.at_level(logging.WARNING, logger="absl"):
        step, model, training = checkpoints.restore_latest(*map(abstract, items()))
    assert step == 1
    assert_bits((model, training), items(1))
    assert (workdir / "damaged" / "2").is_dir()
    assert not (workdir / "checkpoints" / "2").exists()
    (warning,) = [record.getMessage() for record in caplog.records if "is moved to" in record.getMessage()]
    assert warning.startswith("checkpoint 2 is damaged (")
    assert str(workdir / "damaged" / "2") in warning

    assert (checkpoints.steps(), checkpoints.best_first()) == ([1], [1])
    checkpoints.save(2, *items(7), {}, {"accuracy": 0.05})
    checkpoints.wait()
    step, model, training = checkpoints.restore_latest(*map(abstract, items()))
    assert (step, checkpoints.steps(), checkpoints.best_first()) == (2, [1, 2], [1, 2])
    assert_bits((model, training), items(7))


@leftovers
def test_whatever_file_is_lost_the_contents_are_right_or_refused(two_steps, tmp_path, opened):
    for lost in sorted((two_steps / "checkpoints" / "2").rglob("*")):
        if lost.is_file() and lost.parent.name != "d":
            workdir = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            shutil.copytree(two_steps, workdir)
            (workdir / lost.relative_to(two_steps)).unlink()
            step, model, training = opened(workdir=workdir).restore_latest(*map(abstract, items()))
            assert_bits((model, training), items(step))


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), ValueError("INTERNAL: read [os_error_code='116'] from file")]
)
def test_a_file_system_that_fails_is_no_damage(two_steps, tmp_path, opened, monkeypatch, error):
    shutil.copytree(two_steps, tmp_path / "run")
    checkpoints = opened(workdir=tmp_path / "run")

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints._arrays["model"], "restore", fails)
    with pytest.raises(UsageError, match="a checkpoint can't be read .*; nothing was changed: give the same command"):
        checkpoints.restore_latest(*map(abstract, items()))
    assert checkpoints.steps() == [1, 2]
    assert not (tmp_path / "run" / "damaged").exists()


def test_tasks_that_orbax_leaves_are_not_reported_after_all(caplog):
    def failed(path):
        return f"Task exception was never retrieved\nfuture: <Task finished coro=<write() done, defined at {path}:1>>"

    for path in (ocp.__file__, "/elsewhere/write.py"):
        logging.getLogger("asyncio").error(failed(path))
    assert [record.getMessage() for record in caplog.records] == [failed("/elsewhere/write.py")]


@leftovers
def test_all_damaged_is_an_error_that_says_where_they_are(two_steps, tmp_path, opened):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    for step in (1, 2):
        flip(largest_data_file(workdir / "checkpoints" / str(step)))
    with pytest.raises(UsageError, match="all checkpoints .* were damaged .*damaged"):
        opened(workdir=workdir).restore_latest(*map(abstract, items()))
    assert {path.name for path in (workdir / "damaged").iterdir()} == {"1", "2"}
    # Nor does the same command, given again, begin from nothing.
    with pytest.raises(UsageError, match="all checkpoints .* were damaged .*damaged"):
        opened(workdir=workdir).restore_latest(*map(abstract, items()))


@leftovers
def test_a_step_that_is_damaged_twice_is_kept_twice(two_steps, tmp_path, opened):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    for _ in range(2):
        flip(workdir / "checkpoints" / "2" / "meta" / "metadata")
        checkpoints = opened(workdir=workdir)
        assert checkpoints.restore_latest(*map(abstract, items()))[0] == 1
        checkpoints.save(2, *items(2), {})
        checkpoints.wait()
    assert len(list((workdir / "damaged").iterdir())) == 2


@leftovers
@pytest.mark.parametrize("error", [MemoryError, PermissionError, jax.errors.JaxRuntimeError])
def test_trouble_of_the_machine_is_not_taken_for_damage(error, two_steps, opened, monkeypatch):
    checkpoints = opened(workdir=two_steps, read_only=True)

    def fail(*args, **kwargs):
        raise error("not the checkpoint's fault")

    monkeypatch.setattr(checkpoints._arrays["model"], "restore", fail)
    with pytest.raises(error):
        checkpoints.restore_latest(*map(abstract, items()))
    assert checkpoints.steps() == [1, 2]


@leftovers
def test_a_damaged_model_is_refused_by_name(two_steps, tmp_path, opened):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    flip(max((workdir / "checkpoints" / "2" / "model").glob("**/d/*"), key=lambda path: path.stat().st_size))
    checkpoints = opened(workdir=workdir, read_only=True)
    with pytest.raises(DamagedCheckpoint):
        checkpoints.restore_model(2)
    assert_bits(checkpoints.restore_model(1), items(1)[0])


def test_what_a_killed_save_left_is_ignored_and_its_step_can_be_saved(two_steps, tmp_path, opened):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    folder = workdir / "checkpoints"
    half = folder / "3.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", half)
    shutil.rmtree(half / "meta")
    assert opened(workdir=workdir, read_only=True).steps() == [1, 2]
    assert half.is_dir()  # a reader cleans nothing: the writer may be at it
    checkpoints = opened(workdir=workdir)
    assert checkpoints.restore_latest(*map(abstract, items()))[0] == 2
    checkpoints.save(3, *items(3), {})
    checkpoints.wait()
    step, model, training = checkpoints.restore_latest(*map(abstract, items()))
    assert step == 3
    assert_bits((model, training), items(3))


def test_reading_leaves_the_folder_as_it_is(two_steps, opened):
    def state():
        return {path: path.stat().st_mtime_ns for path in two_steps.rglob("*")}

    before = state()
    opened(workdir=two_steps, metric="accuracy", read_only=True).restore_model(2)
    assert state() == before


def test_another_format_version_is_an_error_and_no_damage(two_steps, opened, monkeypatch):
    monkeypatch.setattr(manager, "FORMAT_VERSION", 7)
    for restore in (
        lambda checkpoints: checkpoints.restore_latest(*map(abstract, items())),
        lambda checkpoints: checkpoints.restore_model(2),
    ):
        with pytest.raises(UsageError, match="checkpoints/2 has format 1, this xattn reads 7: use the xattn that"):
            restore(opened(workdir=two_steps, read_only=True))
    assert not (two_steps / "damaged").exists()


def test_meta_is_kept_beside_the_arrays(two_steps):
    meta = json.loads((two_steps / "checkpoints" / "2" / "meta" / "metadata").read_text())
    assert meta["config_hash"] == "abc"
    assert meta["metrics"] == {"accuracy": 0.2}
    assert meta["format_version"] == 1


# Checksums.


def checksum(array: Any) -> int:
    (value,) = manager._checksums({"x": array}).values()
    return value


def test_a_checksum_does_not_depend_on_the_layout():
    whole = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    for sizes, spec in (((8,), P("data")), ((2, 4), P("data", "fsdp")), ((2, 4), P(None, ("fsdp", "data")))):
        assert checksum(jax.device_put(whole, NamedSharding(make_mesh(*sizes), spec))) == checksum(whole)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.uint8, np.bool_])
def test_a_checksum_changes_with_every_single_bit(dtype):
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)
    seen = {checksum(array)}
    bits = 1 if dtype is np.bool_ else 8 * array.dtype.itemsize
    for index in (0, 7, 14):
        for bit in range(bits):
            other = array.copy()
            raw = other.reshape(-1).view(np.uint8)[index * array.dtype.itemsize :]
            raw[bit // 8] ^= 1 << (bit % 8)
            seen.add(checksum(other))
    assert len(seen) == 1 + 3 * bits


def test_a_checksum_changes_when_elements_change_places():
    """Also those that differ in few bits, at distances that are powers of two."""
    line = np.zeros(4096, np.float32)
    line[:4] = 1.0, -1.0, 2.0, 0.5
    seen = {checksum(line)}
    swaps = [(0, 1), (0, 2), (1, 3), (0, 4), (1, 1024), (0, 2048), (2, 2050), (3, 4095)]
    for i, j in swaps:
        other = line.copy()
        other[[i, j]] = other[[j, i]]
        seen.add(checksum(other))
    assert len(seen) == 1 + len(swaps)
    square = np.arange(16.0, dtype=np.float32).reshape(4, 4)
    assert checksum(square) != checksum(np.ascontiguousarray(square.T))
    assert checksum(np.zeros(4, np.float32)) != checksum(np.asarray([0.0, 0.0, -0.0, 0.0], np.float32))
    assert checksum(np.zeros(4, np.float32)) != checksum(np.zeros(5, np.float32))
