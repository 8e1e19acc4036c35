"""What the recipes share: flags, processes, the order of the data, checkpoints, a log and its plot.

A run gives the same numbers however it is cut. Sample k of a run is the same image with the same
augmentation in one process and in many, in the first attempt and after `--resume`, and a checkpoint
holds the state of every random generator.
"""

import argparse
import atexit
import contextlib
import csv
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The flags of every recipe, with a recipe's own `defaults` for some."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = flags.add_argument
    add("--data", type=Path, required=True, help="folder of the data")
    add("--output", type=Path, required=True, help="folder for checkpoints, log and pictures")
    add("--resume", action="store_true", help="go on from the checkpoints in --output")
    add("--steps", type=int, help="optimizer steps of the whole schedule")
    add("--stop-after", type=int, help="save and end after this step")
    add("--save-every", type=int, default=1000, help="steps between checkpoints")
    add("--log-every", type=int, default=20, help="steps between lines of the log")
    add("--eval-every", type=int, default=4000, help="steps between evaluations")
    add("--batch-size", type=int, help="images per optimizer step, of all processes together")
    add("--accumulate", type=int, default=1, help="forward passes per optimizer step")
    add("--lr", type=float, help="learning rate for --batch-size images")
    add("--limit-data", type=int, help="use the first images only, for a trial")
    add("--workers", type=int, default=4, help="processes that load images, of each process")
    add("--amp", choices=DTYPES, default="bf16", help="autocast; fp16 also scales the loss")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="NHWC maps")
    add("--compile", action="store_true", help="torch.compile the training step's module")
    add("--device", help="cuda, cuda:1 or cpu; by default a GPU where there is one")
    add("--seed", type=int, default=0, help="of weights, order of data and augmentation")
    flags.set_defaults(**defaults)
    return flags


def stop(sentence: str) -> NoReturn:
    """End the program with a sentence that says what is expected where."""
    raise SystemExit(f"error: {sentence}")


class Run:
    """Processes, device and precision of a run, its optimizer steps and its checkpoints.

    One process, or one per GPU under `torchrun`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        cuda = torch.cuda.is_available()
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
            atexit.register(dist.destroy_process_group)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.world > 1 else 0
        local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
        self.device = torch.device(args.device or local)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        parts = self.world * args.accumulate
        if args.batch_size % parts:
            stop(f"--batch-size {args.batch_size} must be a multiple of {parts} "
                 f"({self.world} processes, --accumulate {args.accumulate})")  # fmt: skip
        if any(args.output.glob("*.pt")) and not args.resume:
            stop(f"{args.output} holds a run: pass --resume to go on, or another --output")
        args.output.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)  # the weights are the same in all processes

    def print(self, line: str) -> None:
        """Print once, not in every process."""
        if self.rank == 0:
            print(line)

    def autocast(self) -> torch.autocast:
        """The context for forward passes."""
        dtype = DTYPES[self.args.amp]
        return torch.autocast(self.device.type, dtype, enabled=self.args.amp != "none")

    def frozen(self, module: nn.Module) -> nn.Module:
        """A teacher: in eval mode, without gradients."""
        module.eval().requires_grad_(False).to(self.device)
        return self._layout(module)

    def trained(self, module: nn.Module, compiled: nn.Module | None = None) -> nn.Module:
        """What is trained, moved to the device and wrapped for the processes.

        `--compile` compiles it, or only its part `compiled`.
        """
        if self.world > 1 and self.device.type == "cuda":
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        self._layout(module.to(self.device))
        if self.args.compile:
            (compiled or module).compile()  # in place: the names in checkpoints stay
        return DistributedDataParallel(module) if self.world > 1 else module

    def _layout(self, module: nn.Module) -> nn.Module:
        for weight in module.parameters() if self.args.channels_last else ():
            # As cuDNN and DDP lay out gradients.
            if weight.dim() == 4 and weight.shape[2:].numel() > 1:
                nhwc = torch.empty_like(weight, memory_format=torch.channels_last)
                weight.data = nhwc.copy_(weight.detach())
        return module

    def move(self, batch: Any) -> Any:
        """A batch on the device: tensors, and sequences or dictionaries of them."""
        if isinstance(batch, Tensor):
            batch = batch.to(self.device, non_blocking=True)
            nhwc = self.args.channels_last and batch.dim() == 4
            return batch.contiguous(memory_format=torch.channels_last) if nhwc else batch
        if isinstance(batch, Mapping):
            return {key: self.move(value) for key, value in batch.items()}
        return [self.move(item) for item in batch] if isinstance(batch, (list, tuple)) else batch

    def step(
        self,
        model: nn.Module,
        batches: Iterator[Any],
        optimizer: torch.optim.Optimizer,
        clip: tuple[Iterable[Tensor], float] | None = None,
    ) -> dict[str, Tensor]:
        """One optimizer step on `--accumulate` batches; returns the mean of what `model` returned.

        `model(*batch)` returns a dictionary of scalars; "loss" is differentiated. `clip` limits the
        norm of the gradient of some parameters.
        """
        parts: dict[str, Tensor] = {}
        optimizer.zero_grad()
        count = self.args.accumulate
        for micro in range(count):
            wait = micro + 1 < count and isinstance(model, DistributedDataParallel)
            with model.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                with self.autocast():
                    values = model(*self.move(next(batches)))
                self.scaler.scale(values["loss"] / count).backward()
            for name, value in values.items():
                parts[name] = parts.get(name, 0) + value.detach() / count
        if clip is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(*clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        return parts

    def save(self, name: str, step: int, state: Mapping[str, Any]) -> None:
        """Write the `state_dict` of each object, the step and all generators; every process calls."""
        cuda = self.device.type == "cuda"
        own = [torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None]
        generators = [own] * self.world
        if self.world > 1:
            dist.all_gather_object(generators, own)
        if self.rank == 0:
            parts = {key: part.state_dict() for key, part in state.items()}
            what = {"step": step, "settings": self._settings(), "generators": generators}
            torch.save({**parts, **what}, self.args.output / f"{name}.part")
            os.replace(self.args.output / f"{name}.part", self.args.output / name)

    def load(self, name: str, state: Mapping[str, Any]) -> int:
        """Restore what `save` wrote and return its step; 0 where there is nothing to resume."""
        path = self.args.output / name
        if not (self.args.resume and path.exists()):
            torch.manual_seed(self.args.seed + 1 + self.rank)  # ranks drop other pixels
            return 0
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["settings"] != self._settings():
            stop(f"{path} was written with {saved['settings']}, and this run has "
                 f"{self._settings()}: pass the same flags, or another --output")  # fmt: skip
        for key, part in state.items():
            part.load_state_dict(saved[key])
        if len(saved["generators"]) != self.world:
            torch.manual_seed(self.args.seed + saved["step"] * self.world + self.rank)
            return int(saved["step"])
        cpu, cuda = saved["generators"][self.rank]
        torch.set_rng_state(cpu)
        if cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda)
        return int(saved["step"])

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must share."""
        return {key: getattr(self.args, key) for key in ("steps", "batch_size", "seed")}


