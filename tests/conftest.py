"""How long a test may take before it counts as hung."""

from pathlib import Path

import pytest

UNIT = Path(__file__).parent / "unit"
SYSTEM_TIMEOUT_S = 900
"""Of tests that start whole systems, whose every wait has a deadline of its own below it. Other tests have the
default of pyproject.toml."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if UNIT not in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SYSTEM_TIMEOUT_S))
