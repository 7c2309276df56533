"""Images and videos cut into patches, and back."""

import einops
import jax.numpy as jnp
from jaxtyping import Array, Float

from xattn.config import UsageError


def space_to_depth(x: Float[Array, "..."], *, spatial: int = 1, temporal: int = 1) -> Float[Array, "..."]:
    """Moves blocks of pixels into channels.

    Args:
      x: images [B, H, W, C] or videos [B, T, H, W, C].
      spatial: height and width of a block.
      temporal: frames in a block of a video.

    Returns:
      [B, h, w, dh dw C] or [B, t, h, w, dt dh dw C], the axes of a block in this order.

    Raises:
      UsageError: blocks do not divide the image.
    """
    sizes = x.shape[1:-1]
    blocks = (temporal, spatial, spatial)[-len(sizes) :]
    if any(size % block for size, block in zip(sizes, blocks, strict=True)):
        raise UsageError(f"blocks of {blocks} do not divide an input of {sizes}: crop or pad it.")
    if x.ndim == 4:
        return einops.rearrange(x, "b (h dh) (w dw) c -> b h w (dh dw c)", dh=spatial, dw=spatial)
    pattern = "b (t dt) (h dh) (w dw) c -> b t h w (dt dh dw c)"
    return einops.rearrange(x, pattern, dt=temporal, dh=spatial, dw=spatial)


def depth_to_space(x: Float[Array, "..."], *, spatial: int = 1, temporal: int = 1) -> Float[Array, "..."]:
    """The inverse of `space_to_depth`.

    Raises:
      UsageError: the channels are not a multiple of a block.
    """
    block = spatial**2 * (temporal if x.ndim == 5 else 1)
    if x.shape[-1] % block:
        raise UsageError(f"{x.shape[-1]} channels do not split into blocks of {block} pixels: make it a multiple.")
    if x.ndim == 4:
        return einops.rearrange(x, "b h w (dh dw c) -> b (h dh) (w dw) c", dh=spatial, dw=spatial)
    pattern = "b t h w (dt dh dw c) -> b (t dt) (h dh) (w dw) c"
    return einops.rearrange(x, pattern, dt=temporal, dh=spatial, dw=spatial)


def flow_patches(frames: Float[Array, "*B H W C"]) -> Float[Array, "*B H W D"]:
    """The 3x3 surroundings of every pixel, zero outside the image, as 9 C channels in the order (row, column, C)."""
    height, width = frames.shape[-3:-1]
    padded = jnp.pad(frames, [(0, 0)] * (frames.ndim - 3) + [(1, 1), (1, 1), (0, 0)])
    shifts = [padded[..., i : i + height, j : j + width, :] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, axis=-1)
