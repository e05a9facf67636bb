"""Waiting for an actor: with a deadline, and with the system's own errors."""

import asyncio
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import ObjectRef
from ray.exceptions import RayActorError, RayError, RayTaskError

from memcube.errors import DeadlineExceeded, MemCubeError, Unavailable


def pack(*values: Any) -> bytes:
    """Values as one argument or answer of a call that is made for every search.

    Ray serialises each argument apart, and calls back into Python for every object that is not
    plain; this is one pass in C. Both ends are processes of one version of this system, as with Ray's
    own pickles; nothing that is stored is read so.
    """
    return pickle.dumps(values, pickle.HIGHEST_PROTOCOL)


def unpack(packed: bytes) -> Any:
    """The values of ``pack``, as a tuple."""
    return pickle.loads(packed)


async def answer(ref: ObjectRef, *, of: str, deadline_s: float | None) -> Any:
    """What a remote call returned. Without a deadline is work that its caller can end otherwise.

    Raises:
        MemCubeError: what the callee raised.
        DeadlineExceeded: no answer in time; the call may still have its effect.
        Unavailable: the actor is dead or out of reach.
    """
    with own_errors(of):
        try:
            async with asyncio.timeout(deadline_s):
                return await asyncio.wrap_future(ref.future())
        except RayTaskError:  # what a callee raised may be a TimeoutError too
            raise
        except TimeoutError:
            raise DeadlineExceeded(f"{of} did not answer within {deadline_s:g} s") from None


@contextmanager
def own_errors(of: str) -> Iterator[None]:
    """Ray's errors of a call as the system's own.

    Raises:
        MemCubeError: what the callee raised.
        Unavailable: the actor is dead or out of reach.
    """
    try:
        yield
    except RayTaskError as failed:
        if isinstance(failed.cause, MemCubeError):
            raise failed.cause from None
        raise
    except RayActorError:
        raise Unavailable(f"{of} is not there now; it is being restarted", 2.0) from None
    except RayError as failed:
        raise Unavailable(f"{of} can't be reached ({type(failed).__name__})", 2.0) from None
