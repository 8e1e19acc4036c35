"""Teachers that were trained without labels, from the checkpoint files that their projects publish.

`load_teacher("mocov3", file)` returns a frozen network, images `[B, 3, H, W]` -> `[B, D, h, w]`: the
backbone's last map, and at each cell the head that was trained on pooled vectors, by `SpatialAdaptor`.
Widths and depths are read from the shapes. A missing key and a wrong shape are named.
"""

import argparse
import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pixdistill import L2Norm, SpatialAdaptor, tokens_to_map

State = dict[str, Tensor]


class Format(NamedTuple):
    """Where a checkpoint keeps the networks; keys without the `module.` of DDP."""

    entry: str | None
    """Entry of the file that is the state dict; None: the file itself."""
    backbone: str
    """Beginning of the backbone's keys."""
    heads: tuple[tuple[str, str], ...]
    """Of each variant: the beginning of the head's keys, and its layers, numbered from 0."""
    unused: tuple[str, ...] = ()
    """Beginnings of further keys that are left out."""


LAYER = "linear bn relu"
FORMATS = {
    # github.com/facebookresearch/moco-v3, ResNets and ViTs
    "mocov3": Format(
        "state_dict",
        "momentum_encoder.",
        (
            ("momentum_encoder.fc.", f"{LAYER} linear plain_bn"),
            ("momentum_encoder.head.", f"{LAYER} {LAYER} linear plain_bn"),
        ),
    ),
    # github.com/facebookresearch/dino, "full ckpt", without the prototypes head.last_layer
    "dino": Format(
        "teacher",
        "backbone.",
        (
            ("head.mlp.", "affine gelu affine gelu affine l2"),
            ("head.mlp.", "affine bn gelu affine bn gelu affine l2"),
        ),
    ),
    # github.com/facebookresearch/swav, without the prototypes
    "swav": Format(None, "", (("projection_head.", "affine bn relu affine l2"),), ("prototypes",)),
    # github.com/facebookresearch/barlowtwins, "full checkpoint", without the BatchNorm of its loss
    "barlowtwins": Format("model", "backbone.", (("projector.", f"{LAYER} {LAYER} linear"),)),
    # BYOL in PyTorch: as PCD's official code reads it, and github.com/vturrisi/solo-learn
    "byol": Format("model", "target_encoder.", (("target_encoder.fc.", "affine bn relu linear"),)),
    "solo-byol": Format(
        "state_dict", "momentum_backbone.", (("momentum_projector.", "affine bn relu affine"),)
    ),
}
PARTS = {
    "linear": ("weight",),
    "affine": ("weight", "bias"),
    "bn": ("weight", "bias", "running_mean", "running_var"),
    "plain_bn": ("running_mean", "running_var"),
}
"""Keys of the layers that have any."""


