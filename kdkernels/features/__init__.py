"""Which layers to distil, and their outputs: `FeatureCapture`, `match_layers`, `MultiLayerLoss`. Plain PyTorch."""

from kdkernels.features.capture import FeatureCapture
from kdkernels.features.layers import layers_of, match_layers
from kdkernels.features.multilayer import MultiLayerLoss

__all__ = ["FeatureCapture", "MultiLayerLoss", "layers_of", "match_layers"]
