"""Tasks by name: the loss and the batch metrics of one objective."""

from collections.abc import Mapping
from typing import Any

from xattn.config import check_options, lookup
from xattn.tasks.autoencoding import Autoencoding
from xattn.tasks.classification import Classification
from xattn.tasks.fewshot import FewShot
from xattn.tasks.masked_language import MaskedLanguage
from xattn.tasks.optical_flow import OpticalFlow

TASKS = {
    "autoencoding": Autoencoding,
    "classification": Classification,
    "fewshot": FewShot,
    "masked_language": MaskedLanguage,
    "optical_flow": OpticalFlow,
}


def build(config: Mapping[str, Any]) -> Any:
    """The task of a config: its `name` and its constructor's keywords; `UsageError` for others."""
    options = dict(config)
    task = lookup(TASKS, options.pop("name", None), "task")
    check_options(options, task, "config.task")
    return task(**options)
