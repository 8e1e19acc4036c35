"""Write docs/benchmarks.md and its pictures from the files of results."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import peers, scaling, targets
from .sheet import RESULTS, Record, cells, duration, label, table, warnings
from .subjects import SUBJECTS

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
Content = dict[str, Any]

HEAD = """# Benchmarks

<!-- Written by `python -m benchmarks page` from benchmarks/results; edit that, not this. -->

What the losses cost in time and memory, beside the same formulas in plain PyTorch and beside other
libraries: first on a GPU, then on a CPU. Each question has one picture; the tables are folded below it.
To measure on your own machine, in a checkout:

```text
python -m pip install -c constraints.txt ".[bench]"
python -m benchmarks all --device cuda --minutes 10
```
"""

HOW = """
## How it is measured

- All providers of a problem get the same tensors and run in turns, forward plus backward. A time is the
  median; the files in `benchmarks/results` have the spread.
- "time" is that of one call on an idle device, until its result is there. "host" is the part until
  Python returns, "GPU" the GPU's own time, by a CUDA graph or from a filled queue: what a call costs
  where the GPU is busy.
- "launches" counts kernels and copies on a GPU, and PyTorch's operators on a CPU.
- "MiB" is the peak of memory minus what was there before: of CUDA's allocator, or of the resident set of
  a process of its own.
