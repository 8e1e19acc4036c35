"""docs/recipes/pretrain_pcd.py and teachers.py, on small made images and checkpoints."""

import argparse
import functools
import importlib
import math
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_close, fresh_compiler, python_blocks, run
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

MISSING = [name for name in ("torchvision", "timm", "PIL", "tqdm") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f'not installed: {MISSING}; pip install ".[recipes]"'
)
RECIPES = ROOT / "docs" / "recipes"


@pytest.fixture(scope="module", autouse=True)
def _recipes():
    """Import the recipes as their own folder does."""
    sys.path.insert(0, str(RECIPES))
    yield
    sys.path.remove(str(RECIPES))


def recipe(name):
    return importlib.import_module(name)


# --- Checkpoints with the keys of the official files, at small width ------------------------------


def random_state(shapes):
    """Values for these keys and shapes, with variances that are positive."""
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif key.endswith("running_var"):
            state[key] = torch.rand(shape) + 0.5
        else:
            state[key] = torch.randn(shape) / math.sqrt(max(1, math.prod(shape[1:])))
    return state


@functools.cache
def resnet50_shapes():
    """The keys of torchvision's ResNet-50, in 1/16 of its width after the first convolution."""
    from torchvision.models import resnet50

    with torch.device("meta"):
        whole = resnet50().state_dict()
    shapes = {}
    for key, value in whole.items():
        first = key.startswith(("conv1.", "bn1."))
        shape = [d if first or d < 16 else d // 16 for d in value.shape]
        if key in ("layer1.0.conv1.weight", "layer1.0.downsample.0.weight"):
            shape[1] = 64
        if not key.startswith("fc."):
            shapes[key] = shape
    return shapes


def vit_shapes(width, depth=2, patch=8, grid=4):
    shapes = {
        "cls_token": [1, 1, width],
        "pos_embed": [1, 1 + grid * grid, width],
        "patch_embed.proj.weight": [width, 3, patch, patch],
        "patch_embed.proj.bias": [width],
    }
    for block in range(depth):
        path = f"blocks.{block}."
        shapes |= affine(f"{path}norm1", width) | affine(f"{path}norm2", width)
        shapes |= linear(f"{path}attn.qkv", 3 * width, width, True)
        shapes |= linear(f"{path}attn.proj", width, width, True)
        shapes |= linear(f"{path}mlp.fc1", 4 * width, width, True)
        shapes |= linear(f"{path}mlp.fc2", width, 4 * width, True)
    return shapes | affine("norm", width)


def linear(key, outputs, inputs, bias=False):
    return {f"{key}.weight": [outputs, inputs]} | ({f"{key}.bias": [outputs]} if bias else {})


def affine(key, width):
    return {f"{key}.weight": [width], f"{key}.bias": [width]}


def norm(key, width, scaled=True):
    shapes = {f"{key}.{part}": [width] for part in ("running_mean", "running_var")}
    return (affine(key, width) if scaled else {}) | shapes | {f"{key}.num_batches_tracked": []}


def under(prefix, shapes):
    return {prefix + key: shape for key, shape in shapes.items()}


HIDDEN, OUT = 24, 16
TEACHERS = {
    "mocov3": "linear bn relu linear bn",
    "mocov3 ViT": "linear bn relu linear bn relu linear bn",
    "dino": "linear gelu linear gelu linear l2",
    "dino BatchNorm": "linear bn gelu linear bn gelu linear l2",
    "dino ViT": "linear gelu linear gelu linear l2",
    "swav": "linear bn relu linear l2",
    "barlowtwins": "linear bn relu linear bn relu linear",
    "byol": "linear bn relu linear",
    "solo-byol": "linear bn relu linear",
}
"""The format (and kind), and what its project's head computes."""


def official(name):
    """The file as its project saves it: entries, prefixes and the other networks too."""
    torch.manual_seed(0)
    width = {"mocov3 ViT": 96, "dino ViT": 128}.get(name, 128)
    trunk = vit_shapes(width) if name.endswith("ViT") else resnet50_shapes()
    if name.startswith("mocov3"):
        head = linear("0", HIDDEN, width) | norm("1", HIDDEN)
        if name == "mocov3":
            head |= linear("3", OUT, HIDDEN) | norm("4", OUT, scaled=False)
        else:
            head |= linear("3", HIDDEN, HIDDEN) | norm("4", HIDDEN)
            head |= linear("6", OUT, HIDDEN) | norm("7", OUT, scaled=False)
        encoder = trunk | under("fc." if name == "mocov3" else "head.", head)
        shapes = under("base_encoder.", encoder) | under("momentum_encoder.", encoder)
        shapes |= under("predictor.", linear("0", HIDDEN, OUT))
        return {"state_dict": random_state(under("module.", shapes)), "epoch": 300, "arch": "vit"}
    if name.startswith("dino"):
        places = ("0", "3", "6") if name == "dino BatchNorm" else ("0", "2", "4")
        sizes = ((HIDDEN, width), (HIDDEN, HIDDEN), (OUT, HIDDEN))
        head = {}
        for place, size in zip(places, sizes, strict=True):
            head |= linear(place, *size, bias=True)
        if name == "dino BatchNorm":
            head |= norm("1", HIDDEN) | norm("4", HIDDEN)
        shapes = under("backbone.", trunk) | under("head.mlp.", head)
        shapes |= {"head.last_layer.weight_g": [40, 1], "head.last_layer.weight_v": [40, OUT]}
        # DINO wraps a teacher with BatchNorm in DDP, and a ViT not.
        teacher = random_state(shapes if name == "dino ViT" else under("module.", shapes))
        arguments = argparse.Namespace(arch="vit_small", lr=0.0005)
        return {"student": {}, "teacher": teacher, "args": arguments, "epoch": 100}
    if name == "swav":
        head = linear("0", HIDDEN, width, True) | norm("1", HIDDEN) | linear("3", OUT, HIDDEN, True)
        shapes = trunk | under("projection_head.", head) | {"prototypes.weight": [30, OUT]}
        return random_state(under("module.", shapes))
    if name == "barlowtwins":
        head = linear("0", HIDDEN, width) | norm("1", HIDDEN) | linear("3", HIDDEN, HIDDEN)
        head |= norm("4", HIDDEN) | linear("6", OUT, HIDDEN)
        shapes = under("backbone.", trunk) | under("projector.", head)
        shapes |= norm("bn", OUT, scaled=False)
        return {"epoch": 1000, "model": random_state(under("module.", shapes)), "optimizer": {}}
    head = linear("0", HIDDEN, width, True) | norm("1", HIDDEN)
    if name == "byol":
        encoder = trunk | under("fc.", head | linear("3", OUT, HIDDEN))
        shapes = under("online_encoder.", encoder) | under("target_encoder.", encoder)
        return {"model": random_state(under("module.", shapes))}
    head |= linear("3", OUT, HIDDEN, True)
    shapes = under("backbone.", trunk) | under("momentum_backbone.", trunk)
    shapes |= under("projector.", head) | under("momentum_projector.", head)
    return {"state_dict": random_state(shapes), "epoch": 399}


PLACES = {
    "mocov3": ("state_dict", "module.momentum_encoder.", "module.momentum_encoder.fc."),
    "mocov3 ViT": ("state_dict", "module.momentum_encoder.", "module.momentum_encoder.head."),
    "dino": ("teacher", "module.backbone.", "module.head.mlp."),
    "dino BatchNorm": ("teacher", "module.backbone.", "module.head.mlp."),
    "dino ViT": ("teacher", "backbone.", "head.mlp."),
    "swav": (None, "module.", "module.projection_head."),
    "barlowtwins": ("model", "module.backbone.", "module.projector."),
    "byol": ("model", "module.target_encoder.", "module.target_encoder.fc."),
    "solo-byol": ("state_dict", "momentum_backbone.", "momentum_projector."),
}
"""Entry of the file, and the beginnings of the keys of backbone and head."""


def state_of(saved, name):
    entry = PLACES[name][0]
    return saved if entry is None else saved[entry]


def saved_at(folder, saved):
    file = folder / "teacher.pth"
    torch.save(saved, file)
    return file


# --- What the networks compute, written with functions --------------------------------------------


def batch_norm(x, state, key):
    scale = [state.get(f"{key}.{part}") for part in ("weight", "bias")]
    return F.batch_norm(x, state[f"{key}.running_mean"], state[f"{key}.running_var"], *scale)


def resnet50_map(state, x):
    def convolve(x, conv, bn, stride=1):
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return batch_norm(x, state, bn)

    x = F.max_pool2d(convolve(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            path = f"layer{stage}.{block}"
            stride = 2 if block == 0 and stage > 1 else 1
            y = convolve(x, f"{path}.conv1", f"{path}.bn1").relu()
            y = convolve(y, f"{path}.conv2", f"{path}.bn2", stride).relu()
            y = convolve(y, f"{path}.conv3", f"{path}.bn3")
            if block == 0:
                x = convolve(x, f"{path}.downsample.0", f"{path}.downsample.1", stride)
            x = (x + y).relu()
    return x


def vit_map(state, x, heads):
    """The patch tokens after the last norm, as a map; images of the size of the position code."""

    def layer(x, key):
        return F.linear(x, state[f"{key}.weight"], state[f"{key}.bias"])

    def layer_norm(x, key):
        return F.layer_norm(x, x.shape[-1:], state[f"{key}.weight"], state[f"{key}.bias"], 1e-6)

    proj = state["patch_embed.proj.weight"]
    patches = F.conv2d(x, proj, state["patch_embed.proj.bias"], stride=proj.shape[-1])
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), patches.flatten(2).mT], dim=1)
    x = x + state["pos_embed"]
    for block in range(2):
        path = f"blocks.{block}"
        qkv = layer(layer_norm(x, f"{path}.norm1"), f"{path}.attn.qkv")
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        seen = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
        x = x + layer(seen.transpose(1, 2).flatten(2), f"{path}.attn.proj")
        hidden = F.gelu(layer(layer_norm(x, f"{path}.norm2"), f"{path}.mlp.fc1"))
        x = x + layer(hidden, f"{path}.mlp.fc2")
    return layer_norm(x, "norm")[:, 1:].mT.unflatten(2, patches.shape[2:])


