"""What a run tells: metrics.jsonl, TensorBoard files, a progress bar or plain lines, curve pictures."""

import io
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
from absl import logging
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import scalar

from xattn.config import write_atomically

PLAIN_LINES = 20  # a whole run's worth, where no terminal shows a bar


class NotFinite(ArithmeticError):
    """Too many updates in a row had a loss or gradient that was not finite."""


class Reporter:
    """Writes one run's metrics; use it as a context manager. Only process 0 writes.

    A training row is fetched from the device when the next one comes, so that logging never waits for a step.

    Args:
      workdir: the run's folder; rows go to `metrics.jsonl` and `tb/`, pictures to `plots/`.
      start_step: rows of later steps, left by a run that was killed, are dropped.
      num_steps: length of the run.
      batch_size: examples a step.
      max_skipped: how many updates in a row may be left out as not finite.
      stream: where progress is shown: a bar on a terminal, a line now and then elsewhere.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        num_steps: int,
        batch_size: int,
        max_skipped: int,
        stream: io.TextIOBase | None = None,
    ):
        self._workdir, self._num_steps, self._batch_size = workdir, num_steps, batch_size
        self._max_skipped = max_skipped
        self._stream: Any = stream or sys.stdout
        self._plain_every = max(1, num_steps // PLAIN_LINES)
        self._next_plain = start_step
        self._clock = (time.perf_counter(), start_step)
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._skipped = 0.0
        self._writes = jax.process_index() == 0
        self._bar = None
        if not self._writes:
            return
        path = workdir / "metrics.jsonl"
        keep = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in keep))
        self._file = path.open("a")
        (workdir / "tb").mkdir(exist_ok=True)
        # Not SummaryWriter: when its thread has died of a full disk, it waits for it forever.
        self._events = EventsWriter(str(workdir / "tb" / "events"), f".{start_step}")
        self._event(start_step + 1, session_log=SessionLog(status=SessionLog.START))  # hides what was there from it on
        if self._stream.isatty():
            self._progress = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(file=self._stream),
            )
            self._bar = self._progress.add_task("", total=num_steps, completed=start_step)

    def __enter__(self) -> "Reporter":
        if self._bar is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._progress.stop()
        if self._writes:
            self._file.close()
            self._events.close()

    def train_row(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes a step's metrics, still on the device, and writes those of the call before."""
        self.flush()
        self._pending = step, metrics

    def validation_row(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes and shows what validation after `step` updates gave."""
        self.flush()
        self._write(step, "validation", metrics)
        self.say(f"step {step} validation: {_format(metrics)}")

    def flush(self) -> None:
        """Writes the row that waits, and shows progress.

        Raises:
          NotFinite: more than `max_skipped` updates in a row were left out.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._write(step, "train", row)
        self._show_progress(step, row)
        if row["skipped"] > self._skipped:
            self._skipped = row["skipped"]
            if self._writes:
                logging.warning(
                    "up to step %d, %d updates were left out: loss or gradient not finite", step, row["skipped"]
                )
        self.check(step, row)

    def check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raises `NotFinite` if more than `max_skipped` updates in a row were left out up to `step`."""
        in_a_row = int(metrics["skipped_in_a_row"])
        if in_a_row > self._max_skipped:
            first = step - in_a_row + 1
            raise NotFinite(
                f"from step {first} on, more than config.max_skipped {self._max_skipped} updates in a row had a loss "
                "or gradient that was not finite: lower the learning rate, or look at the data of these steps."
            )

    def _write(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, "kind": kind, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._event(step, summary=scalar(f"{kind}/{name}", value))
        self._events.flush()

    def _event(self, step: int, **contents: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **contents))

    def _show_progress(self, step: int, row: Mapping[str, float]) -> None:
        if not self._writes:
            return
        now = time.perf_counter()
        rate = (step - self._clock[1]) / max(now - self._clock[0], 1e-9)
        self._clock = (now, step)
        examples = rate * self._batch_size
        self._event(step, summary=scalar("speed/steps_per_second", rate))
        self._event(step, summary=scalar("speed/examples_per_second", examples))
        shown = {name: row[name] for name in ("loss", "accuracy") if name in row}
        text = f"{_format(shown)}  {rate:.2f} steps/s  {examples:.1f} examples/s"
        if self._bar is not None:
            self._progress.update(self._bar, completed=step, description=text)
        elif step >= self._next_plain:
            self._next_plain = step + self._plain_every
            self.say(f"step {step}/{self._num_steps}: {text}")

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self._bar is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        elif self._writes:
            print(text, file=self._stream, flush=True)

    def plot_curves(self) -> None:
        """Writes what is pending, draws `plots/curves.png` and says so; see the function of this name."""
        self.flush()
        if self._writes:
            self.say(f"curves: {plot_curves(self._workdir)}")


def _format(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; a last line that a killed run left half-written is dropped."""
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_curves(workdir: Path) -> Path:
    """Draws loss and accuracy over the steps from `metrics.jsonl`; returns `plots/curves.png`."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    rows = read_metrics(workdir)
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for kind, style in (("train", {"alpha": 0.35}), ("validation", {"marker": "o", "markersize": 3})):
            points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and name in row]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            (line,) = axis.plot(steps, values, label=kind, **style)
            if kind == "train" and len(values) >= 20:
                window = len(values) // 10
                means = [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
                axis.plot(steps, means, color=line.get_color(), label=f"mean of {window} rows")
        axis.set(xlabel="step", ylabel=name)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    path = workdir / "plots" / "curves.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
