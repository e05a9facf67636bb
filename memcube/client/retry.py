"""One call's tries, apart from I/O: what to send when, how long to wait, when to give up.

Which failures are tried again:

=====================  ==========================  ==========================================
failure                repeatable call             other change
=====================  ==========================  ==========================================
could not connect      again                       again: nothing was sent
429                    again                       again: refused before anything was done
502, 503, 504, and     again                       raised: it may have been done
the proxy's own 500
no answer, broken off  again                       ``OutcomeUnknown``: it may have been done
=====================  ==========================  ==========================================

The proxy in front of the gateways, Ray Serve's, says 500 where a gateway is gone or broke off: what
others answer with 502, 503 or 504. It is told from a gateway's 500 by its form: not problem+json.

Repeatable are reads, changes that carry an Idempotency-Key, deletes, and updates with an expected
version. Waits are drawn from [0, base_s · 2ⁿ], at most cap_s ("full jitter"), and are no shorter
than the server's Retry-After.
"""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import httpx

from memcube.client.problems import (
    OutcomeUnknown,
    Unreachable,
    is_proxys,
    problem_error,
    retry_after_s,
)
from memcube.errors import BadRequest, Corrupt, MemCubeError

T = TypeVar("T")

TRANSIENT = frozenset({502, 503, 504})
PROXY_WAIT_S = 2.0
"""The shortest wait where the proxy answered: a gateway is started anew. As the system's own Retry-After."""
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how long a call is tried. ``max_tries=1`` never repeats."""

    max_tries: int = 6
    base_s: float = 0.2
    cap_s: float = 10.0
    deadline_s: float = 180.0
    """From the call to its end, waits included. A try that runs is cut off at it."""

    def __post_init__(self) -> None:
        if self.max_tries < 1:
            raise BadRequest("at least 1", "max_tries")
        if self.base_s < 0 or self.cap_s < 0 or self.deadline_s <= 0:
            raise BadRequest("base_s and cap_s must be ≥ 0, deadline_s > 0", "retry")


class Repeat(enum.Enum):
    """Whether a call may be sent again when it may have been carried out already."""

    SAFE = "safe"
    UNSAFE = "unsafe"
    NEVER = "never"
    """Not even a failure that surely did nothing: the caller wants to know the state now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One request and how its answer is read."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    params: Mapping[str, str] | None = None
    body: bytes | None = None
    headers: Mapping[str, str] | None = None
    repeat: Repeat = Repeat.SAFE
    accept: frozenset[int] = frozenset()
    """Statuses besides 2xx that are answers, not errors."""
    when_gone: T | None = None
    """The answer when a try after an unknown outcome says 404."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """The call is done."""

    value: T


@dataclass(frozen=True, slots=True)
class Again:
    """Send the call again after ``wait_s``."""

    wait_s: float


class Tries(Generic[T]):
    """The state of one call between its tries. Times are seconds of any monotonic clock."""

    def __init__(
        self, call: Call[T], policy: RetryPolicy, url: str, *, now: float, draw: Callable[[], float]
    ) -> None:
        self._call = call
        self._policy = policy
        self._url = url
        self._ends = now + policy.deadline_s
        self._draw = draw
        self._tried = 0
        self._maybe_done = False

    def left_s(self, now: float) -> float:
        """Seconds until the deadline, at least a millisecond."""
        return max(self._ends - now, 0.001)

    def answered(self, response: httpx.Response, *, now: float) -> Answer[T] | Again:
        """What follows from a response.

        Raises:
            MemCubeError: the error that the server answered with, when it is not tried again.
        """
        self._tried += 1
        status = response.status_code
        if response.is_success or status in self._call.accept:
            return Answer(self._call.parse(response))
        gone = self._call.when_gone
        if status == httpx.codes.NOT_FOUND and self._maybe_done and gone is not None:
            return Answer(gone)
        refused = status == httpx.codes.TOO_MANY_REQUESTS
        by_proxy = is_proxys(response)
        transient = by_proxy or status in TRANSIENT
        if transient:
            self._maybe_done = True
        if not refused and not transient:
            raise problem_error(response)
        at_least_s = PROXY_WAIT_S if by_proxy else retry_after_s(response)
        wait_s = self._wait_s(now, at_least_s=at_least_s, did_nothing=refused)
        if wait_s is None:
            raise problem_error(response)
        return Again(wait_s)

    def failed(self, failure: httpx.RequestError, *, now: float) -> Again:
        """What follows from a request that got no response.

        Raises:
            MemCubeError: Unreachable or OutcomeUnknown, when it is not tried again; Corrupt for a
                response that can't be decoded.
        """
        if isinstance(failure, httpx.DecodingError):
            raise Corrupt(str(failure.request.url), f"the answer can't be decoded: {failure}")
        self._tried += 1
        not_sent = isinstance(failure, NOT_SENT)
        if not not_sent:
            self._maybe_done = True
        wait_s = self._wait_s(now, at_least_s=None, did_nothing=not_sent)
        if wait_s is None:
            raise self._given_up(failure) from failure
        return Again(wait_s)

    def _wait_s(self, now: float, *, at_least_s: float | None, did_nothing: bool) -> float | None:
        repeat = self._call.repeat
        allowed = repeat is Repeat.SAFE or (repeat is Repeat.UNSAFE and did_nothing)
        if not allowed or self._tried >= self._policy.max_tries:
            return None
        ceiling = min(self._policy.cap_s, self._policy.base_s * 2.0 ** (self._tried - 1))
        wait_s = max(ceiling * self._draw(), at_least_s or 0.0)
        return wait_s if now + wait_s < self._ends else None

    def _given_up(self, failure: httpx.RequestError) -> MemCubeError:
        why = str(failure) or type(failure).__name__
        tries = "" if self._tried == 1 else f" in {self._tried} tries"
        if not self._maybe_done:
            return Unreachable(
                f"can't reach {self._url}{tries} ({why}); is it running? start one with: memcube serve"
            )
        doing = f"{self._call.method} {self._url}{self._call.path}"
        if self._call.method == "GET":
            return OutcomeUnknown(f"{doing}: no answer{tries} ({why}); try again")
        return OutcomeUnknown(
            f"{doing}: no answer{tries} ({why}); it may have been done or not: look before doing it again"
        )