def head_of(x, state, layers):
    for number, layer in enumerate(layers.split()):
        if layer == "linear":
            x = F.linear(x, state[f"{number}.weight"], state.get(f"{number}.bias"))
        elif layer == "bn":
            x = batch_norm(x, state, str(number))
        else:
            x = {"relu": F.relu, "gelu": F.gelu, "l2": F.normalize}[layer](x)
    return x


def part(state, prefix):
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_compute_what_their_projects_do(name, tmp_path):
    """Backbone and head of the official file: the mean of the map is the head of the pooled vector."""
    saved = official(name)
    teacher = recipe("teachers").load_teacher(name.split()[0], saved_at(tmp_path, saved))
    _, backbone, head = PLACES[name]
    state = {key: value.double() for key, value in state_of(saved, name).items()}
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        if name.endswith("ViT"):
            heads = 12 if name.startswith("mocov3") else 2  # of width 64
            features = vit_map(part(state, backbone), images, heads)
        else:
            features = resnet50_map(part(state, backbone), images)
        truth = head_of(features.mean(dim=(2, 3)), part(state, head), TEACHERS[name])
    made = teacher.double()(images)
    assert made.shape == (2, OUT, *features.shape[2:])
    assert_close(made.mean(dim=(2, 3)), truth, 1e-10)
    assert not teacher.train().trunk.training
    assert not made.requires_grad


