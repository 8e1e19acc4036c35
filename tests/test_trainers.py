"""The programs of the page "In your trainer", each in a fresh process, and what must hold after them."""

import re
from importlib.util import find_spec

import pytest
import torch
from helpers import ROOT, assert_close, python_blocks, run

PAGE = (ROOT / "docs" / "in_your_trainer.md").read_text()
PROGRAMS = {
    section.partition("\n")[0]: python_blocks(section)
    for section in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)[1:]
    if python_blocks(section)
}
TESTED = {
    "A plain loop with DDP",
    "Lightning",
    "Hugging Face Trainer",
    "Accelerate",
    "MMEngine",
    "Get features out of a network",
    "Forward hooks",
    "Hidden states of transformers",
    "A feature extractor",
    "torchvision's dictionaries",
    "timm, and maps with the channels last",
    "Add the task loss and the logits",
}

LOSSES = (
    "pixdistill.PixelContrastLoss(gather_distributed=True)",
    "pixdistill.PixelContrastLoss(learnable_temperature=True, negatives='image', "
    "queue=pixdistill.PixelQueue(64, 32))",
    "pixdistill.MaskedDistillationLoss(pixdistill.MaskedReceptiveTokens(32), student_channels=32)",
    "pixdistill.AfDCDLoss(32, 32, num_groups=4, patch_size=2, pool_size=2, mimic_weight=1e-4)",
)
"""For Lightning's program, whose maps have 32 channels on both sides. The first is the page's."""

START = """
import warnings
import torch
torch.manual_seed(0)
warnings.simplefilter("error")
warnings.filterwarnings("ignore", module="lightning|transformers|accelerate")
warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
"""
"""In front of every program: a warning is an error, except those of the trainers about themselves."""

WATCH = """
from copy import deepcopy

def state(network):
    return deepcopy(dict(network.state_dict()))

def objective():
    modes = {each: each.training for each in student.modules()}
    with torch.no_grad():
        value = float(criterion(*maps(student.eval(), teacher)))
    for each, mode in modes.items():
        each.training = mode
    return value

before = state(student), state(teacher), objective()
"""
"""Put in front of the training; `maps(student, teacher)` are what the program gives to its loss."""

CHECK = """
learned, kept, start = before
assert objective() < 0.97 * start, (objective(), start)
moved = [not torch.equal(value, learned[name]) for name, value in state(student).items()]
assert sum(moved) > len(moved) / 2, moved
assert state(teacher).keys() == kept.keys()
assert all(torch.equal(value, kept[name]) for name, value in state(teacher).items())
assert all(parameter.grad is None for parameter in teacher.parameters())
assert not any(module.training for module in teacher.modules())
"""


def needs(*packages: str):
    """Skip where a package of the extra is missing; nothing is imported into the test's process."""
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f'not installed: {missing}; pip install ".[trainers]"'
    )


def watched(title: str, training: str, maps: str) -> str:
    """The program with the checks around it; `training` is how its line that starts to train begins."""
    (program,) = PROGRAMS[title]
    head, found, tail = program.partition(f"\n{training}")
    assert found, f"{training!r} is not in the program"
    return f"{head}\nmaps = lambda student, teacher: ({maps})\n{WATCH}{found}{tail}{CHECK}"


def run_file(program: str, folder, *launcher: str) -> None:
    """Run it as a file of the user's, in a folder of its own, offline."""
    file = folder / "train.py"
    file.write_text(START + program)
    run(*launcher, str(file), env={"HF_HUB_OFFLINE": "1"}, folder=folder)


def test_every_program_is_short_and_tested():
    assert PROGRAMS.keys() == TESTED
    for title, programs in PROGRAMS.items():
        (program,) = programs
        assert len(program.splitlines()) < 36, title


def test_plain_loop_with_one_process_and_with_ddp(tmp_path):
    """Two processes make the student of one: the same batches, negatives and gradients."""
    maps = "student(images.to(device)), teacher(images.to(device))"
    program = watched("A plain loop with DDP", "for epoch", maps)
    program += 'torch.save(state(student), f"{rank}.pt")\n'
    (alone,), both = (_students(program, tmp_path / str(ranks), ranks) for ranks in (1, 2))
    for name, truth in alone.items():
        assert torch.equal(both[0][name], both[1][name])
        assert_close(both[0][name], truth, 1e-5)


def _students(program, folder, ranks):
    """Of every rank; one rank runs without torchrun."""
    folder.mkdir()
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    run_file(program, folder, *(torchrun if ranks > 1 else ()))
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@needs("lightning")
def test_lightning_with_each_loss(tmp_path):
    maps = "student(loader.dataset), teacher(loader.dataset)"
    program = watched("Lightning", "lightning.Trainer(", maps)
    program += """
assert all(p.grad.norm() > 0 for p in criterion.parameters() if p.requires_grad)
print(criterion)
"""
    assert program.count(LOSSES[0]) == 1
    run_file("\n".join(program.replace(LOSSES[0], loss) for loss in LOSSES), tmp_path)


@needs("transformers", "accelerate")
def test_hugging_face_trainer(tmp_path):
    """The loss of the labels is random, so only the distillation has to fall."""
    maps = "student(images, labels)['map'], teacher(images, True).hidden_states[2]"
    program = watched("Hugging Face Trainer", "DistillationTrainer(", maps)
    program += """
student.eval().save_pretrained("saved")
plain, report = Segformer.from_pretrained("saved", output_loading_info=True)
assert set(report["unexpected_keys"]) == {"projector.weight", "projector.bias"}, report
assert not report["missing_keys"], report
torch.testing.assert_close(plain.eval()(images).logits, student(images, labels)["logits"])
"""
    run_file(program, tmp_path)


