"""Which loss helps, by how much, for how long: a study on scenes of handwritten digits.

    python docs/examples/study.py            # all parts, about 20 minutes on two CPU cores
    python docs/examples/study.py --quick    # all parts with fewer seeds and steps, about 2 minutes
    python docs/examples/study.py few-labels # one part

Parts:

- `budget`: mean IoU against the number of steps, of a student that learns from labels: alone, with a
  control (divergence of the logits, squared error of the features), with each loss, and with each loss
  and the divergence.
- `why`: the terms of `AfDCDLoss` one by one, and MasKD's distance without masks.
- `few-labels`: students that were distilled without labels, then fine-tuned on 16, 64 and 256 scenes;
  from scratch (also with as many steps), from pooled vectors, and from pixels by PCD with and without
  its parts.
- `labels`: the contrast with and without the labels' exclusion of negatives.

Settings are chosen on validation digits with one seed of its own and four trials per arm; all trials are
in the results. Scores are those of test digits, over five seeds. Every run is saved at once to
`results.json` in the folder of `--output`. Started again, the study goes on where it stopped. It needs
scikit-learn, scipy, matplotlib and tqdm besides pixdistill.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from study_losses import OBJECTIVES, fine_tune, pretrain, train_with_labels
from study_report import report
from study_scenes import Data, Machine, prepare_with_labels, prepare_without_labels
from tqdm import tqdm

PREPARE = {"with_labels": prepare_with_labels, "without_labels": prepare_without_labels}
TRIAL_SEED = 1000  # of the trials, apart from the students' 0, 1, 2, ...


@dataclass(frozen=True)
class Sizes:
    """How much is trained."""

    seeds: int = 5
    budgets: tuple[int, ...] = (100, 400, 1600)  # steps
    trial_steps: int = 400
    scenes: int = 512  # with labels
    labels: tuple[int, ...] = (16, 64, 256)  # scenes to fine-tune on
    unlabelled: int = 2048  # scenes to distil on without labels
    pretrain_steps: int = 1000
    tune_steps: int = 300
    test_scenes: int = 512
    teacher_scenes: int = 4096
    teacher_steps: int = 1500
    mask_steps: int = 200
    whole_images: int = 16384  # for the teacher of whole images
    whole_steps: int = 1600


SIZES = Sizes()
QUICK = Sizes(
    seeds=2, budgets=(40, 160), trial_steps=40, scenes=256, labels=(16, 64), unlabelled=512,
    pretrain_steps=100, tune_steps=60, test_scenes=128, teacher_scenes=1024, teacher_steps=300,
    mask_steps=50, whole_images=2048, whole_steps=200,
)  # fmt: skip

Settings = dict[str, float]


def weights(name: str, *values: float) -> list[Settings]:
    """One trial per weight."""
    return [{name: value} for value in values]


# The trials of each arm. An arm with a loss takes the learning rate that suits the student alone.
WITH_LABELS: dict[str, list[Settings]] = {
    "alone": weights("rate", 5e-3, 1e-2, 2e-2, 4e-2),
    "kl": weights("kl", 0.25, 1, 4, 16),
    "mse": weights("mse", 0.1, 0.5, 2, 8),
    "contrast": weights("contrast", 0.25, 0.5, 1, 2),
    "maskd": weights("maskd", 0.1, 0.5, 2, 8),
    "af_dcd": weights("af_dcd", 0.003, 0.01, 0.05, 0.2),
    "contrast_labels": weights("contrast_labels", 0.25, 0.5, 1, 2),
    "logits_mse": weights("logits_mse", 0.1, 0.5, 2, 8),
    "af_dcd_mimic": weights("af_dcd_mimic", 0.003, 0.01, 0.05, 0.2),
    "af_dcd_contrast": weights("af_dcd_contrast", 0.003, 0.01, 0.05, 0.2),
}
PAIRED = (
    "contrast",
    "maskd",
    "af_dcd",
)  # also tried with "kl", each with its weight and half of it
PARTS = {
    "budget": ["alone", "kl", "mse", *PAIRED, *(f"{name}+kl" for name in PAIRED)],
    "why": ["alone", "maskd", "logits_mse", "af_dcd", "af_dcd_mimic", "af_dcd_contrast"],
    "few-labels": list(OBJECTIVES),
    "labels": ["alone", "contrast", "contrast_labels"],
}


@dataclass(frozen=True)
class Job:
    """One training, or one pre-training with its fine-tunings."""

    arm: str
    settings: tuple[tuple[str, float], ...]
    sizes: tuple[int, ...]  # steps, or labelled scenes
    seed: int
    split: str

    @property
    def key(self) -> str:
        """What identifies its record."""
        return json.dumps(asdict(self))


def few_labels(arm: str) -> bool:
    """Whether an arm is distilled without labels."""
    return arm in OBJECTIVES


def trials_of(arm: str, best: dict[str, Settings]) -> list[Settings]:
    """Four settings; those of an arm that builds on others need what was chosen for these."""
    if arm.startswith("scratch"):
        return weights("rate", 5e-3, 1e-2, 2e-2, 4e-2)
    if few_labels(arm):
        rates = [(before, after) for before in (5e-3, 2e-2) for after in (1e-2, 3e-2)]
        return [{"pretrain_rate": before, "rate": after} for before, after in rates]
    if arm.endswith("+kl"):
        name = arm.removesuffix("+kl")
        one, other = best[name][name], best["kl"]["kl"]
        options = [{name: one * a, "kl": other * b} for a in (1, 0.5) for b in (1, 0.5)]
    else:
        options = WITH_LABELS[arm]
    return options if arm == "alone" else [o | {"rate": best["alone"]["rate"]} for o in options]


@cache
def load(path: Path, device: str) -> Data:
    """What was prepared, once per process."""
    return Data.load(path, device)


def train(job: Job, sizes: Sizes, machine: Machine, path: Path) -> dict[str, float]:
    """Run a job: mean IoU in percent for each of its sizes."""
    torch.set_num_threads(1)  # the processes share the cores
    data, settings = load(path, machine.device), dict(job.settings)
    scores = {}
    if few_labels(job.arm):
        start = pretrain(machine, data, job.arm, settings, sizes.pretrain_steps, job.seed)
    for size in job.sizes:
        if few_labels(job.arm):
            student, steps = copy.deepcopy(start), sizes.tune_steps
            if job.arm == "scratch_long":
                steps += sizes.pretrain_steps
            fine_tune(machine, data, student, size, settings["rate"], steps, job.seed)
        else:
            student = train_with_labels(machine, data, settings, size, job.seed)
        scores[str(size)] = machine.score(student, data.scenes[job.split])
    return scores


class Study:
    """Runs jobs, and keeps their scores in a file."""

    def __init__(self, folder: Path, sizes: Sizes, machine: Machine, workers: int) -> None:
        self.folder, self.file = folder, folder / "results.json"
        self.sizes, self.machine, self.workers = sizes, machine, workers
        self.pool: Executor = ThreadPoolExecutor(1)
        if workers > 1:
            self.pool = ProcessPoolExecutor(workers, get_context("spawn"))
        folder.mkdir(parents=True, exist_ok=True)
        about = {"sizes": asdict(sizes), "device": describe(machine), "torch": torch.__version__}
        self.results: dict[str, Any] = {**about, "records": []}
        if self.file.exists():
            found = json.loads(self.file.read_text())
            if found["sizes"] != json.loads(json.dumps(about["sizes"])):
                raise SystemExit(f"{self.file} has other sizes; choose another --output")
            self.results = found

    def data(self, arms: Sequence[str]) -> Path:
        """The file with the scenes and the teacher's maps for these arms; made where missing."""
        kind = "without_labels" if few_labels(arms[0]) else "with_labels"
        path = self.folder / f"{kind}.pt"
        if not path.exists():
            torch.set_num_threads(self.workers)
            prepared = PREPARE[kind](self.machine, self.sizes)
            self.results[f"teacher_{kind}"] = prepared.teacher
            self.save()
            prepared.save(path)
        return path

    def save(self) -> None:
        """Replace the file in one step, so that a kill leaves the old or the new one."""
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1))
        part.replace(self.file)

    def run(self, name: str, jobs: Sequence[Job]) -> None:
        """Run those of the jobs that have no record yet."""
        done = {record["key"] for record in self.results["records"]}
        jobs = [job for job in jobs if job.key not in done]
        if not jobs:
            return
        how = (self.sizes, self.machine, self.data([job.arm for job in jobs]))
        futures = {self.pool.submit(train, job, *how): job for job in jobs}
        for future in tqdm(as_completed(futures), name, len(jobs), unit="run"):
            job = futures[future]
            record = {"key": job.key, **asdict(job), "settings": dict(job.settings)}
            self.results["records"].append(record | {"scores": future.result()})
            self.save()

    def choose(self, arms: Sequence[str], best: dict[str, Settings]) -> None:
        """Run the trials of arms, and add the settings with the highest mean IoU to `best`."""
        trials = {arm: [self.trial(arm, s) for s in trials_of(arm, best)] for arm in arms}
        self.run("trials", [job for jobs in trials.values() for job in jobs])
        scores = {r["key"]: fmean(r["scores"].values()) for r in self.results["records"]}
        for arm, jobs in trials.items():
            best[arm] = dict(max(jobs, key=lambda job: scores[job.key]).settings)

    def trial(self, arm: str, settings: Settings) -> Job:
        """One setting with the seed of the trials, on validation digits."""
        size = self.sizes.labels[1] if few_labels(arm) else self.sizes.trial_steps
        return Job(arm, tuple(settings.items()), (size,), TRIAL_SEED, "validation")

    def part(self, part: str) -> None:
        """Choose the settings of all arms of a part, then train them with every seed."""
        best: dict[str, Settings] = {}
        arms, sizes = PARTS[part], self.sizes
        # Each group builds on the settings that were chosen for those before.
        single = [arm for arm in arms if arm != "alone" and not arm.endswith("+kl")]
        for group in (["alone"] if "alone" in arms else [], single, [a for a in arms if "+" in a]):
            self.choose(group, best)
        xs = {"few-labels": sizes.labels, "why": sizes.budgets[-1:]}.get(part, sizes.budgets)
        # Seed by seed, so that a killed study has all arms of some seeds, and the longest first.
        jobs = [
            Job(arm, tuple(best[arm].items()), size, seed, "test")
            for seed in range(sizes.seeds)
            for size in ([xs] if part == "few-labels" else [(x,) for x in reversed(xs)])
            for arm in arms
        ]
        self.run(part, jobs)


