"""The command line: what a user can get wrong is one sentence and exit code 2."""

import json
import signal

import numpy as np
import pytest
from PIL import Image

from xattn import data
from xattn.cli import main

SMOKE = "--config=protonet/glyphs:smoke"


@pytest.fixture
def folders(tmp_path):
    """Two classes a split with two tiny images each."""
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / f"{split}_{name}"
            folder.mkdir(parents=True)
            for number in range(2):
                Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


def refused(capsys, *arguments: str) -> str:
    """Runs the command; checks that it ended with 2 and one sentence, which is returned."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    return lines[0]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--config.model.scal=1"], "config.model has no key 'scal': did you mean 'scale'?"),
        (["--config.modell.scale=1"], "config has no key 'modell': did you mean 'model'?"),
        (["--config.num_steps=many"], "--config.num_steps=many"),
        (["--config.optimizer.name=adan"], "there is no optimizer 'adan': did you mean 'adam'?"),
        (["--config.data.name=glyph"], "there is no data source 'glyph': did you mean 'glyphs'?"),
        (["--config.data.jitter=strongest"], "strongest"),
        (["--config.mesh.data=3"], "batch_size is 1"),
        (["--config.mesh.data=64"], "does not fit 8 cpu device(s)"),
        (["--config.pipeline.batch_size=4", "--config.accumulate_steps=3"], "make it a multiple of 3"),
        (["--config.task.name=classification"], "task and data of the config do not fit: the batches have no 'image'"),
        (["--config.num_steps=0"], "config.num_steps is 0: give a number at least 1"),
        (["--config.mode=pmp"], "there is no mode 'pmp': did you mean 'pmap'?"),
        (["--config.mode=pmap", "--config.mesh.data=4", "--config.mesh.tensor=2"], "take the mode 'jit'"),
        (["--debug-nans", "--config.mode=pmap"], "--debug-nans looks into the step of the mode 'jit'"),
        (["--coordinator=localhost:1", "--process-id=0"], "--num-processes missing: give all of"),
        (["--config.pipeline.queries=40"], "40 images"),
        (["--nothing=1"], "nothing"),
        (["nothing"], "'nothing' is no flag"),
    ],
)
def test_mistakes_in_a_config(tmp_path, capsys, arguments, sentence):
    assert sentence in refused(capsys, "train", SMOKE, f"--workdir={tmp_path / 'run'}", *arguments)
    assert not (tmp_path / "run").exists()


def test_sigterm_before_the_first_step_ends_with_the_code_of_the_config(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "build", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert main(["train", SMOKE, f"--workdir={tmp_path / 'run'}", "--config.preempt_exit_code=75"]) == 75
    assert "stopped before training." in capsys.readouterr().out


def test_heads_that_do_not_divide(tmp_path, capsys):
    arguments = [
        "--config=qsformer/glyphs:smoke",
        "--config.model.encoder.num_heads=3",
        f"--workdir={tmp_path / 'run'}",
    ]
    said = refused(capsys, "train", *arguments)
    assert "qk_features 8 is not divisible by num_heads 3" in said
    assert not (tmp_path / "run").exists()


def test_config_and_verb_by_their_nearest_name(capsys):
    assert "did you mean 'qsformer/glyphs'?" in refused(capsys, "train", "--config=qsformer/glyph")
    assert "did you mean 'smoke'?" in refused(capsys, "train", "--config=qsformer/glyphs:smok")
    assert "give --config=NAME" in refused(capsys, "train")
    assert "there is no verb 'trian'" in refused(capsys, "trian")


def test_image_folders(tmp_path, folders, capsys):
    few = ["--config=qsformer/miniimagenet", f"--workdir={tmp_path / 'run'}"]
    said = refused(capsys, "train", *few, f"--config.data.root={tmp_path / 'nowhere'}")
    assert "nowhere" in said
    said = refused(capsys, "train", *few, f"--config.data.root={folders}", "--config.pipeline.ways=2")
    assert "train_a" in said and "2 images" in said
    assert not (tmp_path / "run").exists()


def test_workdirs(tmp_path, capsys):
    assert main(["train", SMOKE, f"--workdir={tmp_path / 'run'}", "--config.num_steps=1"]) == 0
    out = capsys.readouterr().out
    assert "5way_1shot" in out and (tmp_path / "run" / "plots" / "curves.png").is_file()
    other = refused(capsys, "train", SMOKE, f"--workdir={tmp_path / 'run'}", "--config.model.scale=2.0")
    assert "belongs to another config (it differs in model.scale)" in other
    assert "holds no run" in refused(capsys, "eval", f"--workdir={tmp_path}")
    assert "has no checkpoint '7': it has 1" in refused(capsys, "eval", f"--workdir={tmp_path / 'run'}", "--step=7")
    assert "give --workdir" in refused(capsys, "eval")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "is no empty folder" in refused(capsys, "train", SMOKE, f"--workdir={tmp_path / 'full'}")


def test_data_prepare(tmp_path, folders, capsys):
    out = tmp_path / "records"
    command = ["data", "prepare", "images", str(folders), str(out), "--shards=2"]
    for name in ("val", "test"):  # labels are those of train
        for label in ("a", "b"):
            (folders / name / f"{name}_{label}").rename(folders / name / f"train_{label}")
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "train-00001-of-00002.arrayrecord: 2 images" in printed
    assert "4 images of train and 4 images of val and 4 images of test in 6 files, every record read back" in printed
    assert main(command) == 0
    assert "in 6 files, all there before, every record read back" in capsys.readouterr().out
    assert "was begun with --shards=2, but now it is 16" in refused(capsys, *command[:-1])
    assert "There is no folder 'nowhere'" in refused(capsys, "data", "prepare", "images", "nowhere", str(out))
    for words in ([], ["prepare"], ["prepare", "images", str(folders)], ["prune", "images", "a", "b"]):
        assert "give prepare KIND SRC OUT" in refused(capsys, "data", *words)
    assert "there is no kind of data to prepare 'image': did you mean 'images'?" in refused(
        capsys, "data", "prepare", "image", str(folders), str(out)
    )
    assert "--shards" in refused(capsys, *command[:-1], "--shards=0")


def test_list_and_help_name_everything(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for name in ("qsformer", "protonet", "resnet12", "fewshot", "glyphs", "class_folders", "qsformer/miniimagenet"):
        assert name in listed
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "xattn VERB" in capsys.readouterr().out
    for verb in ("train", "eval", "data", "inspect", "list"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert "--cache_dir" in capsys.readouterr().out


def test_inspect_prints_one_json_object(capsys):
    assert main(["inspect", "--config=protonet/glyphs", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    # conv 3x3 without bias and a scale and bias a channel, widths 1-32-64-64-64
    assert report["parameters"] == 9 * (32 + 32 * 64 + 2 * 64 * 64) + 2 * (32 + 3 * 64)
    per_image = 2 * 9 * (32 * 32 * 32 + 16 * 16 * 32 * 64 + 8 * 8 * 64 * 64 + 4 * 4 * 64 * 64)
    images = 20 * 1 + 20 * 5
    assert report["by_module"]["encoder"]["flops"] == images * per_image
    assert report["flops_forward"] >= images * per_image
    assert main(["inspect", "--config=protonet/glyphs"]) == 0
    assert "encoder/conv_0" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name, released", [("miniimagenet", 46_484_480), ("fc100", 52_805_888), ("cub", 40_163_072)])
def test_inspect_counts_the_published_models(capsys, name, released):
    assert main(["inspect", f"--config=qsformer/{name}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters_released"] == released
    assert report["parameters"] + sum(report["unused_released"].values()) == released
    assert report["by_module"]["encoder/backbone"]["parameters"] == 12_424_320
    assert report["by_module"]["encoder"]["parameters"] == 25_879_296
    # 3.523 G multiply-adds an image of 84 x 84 for ResNet-12, 80 images an episode
    assert report["by_module"]["encoder/backbone"]["flops"] == pytest.approx(80 * 2 * 3.523e9, rel=0.01)