class Batches(Sampler[list[tuple[int, int]]]):
    """Pairs of index and seed for each forward pass of one process, from a step on."""

    def __init__(self, size: int, run: Run, first: int, last: int) -> None:
        self.size, self.run, self.first, self.last = size, run, first, last

    def __len__(self) -> int:
        return (self.last - self.first) * self.run.args.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        args, epoch, order = self.run.args, -1, torch.empty(0)
        whole = args.batch_size // args.accumulate  # of all processes
        own = whole // self.run.world
        for first in range(self.first * args.batch_size, self.last * args.batch_size, whole):
            batch = []
            for k in range(first + self.run.rank * own, first + (self.run.rank + 1) * own):
                if epoch != k // self.size:
                    epoch = k // self.size
                    generator = torch.Generator().manual_seed(args.seed + epoch)
                    order = torch.randperm(self.size, generator=generator)
                batch.append((int(order[k % self.size]), args.seed + k))
            yield batch


class Seeded(Dataset[Any]):
    """A data set whose augmentation draws from the seed beside the index; the first `limit` images."""

    def __init__(self, dataset: Any, limit: int | None = None) -> None:
        self.dataset = dataset
        self.size = min(len(dataset), limit or len(dataset))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, pair: tuple[int, int]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(pair[1])
            return self.dataset[pair[0]]


def batches(dataset: Any, run: Run, first: int, last: int, collate: Any = None) -> Iterator[Any]:
    """The batches of the steps `first` to `last` of this process."""
    data = Seeded(dataset, run.args.limit_data)
    if not len(data):
        stop(f"{run.args.data} holds no images for training")
    loader = DataLoader(
        data,
        batch_sampler=Batches(len(data), run, first, last),
        num_workers=run.args.workers,
        pin_memory=run.device.type == "cuda",
        collate_fn=collate,
        generator=torch.Generator(),  # the default one belongs to the model
    )
    return iter(loader)


