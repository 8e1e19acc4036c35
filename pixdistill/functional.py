"""The function forms of the losses, for flat inputs and for loops without modules."""

from .af_dcd import af_dcd_terms as af_dcd_terms
from .ops.patch_lse import patch_lse as patch_lse
from .ops.row_lse import row_lse as row_lse
from .pixel_contrast import pixel_contrast_loss as pixel_contrast_loss
