"""Perceiver IO as a masked language model on bytes (arXiv 2107.14795, section 4.1): 201M parameters.

The folder of the text is given by --config.data.root=DIR (`xattn.data.text`). The training code was never released: of
the recipe, what is marked [MEM] (LAMB too) is remembered from the paper (which trains on C4 and Wikipedia) and was not
checked against its text; the rest is our choice.
"""

from typing import Any

from ml_collections import ConfigDict

from xattn.config import check_variant


def get_config(arg: str = "") -> ConfigDict:
    """Variants: "" (published), "plus_plus" (425M), "python" (minutes on two CPU cores), "smoke" (seconds)."""
    check_variant(arg, ("plus_plus", "python", "smoke"))
    config: dict[str, Any] = dict(
        model=dict(
            name="perceiver_io",
            input_preprocessor=dict(
                name="text_preprocessor", vocab_size=262, max_positions=2048, features=768, embed_init_scale=1.0
            ),
            encoder=dict(
                name="perceiver_encoder",
                num_latents=256,
                latent_features=1280,
                num_blocks=1,
                num_self_attends_per_block=26,
                num_cross_heads=8,
                num_self_heads=8,
                remat=False,
                qk_features=256,
                v_features=1280,
            ),
            decoder=dict(
                name="perceiver_decoder",
                queries=dict(
                    name="queries", index_dims=(2048,), positions=dict(name="trainable_positions", features=768)
                ),
                num_heads=8,
                qk_features=256,
                v_features=768,
                use_query_residual=False,
                decode_chunk_size=None,
            ),
            embedding_decoder=dict(name="embedding_decoder"),
        ),
        task=dict(name="masked_language"),
        data=dict(name="text_files", root="", length=2048),
        pipeline=dict(
            name="examples",
            batch_size=512,  # [MEM]
            transforms=dict(mask_words=dict(rate=0.15)),  # [MEM]
        ),
        optimizer=dict(
            name="lamb",
            learning_rate=1.25e-3,  # [MEM]
            weight_decay=0.01,  # [MEM]
            decay="weights",
            clip_norm=10.0,
            schedule=dict(name="cosine", warmup_steps=1000),  # [MEM]
        ),
        num_steps=500_000,  # [MEM]
        accumulate_steps=1,
        ema_decay=0.0,
        max_skipped=5,
        seed=0,
        dtype="bfloat16",
        mesh=dict(data=-1, fsdp=1, tensor=1, sequence=1),
        log_every=100,
        checkpoint=dict(every=1000, keep=2),
        preempt_exit_code=0,
        validation=dict(name="masked_language", split="val", num_examples=1000, every=5000, metric="accuracy"),
        evals=dict(text=dict(name="masked_language", split="test")),
    )
    if arg == "plus_plus":
        config["model"]["encoder"] |= dict(latent_features=1536, v_features=1536, num_self_attends_per_block=40)
    if arg in ("python", "smoke"):
        # Short windows: a byte finds its neighbours by trained positions, and the fewer there are, the sooner.
        # The released embeddings start 50 times as large as the positions, which a short training would not find then.
        config["model"]["input_preprocessor"] |= dict(max_positions=32, features=64, embed_init_scale=0.02)
        config["model"]["encoder"] |= dict(
            num_latents=32,
            latent_features=64,
            v_features=64,
            qk_features=64,
            num_cross_heads=4,
            num_self_heads=4,
            num_self_attends_per_block=1,
        )
        config["model"]["decoder"] |= dict(
            queries=dict(name="queries", index_dims=(32,), positions=dict(name="trainable_positions", features=64)),
            num_heads=4,
            qk_features=64,
            v_features=64,
        )
        config["data"] = dict(name="python_sources", length=32)
        # Twice as many hidden words as published: a window of 32 bytes has few of them to learn from.
        config["pipeline"] |= dict(batch_size=64, transforms=dict(mask_words=dict(rate=0.3)))
        config["optimizer"] |= dict(name="adamw", learning_rate=3e-3, schedule=dict(name="cosine", warmup_steps=100))
        config["validation"] |= dict(num_examples=1000, batch_size=100, every=1000)
        config["evals"] = dict(python=dict(name="masked_language", split="test", num_examples=5000, batch_size=100))
        config |= dict(num_steps=4000, dtype="float32", log_every=10, checkpoint=dict(every=1000, keep=2))
        config["mesh"] = dict(data=1, fsdp=1, tensor=1, sequence=1)
    if arg == "smoke":
        config["model"]["encoder"] |= dict(num_latents=8)
        config["pipeline"]["batch_size"] = 2
        config["validation"] |= dict(num_examples=4, batch_size=4, every=4)
        config["evals"]["python"] |= dict(num_examples=4)
        config |= dict(num_steps=4, log_every=1, checkpoint=dict(every=2, keep=2))
    return ConfigDict(config)
