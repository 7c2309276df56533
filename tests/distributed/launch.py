"""Runs one program in several processes of this machine, each with simulated devices, as one JAX run.

A program is either a command, `["-m", "xattn", "train", ...]`, to which the flags of several processes are added; or a
function `"tests.distributed.test_x:function"` with words as its arguments, called in each process after they have met.
Functions tell their results by files: gloo prints on stdout.
"""

import importlib
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Process:
    """A started process, and the file with what it printed."""

    popen: subprocess.Popen
    output: Path

    def printed(self) -> str:
        """All that it printed so far, on either stream."""
        return self.output.read_text(errors="replace")


def environment(num_devices: int) -> dict[str, str]:
    """Variables for a process of this checkout with so many devices, and with the other flags of this process."""
    # Of two settings of one flag, XLA takes the last.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


def start(
    program: str | Sequence[str],
    *words: str | Path,
    folder: Path,
    num_processes: int = 2,
    num_devices: int = 4,
) -> list[Process]:
    """Starts `program` in `num_processes` processes with `num_devices` devices each.

    Args:
      program: see above.
      words: further arguments of it.
      folder: where `process_<i>.txt` are written.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program] if isinstance(program, str) else [*program]
    command = ["-m", "tests.distributed.launch", *command] if isinstance(program, str) else command
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for index in range(num_processes):
        meeting = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={num_processes}", f"--process-id={index}"]
        output = folder / f"process_{index}.txt"
        with output.open("w") as log:
            popen = subprocess.Popen(
                [sys.executable, *command, *map(str, words), *meeting],
                stdout=log,
                stderr=log,
                env=environment(num_devices),
                cwd=ROOT,
            )
        processes.append(Process(popen, output))
    return processes


def finish(processes: Sequence[Process], timeout: float = 120) -> list[int]:
    """The exit codes, once all have ended; those that have not after `timeout` seconds are killed: AssertionError."""
    deadline = time.monotonic() + timeout
    try:
        return [process.popen.wait(max(0, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"not done after {timeout} s:\n{_all_printed(processes)}") from error
    finally:
        for process in processes:
            process.popen.kill()
            process.popen.wait()


def run(
    program: str | Sequence[str],
    *words: str | Path,
    folder: Path,
    num_processes: int = 2,
    num_devices: int = 4,
    timeout: float = 120,
) -> list[Process]:
    """`start` and `finish`; AssertionError with all that was printed unless each process ends with 0."""
    processes = start(program, *words, folder=folder, num_processes=num_processes, num_devices=num_devices)
    codes = finish(processes, timeout)
    assert not any(codes), f"exit codes {codes}:\n{_all_printed(processes)}"
    return processes


def _all_printed(processes: Sequence[Process]) -> str:
    return "\n".join(f"--- {process.output.name}\n{process.printed()[-4000:]}" for process in processes)


def _main() -> None:
    """One process of a function."""
    from xattn.config import cache_compiled_programs
    from xattn.parallel import distributed

    program, *words = [word for word in sys.argv[1:] if not word.startswith("--")]
    meeting = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
    cache_compiled_programs("tests")
    # A process that has died is noticed soon.
    distributed.start(
        meeting["coordinator"], int(meeting["num-processes"]), int(meeting["process-id"]), heartbeat_timeout=10
    )
    module, _, function = program.partition(":")
    try:
        getattr(importlib.import_module(module), function)(*words)
    except Exception:
        traceback.print_exc()
        distributed.leave(1)  # the others would wait for it
        sys.exit(1)


if __name__ == "__main__":
    _main()
