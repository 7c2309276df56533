"""CrossViT on smaller sets of images, from weights trained on ImageNet (arXiv 2103.14899, section 4.3).

    xattn train --config=crossvit/transfer:cifar10 --config.init_from.workdir=WORKDIR --config.data.root=DIR

WORKDIR is a run of `crossvit/imagenet`, or what `xattn convert timm_crossvit` wrote; config.model must be the same but
for the classes (and the sizes of the images, whose positions are then interpolated). `folders` takes one's own images,
in class folders; config.model.num_classes says how many.

The recipe is the paper's: SGD, 1000 epochs, batches of 768, learning rate 0.01 with 5 epochs of warm-up, weight decay
1e-4, no random erasing, no stochastic depth.
"""

from ml_collections import ConfigDict

from xattn.config import check_variant, load_config

# Name: source, classes, training images, and the split that is reported.
DATASETS = {
    "cifar10": ("cifar10", 10, 50_000),
    "cifar100": ("cifar100", 100, 50_000),
    "pets": ("pets", 37, 3_680),
    "folders": ("imagenet", 2, 10_000),
}


def get_config(arg: str = "") -> ConfigDict:
    """Variants: a data set ("": cifar10), and "smoke" (seconds, embedded data)."""
    dataset = check_variant(arg, (*DATASETS, "smoke")) or "cifar10"
    config = load_config("crossvit/imagenet:" + ("smoke" if dataset == "smoke" else "15_240")).unlock()
    config.model.drop_path_rate = 0.0
    del config.pipeline.transforms.random_erasing
    config.optimizer = ConfigDict(
        dict(
            name="sgd",
            learning_rate=0.01,
            momentum=0.9,
            weight_decay=1e-4,
            decay="kernels",
            clip_norm=0.0,
            schedule=dict(name="cosine", warmup_steps=1, final_fraction=0.0),
        )
    )
    if dataset == "smoke":
        return config
    source, num_classes, num_images = DATASETS[dataset]
    steps_per_epoch = num_images // 768
    config.model.num_classes = num_classes
    config.data.name = source
    config.pipeline.batch_size = 768
    config.optimizer.schedule.warmup_steps = 5 * steps_per_epoch
    config.num_steps = 1000 * steps_per_epoch
    config.validation.update(num_examples=None, every=10 * steps_per_epoch)
    config.evals = ConfigDict({dataset: dict(name="classification", split="test")})
    return config
