"""The vision transformer on ImageNet by CrossViT's recipe, for which it is the baseline (arXiv 2103.14899, table 2).

The variant is timm's name (`deit_tiny_patch16_224`) or CrossViT's (`deit_9`, `deit_15_dagger`); what is not said here
is that of `crossvit/imagenet`, fine-tuning at 384 pixels included. The folder is given by --config.data.root=DIR.
"""

from ml_collections import ConfigDict

from xattn.config import check_variant, load_config

VARIANTS = (
    *(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
    "deit_base_patch16_384",
    *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base")),
    *(f"deit_{depth}{stem}" for depth in (9, 15, 18) for stem in ("", "_dagger")),
)


def get_config(arg: str = "") -> ConfigDict:
    """Variants: the names above ("": deit_small_patch16_224), and "smoke" (seconds, embedded data)."""
    variant = check_variant(arg, (*VARIANTS, "smoke")) or "deit_small_patch16_224"
    like = "smoke" if arg == "smoke" else "15_dagger_408" if variant.endswith("384") else "15_240"
    config = load_config(f"crossvit/imagenet:{like}").unlock()
    if arg == "smoke":
        config.model = ConfigDict(
            dict(name="vit", num_classes=100, image_size=32, patch_size=8, features=16, depth=1, num_heads=2)
        )
        return config
    config.model.name = variant
    config.data.image_size = 384 if variant.endswith("384") else 224
    if variant.startswith("vit"):  # what timm evaluates its own weights of these with
        config.task.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        config.data.transform.crop_fraction = 0.9
        config.pipeline.transforms.random_erasing.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return config
