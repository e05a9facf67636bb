import pytest

from memcube.testing.plaintext_contract import SPEC, PlaintextContract
from memcube.tiers.memory import MemoryStore


class TestMemoryStore(PlaintextContract):
    @pytest.fixture
    def store(self):
        return MemoryStore(SPEC)
