"""CrossViT on 100 letters, embedded: the ways to fuse the branches, small enough for two CPU cores.

The images have 32 x 32 pixels; the fine branch cuts them into 16 patches of 8 x 8, the coarse one into 4 of 16 x 16.
Widths and heads are those of CrossViT-Ti.
"""

from typing import Any

from ml_collections import ConfigDict

from xattn.config import check_variant

FUSIONS = ("none", "all_attention", "class_token", "pairwise", "cross_attention")


def get_config(arg: str = "") -> ConfigDict:
    """Variants: a fusion of the paper's ablation ("": cross_attention), and "smoke" (seconds)."""
    fusion = check_variant(arg, (*FUSIONS, "smoke")) or "cross_attention"
    config: dict[str, Any] = dict(
        model=dict(
            name="crossvit",
            num_classes=100,
            image_sizes=(32, 32),
            patch_sizes=(8, 16),
            features=(96, 192),
            num_heads=(3, 3),
            depths=(1, 2),
            num_stages=2,
            mlp_ratio=2.0,
            fusion="cross_attention" if fusion == "smoke" else fusion,
            drop_path_rate=0.05,
        ),
        task=dict(name="classification", label_smoothing=0.1, mean=0.15, std=0.3),
        data=dict(name="letters", jitter="default"),
        # A mirrored letter is another one: what changes the images here are the maps that they are drawn with.
        pipeline=dict(name="examples", batch_size=64, repeats=1, transforms=dict()),
        optimizer=dict(
            name="adamw",
            learning_rate=1e-3,
            weight_decay=0.05,
            decay="kernels",
            clip_norm=1.0,
            schedule=dict(name="cosine", warmup_steps=50),
        ),
        num_steps=800,
        accumulate_steps=1,
        ema_decay=0.99,
        max_skipped=5,
        seed=0,
        dtype="float32",
        mesh=dict(data=1, fsdp=1, tensor=1, sequence=1),
        log_every=20,
        checkpoint=dict(every=400, keep=1),
        preempt_exit_code=0,
        validation=dict(name="classification", split="val", num_examples=1000, every=400, metric=None),
        evals=dict(letters=dict(name="classification", split="test", num_examples=None)),
    )
    if arg == "smoke":
        config["model"] |= dict(features=(8, 16), num_heads=(2, 2), depths=(1, 1), num_stages=1)
        config["pipeline"]["batch_size"] = 4
        config["optimizer"]["schedule"] |= dict(warmup_steps=1)
        config["validation"] |= dict(num_examples=8, every=4)
        config["evals"]["letters"] |= dict(num_examples=8)
        config |= dict(num_steps=4, log_every=1, checkpoint=dict(every=2, keep=2))
    return ConfigDict(config)
