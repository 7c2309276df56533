"""Perceiver IO for optical flow (arXiv 2107.14795, section 4.2): 41.1M parameters, trained on AutoFlow.

The folder is given by --config.data.root=DIR, in the layout of `xattn.data.flow_files`. The training code was never
released: of the recipe, what is marked [MEM] (LAMB too) is remembered from the paper and was not checked
against its text; the rest is our choice.
"""

from typing import Any

from ml_collections import ConfigDict

from xattn.config import check_variant


def get_config(arg: str = "") -> ConfigDict:
    """Variants: "" (published), "planes" (moving planes, minutes on two CPU cores), "smoke" (seconds)."""
    check_variant(arg, ("planes", "smoke"))
    config: dict[str, Any] = dict(
        model=dict(
            name="perceiver_io",
            input_preprocessor=dict(
                name="image_preprocessor",
                prep_type="patches",
                temporal_downsample=2,
                conv_after_patching=True,
                num_channels=64,
                positions=dict(name="fourier_positions", num_bands=64, max_resolution=(368, 496)),
            ),
            encoder=dict(
                name="perceiver_encoder",
                num_latents=2048,
                latent_features=512,
                num_blocks=1,
                num_self_attends_per_block=24,
                num_cross_heads=1,
                num_self_heads=16,
                remat=True,
            ),
            decoder=dict(
                name="perceiver_decoder",
                queries=dict(name="queries"),
                output_features=2,
                qk_features=512,
                v_features=512,
                use_query_residual=False,
                decode_chunk_size=None,
                zero_output=True,
                rescale_factor=100.0,
            ),
        ),
        task=dict(name="optical_flow"),
        data=dict(name="autoflow", root="", image_size=(368, 496)),
        pipeline=dict(name="examples", batch_size=512),  # [MEM]
        optimizer=dict(
            name="lamb",
            learning_rate=4e-4,  # [MEM]
            weight_decay=0.1,  # [MEM]
            decay="weights",
            clip_norm=10.0,
            schedule=dict(name="cosine"),  # [MEM]
        ),
        num_steps=480 * 400_000 // 512,  # [MEM] epochs of 400,000 pairs
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
            name="optical_flow",
            split="val",
            num_examples=64,
            tile=(368, 496),
            overlap=20,
            every=5000,
            metric=None,  # what is reported must not choose the checkpoint: the latest is evaluated
        ),
        evals=dict(autoflow=dict(name="optical_flow", split="val", tile=(368, 496), overlap=20)),
    )
    if arg in ("planes", "smoke"):
        config["model"]["input_preprocessor"] |= dict(
            num_channels=32, positions=dict(name="fourier_positions", num_bands=4, max_resolution=(12, 16))
        )
        config["model"]["encoder"] |= dict(
            num_latents=32, latent_features=64, num_self_attends_per_block=2, num_self_heads=4, remat=False
        )
        # Divided by 100, the output would need hundreds of steps more to reach a few pixels.
        config["model"]["decoder"] |= dict(qk_features=64, v_features=64, rescale_factor=10.0)
        config["data"] = dict(name="moving_planes", image_size=(12, 16), max_shift=2.0)
        config["pipeline"]["batch_size"] = 16
        # With 3e-3 some runs never leave the plateau of saying that nothing moves.
        config["optimizer"] |= dict(name="adamw", learning_rate=1.5e-3, schedule=dict(name="cosine", warmup_steps=50))
        config["validation"] = dict(name="optical_flow", split="val", num_examples=64, every=500, metric="-epe")
        config["evals"] = dict(planes=dict(name="optical_flow", split="test", num_examples=500))
        config |= dict(num_steps=3000, dtype="float32", log_every=10, checkpoint=dict(every=500, keep=2))
        config["mesh"] = dict(data=1, fsdp=1, tensor=1, sequence=1)
    if arg == "smoke":
        config["model"]["encoder"] |= dict(num_latents=8, latent_features=16, num_self_attends_per_block=1)
        config["model"]["decoder"] |= dict(qk_features=16, v_features=16)
        config["pipeline"]["batch_size"] = 2
        config["validation"] |= dict(num_examples=4, every=4)
        config["evals"]["planes"] |= dict(num_examples=4, tile=(8, 12), overlap=2)
        config |= dict(num_steps=4, log_every=1, checkpoint=dict(every=2, keep=2))
    return ConfigDict(config)
