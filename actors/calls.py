"""Waiting for an actor: always with a deadline, and with the system's own errors."""

import asyncio
from typing import Any

from ray import ObjectRef
from ray.exceptions import RayActorError, RayError, RayTaskError

from memcube.errors import DeadlineExceeded, MemCubeError, Unavailable


async def answer(ref: ObjectRef, *, of: str, deadline_s: float) -> Any:
    """What a remote call returned.

    Raises:
        MemCubeError: what the callee raised.
        DeadlineExceeded: no answer in time; the call may still have its effect.
        Unavailable: the actor is dead or out of reach.
    """
    try:
        return await asyncio.wait_for(asyncio.wrap_future(ref.future()), deadline_s)
    except RayTaskError as failed:
        cause = failed.cause
        if isinstance(cause, MemCubeError):
            raise cause from None
        raise
    except TimeoutError:
        raise DeadlineExceeded(f"{of} did not answer within {deadline_s:g} s") from None
    except RayActorError:
        raise Unavailable(f"{of} is not there now; it is being restarted", 2.0) from None
    except RayError as failed:
        raise Unavailable(f"{of} can't be reached ({type(failed).__name__})", 2.0) from None
