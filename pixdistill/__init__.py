"""Composable modules for dense (pixel-level) knowledge distillation."""

import warnings

with warnings.catch_warnings():  # torch warns where NumPy is absent, which is not needed here
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch as torch

from .af_dcd import AfDCDComponents as AfDCDComponents
from .af_dcd import AfDCDLoss as AfDCDLoss
from .masked_distillation import MaskedDistillationComponents as MaskedDistillationComponents
from .masked_distillation import MaskedDistillationLoss as MaskedDistillationLoss
from .mhsa_plugin import MHSAPlugin as MHSAPlugin
from .mhsa_plugin import plug as plug
from .mhsa_plugin import unplug as unplug
from .pixel_contrast import PixelContrastComponents as PixelContrastComponents
from .pixel_contrast import PixelContrastLoss as PixelContrastLoss
from .pixel_contrast import pixel_contrast_loss as pixel_contrast_loss
from .pixel_head import PixelHead as PixelHead
from .pixel_head import tokens_to_map as tokens_to_map
from .pixel_queue import PixelQueue as PixelQueue
from .receptive_tokens import MaskedReceptiveTokens as MaskedReceptiveTokens
from .spatial_adaptor import L2Norm as L2Norm
from .spatial_adaptor import SpatialAdaptor as SpatialAdaptor

__version__ = "0.2.0"
