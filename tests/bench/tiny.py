"""Sizes of the workloads at which a test can run them."""

SIZES = {
    "roofline": {"side": 64, "megabytes": 1},
    "W1": {"batch": 1, "queries": 16, "width": 8, "keys": 5, "context": 12, "num_heads": 2},
    "W2": {
        "latents": 4,
        "width": 16,
        "pixels": 50,
        "channels": 9,
        "image": {
            "num_latents": 4,
            "d_latents": 16,
            "num_blocks": 1,
            "num_self_attends_per_block": 1,
            "image_size": 4,
        },
    },
    "W3": {"name": "crossvit_tiny_240", "batch": 1},
    "W4": {"candidates": 10, "text": 3, "image": 5, "width": 8, "num_heads": 2, "num_layers": 2},
    "W5": {"ways": 2, "queries": 2, "side": 16, "widths": (4, 4, 4, 8), "qsformer": False},
    "W6": {"queries": 16, "keys": 64, "num_heads": 2, "width": 4},
    "W7a": {"images": 2, "seconds": 0.0, "batch_size": 2, "size": 16},
    "W7b": {"depth": 2, "width": 12, "batch": 1, "tokens": 4},
}