class Table:
    """A CSV file that grows by rows; what a resumed run computes again is cut off first."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        lines = path.read_text().splitlines() if start and path.exists() else []
        rows = list(csv.DictReader(lines))
        self.rows: list[dict[str, Any]] = [row for row in rows if int(row["step"]) <= start]
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows.append(row)
        self._write(append=len(self.rows) > 1)

    def _write(self, append: bool = False) -> None:
        if self.rows:
            with self.path.open("a" if append else "w", newline="") as file:
                writer = csv.DictWriter(file, list(self.rows[0]))
                if not append:
                    writer.writeheader()
                writer.writerows(self.rows[-1:] if append else self.rows)


class Log:
    """The progress bar, a CSV file with the means over `--log-every` steps, one with metrics, a plot."""

    def __init__(self, run: Run, name: str, start: int, steps: int) -> None:
        from tqdm import tqdm

        args = run.args
        self.run, self.steps, self.sums, self.count = run, steps, {}, 0  # type: ignore[var-annotated]
        self.main = run.rank == 0
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.bar = tqdm(total=steps, initial=start, disable=not self.main, desc=name)
        self.since = time.perf_counter()
        if self.main:
            self.table = Table(args.output / f"{name}.csv", start)
            self.scores = Table(args.output / f"{name}_metrics.csv", start)
            self.picture = args.output / f"{name}.png"

    def add(self, step: int, parts: Mapping[str, Tensor], lr: float) -> None:
        """Count one step; the values reach the host once in `--log-every` steps."""
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0) + value.float()
        self.count += 1
        self.bar.update()
        if step % self.run.args.log_every and step != self.steps:
            return
        means = torch.stack(list(self.sums.values())) / self.count
        if self.run.world > 1:
            dist.all_reduce(means)
        values = (means / self.run.world).tolist()
        seconds = (time.perf_counter() - self.since) / self.count
        if self.main:
            row = dict(zip(self.sums, values, strict=True))
            rate = self.run.args.batch_size / seconds
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in {**row, "images/s": rate}.items()})
            cost = {"images_per_s": rate, "seconds_per_step": seconds, "memory_mib": self.memory()}
            self.table.add({"step": step, "lr": lr, **row, **cost})
        self.sums, self.count, self.since = {}, 0, time.perf_counter()

    def score(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of an evaluation, whose time does not count."""
        if self.main:
            self.bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
            self.scores.add({"step": step, **values})
        self.since = time.perf_counter()

    def memory(self) -> float:
        """Peak memory in MiB, of the GPU's tensors or of the process."""
        if self.run.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def close(self) -> None:
        """Draw the plot and print time and memory of a step."""
        self.bar.close()
        if not (self.main and self.table.rows):
            return
        last = self.table.rows[-1]
        print(f"{float(last['seconds_per_step']):.3f} s and {float(last['images_per_s']):.1f} images/s "
              f"at the end, peak memory {float(last['memory_mib']):.0f} MiB")  # fmt: skip
        from matplotlib.figure import Figure

        aside = {"step", "lr", "images_per_s", "seconds_per_step", "memory_mib"}
        curves = [(self.table.rows, [name for name in last if name not in aside], "training")]
        if self.scores.rows:
            names = [name for name in self.scores.rows[0] if name != "step"]
            curves.append((self.scores.rows, names, "evaluation"))
        figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
        for number, (rows, names, title) in enumerate(curves, 1):
            axes = figure.add_subplot(1, len(curves), number, title=title, xlabel="step")
            axes.set_yscale("log" if title == "training" else "linear")
            for name in names:
                points = [(int(row["step"]), float(row[name])) for row in rows]
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
            axes.legend()
        figure.savefig(self.picture)


def fit(
    run: Run,
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    dataset: Any,
    steps: int,
    *,
    collate: Any = None,
    clip: tuple[Iterable[Tensor], float] | None = None,
    after: Callable[[], None] = lambda: None,
    extra: Mapping[str, Any] | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
) -> bool:
    """The training loop, with the checkpoint NAME.pt; False where `--stop-after` ended it early.

    `after` runs after each step; `extra` is saved and restored with the model.
    """
    args = run.args
    state = {
        "model": bare(model),
        "optimizer": optimizer,
        "schedule": schedule,
        "scaler": run.scaler,
        **(extra or {}),
    }
    first = run.load(f"{name}.pt", state)
    last = max(first, min(steps, args.stop_after or steps))
    log = Log(run, name, first, steps)
    loader = batches(dataset, run, first, last, collate)
    if run.scaler.is_enabled():  # where the scaler skips the first step, the scheduler warns
        warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step", UserWarning)
    for step in range(first + 1, last + 1):
        lr = float(schedule.get_last_lr()[0])
        log.add(step, run.step(model, loader, optimizer, clip), lr)
        schedule.step()
        after()
        if evaluate is not None and (step % args.eval_every == 0 or step == steps):
            log.score(step, evaluate())
        if step % args.save_every == 0 or step == last:
            run.save(f"{name}.pt", step, state)
    log.close()
    return last == steps


def summed(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a loss, and "loss", their sum."""
    return {"loss": torch.stack([part.float() for part in parts.values()]).sum(), **parts}


def bare(module: nn.Module) -> nn.Module:
    """The module inside DDP's wrapper."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def existing(path: Path, expected: Sequence[str]) -> Path:
    """The folder, or a sentence that names the first entry that is missing."""
    for name in ("", *expected):
        if not (path / name).exists():
            stop(f"{path / name} does not exist; {path} must hold {', '.join(expected)}")
    return path


def load(path: Path | str, flag: str, expected: str = "a state_dict") -> Any:
    """The content of a checkpoint file, read without running code from it."""
    if not Path(path).is_file():
        stop(f"{flag} {path} is not a file; it must hold {expected}")
    return torch.load(path, map_location="cpu", weights_only=True)
