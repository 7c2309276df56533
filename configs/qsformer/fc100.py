"""QSFormer on FC100 (arXiv 2208.12398): the settings of the released training script.

The folder is given by --config.data.root=DIR, in a layout of `xattn.data.folders`. The script starts from an image
encoder that was trained to tell the training classes apart; without one, training starts from random weights.
"""

from typing import Any

from ml_collections import ConfigDict

from xattn.config import check_variant

STEPS_PER_EPOCH = 50


def get_config(arg: str = "") -> ConfigDict:
    """Variants: "" (the corrected model), "released" (as the released code trains it), "smoke" (seconds, glyphs)."""
    check_variant(arg, ("released", "smoke"))
    episodes = dict(name="fewshot", split="test", ways=5, shots=1, queries=15, num_episodes=5000, seed=0)
    config: dict[str, Any] = dict(
        model=dict(
            name="qsformer",
            encoder=dict(
                name="cife", backbone=dict(name="resnet12"), num_heads=8, dropout_rate=0.5, attn_axis="tokens"
            ),
            num_blocks=4,
            num_heads=1,
            patch_num_heads=1,
            mlp_dim=2048,
            support_dropout=0.5,
            query_dropout=0.5,
            patch_dropout=0.1,
            patch_mix=0.7,
            query_residual=0.05,
            global_weight=0.4,
            global_temperature=0.5,
            emd_temperature=12.5,
            query_self_attn="joint",
            projection_norm="l2",
            freeze_patchformer=False,
            prototypes="sfc",
        ),
        task=dict(
            name="fewshot",
            alpha=0.5,
            tau=0.15,
            mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
            std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        ),
        data=dict(name="class_folders", root="", image_size=84, augment=True),
        pipeline=dict(name="episodes", ways=5, shots=1, queries=15, batch_size=1),
        optimizer=dict(
            name="sgd",
            learning_rate=1e-4,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            decay="all",
            clip_norm=3.0,
            schedule=dict(name="step", every=10 * STEPS_PER_EPOCH, factor=0.9),
        ),
        num_steps=50 * STEPS_PER_EPOCH,
        accumulate_steps=1,
        ema_decay=0.0,
        max_skipped=5,
        seed=0,
        dtype="float32",
        mesh=dict(data=1, fsdp=1, tensor=1, sequence=1),
        log_every=10,
        checkpoint=dict(every=STEPS_PER_EPOCH, keep=2),
        preempt_exit_code=0,
        validation=dict(
            name="fewshot",
            split="val",
            ways=5,
            queries=15,
            num_episodes=1000,
            seed=0,
            every=STEPS_PER_EPOCH,
            metric="accuracy",
        ),
        evals={
            "5way_1shot": episodes,
            "5way_5shot": episodes | dict(shots=5),
            "5way_1shot_inductive": episodes | dict(overrides=dict(query_self_attn="diagonal")),
        },
    )
    if arg == "released":
        config["model"]["encoder"]["attn_axis"] = "batch"
        config["model"]["freeze_patchformer"] = True
    if arg == "smoke":
        # A narrow model on 32 x 32 images of one channel: without the last pool there are 16 tokens an image.
        config["model"] |= dict(num_blocks=1, mlp_dim=16, prototypes="mean")
        config["model"]["encoder"] |= dict(
            backbone=dict(name="resnet12", widths=(8, 8, 16, 16), pool_last=False), num_heads=2, mlp_dim=16
        )
        config["task"] |= dict(mean=0.5, std=0.5)
        config["data"] = dict(name="glyphs", jitter="strong")
        config["pipeline"]["queries"] = 2
        config["validation"] |= dict(queries=2, num_episodes=4, every=4)
        config["evals"] = {"5way_1shot": episodes | dict(queries=2, num_episodes=4)}
        config |= dict(num_steps=4, log_every=1, checkpoint=dict(every=2, keep=2))
    return ConfigDict(config)
