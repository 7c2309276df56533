"""Perceiver IO on ImageNet with learned positions (arXiv 2107.14795, appendix H): 62.3M parameters.

The model is told nothing about the neighbourhood of pixels: each has a trained vector. The recipe is that of
`imagenet_fourier`, where the released training code's is stated to be the paper's.
"""

from ml_collections import ConfigDict

from xattn.config import load_config


def get_config(arg: str = "") -> ConfigDict:
    """Variants: "" (published), "digits" and "digits_permuted" (a minute on two CPU cores), "smoke" (seconds)."""
    config = load_config(f"perceiver_io/imagenet_fourier:{arg}").unlock()
    features, side = (32, 8) if arg else (256, 224)
    config.model.input_preprocessor = dict(
        name="image_preprocessor",
        prep_type="conv1x1",
        num_channels=features,
        positions=dict(
            name="trainable_positions", features=features, index_dims=(side, side), project_features=features
        ),
    )
    config.model.decoder.use_query_residual = False
    return config