def test_a_vit_takes_other_sizes(tmp_path):
    teacher = recipe("teachers").load_teacher("dino", saved_at(tmp_path, official("dino ViT")))
    assert teacher(torch.randn(1, 3, 48, 64)).shape == (1, OUT, 6, 8)


@pytest.mark.parametrize("name", TEACHERS)
def test_missing_and_wrong_keys_are_named(name, tmp_path):
    load, kind = recipe("teachers").load_teacher, name.split()[0]
    _, backbone, head = PLACES[name]
    saved = official(name)
    state = state_of(saved, name)
    for key in (f"{head}0.weight", f"{backbone}{'norm.bias' if 'ViT' in name else 'bn1.bias'}"):
        value = state.pop(key)
        with pytest.raises(ValueError, match=f"no key '{key.removeprefix('module.')}'"):
            load(kind, saved_at(tmp_path, saved))
        state[key] = value
    state[f"{head}9.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"9\.weight"):
        load(kind, saved_at(tmp_path, saved))
    del state[f"{head}9.weight"]
    matrices = [i for i in range(9) if state.get(f"{head}{i}.weight", torch.ones(1)).dim() == 2]
    for key in (f"{head}{matrices[0]}.weight", f"{head}{matrices[-1]}.weight"):
        value = state[key]
        state[key] = value[:, :-1]
        with pytest.raises(ValueError, match=rf"{key[-8]}\.weight has shape"):
            load(kind, saved_at(tmp_path, saved))
        state[key] = value
    load(kind, saved_at(tmp_path, saved))


def test_other_files_get_a_sentence(tmp_path):
    load = recipe("teachers").load_teacher
    with pytest.raises(ValueError, match=r"nothing\.pth does not exist"):
        load("dino", tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="has no entry 'model'; it has state_dict"):
        load("barlowtwins", saved_at(tmp_path, {"state_dict": {}}))
    alone = random_state(resnet50_shapes())
    with pytest.raises(
        ValueError, match=r"projection_head.0.weight.*backbone alone.*found bn1.bias"
    ):
        load("swav", saved_at(tmp_path, alone))
    with pytest.raises(ValueError, match="could run code"):
        load("swav", saved_at(tmp_path, {"model": nn.Linear(1, 1)}))


# --- Views and the pixels that correspond ---------------------------------------------------------


def save_gradient(folder, width=96, height=64):
    """An image whose red is the column and whose green is the row."""
    from torchvision.utils import save_image

    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    folder.mkdir()
    save_image(torch.stack([x / 255, y / 255, torch.zeros_like(x)]), folder / "a.png")


def test_a_view_lies_where_it_says(tmp_path):
    pcd = recipe("pretrain_pcd")
    save_gradient(tmp_path / "images")
    data = pcd.Views(tmp_path / "images", 32, 0.3)
    data.colours = [lambda view: view] * 2
    torch.manual_seed(0)
    mirrored = 0
    for _ in range(8):
        views, places = data[0]
        for view, (left, top, right, bottom) in zip(views, places.tolist(), strict=True):
            mirrored += left > right
            for cell in (5, 17, 28):
                place = (cell + 0.5) / 32
                assert abs(255 * view[0, 3, cell] - (left + place * (right - left))) < 1.5
                assert abs(255 * view[1, cell, 3] - (top + place * (bottom - top))) < 1.5
    assert 2 < mirrored < 14


def test_corresponding_pixels_show_the_same_place():
    """Each vector is the place in the image; it must be that of the other view's own cell."""
    places = torch.tensor(
        [
            [[0, 0, 40, 40], [70, 10, 10, 50]],  # overlap, one mirrored
            [[10, 10, 50, 42], [10, 10, 50, 42]],  # the same
            [[0, 0, 20, 20], [40, 40, 60, 60]],  # apart
        ],
        dtype=torch.float32,
    )
    maps = torch.empty(2, 3, 2, 4, 5)
    for view in range(2):
        for image in range(3):
            left, top, right, bottom = places[image, view].tolist()
            for row in range(4):
                for column in range(5):
                    maps[view, image, 0, row, column] = left + (column + 0.5) / 5 * (right - left)
                    maps[view, image, 1, row, column] = top + (row + 0.5) / 4 * (bottom - top)
    paired, in_both = recipe("pretrain_pcd").corresponding(maps, places)
    assert paired.shape == maps.shape
    met = 0
    for view in range(2):
        for image in range(3):
            box = places[image, 1 - view]
            low, high = torch.minimum(box[:2], box[2:]), torch.maximum(box[:2], box[2:])
            cell = (high - low) / torch.tensor([5.0, 4.0])
            for row in range(4):
                for column in range(5):
                    place = maps[view, image, :, row, column]
                    inside = bool(((place >= low) & (place <= high)).all())
                    assert in_both[view, image, row, column] == inside
                    # Towards the border the sampling repeats the outermost cell.
                    if ((place >= low + cell / 2) & (place <= high - cell / 2)).all():
                        met += 1
                        assert (paired[view, image, :, row, column] - place).abs().max() < 1e-3
    assert met > 40
    assert not in_both[:, 2].any()


# --- Runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Eight images in two folders, a teacher, and the flags for them."""
    from torchvision.utils import save_image

    folder = tmp_path_factory.mktemp("pretraining")
    torch.manual_seed(1)
    for number in range(8):
        path = folder / "images" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = torch.rand(1, 3, 6, 8)
        save_image(F.interpolate(coarse, (72, 96), mode="bicubic").clamp(0, 1), path)
    file = saved_at(folder, official("mocov3"))
    return [
        *("--data", str(folder / "images"), "--teacher", "mocov3", "--teacher-weights", str(file)),
        *("--batch-size", "4", "--crop", "64", "--queue-size", "50", "--workers", "0"),
        *("--steps", "3", "--log-every", "1", "--smallest", "0.5", "--device", "cpu"),
    ]


def checkpoint(folder):
    return torch.load(folder / "student.pt", weights_only=True)


def flat(value, path=""):
    """All tensors and numbers of a checkpoint by their path."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{path}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, x in enumerate(value) for k, v in flat(x, f"{path}.{i}").items()}
    return {path: value}


def test_a_run_resumed_in_the_middle_has_the_same_numbers(made, tmp_path):
    """Weights, queue, optimizer, schedule, generators and the log; with accumulation and bfloat16."""
    main, options = recipe("pretrain_pcd").main, [*made, "--accumulate", "2", "--amp", "bf16"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main([*options, "--output", str(whole)])
    main([*options, "--output", str(cut), "--stop-after", "1"])
    assert checkpoint(cut)["step"] == 1
    main([*options, "--output", str(cut), "--resume"])
    first, second = (flat(checkpoint(folder)) for folder in (whole, cut))
    assert first.keys() == second.keys()
    for path, value in first.items():
        same = torch.equal(value, second[path]) if torch.is_tensor(value) else value == second[path]
        assert same, path
    start, queue = first[".queue.keys"], 50
    assert int(first[".queue.ptr"]) == 3 * 4 % queue  # one vector per image of a step
    assert start.shape == (queue, OUT)
    rows = [(folder / "student.csv").read_text().splitlines() for folder in (whole, cut)]
    parts = [[row.split(",")[:5] for row in each] for each in rows]
    assert parts[0] == parts[1]
    assert parts[0][0] == ["step", "lr", "loss", "accuracy", "similarity"]
    rates = [float(row[1]) for row in parts[0][1:]]
    # lr = 4 / 256; warm-up over a tenth of three steps, then half a cosine.
    cosine = [0.5 * (1 + math.cos(math.pi * (step / 3 - 0.1) / 0.9)) for step in (1, 2)]
    assert rates == pytest.approx([0, *(4 / 256 * value for value in cosine)])
    for name in ("views.png", "student.png"):
        assert (whole / name).stat().st_size > 5_000


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """A run in float32."""
    output = tmp_path_factory.mktemp("trained")
    recipe("pretrain_pcd").main([*made, "--output", str(output), "--amp", "none"])
    return output


def test_a_compiled_run_has_the_same_numbers(made, trained, tmp_path, monkeypatch):
    """By AOTAutograd, without the C++ compiler, which takes minutes."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    options = [*made, "--amp", "none", "--compile", "--stop-after", "2"]
    with fresh_compiler():
        recipe("pretrain_pcd").main([*options, "--output", str(tmp_path)])
    logs = [
        (folder / "student.csv").read_text().splitlines()[1:3] for folder in (trained, tmp_path)
    ]
    plain, compiled = ([[float(x) for x in row.split(",")[:5]] for row in log] for log in logs)
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=1e-4, atol=1e-5)
    assert counter.frame_count >= 2  # teacher and student


