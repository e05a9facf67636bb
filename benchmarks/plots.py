"""Plots of the benchmarks, as SVG for the documentation."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def can_draw(path: Path) -> bool:
    """Whether matplotlib is there; says so where a plot stays as it was."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    print(f"matplotlib is missing, so {path.name} stays as it was: pip install -e '.[bench]'")
    return False


@contextmanager
def svg(path: Path, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A canvas of a size in inches and its axes, written when they are drawn. The same figures make
    the same file."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        canvas = Figure(figsize=size, layout="constrained")
        yield canvas, canvas.add_subplot()
        canvas.savefig(path, format="svg", metadata={"Date": None})
