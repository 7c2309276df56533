"""ProtoNet on GlyphFS: the baseline of `qsformer/glyphs`, with its backbone, steps, episodes and seed."""

from ml_collections import ConfigDict

from xattn.config import check_variant


def get_config(arg: str = "") -> ConfigDict:
    """Variants: "" (minutes on two CPU cores), "smoke" (seconds)."""
    check_variant(arg, ("smoke",))
    episodes = dict(name="fewshot", split="test", ways=5, shots=1, queries=15, num_episodes=1000, seed=0)
    config = ConfigDict(
        dict(
            model=dict(
                name="protonet",
                scale=10.0,
                encoder=dict(name="conv4", widths=(32, 64, 64, 64), norm="group", pool_last=False),
            ),
            task=dict(name="fewshot"),
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
            evals={
                "5way_1shot": episodes,
                "5way_5shot": episodes | dict(shots=5),
                "20way_1shot": episodes | dict(ways=20),
                "5way_1shot_cross_family": episodes | dict(mode="cross_family"),
                "5way_1shot_pixel_centroid": episodes | dict(method="pixel_centroid"),
                "5way_1shot_random_features": episodes | dict(method="random_features"),
            },
        )
    )
    if arg == "smoke":
        few = dict(ways=5, queries=2, num_episodes=8)
        config.model.encoder.widths = (8, 8, 8, 8)
        config.pipeline.update(ways=5, queries=2)
        config.validation.update(few, every=4)
        config.evals = {"5way_1shot": episodes | few}
        config.update(num_steps=8, log_every=1)
        config.checkpoint.every = 2
    return config
