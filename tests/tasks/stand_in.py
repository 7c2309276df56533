"""A model that returns the parameters it is made of, whatever its inputs."""

from flax import linen as nn


class Constant(nn.Module):
    """Its output is its parameter `output`."""

    def __call__(self, *inputs, train=False):
        return self.variables["params"]["output"]


def constant(output):
    """Variables with which `Constant` returns `output`."""
    return {"params": {"output": output}}
