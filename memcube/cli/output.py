"""What the commands print.

Remembered text comes from anybody. Control characters in it are shown, not sent to the terminal,
where they could move the cursor or change the title.
"""

import json
import unicodedata
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from memcube.client import Cube, Hit
from memcube.client.types import to_json


def print_json(value: Any) -> None:
    """JSON on stdout, indented."""
    typer.echo(json.dumps(to_json(value), ensure_ascii=False, indent=2))


def fail(error: Exception | str) -> None:
    """One line on stderr."""
    typer.echo(f"memcube: {safe(' '.join(str(error).split()))}", err=True)


def safe(text: str) -> str:
    """The text with control characters, except line breaks and tabs, made visible."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else f"\\x{ord(c):02x}"
        for c in text
    )


def print_cube(cube: Cube | Hit, *, before: str = "") -> None:
    """A cube as a short block: who and when, the text, the id."""
    about = [before, cube.speaker or cube.role or "", _when(cube.event_time or cube.created_at)]
    about += [f"{name}={cube.metadata[name]}" for name in sorted(cube.metadata)]
    about += [f"#{tag}" for tag in cube.tags]
    typer.echo(safe("  ".join(part for part in about if part)))
    typer.echo(safe("    " + cube.text.replace("\n", "\n    ")))
    typer.echo(safe(f"    {cube.id}"))


def as_lines(value: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested values as ``a.b: value`` and ``a.0.b: value`` lines."""
    for name, inner in value.items():
        if isinstance(inner, list) and any(isinstance(entry, Mapping) for entry in inner):
            inner = {str(place): entry for place, entry in enumerate(inner)}
        if isinstance(inner, Mapping):
            yield from as_lines(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}: {inner}"


def progress_bar(unit: str) -> Progress:
    """A bar on stderr with count, rate, elapsed and remaining time; gone when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} " + unit + "/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _when(time: datetime | None) -> str:
    return "" if time is None else time.strftime("%Y-%m-%d %H:%M")