- "error" compares loss and gradient with float64, relative to their size.
"""

TITLES = {
    "step": (
        "What does a loss add to a training step?",
        "Teacher, student, loss, backward and SGD on networks of torchvision. The squared error in the\n"
        "loss's place shows what the step costs without it.",
    ),
    "overhead": (
        "What does one call cost?",
        "Each loss and operator against plain PyTorch. Small calls take as long as the host needs.",
    ),
    "contrast": (
        "How fast is `PixelContrastLoss` on maps?",
        "Plain is `F.normalize`, a product and `F.cross_entropy`.",
    ),
    "peers": (
        "Who else can compute the contrast?",
        "Plain is `F.cross_entropy`; the others are every library that can compute it.",
    ),
    "maskd": (
        "How fast is masked distillation?",
        "One level. Plain holds a tensor [B, T, C, H, W].",
    ),
    "af_dcd": ("How fast is Af-DCD?", "The contrast inside patches, and the whole loss."),
    "scaling": ("How does the cost of the contrast grow?", "Against N = M vectors of width 128."),
    "row_lse": (
        "How near is `row_lse` to the limit of the device?",
        "Beside its two matrix products, and fused attention with V = K. Plain is the `logsumexp` of\n"
        "all logits, which is slower than `F.cross_entropy`.",
    ),
    "wide": ("And with features wider than the kernel takes?", "More than 256 elements."),
}
SHOWN_OF_PEERS = [label(case) for case in (peers.PCD, (16384, 16384, 128), (8192, 8192, 128))]
# Rows of the summary: subject, a case by its label, and what it is in words.
SUMMARY = [
    ("step", "pcd 256 224", "training step of PCD, 256 images of 224 x 224, queue of 65,536"),
    ("step", "detection-maskd 2 800", "training step of a detector with MasKD, 2 images, 800 high"),
    ("step", "segmentation-af_dcd 4 512", "training step with Af-DCD, 4 images of 512 x 1024"),
    (
        "contrast",
        "batch 16 128 32 32 0",
        "contrast of 16 maps of 128 x 32 x 32, negatives of the batch",
    ),
    ("contrast", "queue 128 256 7 7 65536", "contrast of 128 maps of 256 x 7 x 7, queue of 65,536"),
    ("peers", "8192 8192 128", "contrast of 8192 x 8192 vectors of 128"),
    ("peers", "6272 65536 256", "contrast of 6272 x 65536 vectors of 256, PCD's setting"),
    ("maskd", "detection 2 256 6 100 168", "masked distance, 2 x 256 x 100 x 168, 6 tokens"),
    (
        "af_dcd",
        "contrast 2 512 64 128 4",
        "contrast inside patches, 2 x 512 x 64 x 128, pooled by 4",
    ),
    ("af_dcd", "loss 2 512 64 128 4", "whole `AfDCDLoss`, the same map"),
]


def render(results: Path) -> str:
    """The whole page."""
    devices = targets.devices(results)
    summary = [row for device in devices for row in _summary(results, device)]
    parts = [HEAD, f"\n## Summary\n\n{table(summary)}\n"]
    parts += [_missed(results, device) for device in devices]
    for device in devices:
        files = targets.Results(results, device).files
        machine = next(iter(files.values()))["machine"]
        parts.append(f"\n## {machine.get('gpu') or machine['processor']}\n")
        for name in TITLES:
            if name in files:
                parts += _section(files[name], results / f"{name}_{device}")
        if reached := targets.reached(results, device):
            parts.append(f"\n### Targets\n{_folded('All targets', reached)}")
    return "".join([*parts, *_kernels(results), HOW])


def _folded(summary: str, text: str) -> str:
    """Markdown that a click unfolds."""
    return f"\n<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>\n"


def _summary(results: Path, device: str) -> Iterator[dict[str, str]]:
    """Ours and plain: a whole step of training, or one call."""
    found = targets.Results(results, device)
    for name, case, what in SUMMARY:
        columns = found.files.get(name, {"columns": []})["columns"]
        usual = dict(zip(columns, case.split(), strict=False))
        content = found.files.get(name, {"records": []})
        records = {
            r["provider"]: r
            for r in content["records"]
            if "seconds" in r and all(str(r[key]) == value for key, value in usual.items())
        }
        if {"ours", "plain"} <= records.keys():
            key = "peak_bytes" if name == "step" else "extra_bytes"
            row = {"on": device.upper(), "what": what}
            yield row | {
                title: _cost(records[provider], key)
                for title, provider in (("plain PyTorch", "plain"), ("pixdistill", "ours"))
            }


def _cost(record: Record, key: str) -> str:
    mib = (record[key] or 0) / 2**20
    size = f"{mib / 1024:.1f} GiB" if mib >= 1000 else f"{mib:.0f} MiB"
    return f"{duration(record['seconds'])}, {size}"


def _missed(results: Path, device: str) -> str:
    """What falls short of its target, in the open."""
    rows = targets.reached(results, device).splitlines()[2:]
    missed, subject = [], ""
    for row in rows:
        what, target, measured, verdict = (cell.strip() for cell in row.strip("|").split("|"))
        subject = subject if what.startswith("the same") else what.partition(":")[0]
        if verdict == "missed":
            what = what.replace("the same", subject)
            missed.append(f"- {what}: {measured}, the target is {target}\n")
    if not missed:
        return ""
    files = targets.Results(results, device).files.values()
    versions = ", ".join(sorted({content["machine"]["pixdistill"] for content in files}))
    words = f"{len(missed)} of {len(rows)} targets, measured with pixdistill {versions}:"
    return f"\n### What falls short on the {device.upper()}\n\n{words}\n\n{''.join(missed)}"


def _case(content: Content, record: Record) -> str:
    return label(record[column] for column in content["columns"])


def _section(content: Content, stem: Path) -> Iterator[str]:
    """A question, its picture, and a fold with the table and what is particular to the subject."""
    name, machine, records = content["subject"], content["machine"], content["records"]
    title, words = TITLES[name]
    yield f"\n### {title}\n\n{words}\n"
    picture = f"{stem.name}_{content['dtype']}.png"
    if (stem.parent / picture).exists():
        yield f"\n![{title.replace('`', '')}](../benchmarks/results/{picture})\n"
    facts = [f"{key} {machine[key]}" for key in ("pixdistill", "torch", "triton")]
    facts += [f"{machine['processor']}, {machine['threads']} threads"]
    facts += [machine["date"]] if "date" in machine else []
    lines = [f"`python -m benchmarks {name}`, {content['dtype']}; {', '.join(facts)}.\n\n"]
    lines.append(f"{table(list(_rows(content)))}\n")
    if name in ("peers", "row_lse"):
        lines += _better(content)
    for provider in ("ours", "plain") if name == "scaling" else ():
        for key, what in (("seconds", "time"), ("extra_bytes", "memory")):
            exponent = scaling.exponent(records, provider, key)
            if exponent is not None:
                lines.append(
                    f"\n- {provider}: from N = {scaling.FITTED_FROM}, {what} grows as "
                    f"$N^{{{exponent:.2f}}}$"
                )
    lines += [f"\n{line}\n" for line in warnings(records) if line.startswith("WARNING")]
    reasons: dict[str, str] = {}
    for record in records:
        if reason := record.get("skipped") or record.get("failed"):
            reasons.setdefault(record["provider"], f"{reason} (at {_case(content, record)})")
    if reasons:
        lines.append("\nLeft out, with the first reason of each:\n\n")
        lines += (f"- {provider}: `{reason}`\n" for provider, reason in reasons.items())
    if name == "peers":
        lines.append("\nWhat they are:\n\n")
        lines += (f"- {key}: {p.note}\n" for key, p in peers.PROVIDERS.items())
    yield _folded("Table", "".join(lines).strip())


def _rows(content: Content) -> Iterator[dict[str, str]]:
    """The measured rows, the case named once; two cases of the peers, with their many rows."""
    last = ""
    for record in content["records"]:
        case = _case(content, record)
        hidden = content["subject"] == "peers" and case not in SHOWN_OF_PEERS
        if hidden or "seconds" not in record:
            continue
        plain = _other(content, record, "plain").get("seconds")
        row = {" ".join(content["columns"]): "" if case == last else case} | cells(record)
        row["spread"] = "-"
        yield row | {"/ plain": f"{record['seconds'] / plain:.2g}" if plain else "-"}
        last = case


def _other(content: Content, record: Record, provider: str) -> Record:
    """Another provider's record of the same case."""
    case = _case(content, record)
    found = (r for r in content["records"] if r["provider"] == provider)
    return next((r for r in found if _case(content, r) == case), {})


