"""Composable modules for dense (pixel-level) knowledge distillation."""

from .pixel_contrast import PixelContrastComponents as PixelContrastComponents
from .pixel_contrast import PixelContrastLoss as PixelContrastLoss
from .pixel_contrast import pixel_contrast_loss as pixel_contrast_loss
from .pixel_queue import PixelQueue as PixelQueue

__version__ = "0.1.0.dev0"
