"""The simulation driven by hypothesis: which operations come in which order, and how much time between them."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from memcube.testing.simulation import OPERATIONS, Simulation

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")


class SchedulerMachine(RuleBasedStateMachine):
    """Invariants are checked after every event; a failure shrinks to few operations."""

    def __init__(self) -> None:
        super().__init__()
        self.simulation: Simulation | None = None

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.simulation = Simulation(seed)
        self.simulation.begin()

    @rule(operation=st.sampled_from(sorted(OPERATIONS)), after_s=st.floats(0.01, 6.0))
    def operate(self, operation: str, after_s: float) -> None:
        assert self.simulation is not None
        self.simulation.advance(after_s)
        self.simulation.do(operation)

    def teardown(self) -> None:
        if self.simulation is not None:
            try:
                self.simulation.finish()
            finally:
                self.simulation.abandon()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