def _better(content: Content) -> Iterator[str]:
    """Where another provider of the same values is faster or leaner than ours."""
    floors = {name for name, p in SUBJECTS[content["subject"]].providers.items() if p.floor}
    for key, words in (("seconds", "faster"), ("extra_bytes", "leaner")):
        found: dict[str, list[str]] = {}
        for record in content["records"]:
            name, value = record["provider"], record.get(key)
            ours = _other(content, record, "ours").get(key)
            if None in (ours, value) or name in floors or name.startswith("ours"):
                continue
            if value < ours:
                where = f"{value / ours:.2f} at {_case(content, record)}"
                found.setdefault(name, []).append(where)
        lines = (f"- {name}: {'; '.join(where)}\n" for name, where in found.items())
        listed = "\n\n" + "".join(lines) if found else " nobody.\n"
        yield f"\nWho is {words}, as a fraction of ours:{listed}"


def _kernels(results: Path) -> Iterator[str]:
    """Registers and spills, by kernel and architecture."""
    path = results / "kernels.json"
    if not path.exists():
        return
    content = json.loads(path.read_text())
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in content["records"]:
        groups.setdefault((record["kernel"], record["arch"]), []).append(record)
    rows = [
        {
            "kernel": f"`{kernel}`",
            "architecture": arch,
            "variants": str(len(group)),
            "most registers": str(max(r["registers"] for r in group)),
            "with spills": str(sum(r["spills"] > 0 for r in group)),
            "with tensor cores": str(sum(r["tensor_core"] > 0 for r in group)),
        }
        for (kernel, arch), group in groups.items()
    ]
    yield "\n## Kernels, compiled without a GPU\n\n"
    yield f"`python -m benchmarks kernels`, triton {content['machine']['triton']}.\n"
    yield f"\n{table(rows)}\n"


# --- Pictures -------------------------------------------------------------------------------------


