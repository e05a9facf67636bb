"""The activation tier's benchmark, in parts that can be run apart.

    python -m benchmarks.bench_kv                        all parts
    python -m benchmarks.bench_kv --parts ladder,ttft    these; the others' figures stay as they were
    python -m benchmarks.bench_kv --short                whether it works: less of all, nothing is stored

Each part is a function in a module of its own: ``run(cache_dir, short=False) -> list[Figure]``. They
run in processes of their own, so that none is measured in what another left behind.
"""

import argparse
import importlib
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, Figure, commit, show, write_results
from memcube.config import Config

PARTS = {
    "ttft": "benchmarks.kv_ttft:run",
    "ladder": "benchmarks.kv_ladder:run",
    "media": "benchmarks.kv_media:run",
    "batch": "benchmarks.kv_batch:run",
}
"""What can be measured, in the order of the results. Add a line for another part."""

_NAME = "kv"
_COMMAND = "make bench-kv"


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the activation tier.")
    parser.add_argument("--parts", default=",".join(PARTS), help="a comma between each two")
    parser.add_argument("--models", type=Path, default=Config().model_folder())
    parser.add_argument("--short", action="store_true", help="less of all; nothing is stored")
    given = parser.parse_args()
    wanted = given.parts.split(",")
    if unknown := set(wanted) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    for part in PARTS:
        if part in wanted:
            print(f"-- {part}", flush=True)
            began = time.perf_counter()
            figures = _measure(part, given.models, given.short)
            print(f"-- {part} took {time.perf_counter() - began:,.0f} s", flush=True)
            if given.short:
                show(figures)
            else:
                _store(part, figures)


def _measure(part: str, models: Path, short: bool) -> list[Figure]:
    # A multiprocessing.Pool would wait forever for a process that was killed.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_run, PARTS[part], models, short).result()


def _run(where: str, models: Path, short: bool) -> list[Figure]:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)(models, short=short)


def _store(part: str, figures: list[Figure]) -> None:
    """Put a part's figures in the place of those it had."""
    known = _stored()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    known[part] = {"date": now, "commit": commit(), "names": [figure.name for figure in figures]}
    by_name = {figure.name: figure for figure in [*_stored_figures(), *figures]}
    ordered = [
        by_name[name]
        for one in PARTS
        if one in known
        for name in known[one]["names"]
        if name in by_name
    ]
    write_results(
        _NAME, _COMMAND, ordered, parts={one: known[one] for one in PARTS if one in known}
    )


def _file() -> dict[str, Any]:
    path = RESULTS / f"{_NAME}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _stored() -> dict[str, Any]:
    return dict(_file().get("details", {}).get("parts", {}))


def _stored_figures() -> list[Figure]:
    names = [field.name for field in fields(Figure)]
    return [
        Figure(**{name: figure[name] for name in names}) for figure in _file().get("figures", [])
    ]


if __name__ == "__main__":
    main()
