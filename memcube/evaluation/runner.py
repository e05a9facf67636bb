"""The retrieval measurement against a running system: ``memcube eval locomo``.

Each conversation is stored under a user of its own, made for the run and deleted after it; every
question is asked with that user's scope, in each mode. What is counted is whether the turns that
hold the answer come back, not whether a model then answers well.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from memcube.client import MemCubeClient
from memcube.errors import BadRequest
from memcube.evaluation.locomo import Conversation, Question
from memcube.evaluation.metrics import measures, summarise
from memcube.ingest.formats import locomo_items

SYSTEMS = {"hybrid": "memcube", "dense": "dense", "sparse": "bm25"}
"""Search modes, and what each is called in a report."""

TOP_K = 20
_BATCH_ITEMS = 250
CpuClock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """``done`` of ``total`` turns stored or questions asked in ``phase``."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A question, whose memory it is asked of, and the turns that each cube there stands for."""

    question: Question
    user_id: str
    turns_of: Mapping[str, Sequence[str]]


def run_locomo(
    client: MemCubeClient,
    conversations: Sequence[Conversation],
    *,
    suffix: str,
    modes: Sequence[str] = tuple(SYSTEMS),
    concurrency: int = 1,
    keep: bool = False,
    cpu_clock: CpuClock | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Figures of each system: ``{system: {"overall": …, "by_category": …, …}}``.

    Measures are in percent; times are wall milliseconds a query at ``concurrency``, seen from here.

    Args:
        suffix: makes the users' ids this run's own; they are deleted at the end unless ``keep``.
        cpu_clock: CPU seconds that the server has used so far, see ``cpu_clock_of``.

    Raises:
        BadRequest: an unknown mode, or no question with evidence.
    """
    for mode in modes:
        if mode not in SYSTEMS:
            raise BadRequest(f"no such system; there are: {', '.join(SYSTEMS)}", mode)
    if not any(conversation.questions for conversation in conversations):
        raise BadRequest("the file holds no question with evidence", "questions")
    users = {c.id: f"{c.id}-eval-{suffix}" for c in conversations}
    try:
        asked = _store(client, conversations, users, progress)
        return {
            SYSTEMS[mode]: _measure(client, asked, mode, concurrency, cpu_clock, progress)
            for mode in modes
        }
    finally:
        if not keep:
            for user_id in users.values():
                client.delete_all(user_id=user_id)


def cpu_clock_of(pid: int | None) -> CpuClock | None:
    """CPU seconds of a process and all its descendants, Ray's daemons included.

    None without a pid, without psutil (an extra of the server), or when the process is gone or
    another user's: there is then nothing to read.
    """
    if pid is None:
        return None
    try:
        import psutil
    except ModuleNotFoundError:
        return None
    if not psutil.pid_exists(pid):
        return None
    root = psutil.Process(pid)

    def seconds() -> float:
        total = 0.0
        for process in [root, *root.children(recursive=True)]:
            try:
                times = process.cpu_times()
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue  # it ended between the listing and the reading
            total += times.user + times.system
        return total

    try:
        seconds()
    except psutil.AccessDenied:
        return None
    return seconds


def _store(
    client: MemCubeClient,
    conversations: Sequence[Conversation],
    users: Mapping[str, str],
    progress: Callable[[Progress], None],
) -> list[_Asked]:
    asked: list[_Asked] = []
    done = 0
    total = sum(len(conversation.turns) for conversation in conversations)
    for conversation in conversations:
        user_id = users[conversation.id]
        items = locomo_items(conversation, user_id=user_id)
        turns_of: dict[str, list[str]] = {}
        for start in range(0, len(items), _BATCH_ITEMS):
            batch = items[start : start + _BATCH_ITEMS]
            answer = client.add_batch(batch, wait="indexed")
            turns = conversation.turns[start : start + _BATCH_ITEMS]
            for turn, result in zip(turns, answer.results, strict=True):
                for id in result.ids:  # a repeat is one cube that stands for several turns
                    turns_of.setdefault(id, []).append(turn.id)
            done += len(batch)
            progress(Progress(phase="store", done=done, total=total))
        asked += [
            _Asked(question=question, user_id=user_id, turns_of=turns_of)
            for question in conversation.questions
        ]
    return asked


def _measure(
    client: MemCubeClient,
    asked: Sequence[_Asked],
    mode: str,
    concurrency: int,
    cpu_clock: CpuClock | None,
    progress: Callable[[Progress], None],
) -> dict[str, Any]:
    rows: list[tuple[int, dict[str, float]]] = []
    times_ms: list[float] = []
    _ask(client, asked[0], mode)  # the first query of a mode pays for what later ones find warm
    cpu_before_s = cpu_clock() if cpu_clock else 0.0
    with ThreadPoolExecutor(concurrency) as pool:
        for one, (ranked, ms) in zip(
            asked, pool.map(lambda one: _ask(client, one, mode), asked), strict=True
        ):
            rows.append((one.question.category, measures(ranked, one.question.evidence)))
            times_ms.append(ms)
            progress(Progress(phase=mode, done=len(rows), total=len(asked)))
    cpu_s = cpu_clock() - cpu_before_s if cpu_clock else None
    return summarise(rows) | {
        "cpu_ms_per_query": None if cpu_s is None else round(1000 * cpu_s / len(rows), 3),
        "ms_per_query": {"p50": _percentile(times_ms, 50), "p95": _percentile(times_ms, 95)},
    }


def _ask(client: MemCubeClient, one: _Asked, mode: str) -> tuple[list[str], float]:
    """The ids of the turns found, best first, each once; and how long it took (ms)."""
    started = perf_counter()
    found = client.search(one.question.text, user_id=one.user_id, top_k=TOP_K, mode=mode)
    took_ms = 1000 * (perf_counter() - started)
    turns = [turn for hit in found for turn in one.turns_of.get(hit.id, ())]
    return list(dict.fromkeys(turns)), took_ms


def _percentile(values: Sequence[float], percent: int) -> float:
    """The value at nearest rank, to the microsecond."""
    place = max(-(-len(values) * percent // 100) - 1, 0)
    return round(sorted(values)[place], 3)
