"""QSFormer on CUB-200-2011 (arXiv 2208.12398): the settings of the released training script, where they differ from
those of `miniimagenet`.
"""

from ml_collections import ConfigDict

from xattn.config import load_config

STEPS_PER_EPOCH = 50


def get_config(arg: str = "") -> ConfigDict:
    """Variants: "" (the corrected model), "released" (as the released code trains it), "smoke" (seconds, glyphs)."""
    config = load_config(f"qsformer/miniimagenet:{arg}").unlock()
    config.model.update(
        patch_num_heads=1, patch_mix=0.99, query_residual=0.1, global_weight=0.3, global_temperature=0.1
    )
    config.model.encoder.dropout_rate = 0.1
    config.task.update(alpha=0.05, tau=0.5)
    config.optimizer.schedule.factor = 0.95
    if arg != "smoke":
        config.model.num_blocks = 2
        config.model.encoder.num_heads = 8
        config.num_steps = 150 * STEPS_PER_EPOCH
    return config
