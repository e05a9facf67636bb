"""The fidelity gate of a running engine: run once for a model, in idle time, and remembered.

Until it has passed, requests for composed modes are served exactly. Its report lies beside the
converted models, named by all that its figures depend on: the model, what is asked of it, how
segments are composed, and ``GATE_VERSION``. A report that can't be read is made anew. Of several
engines on one node one measures, and the others wait for its report.
"""

import asyncio
import contextlib
import fcntl
import logging
import threading
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import psutil
import torch

from memcube.activation.compose import BLEND_SHARE, FIRST_TOKENS, QUERY_TOKENS
from memcube.activation.contract import Mode
from memcube.activation.fidelity import GATE_SEED, measure_fidelity
from memcube.activation.fidelity_report import THRESHOLDS, FidelityReport
from memcube.activation.forward import RowModel
from memcube.activation.gate_status import GateState, GateStatus
from memcube.activation.models import LoadedModel
from memcube.errors import Unavailable
from memcube.files import replace_file
from memcube.ids import digest

log = logging.getLogger(__name__)

GATE_VERSION = 1
"""Raise it where the same constants compose otherwise than before, or cases are made otherwise."""
_FOLDER = "fidelity"
_LOOK_S = 2.0
_SAMPLE_S, _MOST_PERCENT = 0.1, 60.0


class GatedEngine(Protocol):
    """An engine as the gate sees it."""

    @property
    def loaded(self) -> LoadedModel: ...
    def idle_model(self, pause: Callable[[], None]) -> RowModel: ...
    def allow_composing(self, modes: Collection[Mode]) -> None: ...


class FidelityGate:
    """Decides which modes an engine composes."""

    def __init__(
        self,
        engine: GatedEngine,
        cache_dir: Path,
        *,
        num_cases: int,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """``is_busy`` says whether others need the machine; it is asked before each piece."""
        self._engine = engine
        self._is_busy = is_busy
        self._ended = threading.Event()
        self._path = cache_dir / _FOLDER / f"{report_key(engine.loaded, num_cases)}.json"
        self.status = GateStatus(state=GateState.MEASURING, num_cases=num_cases)

    async def run(self) -> None:
        """Read the report or make it, and let the engine compose what passed.

        Raises nothing but its own cancellation: what goes wrong is in ``status``.
        """
        try:
            report = await self._report()
            self._engine.allow_composing(report.passed)
        except Unavailable as closed:
            self._failed(str(closed))
        except Exception as failed:
            log.exception("the fidelity gate failed; nothing is composed")
            self._failed(f"{type(failed).__name__}: {failed}")
        else:
            self.status = replace(
                self.status,
                state=GateState.DONE,
                modes=report.passed,
                why=report.why_not or report.refusals(),
                report=report,
            )
            log.info("composed modes that passed the gate: %s", ", ".join(report.passed) or "none")

    def _failed(self, why: str) -> None:
        self.status = replace(self.status, state=GateState.FAILED, why=why)

    async def _report(self) -> FidelityReport:
        if (stored := self._stored()) is not None:
            return stored
        self._path.parent.mkdir(parents=True, exist_ok=True)
        async with _alone(self._path.with_suffix(".lock")):
            if (stored := self._stored()) is not None:
                return stored
            report = await asyncio.to_thread(self._measure)
            replace_file(self._path, report.to_json())
            return report

    def _stored(self) -> FidelityReport | None:
        """The stored report, unless it is damaged or of another model."""
        try:
            report = FidelityReport.from_json(self._path.read_text())
        except (OSError, ValueError):
            return None
        loaded = self._engine.loaded
        is_ours = (report.model, report.dtype) == (loaded.fingerprint, loaded.layout.dtype)
        return report if is_ours else None

    @torch.inference_mode()
    def _measure(self) -> FidelityReport:
        return measure_fidelity(
            self._engine.loaded,
            self._engine.idle_model(self._until_calm),
            num_cases=self.status.num_cases,
            measured=self._count,
        )

    def _until_calm(self) -> None:
        while self._is_busy() or self._ended.is_set():
            if self._ended.wait(_LOOK_S):
                raise Unavailable("the fidelity gate was ended")

    def end(self) -> None:
        """Measure no further."""
        self._ended.set()

    def _count(self, num_cases: int) -> None:
        self.status = replace(self.status, num_measured=num_cases)


def machine_is_busy() -> bool:
    """Whether others use most of this machine's processors; looks for a tenth of a second."""
    return psutil.cpu_percent(_SAMPLE_S) > _MOST_PERCENT


def report_key(loaded: LoadedModel, num_cases: int) -> str:
    """What a report's figures depend on."""
    limits = [f"{mode}:{sorted(asdict(limit).items())}" for mode, limit in THRESHOLDS.items()]
    composing = f"{BLEND_SHARE}:{FIRST_TOKENS}:{QUERY_TOKENS}"
    return digest(
        "fidelity",
        str(GATE_VERSION),
        loaded.fingerprint,
        loaded.tokenizer_fingerprint,
        loaded.layout.dtype,
        f"{num_cases}:{GATE_SEED}",
        composing,
        *limits,
    )


@asynccontextmanager
async def _alone(path: Path) -> AsyncIterator[None]:
    """Hold a lock between processes, which ends with the process if not before. Looked at now and then
    instead of waited for: a wait for a lock can't be cancelled."""
    with path.open("w") as file:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            await asyncio.sleep(_LOOK_S)
        yield
