"""What lies in an ``EdgeStore``'s folder, and how it is told whole from damaged.

``spec.json``: what the index was built with. ``current``: the name of the live engine folder, and the
sizes of its append-only files at the last flush. ``engine-NNNNNN``: engine folders; any but the
current one are what a crash left of an optimisation. ``creating``: the first engine folder on its way.
``lock``: held by the process that has the store open.

The engine starts with fewer cubes, and says nothing, where a segment's folder is gone or the map from
ids to points is cut short (measured on 0.9.0). So a folder opens only if the files that never shrink
are there and no smaller than they were. Bytes that were changed in place are not noticed.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from memcube.errors import Conflict, Corrupt
from memcube.files import replace_file, sync_folder
from memcube.tiers.plaintext import IndexSpec

CURRENT = "current"
_SPEC = "spec.json"
_CREATING = "creating"
_REBUILD = "; remove the folder to rebuild it from the catalog"
_NEVER_SHRINK = (
    "segments/*/*id_tracker.mappings",
    "segments/*/vector_storage-*/**/chunk_*.mmap",
    "segments/*/vector_storage-*/**/page_*.dat",
    "segments/*/payload_storage/page_*.dat",
)


def check_spec(path: Path, spec: IndexSpec) -> None:
    """State the spec in a new folder; compare it with the one stated in an old folder.

    Raises:
        Conflict: it is another one.
        Corrupt: it is gone, while the index is there.
    """
    written = path / _SPEC
    stated = json.dumps({"embedder": spec.embedder, "dim": spec.dim}, sort_keys=True)
    if not written.exists():
        if (path / CURRENT).exists() or any(path.glob("engine-*")):
            raise Corrupt(str(written), f"is missing, while the index is there{_REBUILD}")
        replace_file(written, stated)
    held = written.read_text()
    if held != stated:
        raise Conflict(f"{path} holds an index of {held}, not of {stated}; use another folder")


def begin(path: Path) -> Path:
    """An empty folder for a first engine.

    Raises:
        Corrupt: engine folders are there, but nothing says which one is used.
    """
    if any(path.glob("engine-*")):
        raise Corrupt(str(path / CURRENT), f"is missing, while the index is there{_REBUILD}")
    begun = path / _CREATING
    if begun.exists():
        shutil.rmtree(begun)
    begun.mkdir()
    return begun


def adopt(path: Path, begun: Path) -> None:
    """Make the engine folder that was begun the current one."""
    # `current` first: a crash before the rename leaves a name without a folder, and `creating`.
    name = next_name(path)
    replace_file(path / CURRENT, json.dumps({"engine": name, "sizes": {}}))
    os.rename(begun, path / name)
    sync_folder(path)


def check(path: Path) -> str:
    """The name of the live engine folder; what crashes left behind is removed.

    Raises:
        Corrupt: something that was written is missing or cut short.
    """
    held = _held(path)
    name = held["engine"]
    if not (path / name).is_dir() and (path / _CREATING).is_dir():
        os.rename(path / _CREATING, path / name)
    for leftover in path.glob("engine-*"):
        if leftover.name != name:
            shutil.rmtree(leftover)
    if not (path / name).is_dir():
        raise Corrupt(str(path / name), f"is missing{_REBUILD}")
    for needed in ("wal", "segments", "edge_config.json"):
        if not (path / name / needed).exists():
            raise Corrupt(str(path / name / needed), f"is missing{_REBUILD}")
    for file, size in held["sizes"].items():
        at = path / name / file
        found = at.stat().st_size if at.exists() else 0
        if found < size:
            raise Corrupt(str(at), f"has {found:,} bytes of {size:,}{_REBUILD}")
    return name


def mark(path: Path, name: str) -> None:
    """Make a flushed engine folder the current one, and note the sizes of its files."""
    engine = path / name
    sizes = {
        str(file.relative_to(engine)): file.stat().st_size
        for pattern in _NEVER_SHRINK
        for file in engine.glob(pattern)
    }
    replace_file(path / CURRENT, json.dumps({"engine": name, "sizes": sizes}))


def next_name(path: Path) -> str:
    """A name that no engine folder has had since the store was opened."""
    numbers = [int(folder.name.removeprefix("engine-")) for folder in path.glob("engine-*")]
    return f"engine-{max(numbers, default=-1) + 1:06d}"


def sync_tree(folder: Path) -> None:
    """Fsync every file and folder below, and the folder."""
    for at in (folder, *folder.rglob("*")):
        sync_folder(at)


def _held(path: Path) -> dict[str, Any]:
    at = path / CURRENT
    try:
        held = json.loads(at.read_text())
        name = held["engine"]
        if name.startswith("engine-") and name.removeprefix("engine-").isdecimal():
            return held
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise Corrupt(str(at), f"names no engine folder{_REBUILD}")
