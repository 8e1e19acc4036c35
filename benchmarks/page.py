"""Write docs/benchmarks.md and its pictures from the files of results."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import peers, scaling, targets
from .sheet import RESULTS, Record, cells, duration, label, table
from .subjects import SUBJECTS

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
Content = dict[str, Any]

HEAD = """# Benchmarks

<!-- Written by `python -m benchmarks page` from benchmarks/results; edit that, not this. -->

In a checkout, `pip install -e ".[bench]"` and `python -m benchmarks all --device cuda --minutes 10`
measure everything, the most informative first; `python -m benchmarks --help` lists the single commands.
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
- In the pictures, left of the line is better than plain PyTorch.
"""

TITLES = {
    "step": ("What a loss adds to a training step", "Teacher, student, loss, backward and SGD."),
    "overhead": ("What a call costs", "Each loss and operator against plain PyTorch."),
    "contrast": (
        "The contrast on maps",
        "`PixelContrastLoss` against `F.normalize`, a product and `F.cross_entropy`.",
    ),
    "row_lse": (
        "`row_lse` alone",
        "Beside its two matrix products, fused attention with V = K, and as plain the `logsumexp` of\n"
        "all logits, which is slower than `F.cross_entropy`.",
    ),
    "wide": ("`row_lse` with wide features", "More than the fused kernel takes."),
    "maskd": ("Masked distillation", "One level; plain holds a tensor [B, T, C, H, W]."),
    "af_dcd": ("Af-DCD", "The contrast inside patches, and the whole loss."),
    "peers": (
        "The contrast by others",
        "`F.cross_entropy` (plain), and every library that can compute it.",
    ),
    "scaling": ("How the cost grows", "Against N = M."),
}
SHOWN_OF_PEERS = [label(case) for case in (peers.PCD, (16384, 16384, 128), (8192, 8192, 128))]


def render(results: Path) -> str:
    """The whole page."""
    devices = targets.devices(results)
    summary = [row for device in devices for row in _summary(results, device)]
    parts = [HEAD, f"\n## Summary\n\n{table(summary)}\n"]
    for device in devices:
        files = targets.Results(results, device).files
        machine = next(iter(files.values()))["machine"]
        parts.append(f"\n## {machine.get('gpu') or machine['processor']}\n")
        for name in TITLES:
            if name in files:
                parts += _section(files[name], results / f"{name}_{device}")
        if reached := targets.reached(results, device):
            parts.append(f"\n### Targets\n\n{reached}\n")
    return "".join([*parts, *_kernels(results), HOW])


def _summary(results: Path, device: str) -> Iterator[dict[str, str]]:
    """Ours and plain in the first cases of each subject."""
    found = targets.Results(results, device)
    for name, count in (("step", 3), ("contrast", 2), ("peers", 2), ("maskd", 1), ("af_dcd", 2)):
        content = found.files.get(name, {"columns": [], "records": []})
        cases = [tuple(r[x] for x in content["columns"]) for r in content["records"]]
        if name == "peers":
            cases = [case for case in cases if label(case) in SHOWN_OF_PEERS]
        for case in list(dict.fromkeys(cases))[:count]:
            records = found.records(name, case)
            if {"ours", "plain"} <= records.keys():
                base = records.get("squared-error", {})
                key = "peak_bytes" if name == "step" else "extra_bytes"
                yield {
                    "on": device,
                    "what": f"{TITLES[name][0]}: {label(case)}",
                    "plain PyTorch": _cost(records["plain"], base, key),
                    "pixdistill": _cost(records["ours"], base, key),
                }


def _cost(record: Record, base: Record, key: str) -> str:
    seconds = record["seconds"] - base.get("seconds", 0.0)
    mib = ((record[key] or 0) - base.get(key, 0)) / 2**20
    return f"{duration(max(seconds, 0.0))}, {max(mib, 0):.0f} MiB"


def _case(content: Content, record: Record) -> str:
    return label(record[column] for column in content["columns"])


def _section(content: Content, stem: Path) -> Iterator[str]:
    """A heading, the machine, a picture, a table, and what is particular to the subject."""
    name, machine, records = content["subject"], content["machine"], content["records"]
    title, words = TITLES[name]
    facts = [f"{key} {machine[key]}" for key in ("pixdistill", "torch", "triton")]
    facts += [f"{machine['processor']}, {machine['threads']} threads"]
    facts += [machine["date"]] if "date" in machine else []
    yield f"\n### {title}\n\n{words} `python -m benchmarks {name}`, {content['dtype']};\n"
    yield f"{', '.join(facts)}.\n"
    picture = f"{stem.name}_{content['dtype']}.png"
    if (stem.parent / picture).exists():
        yield f"\n![Time and memory beside plain PyTorch's](../benchmarks/results/{picture})\n"
    yield f"\n{table(list(_rows(content)))}\n"
    if name in ("peers", "row_lse"):
        yield from _better(content)
    for provider in ("ours", "plain") if name == "scaling" else ():
        for key, what in (("seconds", "time"), ("extra_bytes", "memory")):
            exponent = scaling.exponent(records, provider, key)
            if exponent is not None:
                yield f"\n- {provider}: from N = {scaling.FITTED_FROM}, {what} grows as "
                yield f"$N^{{{exponent:.2f}}}$"
    reasons: dict[str, str] = {}
    for record in records:
        if reason := record.get("skipped") or record.get("failed"):
            reasons.setdefault(record["provider"], f"{reason} (at {_case(content, record)})")
    if reasons:
        yield "\nLeft out, with the first reason of each:\n\n"
        yield from (f"- {provider}: `{reason}`\n" for provider, reason in reasons.items())
    if name == "peers":
        yield "\nWhat they are:\n\n"
        yield from (f"- {key}: {p.note}\n" for key, p in peers.PROVIDERS.items())


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
    """Time and memory: of scaling against N, otherwise as multiples of plain PyTorch's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [record for record in content["records"] if record.get("seconds")]
    grows = content["subject"] == "scaling"
    if not grows:
        records = [r for r in records if _other(content, r, "plain").get("seconds")]
        records = [r for r in records if r["provider"] != "plain"]
    if not records:
        return
    cases = list(dict.fromkeys(_case(content, record) for record in records))[::-1]
    height = 4.0 if grows else 1.6 + 0.42 * len(cases)
    figure, axes = plt.subplots(1, 2, figsize=(11, height), sharey=not grows, layout="constrained")
    for axis, (key, title) in zip(
        axes, (("seconds", "time"), ("extra_bytes", "extra memory")), strict=True
    ):
        for number, name in enumerate(dict.fromkeys(record["provider"] for record in records)):
            mine = [r for r in records if r["provider"] == name and r.get(key)]
            style: dict[str, Any] = {"color": f"C{number}", "marker": "o^Dv*P"[number % 6]}
            if name == "ours":
                style = {"color": "black", "marker": "s", "markersize": 9, "zorder": 1}
            if grows:
                unit = 1 if key == "seconds" else 2**20
                axis.plot(
                    [r["N"] for r in mine], [r[key] / unit for r in mine], label=name, **style
                )
                continue
            mine = [r for r in mine if _other(content, r, "plain").get(key)]
            ratios = [r[key] / _other(content, r, "plain")[key] for r in mine]
            places = [cases.index(_case(content, r)) for r in mine]
            axis.plot(ratios, places, linestyle="none", label=name, **style)
        if grows:
            axis.set(yscale="log", xlabel="N = M")
            axis.set_title(f"{title} ({'s' if key == 'seconds' else 'MiB'})")
            axis.set_xscale("log", base=2)
        else:
            axis.set(xscale="log", title=f"{title} / plain's")
            axis.axvline(1, color="black", linewidth=1)
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.grid(alpha=0.3)
    if not grows:
        axes[0].set_yticks(range(len(cases)), cases)
        axes[0].set_ylabel(" ".join(content["columns"]))
    axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
