"""Bugs planted on purpose: what the simulation has to find, or it proves nothing."""

from memcube.catalog.action_rows import ActionRecord
from memcube.scheduler.actions import ActionState
from memcube.scheduler.enact import Enactor


class DropsBeforeCommit(Enactor):
    """Takes the source away when the bytes are over, before the catalog lists the copy."""

    async def _copy(self, record: ActionRecord) -> None:
        if record.state is ActionState.PREPARED and record.takes_over and record.source is not None:
            await self._port.drop(record, leader=self._leader)
        await super()._copy(record)


class LooksTooLate(Enactor):
    """Strikes a payload since another one is listed, and reads that only after the commit."""

    async def _check_another(self, record: ActionRecord) -> None:
        return


class LooksOnce(Enactor):
    """Removes what it has struck without a second look at the other copy."""

    async def _list_again(self, record: ActionRecord) -> bool:
        return False


class BelievesTheList(LooksTooLate, LooksOnce):
    """Drops a payload since another one is listed, without reading that."""


class Loses(Enactor):
    """Doesn't take over what an earlier leader left open."""

    async def recover(self) -> list[ActionRecord]:
        return []


PLANTED: tuple[type[Enactor], ...] = (
    DropsBeforeCommit,
    LooksTooLate,
    LooksOnce,
    BelievesTheList,
    Loses,
)
