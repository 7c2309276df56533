"""QSFormer on tieredImageNet (arXiv 2208.12398): the settings of the released training script, where they differ from
those of `miniimagenet`.
"""

from ml_collections import ConfigDict

from xattn.config import load_config


def get_config(arg: str = "") -> ConfigDict:
    """Variants: "" (the corrected model), "released" (as the released code trains it), "smoke" (seconds, glyphs)."""
    config = load_config(f"qsformer/miniimagenet:{arg}").unlock()
    config.model.update(patch_mix=0.5, query_residual=0.1)
    config.task.update(alpha=0.5, tau=0.5)
    config.optimizer.schedule.factor = 0.5
    if arg != "smoke":
        config.model.encoder.num_heads = 8
    return config