def describe(machine: Machine) -> str:
    """The device, in words."""
    if machine.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return f"{name}, mixed precision" if machine.amp else name


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts, write the tables and the plots, and return the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("part", nargs="*", help=f"{', '.join(PARTS)} (default: all)")
    add("--quick", action="store_true", help="fewer seeds and steps, too few for a result")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action="store_true", help="mixed precision: float16 on CUDA, else bfloat16")
    add("--workers", type=int, help="processes that train at once (2, with CUDA up to 12)")
    add("--output", type=Path, default=Path("study"), help="folder of results and plots (study)")
    options = parser.parse_args(argv)
    if unknown := set(options.part) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    most = 12 if options.device == "cuda" else 2
    workers = options.workers or min(most, os.cpu_count() or 1)
    began = time.perf_counter()
    machine = Machine(options.device, options.amp)
    study = Study(options.output, QUICK if options.quick else SIZES, machine, workers)
    try:
        for part in options.part or PARTS:
            study.part(part)
            print(report(part, PARTS[part], study.results, options.output), flush=True)
    finally:
        study.pool.shutdown(cancel_futures=True)
    minutes, seconds = divmod(round(time.perf_counter() - began), 60)
    print(f"Took {minutes} min {seconds} s; everything is in {options.output}.")
    return study.results


if __name__ == "__main__":
    main()
