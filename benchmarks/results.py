"""Results of benchmarks: one JSON file each, and the checks and the table made from the files.

python -m benchmarks.results check     what falls short of its goal (exit 1 if anything does)
python -m benchmarks.results table     write benchmarks/README.md's table
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
README = Path(__file__).with_name("README.md")
_PACKAGES = ("ray", "torch", "onnxruntime", "qdrant-edge-py", "sqlalchemy", "fastapi", "numpy")
_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured value. ``goal`` is a bound such as ``>= 80``; None where nothing is asked.

    ``beside`` names a peer or limit and its value, measured in the same run where it can be.
    """

    name: str
    value: float
    unit: str
    goal: str | None = None
    beside: str | None = None

    @property
    def ok(self) -> bool | None:
        """Whether the goal is met."""
        if self.goal is None:
            return None
        sign, bound = self.goal.split()
        return self.value >= float(bound) if sign == ">=" else self.value <= float(bound)


def write_results(name: str, command: str, figures: list[Figure], **details: Any) -> Path:
    """Write ``results/NAME.json`` and print it."""
    data = {
        "name": name,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in _PACKAGES},
        "figures": [asdict(figure) | {"ok": figure.ok} for figure in figures],
    }
    if details:
        data["details"] = details
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    show(figures)
    return path


def show(figures: list[Figure]) -> None:
    """Print figures, and which of them fall short."""
    for figure in figures:
        mark = {True: "ok", False: "SHORT", None: ""}[figure.ok]
        print(
            f"{figure.name:55} {figure.value:10.4g} {figure.unit:8} {figure.goal or '':10} {mark}"
        )


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = "unknown"
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1)}


def commit() -> str:
    """What of this project is checked out, in short."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def read_all() -> list[dict[str, Any]]:
    """All results, by name."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def check() -> int:
    """Print what falls short; the number of such figures."""
    short = 0
    for result in read_all():
        for figure in result["figures"]:
            if figure["ok"] is False:
                short += 1
                print(
                    f"{result['name']}: {figure['name']} is {figure['value']:.4g} {figure['unit']}, "
                    f"goal {figure['goal']} ({result['command']})"
                )
    print(f"{short} figures fall short" if short else "all goals are met")
    return short


def table() -> None:
    """Put the table of all figures into the README."""
    lines = ["| benchmark | figure | value | goal | beside |", "|---|---|---|---|---|"]
    for result in read_all():
        for f in result["figures"]:
            mark = {True: " ✓", False: " **short**", None: ""}[f["ok"]]
            lines.append(
                f"| `{result['command']}` | {f['name']} | {f['value']:.4g} {f['unit']} "
                f"| {f['goal'] or ''}{mark} | {f['beside'] or ''} |"
            )
    text = README.read_text()
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    README.write_text(before + "\n".join([_BEGIN, *lines, _END]) + after)


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        sys.exit(1 if check() else 0)
    if sys.argv[1:] == ["table"]:
        table()
    else:
        sys.exit(__doc__)
