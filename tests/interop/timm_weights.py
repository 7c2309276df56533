"""timm's CrossViT and ViT as names and shapes of tensors, and weights and images that formulas fill."""

import jax.numpy as jnp
import numpy as np

# Widths, blocks of the second branch, ratio of the MLP, dagger, sizes of the images.
CROSSVITS = {
    "crossvit_tiny_240": ((96, 192), 4, 4, False, (240, 224)),
    "crossvit_small_240": ((192, 384), 4, 4, False, (240, 224)),
    "crossvit_base_240": ((384, 768), 4, 4, False, (240, 224)),
    "crossvit_9_240": ((128, 256), 3, 3, False, (240, 224)),
    "crossvit_15_240": ((192, 384), 5, 3, False, (240, 224)),
    "crossvit_18_240": ((224, 448), 6, 3, False, (240, 224)),
    "crossvit_9_dagger_240": ((128, 256), 3, 3, True, (240, 224)),
    "crossvit_15_dagger_240": ((192, 384), 5, 3, True, (240, 224)),
    "crossvit_18_dagger_240": ((224, 448), 6, 3, True, (240, 224)),
    "crossvit_15_dagger_408": ((192, 384), 5, 3, True, (408, 384)),
    "crossvit_18_dagger_408": ((224, 448), 6, 3, True, (408, 384)),
}


class Shapes(dict):
    """Name to shape of the layers of torch."""

    def linear(self, name, outputs, inputs):
        self.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(self, name, size):
        self.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    def conv(self, name, outputs, inputs, size):
        self.update({f"{name}.weight": (outputs, inputs, size, size), f"{name}.bias": (outputs,)})

    def patches(self, name, width, patch, dagger):
        if not dagger:
            return self.conv(f"{name}.proj", width, 3, patch)
        for index, (outputs, inputs, size) in enumerate(
            [(width // 4, 3, 7), (width // 2, width // 4, 3), (width, width // 2, 3)]
        ):
            self.conv(f"{name}.proj.{2 * index}", outputs, inputs, size)

    def block(self, name, width, ratio):
        self.norm(f"{name}.norm1", width)
        self.linear(f"{name}.attn.qkv", 3 * width, width)
        self.linear(f"{name}.attn.proj", width, width)
        self.norm(f"{name}.norm2", width)
        self.linear(f"{name}.mlp.fc1", ratio * width, width)
        self.linear(f"{name}.mlp.fc2", width, ratio * width)


def crossvit_shapes(widths, depth, ratio, dagger, image_sizes, classes=1000):
    """Names and shapes of timm's `CrossVit`: patches of 12 and 16, three stages, one block in the first branch."""
    shapes = Shapes()
    for i, (width, patch, size) in enumerate(zip(widths, (12, 16), image_sizes, strict=True)):
        shapes[f"pos_embed_{i}"] = (1, 1 + (size // patch) ** 2, width)
        shapes[f"cls_token_{i}"] = (1, 1, width)
        shapes.patches(f"patch_embed.{i}", width, patch, dagger)
        shapes.norm(f"norm.{i}", width)
        if classes:
            shapes.linear(f"head.{i}", classes, width)
    for k in range(3):
        for i, width in enumerate(widths):
            other = widths[1 - i]
            for j in range((1, depth)[i]):
                shapes.block(f"blocks.{k}.blocks.{i}.{j}", width, ratio)
            shapes.norm(f"blocks.{k}.projs.{i}.0", width)
            shapes.linear(f"blocks.{k}.projs.{i}.2", other, width)
            shapes.norm(f"blocks.{k}.fusion.{i}.norm1", other)
            for part in ("wq", "wk", "wv", "proj"):
                shapes.linear(f"blocks.{k}.fusion.{i}.attn.{part}", other, other)
            shapes.norm(f"blocks.{k}.revert_projs.{i}.0", other)
            shapes.linear(f"blocks.{k}.revert_projs.{i}.2", width, other)
    return dict(shapes)


def vit_shapes(width, depth=12, ratio=4, dagger=False, image_size=224, classes=1000):
    """Names and shapes of timm's `VisionTransformer` of patches of 16."""
    shapes = Shapes(pos_embed=(1, 1 + (image_size // 16) ** 2, width), cls_token=(1, 1, width))
    shapes.patches("patch_embed", width, 16, dagger)
    for j in range(depth):
        shapes.block(f"blocks.{j}", width, ratio)
    shapes.norm("norm", width)
    if classes:
        shapes.linear("head", classes, width)
    return dict(shapes)


def wave(shapes):
    """0.05 sin(0.7 n + phase) in each tensor, the phase from its name; the scales of norms are around 1."""
    state = {}
    for name, shape in shapes.items():
        phase = sum(name.encode()) % 1000
        values = 0.05 * np.sin(0.7 * np.arange(np.prod(shape)) + phase).reshape(shape)
        state[name] = (values + (name.endswith("weight") and len(shape) == 1)).astype(np.float32)
    return state


def noise(shapes, seed=0):
    """Normal values, all of them different."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def image(size):
    """One image [1, S, S, 3] of waves that differ between its channels, its rows and its columns."""
    row, column, channel = np.arange(size)[:, None, None], np.arange(size)[:, None], np.arange(3)
    return jnp.asarray(np.sin(0.05 * row * (channel + 1) + 0.08 * column)[None], jnp.float32)
