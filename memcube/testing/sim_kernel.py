"""A world with one clock: coroutines, messages and faults in the order that a seed gives.

Coroutines are stepped by hand, without an event loop: what they await is a ``Wait``, and the kernel resumes
them when its time has come. A process that crashes is never resumed, so no cleanup runs, as in life; one
that is paused gets all that came meanwhile when it wakes up.
"""

import contextlib
import heapq
import random
from collections.abc import Callable, Coroutine, Generator
from datetime import UTC, datetime, timedelta
from typing import Any

from memcube.errors import DeadlineExceeded, MemCubeError, Unavailable

START = datetime(2026, 1, 1, tzinfo=UTC)
TIMEOUT_S = 2.0


class Wait:
    """What a coroutine of a simulation awaits: ``begin`` is called with who is to be resumed."""

    __slots__ = ("_begin",)

    def __init__(self, begin: Callable[["Task"], None]) -> None:
        self._begin = begin

    def __await__(self) -> Generator["Wait", Any, Any]:
        return (yield self)

    def begin(self, task: "Task") -> None:
        self._begin(task)


class Task:
    """A coroutine that runs in a process."""

    __slots__ = ("_coroutine", "process")

    def __init__(self, process: "Process", coroutine: Coroutine[Any, Any, Any]) -> None:
        self.process = process
        self._coroutine = coroutine

    def resume(self, value: Any = None, error: BaseException | None = None) -> None:
        """Go on, if the process is alive; later, if it is paused."""
        process = self.process
        if process.is_dead:
            return
        if process.is_paused:
            process.held.append((self, value, error))
            return
        if process.may_crash is not None and process.may_crash():
            return
        try:
            go_on = self._coroutine
            wait = go_on.send(value) if error is None else go_on.throw(error)
        except StopIteration:
            return
        wait.begin(self)

    def abandon(self) -> None:
        """Close the coroutine when all is over, so that Python doesn't complain of it."""
        try:
            self._coroutine.close()
        except RuntimeError:
            # It awaits something in a handler of its own end: there is nobody left to care.
            return


class Process:
    """What crashes as one. After a crash it is another process."""

    __slots__ = ("held", "is_dead", "is_paused", "may_crash", "name", "skew_s", "tasks")

    def __init__(self, name: str, *, skew_s: float = 0.0) -> None:
        self.name = name
        self.skew_s = skew_s
        self.is_dead = False
        self.is_paused = False
        self.may_crash: Callable[[], bool] | None = None
        """Asked before each step: whether the process ends here."""
        self.held: list[tuple[Task, Any, BaseException | None]] = []
        self.tasks: list[Task] = []

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = Task(self, coroutine)
        self.tasks.append(task)
        task.resume()

    def wake(self) -> None:
        """End a pause."""
        self.is_paused = False
        held, self.held = self.held, []
        for task, value, error in held:
            task.resume(value, error)


class Kernel:
    """Time, chance and messages."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.num_events = 0
        self.is_faulty = True
        self.after_event: Callable[[], None] = lambda: None
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._made = 0
        self.loss, self.duplication, self.slowness = 0.03, 0.05, 0.04

    def time(self, process: Process | None = None) -> datetime:
        """The time, as a process has it."""
        skew = 0.0 if process is None else process.skew_s
        return START + timedelta(seconds=self.now_s + skew)

    def at(self, in_s: float, do: Callable[[], None]) -> None:
        """Do something after so many seconds."""
        self._made += 1
        heapq.heappush(self._queue, (self.now_s + in_s, self._made, do))

    def run(self, until_s: float) -> None:
        """Let all happen until a time."""
        queue = self._queue
        while queue and queue[0][0] <= until_s:
            self.now_s, _, do = heapq.heappop(queue)
            self.num_events += 1
            do()
            self.after_event()
        self.now_s = until_s

    def sleep(self, seconds: float) -> Wait:
        return Wait(lambda task: self.at(seconds, task.resume))

    def latency(self) -> float:
        """Of one message: a few milliseconds; now and then longer than anyone waits."""
        rng = self.rng
        if self.is_faulty and rng.random() < self.slowness:
            return rng.random() * 2 * TIMEOUT_S
        return 0.001 + rng.random() * 0.02

    def request(self, do: Callable[[], Any], *, what: str, is_message: bool = True) -> Wait:
        """Ask another process to do something. It may not be asked, be asked twice, or late; the answer
        may be lost. Who asked hears of no answer after ``TIMEOUT_S``.

        With ``is_message`` False it is a transaction of the catalog: done at most once.
        """

        def begin(task: Task) -> None:
            rng = self.rng
            there, back = self.latency(), self.latency()
            if not self.is_faulty:
                self.at(there, lambda: answer(task, back))
                return
            if rng.random() < self.loss:
                # Nobody is asked. That is known at once, or not before the time is up.
                wait_s = TIMEOUT_S if rng.random() < 0.5 else there
                self.at(wait_s, lambda: task.resume(error=Unavailable(what)))
                return
            if rng.random() < self.loss or there + back > TIMEOUT_S:
                self.at(there, unheard)
                self.at(TIMEOUT_S, lambda: task.resume(error=DeadlineExceeded(what)))
            else:
                self.at(there, lambda: answer(task, back))
            if is_message and rng.random() < self.duplication:
                self.at(there + rng.random() * 2 * TIMEOUT_S, unheard)

        def answer(task: Task, back: float) -> None:
            value, error = None, None
            try:
                value = do()
            except MemCubeError as refused:
                error = refused
            self.at(back, lambda: task.resume(value, error))

        def unheard() -> None:
            """It is done, and there is no one to tell."""
            with contextlib.suppress(MemCubeError):
                do()

        return Wait(begin)