def test_the_backbone_loads_into_torchvision(trained):
    """Strictly, into resnet18 and into Faster R-CNN's backbone, by the page's two functions."""
    from torchvision.models import resnet18

    file = trained / "backbone.pth"
    saved = torch.load(file, weights_only=True)
    without = {key: value for key, value in saved.items() if not key.startswith("fc.")}
    page = {}
    exec(python_blocks((RECIPES / "pretrain_pcd.md").read_text())[0], page)
    network, detector = page["classifier"](file, 7).eval(), page["detector"](file, 2).eval()
    assert network(torch.rand(1, 3, 64, 64)).shape == (1, 7)
    assert detector([torch.rand(3, 64, 64)])[0]["boxes"].shape[1] == 4
    for state in (network.state_dict(), detector.backbone.body.state_dict()):
        shared = [key for key in without if key in state]
        assert len(shared) > 90
        assert all(torch.equal(state[key], saved[key]) for key in shared)
    student = part(checkpoint(trained)["model"], "student.trunk.")
    for key, value in without.items():
        assert torch.equal(value, student[key.replace("layer4.", "layer4.module.")]), key
    torch.manual_seed(0)
    start = resnet18().state_dict()
    moved = [key for key in without if key.endswith("conv1.weight")]
    assert all(not torch.equal(saved[key], start[key]) for key in moved)


