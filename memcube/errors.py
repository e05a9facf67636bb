"""The one error tree.

MemCubeError
├── BadRequest            the caller's input is wrong; nothing was changed
│   ├── LimitExceeded     over a stated limit
│   ├── BadFilter         a filter that can't be read
│   └── IllegalMove       a lifecycle move that the table doesn't allow
├── Unauthenticated       no key, or one that is not known
├── Forbidden             the key's role doesn't allow it
├── NotFound              no such thing in this tenant (a foreign one reads the same)
├── Conflict              the state of the cube forbids it now
│   ├── IdempotencyMismatch   same Idempotency-Key, another request
│   ├── VersionMismatch       the caller's expected version is not the current one
│   └── Frozen                a frozen cube can't be changed
├── StaleEpoch            the caller or the callee no longer holds the lease
├── Unavailable           a part of the system can't answer now
│   ├── DeadlineExceeded      an answer did not come in time
│   ├── TooBusy               the queue is full; nothing was started
│   ├── Moved                 a tenant's memories are on their way to another shard
│   └── StorageFull           no room left on the device
├── Corrupt               stored data failed its check
├── AdapterUnusable       an engine can't compute with an adapter; within the system alone
├── ModelAnswerInvalid    a configured model answered with something unusable
└── UnknownBackend        a name that is not built

Each error holds its fields in ``args`` (so that it survives pickling by Ray) and
writes its text in ``__str__``: what happened, where, and what to do.
"""

from typing import ClassVar


class MemCubeError(Exception):
    """Base of all errors that this system raises on purpose."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False


class BadRequest(MemCubeError):
    """The input is wrong: ``BadRequest(what)``, optionally with the field's name."""

    code = "bad_request"
    status = 422

    def __init__(self, what: str, field: str | None = None) -> None:
        super().__init__(what, field)
        self.what = what
        self.field = field

    def __str__(self) -> str:
        return f"{self.field}: {self.what}" if self.field else self.what


class LimitExceeded(BadRequest):
    """``LimitExceeded(what, limit, given)``: over a stated limit."""

    code = "limit_exceeded"

    def __init__(self, what: str, limit: int, given: int | None = None) -> None:
        super().__init__(what)
        self.args = (what, limit, given)
        self.limit = limit
        self.given = given

    def __str__(self) -> str:
        given = "" if self.given is None else f", given {self.given:,}"
        return f"{self.what}: at most {self.limit:,}{given}"


class BadFilter(BadRequest):
    """``BadFilter(what, path)``: a filter that can't be read, and where in it."""

    code = "bad_filter"


class IllegalMove(BadRequest):
    """``IllegalMove(state, event, legal)``: the lifecycle table has no such move."""

    code = "illegal_move"
    status = 409

    def __init__(self, state: str, event: str, legal: tuple[str, ...] = ()) -> None:
        super().__init__(event)
        self.args = (state, event, legal)
        self.state = state
        self.event = event
        self.legal = legal

    def __str__(self) -> str:
        legal = ", ".join(self.legal) or "none"
        return f"a cube in state {self.state!r} can't {self.event}; legal from here: {legal}"


class Unauthenticated(MemCubeError):
    """No key was given, or it is not known, expired or revoked."""

    code = "unauthenticated"
    status = 401

    def __str__(self) -> str:
        return (
            "no valid API key; send 'Authorization: Bearer KEY' or 'X-API-Key: KEY' "
            "(make one with: memcube keys create)"
        )


class Forbidden(MemCubeError):
    """``Forbidden(role, needed)``: the key is valid but its role is too small."""

    code = "forbidden"
    status = 403

    def __init__(self, role: str, needed: str) -> None:
        super().__init__(role, needed)
        self.role = role
        self.needed = needed

    def __str__(self) -> str:
        return f"this key's role is {self.role!r}; this call needs {self.needed!r}"


class NotFound(MemCubeError):
    """``NotFound(what, id)``: not in this tenant. A foreign id gives the same answer."""

    code = "not_found"
    status = 404

    def __init__(self, what: str, id: str) -> None:
        super().__init__(what, id)
        self.what = what
        self.id = id

    def __str__(self) -> str:
        return f"no {self.what} {self.id!r}"


class Conflict(MemCubeError):
    """``Conflict(what)``: the present state forbids it."""

    code = "conflict"
    status = 409

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return self.what


