"""Perceiver IO as an autoencoder of video, sound and label (arXiv 2107.14795, section 4.3): 19.9M parameters.

The folder is given by --config.data.root=DIR (`ClipFolders` in `xattn.data.clips`), of Kinetics-700 in the paper. The
training code was never released: the weights of the losses, the share of hidden labels and the points a step ([MEM])
are remembered from the paper and were not checked against its text; optimizer, batch and length are our choice.
"""

from typing import Any

from ml_collections import ConfigDict

from xattn.config import check_variant


def get_config(arg: str = "") -> ConfigDict:
    """Variants: "" (published), "clips" (rendered clips, minutes on two CPU cores), "smoke" (seconds)."""
    check_variant(arg, ("clips", "smoke"))
    image = dict(name="fourier_positions", num_bands=32, max_resolution=(16, 56, 56))
    audio = dict(name="fourier_positions", num_bands=192, max_resolution=(30720,))
    config: dict[str, Any] = dict(
        model=dict(
            name="perceiver_io",
            input_preprocessor=dict(
                name="multimodal_preprocessor",
                modalities=dict(
                    audio=dict(name="audio_preprocessor", samples_per_patch=16, positions=audio),
                    image=dict(name="image_preprocessor", prep_type="patches", spatial_downsample=4, positions=image),
                    label=dict(name="one_hot_preprocessor"),
                ),
                mask_probs=dict(audio=0.0, image=0.0, label=1.0),
                train_mask_probs=dict(audio=0.0, image=0.0, label=0.5),  # [MEM]
                min_padding_size=4,
            ),
            encoder=dict(
                name="perceiver_encoder",
                num_latents=784,
                latent_features=512,
                num_blocks=1,
                num_self_attends_per_block=8,
                num_cross_heads=1,
                num_self_heads=8,
                remat=False,
            ),
            decoder=dict(
                name="perceiver_decoder",
                queries=dict(
                    audio=dict(name="queries", index_dims=(1920,), positions=audio),
                    image=dict(name="queries", index_dims=(16, 224, 224), positions=image),
                    label=dict(
                        name="queries", index_dims=(), positions=dict(name="trainable_positions", features=1024)
                    ),
                ),
                output_features=512,
                use_query_residual=False,
                decode_chunk_size=16384,
            ),
            output_postprocessor=dict(
                name="multimodal_postprocessor",
                modalities=dict(
                    audio=dict(name="audio_postprocessor", samples_per_patch=16),
                    image=dict(name="projection_postprocessor", features=3),
                    label=dict(name="projection_postprocessor", features=700),
                ),
            ),
        ),
        task=dict(
            name="autoencoding",
            num_classes=700,
            samples_per_patch=16,
            image_points=512,  # [MEM]
            audio_points=512,  # [MEM]
            image_weight=0.03,  # [MEM]
            audio_weight=1.0,  # [MEM]
            label_weight=1e-4,  # [MEM]
        ),
        data=dict(name="clip_folders", root="", frames=16, image_size=224, audio_length=30720, sample_rate=48000),
        pipeline=dict(name="examples", batch_size=1024),
        optimizer=dict(
            name="adamw",
            learning_rate=1e-3,
            weight_decay=0.1,
            decay="weights",
            clip_norm=10.0,
            schedule=dict(name="cosine", warmup_steps=1000),
        ),
        num_steps=100_000,
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
            name="autoencoding", split="val", num_examples=256, chunks=128, every=5000, metric="image_psnr"
        ),
        evals=dict(clips=dict(name="autoencoding", split="val", chunks=128)),
    )
    if arg in ("clips", "smoke"):
        # Clips of 4 frames of 32 x 32 pixels and 512 samples, of 4 classes.
        image = dict(name="fourier_positions", num_bands=8, max_resolution=(4, 8, 8))
        audio = dict(name="fourier_positions", num_bands=16, max_resolution=(512,))
        model = config["model"]
        model["input_preprocessor"]["modalities"]["audio"]["positions"] = audio
        model["input_preprocessor"]["modalities"]["image"]["positions"] = image
        model["encoder"] |= dict(num_latents=64, latent_features=96, num_self_attends_per_block=3, num_self_heads=4)
        model["decoder"] |= dict(
            queries=dict(
                audio=dict(name="queries", index_dims=(32,), positions=audio),
                image=dict(name="queries", index_dims=(4, 32, 32), positions=image),
                label=dict(name="queries", index_dims=(), positions=dict(name="trainable_positions", features=64)),
            ),
            output_features=96,
        )
        model["output_postprocessor"]["modalities"]["label"] = dict(name="projection_postprocessor", features=4)
        # With the published weights so short a training would learn nothing but the sound.
        config["task"] |= dict(num_classes=4, image_points=256, audio_points=16, image_weight=1.0, label_weight=0.03)
        config["data"] = dict(
            name="rendered_clips", frames=4, image_size=(32, 32), audio_length=512, num_classes=4, num_examples=10_000
        )
        config["pipeline"]["batch_size"] = 16
        config["optimizer"] |= dict(learning_rate=2e-3, schedule=dict(name="cosine", warmup_steps=100))
        config["validation"] |= dict(num_examples=64, chunks=1, every=500)
        config["evals"] = dict(clips=dict(name="autoencoding", split="test", num_examples=200))
        config |= dict(num_steps=1000, dtype="float32", log_every=10, checkpoint=dict(every=500, keep=2))
        config["mesh"] = dict(data=1, fsdp=1, tensor=1, sequence=1)
    if arg == "smoke":
        config["model"]["encoder"] |= dict(num_latents=8, latent_features=16, num_self_attends_per_block=1)
        config["model"]["decoder"]["output_features"] = 16
        config["pipeline"]["batch_size"] = 2
        config["validation"] |= dict(num_examples=4, every=4)
        config["evals"]["clips"] |= dict(num_examples=4, chunks=2)
        config |= dict(num_steps=4, log_every=1, checkpoint=dict(every=2, keep=2))
    return ConfigDict(config)
