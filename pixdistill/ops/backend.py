"""What all operators share: backends and the one choice among them, and the rules for dtypes.

Each operator has three forms of equal value and gradient:

- "reference": dense autograd PyTorch, which also has second-order and forward-mode gradients;
- "torch": PyTorch in blocks (`chunked.py`), for the CPU, float64, and what the kernels do not take;
- "triton": fused kernels, for CUDA.
"""

import contextlib
import importlib.util
import os
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

Backend = Literal["auto", "triton", "torch", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "torch", "reference")


def choose(backend: Backend, device: torch.device, why_not_triton: str | None) -> Backend:
    """The form that runs for "auto", "triton" or "torch".

    "auto" takes Triton on a GPU where nothing stands against it. Triton's interpreter on a CPU is
    slow, so it runs only when asked for. Where tensors have shapes only, no kernel can run.
    """
    if device.type == "meta":
        return "torch"
    if backend == "triton":
        if why_not_triton is not None:
            raise ValueError(
                f'backend="triton" cannot run here: {why_not_triton}. Use backend="auto".'
            )
        return "torch" if without_data() else "triton"
    if backend == "auto" and device.type == "cuda" and why_not_triton is None:
        return "torch" if without_data() else "triton"
    return "torch" if backend == "auto" else backend


def without_data() -> bool:
    """Whether tensors have shapes only (FakeTensorMode), which no kernel can be launched with."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def must_be_registered(tensor: Tensor) -> bool:
    """Whether a call has to go through the operator that is registered with PyTorch.

    That is so under torch.compile, and where tensors have shapes only, which a form cannot run on.
    """
    return torch.compiler.is_compiling() or tensor.is_meta or without_data()


def why_no_kernel(device: torch.device) -> str | None:
    """The reason why no Triton kernel runs on this device, or None."""
    if not has_triton():
        return "the package triton is not installed"
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"it runs on CUDA (or under TRITON_INTERPRET=1), not on {device.type}"
    if torch.version.hip is not None:
        return "it has not been validated on ROCm"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    return None


def has_triton() -> bool:
    """Whether the package triton is installed; it is not loaded."""
    return _HAS_TRITON


_HAS_TRITON = importlib.util.find_spec("triton") is not None  # torch.compile warns of a cache


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums and statistics: float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def operand_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of matrix products: the tensor's, or the autocast dtype under autocast."""
    kind = tensor.device.type
    if kind != "meta" and tensor.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside it, autocast changes no matrix product. Free where autocast is off."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def without_subclass(tensor: Tensor) -> Tensor:
    """A plain tensor in place of one that only carries metadata, whose methods may differ."""
    kind = type(tensor)
    if kind is Tensor or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    return tensor.as_subclass(Tensor)


def detached(tensor: Tensor) -> Tensor:
    """The tensor without its graph; a copy where `without_inference` makes one."""
    return without_inference(tensor).detach()


def without_inference(tensor: Tensor) -> Tensor:
    """A copy where the tensor was created in inference mode: autograd cannot save such a tensor."""
    # torch.compile cannot ask a tensor for its mode: what it compiles raises PyTorch's own error.
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def refuse_transforms(name: str, *tensors: Tensor) -> None:
    """Raise where a transform of torch.func or forward-mode AD reaches a form that has only a VJP."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f'{name} does not take part in torch.func transforms; use backend="reference", which does'
        )
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f'{name} has no forward-mode gradient; use backend="reference"')


class FirstOrderOnly(torch.autograd.Function):
    """Identity on the gradients of the operator `name`, which raises when differentiated again.

    `grads` are followed by the tensors that the gradients depend on, so that double backward reaches
    this node and raises.
    """

    @staticmethod
    def forward(ctx: Any, name: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.name = name
        return grad.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            f"{ctx.name} has a second-order gradient in its dense form only. "
            'Use backend="reference" where one is needed.'
        )