PROGRAM = """
import sys
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collective
from torch import nn

def batch_norm(self, x):
    \"\"\"SyncBatchNorm, which PyTorch has for GPUs only.\"\"\"
    if not self.training:
        stored = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, *stored, self.weight, self.bias)
    count = x.new_full(x.shape[1:2], x[:, 0].numel())
    sums = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count])
    if dist.is_initialized():
        sums = collective.all_reduce(sums)
    mean = sums[0] / sums[2]
    scale = self.weight * (sums[1] / sums[2] - mean.square() + self.eps).rsqrt()
    return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]

sys.path.insert(0, sys.argv.pop(1))
import common
import pretrain_pcd

load = pretrain_pcd.load_teacher
pretrain_pcd.load_teacher = lambda *args: load(*args).double()
common.Run.move = lambda self, batch: [part.double() for part in batch]
nn.BatchNorm2d.forward = batch_norm
torch.set_default_dtype(torch.float64)
pretrain_pcd.main(sys.argv[1:])
"""


def test_two_processes_train_what_one_does(made, tmp_path):
    """The same images, negatives and loss, in float64: the same student and queue."""
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    options = [*made, "--amp", "none", "--steps", "2", "--warmup", "0", "--lr", "0.001"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    for name, launcher in (("one", ()), ("two", torchrun)):
        run(*launcher, str(program), str(RECIPES), *options, "--output", str(tmp_path / name))
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    assert one["queue"]["ptr"] == two["queue"]["ptr"] == 8
    assert_close(two["queue"]["keys"], one["queue"]["keys"], 1e-6)
    for key, value in one["model"].items():
        if value.is_floating_point() and "running" not in key:
            # A bias in front of a BatchNorm has no gradient but rounding.
            torch.testing.assert_close(two["model"][key], value, rtol=1e-5, atol=1e-9)


def test_wrong_paths_and_data_get_a_sentence(made, tmp_path):
    main, output = recipe("pretrain_pcd").main, ["--output", str(tmp_path / "run")]
    data, file = made.index("--data") + 1, made.index("--teacher-weights") + 1
    (tmp_path / "empty").mkdir()
    for place, value, sentence in (
        (data, str(tmp_path / "gone"), "does not exist"),
        (data, str(tmp_path / "empty"), "holds no images; expected are .bmp, .jpeg"),
        (file, str(tmp_path / "gone.pth"), r"gone\.pth does not exist: give the teacher's"),
    ):
        options = [*made[:place], value, *made[place + 1 :]]
        with pytest.raises(SystemExit, match=sentence):
            main([*options, *output])


def test_the_optimizer_leaves_biases_and_norms_alone():
    """LARS moves a matrix by 0.001 of its norm, and a bias by its gradient."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    before = [value.detach().clone() for value in layer.parameters()]
    optimizer = recipe("pretrain_pcd").optimizer_of(layer, 0.5)
    layer.weight.grad = torch.tensor([[3.0, 0, 0], [0, 4.0, 0]])
    layer.bias.grad = torch.tensor([1.0, -2.0])
    optimizer.step()
    weight, bias = layer.parameters()
    assert_close(bias, before[1] - 0.5 * torch.tensor([1.0, -2.0]), 1e-6)
    norm = 2 * math.sqrt(6)
    grad = layer.weight.grad.new_tensor([[3.0, 0, 0], [0, 4.0, 0]]) + 1e-5 * 2
    assert_close(weight, before[0] - 0.5 * 0.001 * norm / (5 + 1e-5 * norm) * grad, 1e-5)
