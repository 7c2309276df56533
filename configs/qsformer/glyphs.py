"""QSFormer on GlyphFS: the main job, minutes on two CPU cores."""

from ml_collections import ConfigDict

from xattn.config import check_variant


def get_config(arg: str = "") -> ConfigDict:
    """Variants: "" (the main job), "smoke" (seconds)."""
    check_variant(arg, ("smoke",))
    episodes = dict(name="fewshot", split="test", ways=5, shots=1, queries=15, num_episodes=1000, seed=0)
    config = ConfigDict(
        dict(
            model=dict(
                name="qsformer",
                encoder=dict(
                    name="cife",
                    # 32 x 32 images: without the last pool there are 16 tokens an image.
                    backbone=dict(name="conv4", widths=(32, 64, 64, 64), norm="group", pool_last=False),
                    num_heads=4,
                    mlp_dim=256,
                    dropout_rate=0.0,
                ),
                num_blocks=2,
                num_heads=1,
                patch_num_heads=4,
                mlp_dim=256,
                support_dropout=0.0,
                query_dropout=0.0,
                patch_dropout=0.0,
                patch_mix=0.5,
                query_residual=0.5,
                global_weight=0.1,
                global_temperature=1.0,
                emd_temperature=12.5,
                query_self_attn="joint",
                freeze_patchformer=False,
                train_sinkhorn=(0.05, 20),
                # On 16 tokens this is as accurate as (0.02, 200), which the evaluation 5way_1shot_fine measures.
                eval_sinkhorn=(0.05, 20),
            ),
            task=dict(name="fewshot", alpha=0.7, tau=0.5),
            data=dict(name="glyphs", jitter="strong"),
            pipeline=dict(name="episodes", ways=20, shots=1, queries=5, batch_size=1),
            optimizer=dict(
                name="adam", learning_rate=2e-3, schedule=dict(name="cosine", warmup_steps=10), clip_norm=3.0
            ),
            num_steps=300,
            accumulate_steps=1,
            ema_decay=0.0,
            max_skipped=5,
            seed=0,
            dtype="float32",
            mesh=dict(data=1, fsdp=1, tensor=1, sequence=1),
            log_every=2,
            checkpoint=dict(every=100, keep=2),
            preempt_exit_code=0,
            validation=dict(
                name="fewshot", split="val", ways=20, queries=5, num_episodes=100, seed=0, every=100, metric="accuracy"
            ),
            evals=dict(
                {
                    "5way_1shot": episodes,
                    "5way_5shot": episodes | dict(shots=5),
                    "20way_1shot": episodes | dict(ways=20),
                    "5way_1shot_cross_family": episodes | dict(mode="cross_family"),
                    "5way_1shot_inductive": episodes | dict(overrides=dict(query_self_attn="diagonal")),
                    "5way_1shot_fine": episodes | dict(num_episodes=300, overrides=dict(eval_sinkhorn=(0.02, 200))),
                    "5way_1shot_pixel_centroid": episodes | dict(method="pixel_centroid"),
                    "5way_1shot_random_features": episodes | dict(method="random_features"),
                }
            ),
        )
    )
    if arg == "smoke":
        few = dict(ways=5, queries=2, num_episodes=8)
        config.model.update(num_blocks=1, patch_num_heads=2, mlp_dim=16)
        config.model.encoder.update(num_heads=2, mlp_dim=16)
        config.model.encoder.backbone.widths = (8, 8, 8, 8)
        config.pipeline.update(ways=5, queries=2)
        config.validation.update(few, every=4)
        config.evals = {"5way_1shot": episodes | few}
        config.update(num_steps=8, log_every=1)
        config.checkpoint.every = 2
    return config