@needs("transformers", "accelerate")
def test_accelerate(tmp_path):
    """The objective is that of the queue at the start: later it holds what is harder to tell apart."""
    maps = (
        "student(loader.dataset), tokens_to_map(teacher(loader.dataset).last_hidden_state, (8, 8))"
    )
    program = watched("Accelerate", "for images in loader", maps)
    program = program.replace("\nlearned, kept", "\nfilled = queue.keys.clone()\nlearned, kept")
    program = program.replace("before = state", "start_keys = queue.keys.clone()\nbefore = state")
    program = program.replace(
        "assert objective()", "queue.keys.copy_(start_keys)\nassert objective()"
    )
    program += """
assert int((filled != start_keys).any(dim=1).sum()) == len(loader.dataset)
assert accelerator._custom_objects == [queue]
"""
    run_file(program, tmp_path)


@needs("mmengine", "cv2")
def test_mmengine(tmp_path):
    """The queue moves by the images of each step, and is in the checkpoint."""
    (program,) = PROGRAMS["MMEngine"]
    program = program.replace(
        "\nRunner(", "\nstart = queue.keys.clone(), model.student.weight.clone()\nRunner("
    )
    program += """
saved = torch.load("run/epoch_5.pth", weights_only=False)
assert torch.equal(saved["queue"]["keys"], queue.keys)
assert int(queue.ptr) == 5 * 16 % 64
assert not (queue.keys == start[0]).all(dim=1).any()
assert saved["state_dict"].keys() == {"student.weight", "student.bias"}
assert not torch.equal(model.student.weight, start[1]) and teacher.weight.grad is None
"""
    run_file(program, tmp_path)


def test_resized_maps(tmp_path):
    (program,) = PROGRAMS["Get features out of a network"]
    program += """
assert resized.shape[2:] == teacher_map.shape[2:]
assert student_map.grad.norm() > 0 and projector.weight.grad.norm() > 0
"""
    run_file(program, tmp_path)


def test_the_sum_with_the_logits(tmp_path):
    (program,) = PROGRAMS["Add the task loss and the logits"]
    program += """
assert loss.isfinite() and loss > 0
assert logits_kl(student_logits, student_logits).abs() < 1e-6
p, q = (torch.softmax(x / 4, 1).double() for x in (teacher_logits, student_logits))
truth = 16 * (p * (p / q).log()).sum() / (2 * 32 * 32)
torch.testing.assert_close(logits_kl(student_logits, teacher_logits).double(), truth)
"""
    run_file(program, tmp_path)


def test_forward_hooks(tmp_path):
    (program,) = PROGRAMS["Forward hooks"]
    program += """
torch.testing.assert_close(student_maps["1"], student[:2](images))
torch.testing.assert_close(teacher_maps["1"], teacher[:2](images))
assert student[0].weight.grad.norm() > 0 and projector.weight.grad.norm() > 0
assert teacher[0].weight.grad is None
assert not student[1]._forward_hooks and not teacher[1]._forward_hooks
"""
    run_file(program, tmp_path)


@needs("transformers")
def test_hidden_states(tmp_path):
    (program,) = PROGRAMS["Hidden states of transformers"]
    program += """
sizes = [(8, 14, 21), (16, 7, 11), (40, 4, 6), (64, 2, 3)]
assert [tuple(each.shape[1:]) for each in maps] == sizes
assert project.weight.grad.norm() > 0
assert target.shape == (2, 48, 4, 6)
for row in range(4):
    for column in range(6):  # after one class token and four registers
        assert torch.equal(target[:, :, row, column], tokens[:, 5 + 6 * row + column])
"""
    run_file(program, tmp_path)


@needs("torchvision")
def test_dictionaries_of_torchvision(tmp_path):
    (program,) = PROGRAMS["torchvision's dictionaries"]
    program += """
assert list(targets) == ["0", "1", "2", "3", "pool"]
assert all(each.grad.norm() > 0 for each in criterion.align.parameters() if each.dim() > 1)
assert student.body.conv1.weight.grad.norm() > 0
assert all(each.grad is None for each in [*teacher.parameters(), *criterion.tokens.parameters()])
"""
    run_file(program, tmp_path)


@needs("timm")
def test_timm(tmp_path):
    (program,) = PROGRAMS["timm, and maps with the channels last"]
    program += """
assert student_map.shape == (2, 256, 4, 4) and target.shape == (2, 96, 4, 4)
assert torch.equal(target[0, :, 1, 2], teacher(images)[0][0, 1, 2])
assert project.weight.grad.norm() > 0
assert all(each.grad is None for each in teacher.parameters())
from pixdistill import tokens_to_map
name = "vit_small_patch14_reg4_dinov2"
size = {"img_size": 56, "embed_dim": 48, "num_heads": 3, "depth": 1}
vit = timm.create_model(name, **size).eval()
x = torch.randn(1, 3, 56, 56)
tokens, grid = vit.forward_features(x), vit.patch_embed.grid_size
made = tokens_to_map(tokens, grid, prefix_tokens=vit.num_prefix_tokens)
(truth,) = vit.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
torch.testing.assert_close(made, truth)
"""
    run_file(program, tmp_path)


@needs("transformers")
def test_feature_extractor(tmp_path):
    (program,) = PROGRAMS["A feature extractor"]
    program += """
assert student_map.shape == (2, 32, 8, 12) and teacher_map.shape == (2, 48, 8, 12)
assert projector.weight.grad.norm() > 0
assert any(each.grad is not None and each.grad.norm() > 0 for each in student.parameters())
assert all(each.grad is None for each in teacher.parameters())
"""
    run_file(program, tmp_path)
