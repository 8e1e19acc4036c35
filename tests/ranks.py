"""Runs a function on several gloo processes of this machine, and brings back what each returns.

The processes are forked from a server that has imported PyTorch once, and they meet through a file:
a launch takes a fraction of a second and no port.
"""

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "torch._dynamo.testing",
        "torch.distributed.fsdp",
        "hypothesis",
        "numpy",
        "pytest",
        "pixdistill",
    ]
)
_PATIENCE = 300.0  # seconds until a rank that has not ended counts as hanging


class Raised(NamedTuple):
    """What a rank raised instead of returning."""

    kind: str
    message: str


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returned on each rank, or `Raised`."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _SERVER.Process(target=_rank, args=(rank, world, folder, function, arguments))
            for rank in range(world)
        ]
        with _on_the_cpu():
            for process in ranks:
                process.start()
        for process in ranks:
            process.join(_PATIENCE)
        late = [process for process in ranks if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"{len(late)} of {world} ranks hang"
        assert [process.exitcode for process in ranks] == [0] * world
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(world)]


@contextlib.contextmanager
def _on_the_cpu() -> Iterator[None]:
    """What the server inherits: gloo and FSDP would take a GPU where there is one."""
    before = dict(os.environ)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def results(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returned on each rank; fails where one raised."""
    came = on_ranks(world, function, *arguments)
    raised = [one for one in came if isinstance(one, Raised)]
    assert not raised, raised[0].message
    return came


def _rank(
    rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    dist.barrier()  # a rank that left before all are connected would make the others' start fail
    barrier = dist.barrier  # the function may replace it
    result: Any
    try:
        result = function(rank, *arguments)
    except Exception as error:
        result = Raised(type(error).__name__, f"{error}\n{traceback.format_exc()}")
    torch.save(result, Path(folder) / f"{rank}.pt")
    if not isinstance(result, Raised):
        with contextlib.suppress(RuntimeError):  # raised where another rank has gone already
            barrier()
    os._exit(0)  # not waiting for ranks that never come