class Teacher(nn.Module):
    """Images `[B, 3, H, W]` -> the head's map `[B, D, h, w]`; frozen, in eval mode."""

    def __init__(self, trunk: Any, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.adaptor = trunk, SpatialAdaptor(head)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The head at every cell of the backbone's map."""
        features = self.trunk.forward_features(images)
        if features.dim() == 3:  # a ViT's tokens
            patch = self.trunk.patch_embed.patch_size
            grid = [size // cell for size, cell in zip(images.shape[2:], patch, strict=True)]
            features = tokens_to_map(features, grid, prefix_tokens=self.trunk.num_prefix_tokens)
        return self.adaptor(features)


def load_teacher(name: str, file: str | Path) -> Teacher:
    """The teacher of a checkpoint in the format `name`; ValueError says what is wrong with the file."""
    known = FORMATS[name]
    state = _read(Path(file), known.entry)
    # The variant with the fewest missing keys is the one that was meant.
    prefix, layers = min(known.heads, key=lambda head: len(_missing(state, *head)))
    try:
        for key in _missing(state, prefix, layers):
            raise KeyError(key)
        drop = (prefix, *known.unused)
        trunk_state = {key: state[key] for key in state if not key.startswith(drop)}
        trunk: Any = _trunk(_under(trunk_state, known.backbone), known.backbone, name)
        _load(trunk, trunk_state, known.backbone)
        head = _head(state, prefix, layers, trunk.num_features)
        _load(head, state, prefix)
    except KeyError as error:
        found = sorted({".".join(key.split(".")[:2]) for key in state})
        raise ValueError(
            f"{file} is not a complete checkpoint in the format {name}: no key {error.args[0]!r}. "
            f"Expected are {known.backbone}* for the backbone and {prefix}* for the head (a file of "
            f"the backbone alone has no head to distill); found {', '.join(found[:12])}"
        ) from None
    except RuntimeError as error:
        raise ValueError(f"{file} in the format {name}: {error}") from None
    return Teacher(trunk, head)


def _read(file: Path, entry: str | None) -> State:
    """The state dict of the file, without `module.`; nothing in the file is executed."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give the teacher's checkpoint file")
    try:
        # DINO's file holds its arguments.
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors, which is not loaded, since it could run code. Where you "
            f"trust it, load it with weights_only=False and save its state dict alone: {error}"
        ) from None
    if entry is None and "state_dict" in saved:  # as SwAV saves it during training
        saved = saved["state_dict"]
    elif entry is not None:
        if entry not in saved:
            raise ValueError(f"{file} has no entry {entry!r}; it has {', '.join(list(saved)[:8])}")
        saved = saved[entry]
    return {key.removeprefix("module."): value for key, value in saved.items()}


def _missing(state: State, prefix: str, layers: str) -> list[str]:
    """Keys of the head that the state dict lacks."""
    numbered = enumerate(layers.split())
    keys = [f"{prefix}{i}.{part}" for i, layer in numbered for part in PARTS.get(layer, ())]
    return [key for key in keys if key not in state]


def _head(state: State, prefix: str, layers: str, width: int) -> nn.Sequential:
    """The head's layers for vectors of this width, in the widths of the tensors."""
    head = nn.Sequential()
    for number, layer in enumerate(layers.split()):
        key = f"{prefix}{number}." + (
            "weight" if "weight" in PARTS.get(layer, ()) else "running_mean"
        )
        if layer in PARTS and state[key].shape[-1] != width:
            raise RuntimeError(
                f"{key} has shape {tuple(state[key].shape)}; expected are [..., {width}]"
            )
        if layer in ("linear", "affine"):
            head.append(nn.Linear(width, len(state[key]), bias=layer == "affine"))
            width = len(state[key])
        elif layer in ("bn", "plain_bn"):
            head.append(nn.BatchNorm1d(width, affine=layer == "bn"))
        else:
            head.append({"relu": nn.ReLU, "gelu": nn.GELU, "l2": L2Norm}[layer]())
    return head


def _trunk(state: State, prefix: str, name: str) -> nn.Module:
    """The ResNet or ViT that has these keys and shapes."""

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise KeyError(prefix + key)
        return state[key].shape

    if "patch_embed.proj.weight" in state:
        width, _, patch, _ = shape("patch_embed.proj.weight")
        # MoCo v3 has 12 heads up to ViT-B and 16 above; DINO and DeiT have heads of width 64.
        heads = (12 if width <= 768 else 16) if name == "mocov3" else max(1, width // 64)
        return VisionTransformer(
            img_size=math.isqrt(shape("pos_embed")[1] - 1) * patch,
            patch_size=patch,
            embed_dim=width,
            depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
            num_heads=heads,
            mlp_ratio=shape("blocks.0.mlp.fc1.weight")[0] / width,
            num_classes=0,
            dynamic_img_size=True,
        )
    stages = [f"layer{stage}." for stage in (1, 2, 3, 4)]
    return ResNet(
        Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock,
        [len({key.split(".")[1] for key in state if key.startswith(stage)}) for stage in stages],
        channels=[shape(f"{stage}0.conv1.weight")[0] for stage in stages],
        num_classes=0,
    )


def _under(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}


def _load(module: nn.Module, state: State, prefix: str) -> None:
    for key in module.state_dict():
        if prefix + key not in state:
            raise KeyError(prefix + key)
    try:
        module.load_state_dict(_under(state, prefix))
    except RuntimeError as error:
        raise RuntimeError(f"keys {prefix}*: {error}") from None
