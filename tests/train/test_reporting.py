"""What a run leaves behind to be read, and what it shows while it runs."""

import io
import json
import logging
import time

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xattn.train.reporting import NotFinite, Reporter, plot_curves, read_metrics


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def metrics(loss: float, skipped: int = 0, in_a_row: int = 0, **more: float) -> dict:
    """A step's metrics as they come from the device."""
    counters = {"skipped": jnp.int32(skipped), "skipped_in_a_row": jnp.int32(in_a_row)}
    return {"loss": jnp.float32(loss), **counters, **more}


def report(workdir, start=0, num_steps=10, max_skipped=2, stream=None) -> Reporter:
    return Reporter(workdir, start, num_steps, 4, max_skipped, stream or io.StringIO())


def write(workdir, steps, start=0, num_steps=10, validated=(), offset=0.0, stream=None) -> None:
    """A run's loss is 1/step + offset, its validation accuracy step/10."""
    with report(workdir, start, num_steps, stream=stream) as reporter:
        for step in steps:
            reporter.train_row(step, metrics(1 / step + offset))
            if step in validated:
                reporter.validation_row(step, {"accuracy": step / 10})
        reporter.flush()


# metrics.jsonl


def test_rows_hold_step_kind_and_plain_numbers(tmp_path):
    write(tmp_path, (2, 4), validated=(4,))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 2, "kind": "train", "loss": 0.5, "skipped": 0.0, "skipped_in_a_row": 0.0},
        {"step": 4, "kind": "train", "loss": 0.25, "skipped": 0.0, "skipped_in_a_row": 0.0},
        {"step": 4, "kind": "validation", "accuracy": 0.4},
    ]
    assert read_metrics(tmp_path) == lines


def test_a_row_is_written_when_the_next_one_comes(tmp_path):
    """So that asking for a step's metrics never waits for that step."""
    with report(tmp_path) as reporter:
        reporter.train_row(1, metrics(1.0))
        assert read_metrics(tmp_path) == []
        reporter.train_row(2, metrics(0.5))
        assert [row["step"] for row in read_metrics(tmp_path)] == [1]
        reporter.validation_row(2, {"accuracy": 1.0})
        assert [(row["step"], row["kind"]) for row in read_metrics(tmp_path)][1:] == [(2, "train"), (2, "validation")]


def test_a_continued_run_drops_the_rows_after_the_restored_step(tmp_path):
    write(tmp_path, (1, 2, 3, 4), validated=(2, 4))
    write(tmp_path, (3, 4, 5), start=2, validated=(4,), offset=10.0)
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["kind"]) for row in rows] == [
        (1, "train"),
        (2, "train"),
        (2, "validation"),
        (3, "train"),
        (4, "train"),
        (4, "validation"),
        (5, "train"),
    ]
    assert [round(row["loss"], 3) for row in rows if row["kind"] == "train"] == [1.0, 0.5, 10.333, 10.25, 10.2]


def test_a_half_written_last_line_is_dropped(tmp_path):
    write(tmp_path, (1, 2))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for cut in (1, 20, len(whole.splitlines()[1])):  # the newline alone is no loss
        path.write_text(whole[:-cut])
        assert [row["step"] for row in read_metrics(tmp_path)] == ([1, 2] if cut == 1 else [1])
        write(tmp_path, (3,), start=2)
        assert [row["step"] for row in read_metrics(tmp_path)] == ([1, 2, 3] if cut == 1 else [1, 3])
    assert read_metrics(tmp_path / "nowhere") == []


# TensorBoard


