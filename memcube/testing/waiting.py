"""Waiting for what comes about in other processes, with a deadline."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(
    found: Callable[[], T],
    *,
    within_s: float,
    every_s: float = 0.1,
    passing: tuple[type[Exception], ...] = (),
    what: str = "",
) -> T:
    """What ``found`` gives once it is true; asked again and again. Errors that are ``passing`` count as not yet.

    Raises:
        TimeoutError: it was not in time; of the error that was the last, if it was one.
    """
    deadline = time.monotonic() + within_s
    while True:
        failed = None
        try:
            if value := found():
                return value
        except passing as error:
            failed = error
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what or found} did not hold within {within_s:g} s") from failed
        time.sleep(every_s)
