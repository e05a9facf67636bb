"""Small files replaced whole, and folders made durable."""

import os
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Replace a small file: whole or not at all, also at a loss of power. For one writer at a time."""
    temporary = path.with_suffix(".new")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
