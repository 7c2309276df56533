"""Tasks by name: the loss and the batch metrics of one objective."""

from collections.abc import Mapping
from typing import Any

from xattn.config import check_keys, lookup
from xattn.tasks.fewshot import FewShot

TASKS = {
    "fewshot": FewShot,
}


def build(config: Mapping[str, Any]) -> FewShot:
    """The task of a config: its `name` and its constructor's keywords; `UsageError` for others."""
    options = dict(config)
    task = lookup(TASKS, options.pop("name"), "task")
    check_keys(options, task, "config.task")
    return task(**options)
