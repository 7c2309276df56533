"""timm without torchvision: packages that stand in for it while timm is imported, empty but for two names.

timm imports transforms and operators of torchvision with its models, and its models of images use none of them.
"""

import contextlib
import enum
import functools
import importlib.machinery
import sys
import types

_PACKAGES = (
    "",
    ".datasets",
    ".models",
    ".models.feature_extraction",
    ".ops",
    ".ops.misc",
    ".transforms",
    ".transforms.functional",
    ".utils",
)


class InterpolationMode(enum.Enum):
    """The names that timm's transforms look up when they are imported."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Package(types.ModuleType):
    """A package in which every name is an empty class."""

    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.InterpolationMode = InterpolationMode

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


@contextlib.contextmanager
def _torchvision():
    # Gone afterwards: transformers and torch would take it for the real one.
    packages = {f"torchvision{name}": _Package(f"torchvision{name}") for name in _PACKAGES}
    for name, package in packages.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(packages[parent], child, package)
    # timm converts layers of this class, and its own may derive from it.
    from torch import nn

    packages["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
    sys.modules.update(packages)
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]


@functools.cache
def timm():
    """The package timm."""
    with _torchvision():
        import timm

    return timm