def tensorboard(workdir) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(workdir / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_the_same_numbers(tmp_path):
    write(tmp_path, (2, 4), validated=(4,))
    found = tensorboard(tmp_path)
    assert found["train/loss"] == {2: 0.5, 4: 0.25}
    np.testing.assert_allclose(found["validation/accuracy"][4], 0.4, rtol=1e-6)
    speeds = found["speed/steps_per_second"], found["speed/examples_per_second"]
    assert set(speeds[0]) == set(speeds[1]) == {2, 4}
    for step in (2, 4):
        np.testing.assert_allclose(speeds[1][step], 4 * speeds[0][step], rtol=1e-5)  # four examples a step


def test_tensorboard_hides_the_rows_after_the_restored_step(tmp_path):
    write(tmp_path, (1, 2, 3, 4))
    write(tmp_path, (3,), start=2, offset=10.0)  # within the same second, which TensorBoard's file names show
    found = tensorboard(tmp_path)["train/loss"]
    assert {step: round(value, 3) for step, value in found.items()} == {1: 1.0, 2: 0.5, 3: 10.333}


# What is shown


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    stream = io.StringIO()
    write(tmp_path, range(1, 1001), num_steps=1000, validated=(500,), stream=stream)
    lines = stream.getvalue().splitlines()
    shown = [
        int(line.split("/")[0].removeprefix("step ")) for line in lines if line.startswith("step ") and "/" in line
    ]
    assert 18 <= len([line for line in lines if "validation" not in line]) <= 22  # a whole run is a screenful
    assert shown[0] == 1
    assert all(b - a == 50 for a, b in zip(shown, shown[1:], strict=False))
    assert lines[0].startswith("step 1/1000: loss 1 ")
    assert "steps/s" in lines[0]
    assert "examples/s" in lines[0]
    assert "step 500 validation: accuracy 50" in lines
    assert "\x1b" not in stream.getvalue()


def test_a_bar_on_a_terminal_goes_to_its_stream(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with report(tmp_path, start=4, stream=stream) as reporter:
        reporter.say("not sharded: [bold]a[0]/kernel[/]")
        reporter.train_row(5, metrics(0.5))
        reporter.flush()
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "5/10" in text  # steps done, those of the run before included
    assert "loss 0.5" in text
    assert "not sharded: [bold]a[0]/kernel[/]" in text  # brackets in a path are no markup
    assert "step 5/10:" not in text  # the bar replaces the plain lines
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_speed_is_measured_between_rows(tmp_path, monkeypatch):
    now = iter(range(100, 10_000, 2))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    stream = io.StringIO()
    with report(tmp_path, start=10, num_steps=20, stream=stream) as reporter:
        reporter.train_row(13, metrics(1.0))  # three steps of four examples in two seconds
        reporter.flush()
    assert "1.50 steps/s  6.0 examples/s" in stream.getvalue()


# Updates that were not finite


def test_too_many_in_a_row_stop_the_run(tmp_path):
    with report(tmp_path, max_skipped=2) as reporter:
        reporter.train_row(1, metrics(float("nan"), 1, 1))
        reporter.train_row(2, metrics(float("nan"), 2, 2))
        reporter.train_row(3, metrics(0.5, 2, 0))
        reporter.train_row(4, metrics(float("nan"), 5, 3))
        with pytest.raises(
            NotFinite, match="from step 2 on, more than config.max_skipped 2 .* not finite: lower the learning rate"
        ):
            reporter.train_row(5, metrics(0.5, 5, 0))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_each_new_one_is_a_warning_with_the_count(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"), report(tmp_path, max_skipped=9) as reporter:
        for step, skipped in ((1, 0), (2, 1), (3, 1), (4, 3)):
            reporter.train_row(step, metrics(0.5, skipped))
        reporter.flush()
    warnings = [record.getMessage() for record in caplog.records]
    assert [(text.split(",")[0], text.split()[4]) for text in warnings] == [
        ("up to step 2", "1"),
        ("up to step 4", "3"),
    ]


# The picture


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    saved, original = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        saved.append(figure)
        return original(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def test_curves_show_both_kinds_with_labels(tmp_path, figures):
    stream = io.StringIO()
    with report(tmp_path, num_steps=30, stream=stream) as reporter:
        for step in range(1, 31):
            reporter.train_row(step, metrics(1 / step, accuracy=step / 30))
            if step % 10 == 0:
                reporter.validation_row(step, {"loss": 2 / step, "accuracy": step / 40})
        reporter.train_row(31, metrics(0.125, accuracy=1.0))
        reporter.plot_curves()
    path = tmp_path / "plots" / "curves.png"
    assert f"curves: {path}" in stream.getvalue()
    pixels = image.imread(path)
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 2 * pixels.shape[0]
    assert pixels.std() > 0.01  # something is drawn
    (figure,) = figures
    assert [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes] == [("step", "loss"), ("step", "accuracy")]
    for axis, name in zip(figure.axes, ("loss", "accuracy"), strict=True):
        lines = {line.get_label(): line for line in axis.lines}
        assert set(lines) == {"train", "validation", "mean of 3 rows"}
        assert [text.get_text() for text in axis.get_legend().get_texts()] == list(lines)
        rows = [row for row in read_metrics(tmp_path) if row["kind"] == "train"]
        assert lines["train"].get_xydata().tolist() == [[row["step"], row[name]] for row in rows]
        assert lines["train"].get_xdata()[-1] == 31  # the row that waited
        # a trailing mean, shorter at the start
        values = np.asarray([row[name] for row in rows])
        np.testing.assert_allclose(lines["mean of 3 rows"].get_ydata()[0], values[0])
        np.testing.assert_allclose(lines["mean of 3 rows"].get_ydata()[-1], values[-3:].mean())


def test_curves_of_a_run_without_accuracy_or_rows(tmp_path, figures):
    plot_curves(tmp_path)
    write(tmp_path, (1, 2, 3))
    assert plot_curves(tmp_path) == tmp_path / "plots" / "curves.png"
    assert [len(axis.lines) for figure in figures for axis in figure.axes] == [0, 0, 1, 0]
    assert all(axis.get_xlabel() == "step" and axis.get_ylabel() for figure in figures for axis in figure.axes)
