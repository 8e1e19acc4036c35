"""Where there is no GPU, Triton's kernels run on the CPU: the variable must be set before its import."""

import os

import torch
from hypothesis import settings

# What PyTorch wants of CUDA's matrix products in deterministic mode, before the first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if torch.cuda.is_available():
    # TF32 is tested in the kernels. In a convolution before them it would move a ReLU or a maximum to
    # another side, and a gradient with it.
    torch.backends.cudnn.allow_tf32 = False
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # the suite is parallel by processes

settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
