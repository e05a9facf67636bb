"""Unit tests run without Ray: whoever reaches for it fails at once."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_ray():
    import ray

    def refuse(*_: object, **__: object):
        raise AssertionError("a unit test must not start Ray")

    patch = pytest.MonkeyPatch()
    patch.setattr(ray, "init", refuse)
    yield
    patch.undo()
