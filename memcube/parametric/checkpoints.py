"""Checkpoints of a training: folders ``step-NNNNNN`` of safetensors and one JSON file.

Each appears by one rename when all in it is on the disk, so that whatever ends the process leaves
whole ones alone; a half one has another name and is removed by the next write. They say nothing of how
many workers trained. The last two are kept.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from memcube.errors import Corrupt
from memcube.files import sync_folder

_NAME = "step-"
_KEPT = 2
_ABOUT = "state.json"
_WEIGHTS = "adapter.safetensors"
_MOMENTS = "optimizer.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a training was after a step. ``about`` is plain JSON of the trainer's."""

    path: Path
    about: dict[str, Any]
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


def write(
    folder: Path,
    step: int,
    about: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint; it survives a loss of power. One that is there already is left."""
    target = folder / f"{_NAME}{step:06d}"
    if not target.exists():
        partial = begin(target)
        save_file(_plain(weights), partial / _WEIGHTS)
        save_file(_plain(moments), partial / _MOMENTS)
        (partial / _ABOUT).write_text(json.dumps(about))
        settle(partial, target)
    for old in _found(folder)[:-_KEPT]:
        # Out of sight first: what is half removed must not be taken for a checkpoint.
        gone = folder / f".{old.name}"
        shutil.rmtree(gone, ignore_errors=True)
        old.rename(gone)
        shutil.rmtree(gone)


def read_last(folder: Path) -> Checkpoint | None:
    """The last checkpoint of a folder; None if there is none.

    Raises:
        Corrupt: it can't be read.
    """
    if not (found := _found(folder)):
        return None
    path = found[-1]
    try:
        about = json.loads((path / _ABOUT).read_text())
        return Checkpoint(
            path=path,
            about=about,
            weights=load_file(path / _WEIGHTS),
            moments=load_file(path / _MOMENTS),
        )
    except (OSError, ValueError, SafetensorError) as broken:
        raise Corrupt(str(path), f"the checkpoint can't be read: {broken}") from None


def begin(target: Path) -> Path:
    """An empty folder to write what shall become ``target``."""
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def settle(partial: Path, target: Path) -> None:
    """Let a folder of files appear under its name when all of it is on the disk."""
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(partial)
    partial.rename(target)
    sync_folder(target.parent)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _found(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_NAME}*"))
