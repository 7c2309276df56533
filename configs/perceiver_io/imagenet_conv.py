"""Perceiver IO on ImageNet after a convolution (arXiv 2107.14795, appendix H): 48.6M parameters.

A 7 x 7 convolution and a max-pool make the image into 56 x 56 rows. The recipe is that of `imagenet_fourier`, where the
released training code's is stated to be the paper's.
"""

from ml_collections import ConfigDict

from xattn.config import load_config


def get_config(arg: str = "") -> ConfigDict:
    """Variants: "" (published), "digits" and "digits_permuted" (a minute on two CPU cores), "smoke" (seconds)."""
    config = load_config(f"perceiver_io/imagenet_fourier:{arg}").unlock()
    num_bands, side = (4, 2) if arg else (64, 56)
    config.model.input_preprocessor = dict(
        name="image_preprocessor",
        prep_type="conv",
        spatial_downsample=4,
        positions=dict(name="fourier_positions", num_bands=num_bands, max_resolution=(side, side)),
    )
    return config
