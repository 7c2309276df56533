"""Exact attention: one public function, several implementations, one primitive that joins partial results."""

from xattn.ops.attention.additive import additive_attention
from xattn.ops.attention.api import IMPLEMENTATIONS, attention_weights, dot_product_attention
from xattn.ops.attention.masks import Mask
from xattn.ops.attention.merge import merge

__all__ = [
    "IMPLEMENTATIONS",
    "Mask",
    "additive_attention",
    "attention_weights",
    "dot_product_attention",
    "merge",
]