def draw(content: Content, path: Path) -> None:
    """One picture: of steps as bars, of scaling against N, otherwise as multiples of plain PyTorch's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [record for record in content["records"] if record.get("seconds")]
    kind = {"step": _draw_bars, "scaling": _draw_growth}.get(content["subject"], _draw_ratios)
    if kind is _draw_ratios:
        records = [r for r in records if _other(content, r, "plain").get("seconds")]
        records = [r for r in records if r["provider"] != "plain"]
    if not records:
        return
    cases = list(dict.fromkeys(_case(content, record) for record in records))[::-1]
    height = 4.2 if kind is _draw_growth else 1.7 + 0.45 * len(cases) * (1 + (kind is _draw_bars))
    figure, axes = plt.subplots(
        1, 2, figsize=(9, height), sharey=kind is not _draw_growth, layout="constrained"
    )
    kind(content, records, cases, axes)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_bars(content: Content, records: list[Record], cases: list[str], axes: Any) -> None:
    """Milliseconds and peak GiB on axes that begin at zero."""
    colours = {"squared-error": "#9aa5b1", "ours": "black", "plain": "#dd8452"}
    for axis, (key, unit, title) in zip(
        axes,
        (("seconds", 1e-3, "time of a step, ms"), ("peak_bytes", 2**30, "peak memory, GiB")),
        strict=True,
    ):
        for number, (name, colour) in enumerate(colours.items()):
            mine = [r for r in records if r["provider"] == name]
            places = [cases.index(_case(content, r)) + 0.27 * (1 - number) for r in mine]
            bars = axis.barh(places, [r[key] / unit for r in mine], 0.25, label=name, color=colour)
            axis.bar_label(bars, fmt="{:.3g}", padding=3)
        axis.set(title=title, yticks=range(len(cases)), yticklabels=cases)
        axis.margins(x=0.14)


def _draw_growth(content: Content, records: list[Record], cases: list[str], axes: Any) -> None:
    """Against N, with both axes logarithmic."""
    for axis, (key, unit, title) in zip(
        axes, (("seconds", 1, "time, s"), ("extra_bytes", 2**20, "extra memory, MiB")), strict=True
    ):
        for name, style in (("ours", "s-k"), ("plain", "^-C1")):
            mine = [r for r in records if r["provider"] == name and r.get(key)]
            axis.plot([r["N"] for r in mine], [r[key] / unit for r in mine], style, label=name)
        axis.set(yscale="log", xlabel="N = M", title=title)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)


def _draw_ratios(content: Content, records: list[Record], cases: list[str], axes: Any) -> None:
    """Time and memory over plain's; ours is written beside its mark."""
    for axis, (key, title) in zip(
        axes, (("seconds", "time"), ("extra_bytes", "extra memory")), strict=True
    ):
        for number, name in enumerate(dict.fromkeys(record["provider"] for record in records)):
            mine = [r for r in records if r["provider"] == name and r.get(key)]
            mine = [r for r in mine if _other(content, r, "plain").get(key)]
            ratios = [r[key] / _other(content, r, "plain")[key] for r in mine]
            places = [cases.index(_case(content, r)) for r in mine]
            style: dict[str, Any] = {"color": f"C{number}", "marker": "o^Dv*P"[number % 6]}
            if name == "ours":
                style = {"color": "black", "marker": "s", "markersize": 8, "zorder": 1}
                for ratio, place in zip(ratios, places, strict=True):
                    text = f"{ratio:.2g}"
                    axis.annotate(
                        text, (ratio, place), (0, 6), textcoords="offset points", ha="center"
                    )
            axis.plot(ratios, places, linestyle="none", label=name, **style)
        axis.axvline(1, color="black", linewidth=1)
        axis.set(xscale="log", title=title, xlabel="plain PyTorch = 1, left is better")
        axis.margins(x=0.12)
        axis.set(yticks=range(len(cases)), yticklabels=cases, ylim=(-0.6, len(cases) - 0.3))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.xaxis.set_minor_formatter(lambda x, _: "")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(" ".join(content["columns"]))


# --- Command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks page`."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page")


def run(arguments: argparse.Namespace) -> int:
    """Draw the pictures and write the page."""
    for device in targets.devices(arguments.results):
        for name, content in targets.Results(arguments.results, device).files.items():
            draw(content, arguments.results / f"{name}_{device}_{content['dtype']}.png")
    arguments.output.write_text(render(arguments.results))
    print(f"written: {arguments.output}")
    return 0