class IdempotencyMismatch(Conflict):
    """``IdempotencyMismatch(key)``: the key was used for another request."""

    code = "idempotency_mismatch"
    status = 422

    def __str__(self) -> str:
        return (
            f"Idempotency-Key {self.what!r} was used with another request; "
            "use a new key for a new request, or repeat the first one unchanged"
        )


class VersionMismatch(Conflict):
    """``VersionMismatch(id, expected, current)``: somebody else changed the cube first."""

    code = "version_mismatch"

    def __init__(self, id: str, expected: int, current: int) -> None:
        super().__init__(id)
        self.args = (id, expected, current)
        self.expected = expected
        self.current = current

    def __str__(self) -> str:
        return (
            f"cube {self.what!r} is at version {self.current}, not {self.expected}; "
            "read it again and repeat the change"
        )


class Frozen(Conflict):
    """``Frozen(id)``: the cube is frozen."""

    code = "frozen"

    def __str__(self) -> str:
        return f"cube {self.what!r} is frozen; unfreeze it first (POST /v1/cubes/{{id}}/unfreeze)"


class StaleEpoch(MemCubeError):
    """``StaleEpoch(given, current)``: a call was made under a lease that has passed on."""

    code = "stale_epoch"
    status = 503
    retryable = True

    def __init__(self, given: int, current: int) -> None:
        super().__init__(given, current)
        self.given = given
        self.current = current

    def __str__(self) -> str:
        return f"epoch {self.given} is not the current one ({self.current}); read the state again"


class Unavailable(MemCubeError):
    """``Unavailable(what, retry_after_s)``: a part can't answer now; a retry may."""

    code = "unavailable"
    status = 503
    retryable = True

    def __init__(self, what: str, retry_after_s: float = 1.0) -> None:
        super().__init__(what, retry_after_s)
        self.what = what
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.what}; try again in {self.retry_after_s:g} s"


class DeadlineExceeded(Unavailable):
    """``DeadlineExceeded(what)``: no answer in time; the write may have happened."""

    code = "deadline_exceeded"
    status = 504


class TooBusy(Unavailable):
    """``TooBusy(what, retry_after_s)``: as much waits as may; nothing was started."""

    code = "too_busy"
    status = 429


class Moved(Unavailable):
    """``Moved(tenant, shard)``: a tenant's memories are on their way, or lie elsewhere by now; within the
    system alone, where it is followed."""

    code = "moved"

    def __init__(self, tenant: str, shard: int) -> None:
        super().__init__(f"memories of tenant {tenant!r} are being moved from shard {shard}")
        self.args = (tenant, shard)


class StorageFull(Unavailable):
    """``StorageFull(where)``: no room left; reads go on."""

    code = "storage_full"
    status = 507

    def __str__(self) -> str:
        return f"no space left at {self.what}; free some and try again; reads go on"


class Corrupt(MemCubeError):
    """``Corrupt(where, what)``: stored data failed its check and was not used."""

    code = "corrupt"

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where = where
        self.what = what

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class AdapterUnusable(MemCubeError):
    """``AdapterUnusable(id, why)``: an engine can't compute with an adapter, and ``why`` says what is
    wrong. Nothing was said yet. A caller of the system gets ``why``, or an answer without it."""

    code = "adapter_unusable"
    status = 503

    def __init__(self, id: str, why: MemCubeError) -> None:
        super().__init__(id, why)
        self.id = id
        self.why = why

    def __str__(self) -> str:
        return f"adapter {self.id!r}: {self.why}"


class ModelAnswerInvalid(MemCubeError):
    """``ModelAnswerInvalid(model, what)``: the answer can't be used."""

    code = "model_answer_invalid"
    status = 502
    retryable = True

    def __init__(self, model: str, what: str) -> None:
        super().__init__(model, what)
        self.model = model
        self.what = what

    def __str__(self) -> str:
        return f"model {self.model!r}: {self.what}"


class UnknownBackend(MemCubeError):
    """``UnknownBackend(kind, name, known)``: no such implementation is built."""

    code = "unknown_backend"
    status = 400

    def __init__(self, kind: str, name: str, known: tuple[str, ...]) -> None:
        super().__init__(kind, name, known)
        self.kind = kind
        self.name = name
        self.known = known

    def __str__(self) -> str:
        return f"no {self.kind} named {self.name!r}; there are: {', '.join(self.known)}"
