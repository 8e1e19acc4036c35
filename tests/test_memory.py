"""Peak memory of forward and backward, in a fresh process, against what a plain form would hold."""

import ctypes
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run

import pixdistill
from pixdistill import functional

MIB = 2**20


def contrast_with_queue():
    """4096 pixels and 4096 keys, a mask and components: one matrix of logits is 64 MiB."""
    loss = pixdistill.PixelContrastLoss(queue=pixdistill.PixelQueue(4096, 16))
    student, teacher = (torch.randn(1, 16, 64, 64) for _ in range(2))
    valid = torch.rand(1, 64, 64) > 0.2

    def call():
        parts = loss(student.requires_grad_(), teacher, valid_mask=valid, return_components=True)
        parts.loss.backward()

    return call


def row_lse():
    """4096 queries and keys."""
    query, keys = (torch.randn(4096, 32) for _ in range(2))
    return lambda: functional.row_lse(query.requires_grad_(), keys, 1.0).sum().backward()


def masked():
    """B 2, C 64, T 6, 64 x 64: a map is 2 MiB, a tensor [B, T, C, H, W] 12 MiB."""
    loss = pixdistill.MaskedDistillationLoss(pixdistill.MaskedReceptiveTokens(64, 6))
    student, teacher = (torch.randn(2, 64, 64, 64) for _ in range(2))
    return lambda: loss(student.requires_grad_(), teacher).backward()


def patches():
    """256 patches of 256 vectors: their distances are 64 MiB, and plain code holds several of that."""
    student, teacher = (torch.randn(2, 64, 32, 64) for _ in range(2))

    def call():
        settings = {"num_groups": 16, "patch_size": 4, "temperature": 0.07}
        functional.patch_lse(student.requires_grad_(), teacher, **settings).sum().backward()

    return call


def known():
    """What the measurement must see: 64 MiB."""
    return lambda: torch.zeros(64, MIB // 4).add_(1)


LIMITS = {  # MiB
    "contrast_with_queue": (0, 24),
    "row_lse": (0, 16),
    "masked": (0, 12),
    "patches": (0, 32),
    "known": (63, 80),
}


def measure(name: str) -> float:
    """MiB by which the process grows at its peak during a call."""

    def status(key: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split(f"{key}:")[1].split()[0]) * 1024

    call = globals()[name]()
    if name != "known":
        call()  # libraries and their buffers are loaded
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return (status("VmHWM") - before) / MIB


@pytest.fixture(scope="module")
def peaks():
    """All in one process, where large blocks go back to the system at once."""
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return json.loads(run("tests/test_memory.py", env=paths))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", LIMITS)
def test_peak_memory(name, peaks):
    least, most = LIMITS[name]
    assert least <= peaks[name] <= most


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: measure(name) for name in LIMITS}))
