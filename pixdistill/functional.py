"""The function forms of the losses, for flat inputs and for loops without modules."""

from .af_dcd import af_dcd_loss as af_dcd_loss
from .masked_distillation import masked_distillation_loss as masked_distillation_loss
from .ops.patch_lse import patch_lse as patch_lse
from .ops.row_lse import row_lse as row_lse
from .pixel_contrast import pixel_contrast_loss as pixel_contrast_loss
from .receptive_tokens import mask_diversity as mask_diversity
from .receptive_tokens import pooled_convolution as pooled_convolution
from .receptive_tokens import token_masks as token_masks
