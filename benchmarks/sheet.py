"""The records of a run: their file, and their table."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BUSY = 3  # slowest over fastest run above which something else uses the machine

Record = dict[str, Any]


class Sheet:
    """The records of a run and the file that holds them."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.records: list[Record] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        """Write a new file and put it in the place of the old, which a kill cannot tear."""
        draft = self.path.with_suffix(".tmp")
        draft.write_text(as_json(self.head, self.records))
        draft.replace(self.path)

    def __str__(self) -> str:
        """The table, what was skipped and why, and the file."""
        names = self.head["columns"]
        rows = [
            {" ".join(names): label(record[name] for name in names)} | cells(record)
            for record in self.records
            if "seconds" in record
        ]
        return "\n".join([table(rows), *warnings(self.records), f"written: {self.path}"])


def as_json(head: dict[str, Any], records: list[Record]) -> str:
    """A file of results, with a line for each record."""
    lines = ",\n".join(f"  {json.dumps(record)}" for record in records)
    return json.dumps(head, indent=1)[:-2] + f',\n "records": [\n{lines}\n ]\n}}\n'


def label(case: Iterable[Any]) -> str:
    """A case as it is written on the command line."""
    return " ".join(map(str, case))


def cells(record: Record) -> dict[str, str]:
    """What a table says of any record; dashes for what was not measured."""
    mib, errors = record.get("extra_bytes"), [record.get(f"{x}_error") for x in ("loss", "grad")]
    return {
        "provider": record["provider"],
        "time": duration(record["seconds"]),
        "spread": f"{duration(record['fastest'])} to {duration(record['slowest'])}",
        "host": duration(record.get("host_seconds")),
        "GPU": duration(record.get("gpu_seconds")),
        "launches": str(record.get("launches", "-")),
        "MiB": "-" if mib is None else f"{mib / 2**20:.1f}",
        "error": "-" if None in errors else ", ".join(f"{error:.0e}" for error in errors),
    }


def duration(seconds: float | None) -> str:
    """Three digits and a unit."""
    if seconds is None:
        return "-"
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    number = float(f"{seconds * factor:.3g}")
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f} {unit}" if number else "0"


def table(rows: list[dict[str, str]]) -> str:
    """Rows of equal keys as a Markdown table, without columns that hold only dashes."""
    if not rows:
        return "Nothing was measured."
    names = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    lines = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    text = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def warnings(records: list[Record]) -> Iterator[str]:
    """What was skipped or failed and why, once each, and whether the machine was busy."""
    for kind in ("skipped", "failed"):
        yield from dict.fromkeys(f"{kind} {r['provider']}: {r[kind]}" for r in records if kind in r)
    busy = sum(r.get("slowest", 0) > BUSY * r.get("fastest", 1) for r in records)
    if busy:
        yield (
            f"WARNING: in {busy} of {len(records)} rows the slowest run took more than {BUSY} times "
            "the fastest. Is something else running on this machine?"
        )
