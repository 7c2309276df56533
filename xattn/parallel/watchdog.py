"""Tells what a process is doing that has not gone on for long."""

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax


@contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
    """Gives what to call at every turn of a loop: with no call for `seconds`, the stacks of all threads go to stderr.

    It ends nothing: what is slow goes on. 0 seconds turn it off.
    """
    turned, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            if not turned.wait(seconds):
                os.write(2, _stacks(seconds).encode())
                turned.wait()
            turned.clear()

    if not seconds:
        yield lambda: None
        return
    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield turned.set
    finally:
        ended.set()
        turned.set()
        thread.join()


def _stacks(seconds: float) -> str:
    """What every thread is doing. `faulthandler` would look without Python's lock, and may crash a run that is fine."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = [f"no step for {seconds:g} s; what the threads of process {jax.process_index()} are doing:\n"]
    for ident, frame in sys._current_frames().items():
        lines += [f"Thread {names.get(ident, ident)} (most recent call last):\n", *traceback.format_stack(frame)]
    return "".join(lines)
