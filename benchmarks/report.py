"""What every benchmark prints and saves: a table, and a JSON file that names machine and versions."""

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pixdistill

RESULTS = Path(__file__).parent / "results"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table with aligned columns."""
    columns = list(rows[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def save(name: str, records: list[dict[str, Any]], device: str, folder: Path) -> Path:
    """Write `<folder>/<name>.json` with the machine, the versions and the records."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(device), "records": records}, indent=1) + "\n")
    return path


def machine(device: str) -> dict[str, Any]:
    """The processor, what is visible of its cores, and the versions that matter."""
    facts: dict[str, Any] = {"processor": _processor(), "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30)}
        facts |= {"cuda": torch.version.cuda}
    facts |= {"python": platform.python_version(), "system": platform.system()}
    facts |= {package: _version(package) for package in ("torch", "triton")}
    return facts | {"pixdistill": pixdistill.__version__}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The model name and vector extension: what decides how fast a matrix product is."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
