"""Time to first token: attached memory against a full prefill, and the same answer from both.

    python -m benchmarks.bench_kv --parts ttft

The context is stored as the engine stores it, in blocks of 64 tokens and a shorter tail on the device,
and is copied into a buffer that is used again. The full prefill is one forward of all tokens, which
on a CPU is faster than one in chunks. Times are the least of some rounds, in CPU seconds of one thread, as
the machine is shared; on a GPU by the clock. The figure goes into the documentation.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.plots import can_draw, svg
from benchmarks.results import ROOT, Figure
from memcube.activation.fidelity import cases
from memcube.activation.forward import KvBuffer, PackedModel, Row
from memcube.activation.models import LoadedModel, load_model
from memcube.config import ModelConfig

_BLOCK = 64
_CONTEXTS = (500, 1500, 3000, 6000)
_SHORT_CONTEXTS = (100, 500)
_QUERIES = (30, 167)
_GOALS = {(3000, 30): ">= 96", (6000, 167): ">= 95"}
_FIGURE = ROOT / "docs" / "kv-ttft.svg"
_ANSWER_TOKENS = 16
_FULL_ROUNDS, _ATTACHED_ROUNDS = 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """One context and one query: seconds to the first token both ways."""

    context: int
    query: int
    full_s: float
    attached_s: float
    same_tokens: bool

    @property
    def saved(self) -> float:
        return 100 * (1 - self.attached_s / self.full_s)


def run(cache_dir: Path, *, short: bool = False) -> list[Figure]:
    """The figures, about three minutes on one core; in short half a minute, of less."""
    contexts = _SHORT_CONTEXTS if short else _CONTEXTS
    loaded = load_model(ModelConfig(threads=1), cache_dir)
    model = PackedModel(loaded)
    words = _words(loaded, max(contexts) + sum(_QUERIES))
    cells = [
        _cell(loaded, model, words[:context], words[-query:])
        for context in contexts
        for query in _QUERIES
    ]
    if not short:
        draw(cells, _FIGURE)
    figures = [
        Figure(
            name=f"time to first token saved, {cell.context:,} attached tokens, query of {cell.query}",
            value=cell.saved,
            unit="%",
            goal=_GOALS.get((cell.context, cell.query)),
            beside=f"{cell.full_s:.2f} s prefilled, {cell.attached_s:.3f} s attached",
        )
        for cell in cells
    ]
    same = Figure(
        name=f"attached and prefilled: the same {_ANSWER_TOKENS} greedy tokens, cells of {len(cells)}",
        value=sum(cell.same_tokens for cell in cells),
        unit="",
        goal=f">= {len(cells)}",
    )
    return [*figures, same]


def _words(loaded: LoadedModel, num_tokens: int) -> list[int]:
    """Tokens of memories, none repeated."""
    (case,) = cases(loaded, num_cases=1, seed=77, segment_tokens=num_tokens + 64, num_segments=(1,))
    return list(case.segments[0][:num_tokens])


def _cell(loaded: LoadedModel, model: PackedModel, context: list[int], query: list[int]) -> _Cell:
    capacity = len(context) + len(query) + _ANSWER_TOKENS
    full, attached = (KvBuffer(loaded.layout, model.device, capacity) for _ in range(2))
    full_s = attached_s = float("inf")
    from_full = from_attached = 0
    for _ in range(_FULL_ROUNDS):
        full.truncate(0)
        from_full, took_s = _timed(lambda: _prefill(model, full, [*context, *query]))
        full_s = min(full_s, took_s)
    blocks = _blocks(full, len(context))
    for _ in range(_ATTACHED_ROUNDS):
        attached.truncate(0)
        from_attached, took_s = _timed(lambda: _attach(model, attached, blocks, query))
        attached_s = min(attached_s, took_s)
    return _Cell(
        context=len(context),
        query=len(query),
        full_s=full_s,
        attached_s=attached_s,
        same_tokens=_answer(model, attached, from_attached) == _answer(model, full, from_full),
    )


def _prefill(model: PackedModel, buffer: KvBuffer, ids: Sequence[int]) -> int:
    (logits_1V,) = model.forward([Row(buffer, ids)])
    assert logits_1V is not None
    return int(logits_1V.argmax())


def _blocks(buffer: KvBuffer, num_tokens: int) -> list[Tensor]:
    kv_L2HND = buffer.view()
    return [
        kv_L2HND[:, :, :, start : min(start + _BLOCK, num_tokens)].clone()
        for start in range(0, num_tokens, _BLOCK)
    ]


def _attach(
    model: PackedModel,
    buffer: KvBuffer,
    blocks: Sequence[Tensor],
    query: Sequence[int],
) -> int:
    for block_L2HND in blocks:
        buffer.load(block_L2HND, buffer.length)
    return _prefill(model, buffer, query)


def _answer(model: PackedModel, buffer: KvBuffer, first: int) -> list[int]:
    ids = [first]
    while len(ids) < _ANSWER_TOKENS:
        ids.append(_prefill(model, buffer, ids[-1:]))
    return ids


def _timed(call: Callable[[], int]) -> tuple[int, float]:
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    found = call()  # ends with a number on the host, so a GPU is done
    return found, clock() - began


def draw(cells: Sequence[_Cell], path: Path) -> None:
    """The time to the first token against the length of the context, as SVG."""
    if not can_draw(path):
        return
    from matplotlib.ticker import StrMethodFormatter

    with svg(path, (7, 4)) as (_, axes):
        for query, line in zip(_QUERIES, ("-", "--"), strict=True):
            own = [cell for cell in cells if cell.query == query]
            at = [cell.context for cell in own]
            for name, colour, times in (
                ("read anew", "tab:red", [cell.full_s for cell in own]),
                ("attached", "tab:blue", [cell.attached_s for cell in own]),
            ):
                label = f"{name}, question of {query} tokens"
                axes.plot(at, times, line, color=colour, marker="o", label=label)
        axes.set_xlabel("tokens of memory")
        axes.set_ylabel("seconds to the first token")
        axes.set_yscale("log")
        axes.set_xticks(sorted({cell.context for cell in cells}))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
