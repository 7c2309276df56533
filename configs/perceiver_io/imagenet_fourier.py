"""Perceiver IO on ImageNet with 2D Fourier positions (arXiv 2107.14795, appendix H): 48.4M parameters.

The folder is given by --config.data.root=DIR, in the layout of `xattn.data.imagenet`. The recipe is that of the
released training code, which is stated to be the paper's (its train and valid splits together are our train); [MEM]
marks what is remembered from the paper and was not checked against its text.
"""

from typing import Any

from ml_collections import ConfigDict

from xattn.config import check_variant

STEPS_PER_EPOCH = 1_281_167 // 1024


def get_config(arg: str = "") -> ConfigDict:
    """Variants: "" (published), "digits" and "digits_permuted" (a minute on two CPU cores), "smoke" (seconds)."""
    check_variant(arg, ("digits", "digits_permuted", "smoke"))
    config: dict[str, Any] = dict(
        model=dict(
            name="perceiver_io",
            input_preprocessor=dict(
                name="image_preprocessor",
                prep_type="pixels",
                positions=dict(name="fourier_positions", num_bands=64, max_resolution=(224, 224)),
            ),
            encoder=dict(
                name="perceiver_encoder",
                num_latents=512,
                latent_features=1024,
                num_blocks=8,
                num_self_attends_per_block=6,
                num_cross_heads=1,
                num_self_heads=8,
                remat=False,
            ),
            decoder=dict(
                name="perceiver_decoder",
                queries=dict(name="queries", index_dims=(), positions=dict(name="trainable_positions", features=1024)),
                output_features=1000,
                use_query_residual=True,
                decode_chunk_size=None,
            ),
        ),
        task=dict(name="classification", label_smoothing=0.1, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        data=dict(
            name="imagenet",
            root="",
            image_size=224,
            transform=dict(name="perceiver_io", num_layers=4, magnitude=5),
        ),
        pipeline=dict(
            name="examples",
            batch_size=1024,  # [MEM]
            transforms=dict(mixup_cutmix=dict(alpha=0.2)),
        ),
        optimizer=dict(
            name="lamb",
            learning_rate=5e-4 * 1024 / 256,
            b1=0.9,
            b2=0.999,
            eps=1e-6,
            weight_decay=0.1,
            decay="weights",
            clip_norm=10.0,
            schedule=dict(name="constant_cosine", decay_start=0.5),
        ),
        num_steps=110 * STEPS_PER_EPOCH,
        accumulate_steps=1,
        ema_decay=0.0,
        max_skipped=5,
        seed=0,
        dtype="bfloat16",
        mesh=dict(data=-1, fsdp=1, tensor=1, sequence=1),
        log_every=100,
        checkpoint=dict(every=1000, keep=2),
        preempt_exit_code=0,
        validation=dict(
            name="classification",
            split="val",
            num_examples=10_000,
            every=5 * STEPS_PER_EPOCH,
            metric=None,  # what is reported must not choose the checkpoint: the latest is evaluated
        ),
        evals=dict(imagenet=dict(name="classification", split="val")),
    )
    if arg:
        # 8 x 8 pixels of one channel, and ten classes.
        config["model"]["input_preprocessor"] |= dict(
            positions=dict(name="fourier_positions", num_bands=8, max_resolution=(8, 8))
        )
        config["model"]["encoder"] |= dict(
            num_latents=32,
            latent_features=64,
            num_blocks=1,
            num_self_attends_per_block=2,
            num_cross_heads=8,
            qk_features=64,
            v_features=64,
        )
        config["model"]["decoder"] |= dict(
            queries=dict(name="queries", index_dims=(), positions=dict(name="trainable_positions", features=64)),
            output_features=10,
        )
        config["task"] |= dict(mean=0.3, std=0.37)
        config["data"] = dict(name="digits", permute_pixels=0 if arg == "digits_permuted" else None)
        config["pipeline"] |= dict(batch_size=32)
        config["optimizer"] |= dict(name="adamw", learning_rate=3e-3, schedule=dict(name="cosine", warmup_steps=50))
        config["validation"] |= dict(num_examples=None, every=350, metric="accuracy")
        config["evals"] = dict(digits=dict(name="classification", split="test"))
        config |= dict(num_steps=700, ema_decay=0.98, dtype="float32", log_every=10, checkpoint=dict(every=350, keep=2))
        config["mesh"] = dict(data=1, fsdp=1, tensor=1, sequence=1)
    if arg == "smoke":
        config["model"]["encoder"] |= dict(num_latents=4, num_self_attends_per_block=1)
        config["pipeline"]["batch_size"] = 4
        config["validation"] |= dict(num_examples=8, every=4)
        config["evals"]["digits"] |= dict(num_examples=8)
        config |= dict(num_steps=4, log_every=1, checkpoint=dict(every=2, keep=2))
    return ConfigDict(config)
