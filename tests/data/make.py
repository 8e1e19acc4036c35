"""Make the golden files of this folder from checkouts of the official code, or check them against it.

    git clone https://github.com/allo-rene/pcd && git -C pcd checkout 6b0ad4d
    git clone https://github.com/hunto/MasKD && git -C MasKD checkout b5af34f
    git clone https://github.com/OSVAI/Af-DCD && git -C Af-DCD checkout 5b086a7
    python tests/data/make.py --pcd pcd --maskd MasKD --af-dcd Af-DCD

This computes every output anew from the inputs in the files, and prints the largest relative
difference. `--write` saves what came. `--seed N` takes new inputs of the same shapes first.

Nothing of the official code stands here. It is imported from the checkout, on a CPU, with stand-ins
for packages that its functions do not need.
"""

import argparse
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

HERE = Path(__file__).parent
File = dict[str, Tensor]


def official(path: Path, **stand_ins: types.ModuleType) -> Any:
    """The module at a path, in a package of its own, in which `stand_ins` are found by their name."""
    package = types.ModuleType("official")
    package.__path__ = []
    for name in [name for name in sys.modules if name.partition(".")[0] == "official"]:
        del sys.modules[name]
    sys.modules["official"] = package
    for name, module in stand_ins.items():
        sys.modules[name.replace("__", ".")] = module
    spec = importlib.util.spec_from_file_location("official.inner.code", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def module_of(**contents: Any) -> types.ModuleType:
    """A module that holds these."""
    made = types.ModuleType("stand_in")
    vars(made).update(contents)
    return made


def below(file: File, prefix: str) -> File:
    """The entries below a prefix, without it."""
    return {key.removeprefix(prefix): x for key, x in file.items() if key.startswith(prefix)}


def leaf(x: Tensor) -> Tensor:
    """A copy that requires a gradient."""
    return x.clone().requires_grad_()


# --- PCD ------------------------------------------------------------------------------------------


def pixel_contrast(file: File, checkout: Path) -> File:
    """Both losses of two views, their mean and its gradients, and one enqueue."""
    utils = module_of(accuracy=None)
    code = official(checkout / "pcd" / "pcd.py", official__inner__utils=utils)
    width, size = file["queue"].shape
    model = code.PCD(nn.Identity(), nn.Identity(), width, size, float(file["temperature"]))
    model.queue.copy_(file["queue"])
    student1, student2 = leaf(file["student1"]), leaf(file["student2"])
    teacher1, teacher2 = file["teacher1"], file["teacher2"]
    loss12 = model._pixelwise_contrastive_loss(student1, teacher2)
    loss21 = model._pixelwise_contrastive_loss(student2, teacher1)
    loss = (loss12 + loss21) / 2
    loss.backward()
    pooled = nn.functional.normalize(teacher1.mean(dim=(2, 3)), dim=1)
    model._dequeue_and_enqueue(pooled)
    return {
        "loss12": loss12.detach(),
        "loss21": loss21.detach(),
        "loss": loss.detach(),
        "grad_student1": student1.grad,
        "grad_student2": student2.grad,
        "pooled_key": pooled,
        "queue_after": model.queue,
        "queue_ptr_after": model.queue_ptr,
    }


def spatial_adaptor(file: File, checkout: Path) -> File:
    """The head on vectors with the official gates in place of ReLU, on a map."""
    gate = official(checkout / "pcd" / "teacher_model" / "spatial_relu.py").SpatialReLU
    state = below(file, "head.")
    on_maps, on_vectors = nn.Sequential(), nn.Sequential()
    for index in range(1 + max(int(key.split(".")[0]) for key in state)):
        inner = below(state, f"{index}.")
        if not inner:
            on_maps.append(gate())
            on_vectors.append(nn.ReLU())
            continue
        if "running_mean" in inner:
            pair = nn.BatchNorm2d(len(inner["bias"])), nn.BatchNorm1d(len(inner["bias"]))
            states = inner, inner
        else:
            outputs, inputs = inner["weight"].shape
            options = {"bias": "bias" in inner}
            pair = nn.Conv2d(inputs, outputs, 1, **options), nn.Linear(inputs, outputs, **options)
            states = inner | {"weight": inner["weight"][:, :, None, None]}, inner
        for layer, values, whole in zip(pair, states, (on_maps, on_vectors), strict=True):
            layer.load_state_dict(values)
            whole.append(layer)
    with torch.no_grad():
        features = file["features"]
        return {
            "spatial_output": on_maps.eval()(features),
            "vector_output": on_vectors.eval()(features.mean(dim=(2, 3))),
        }


# --- MasKD ----------------------------------------------------------------------------------------


def detection(file: File, checkout: Path) -> File:
    """The loss of one level, and the learning of its masks."""
    registry = module_of(LOSSES=types.SimpleNamespace(register_module=lambda: lambda kind: kind))
    loader = module_of(_load_checkpoint=None)
    code = official(
        checkout / "mmrazor/mmrazor/models/losses/maskd.py",
        official__builder=registry,
        mmcv=module_of(),
        mmcv__runner=module_of(),
        mmcv__runner__checkpoint=loader,
    )
    state = below(file, "state.")
    count, channels = state["mask_token"].shape
    weighted = bool(file["weight_mask"])
    loss = code.MasKDLoss(
        [channels], count, weight_mask=weighted, custom_mask=bool(file["custom_mask"]),
        custom_mask_warmup=0,
    )  # fmt: skip
    (tokens,) = loss.mask_modules
    tokens.load_state_dict(state)
    student, teacher = leaf(file["student"]), file["teacher"]
    value = loss(student, teacher)
    (grad,) = torch.autograd.grad(value, student)
    made = {"loss": value.detach(), "grad_student": grad}
    made["masks_teacher"] = tokens.forward_mask(teacher).detach()
    if weighted:
        made["weights_teacher"] = tokens.forward_prob(teacher).flatten(1).detach()
    x = leaf(file["learn_input"])
    output, dice = tokens(x)
    ((output * file["learn_cotangent"]).sum() + dice).backward()
    made |= {"learn_output": output.detach(), "dice": dice.detach(), "grad_learn_input": x.grad}
    return made | {f"grad_{name}": p.grad for name, p in tokens.named_parameters()}


def segmentation(file: File, checkout: Path) -> File:
    """The loss of the segmentation code, with its factor 0.5."""
    code = official(checkout / "segmentation" / "losses" / "maskd.py")
    count, channels = file["mask_token"].shape
    loss = code.MasKDLoss.__new__(code.MasKDLoss)  # its constructor wants a checkpoint
    nn.Module.__init__(loss)
    loss.mask_module = code.MaskModule(channels, count)
    loss.mask_module.load_state_dict({"mask_token": file["mask_token"]})
    student = leaf(file["student"])
    value = loss(student, file["teacher"])
    value.backward()
    return {"loss": value.detach(), "grad_student": student.grad}


# --- Af-DCD ---------------------------------------------------------------------------------------


def af_dcd(file: File, checkout: Path) -> File:
    """Both terms with a fixed mask, and the contrast of a given map."""
    code = official(checkout / "losses" / "ocmgd.py")
    loss = code.OmniContrastiveFeatureLoss(
        student_channels=file["student"].shape[1],
        teacher_channels=file["teacher"].shape[1],
        tau_ocd=round(float(file["temperature"]), 6),
        M_ocd=int(file["num_groups"]),
        pool_size=int(file["pool"]),
        patch_size=tuple(file["patch"].tolist()),
        rand_mask=False,
        enhance_projector=bool(file["enhanced"]),
    )
    loss.load_state_dict(below(file, "state."))
    student, projected, teacher = leaf(file["student"]), leaf(file["projected"]), file["teacher"]
    made: File = {}
    for name, term in zip(("mimic", "contrast"), loss(student, teacher), strict=True):
        (grad,) = torch.autograd.grad(term, student, retain_graph=True)
        made |= {name: term.detach(), f"grad_student_{name}": grad}
    total = loss.get_omni_contrastive_loss(projected, teacher)
    (grad,) = torch.autograd.grad(total, projected)
    return made | {"contrast_of_projected_sum": total.detach(), "grad_projected": grad}


# --- All files ------------------------------------------------------------------------------------

MAKERS = {
    "pcd_pixel_contrast": (pixel_contrast, "pcd"),
    "pcd_spatial_adaptor": (spatial_adaptor, "pcd"),
    "maskd_det": (detection, "maskd"),
    "maskd_seg": (segmentation, "maskd"),
    "afdcd": (af_dcd, "af_dcd"),
}


def anew(file: File, seed: int) -> File:
    """Random inputs in place of those of a file; settings stay."""
    generator = torch.Generator().manual_seed(seed)
    fresh = {}
    for key, x in file.items():
        if x.is_floating_point() and x.dim() > 0:
            x = torch.randn(x.shape, generator=generator) * (0.3 if ".weight" in key else 1.0)
            if key == "queue":
                x = nn.functional.normalize(x, dim=0)
            elif key.endswith("running_var"):
                x = x.square() + 0.5
        fresh[key] = x
    return fresh


def difference(one: Tensor, other: Tensor) -> float:
    """Relative, in the Frobenius norm; of the untrained projector's contrast, absolute."""
    norm = other.double().norm()
    return float((one.double() - other.double()).norm() / (norm if norm > 1e-4 else 1.0))


def main() -> None:
    """Compute, compare, and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("pcd", "maskd", "af-dcd"):
        parser.add_argument(f"--{name}", type=Path, metavar="CHECKOUT", help=f"of {name}")
    parser.add_argument("--seed", type=int, help="take new inputs")
    parser.add_argument("--write", action="store_true", help="save what came")
    arguments = parser.parse_args()
    torch.Tensor.cuda = lambda self, *_, **__: self  # the official code calls it
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for path in sorted(HERE.glob("*.npz")):
        (maker, project), *_ = (MAKERS[name] for name in MAKERS if path.name.startswith(name))
        checkout = getattr(arguments, project)
        if checkout is None:
            print(f"{path.stem}: needs --{project.replace('_', '-')}")
            continue
        with np.load(path) as stored:
            file = {key: torch.from_numpy(stored[key]) for key in stored.files}
        inputs = file if arguments.seed is None else anew(file, arguments.seed)
        made = maker(inputs, checkout)
        outputs = {key: x.detach().reshape(file[key].shape) for key, x in made.items()}
        worst = max(difference(outputs[key], file[key]) for key in outputs)
        print(f"{path.stem}: {len(outputs)} outputs, largest difference {worst:.1e}")
        if arguments.write:
            saved = {key: outputs.get(key, inputs[key]).numpy() for key in file}
            np.savez(path, **saved)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
