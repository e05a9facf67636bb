"""What the jobs of adapters are asked for, and where their reports lie. No torch in here: whoever
queues a job needs it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from memcube.catalog import Job
from memcube.errors import NotFound
from memcube.ids import digest
from memcube.objects import ObjectStore
from memcube.parametric.judgement import GateReport
from memcube.parametric.selection import Choice
from memcube.parametric.settings import TrainingSettings

MAX_CUBES = 5_000
"""Looked at for one adapter: those of the scope."""
_NAME = re.compile(r"[^a-z0-9._-]+")


class AdapterVersion(NamedTuple):
    """One version of an adapter, by its id."""

    id: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsolidateSpec:
    """What a job is asked for. ``name`` is the adapter's. With ``extend`` it also gets what the version
    holds that serves now."""

    name: str
    choice: Choice
    settings: TrainingSettings
    extend: bool = True
    activate: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "choice": self.choice.to_json(),
            "settings": self.settings.to_json(),
            "extend": self.extend,
            "activate": self.activate,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ConsolidateSpec":
        """
        Raises:
            BadRequest: a setting that there is not.
        """
        given = {
            **data,
            "choice": Choice.from_json(data["choice"]),
            "settings": TrainingSettings.from_json(data["settings"]),
        }
        return cls(**given)

    @property
    def scope_ids(self) -> dict[str, str | None]:
        choice = self.choice
        return {"user_id": choice.user_id, "agent_id": choice.agent_id, "run_id": choice.run_id}


def default_name(user_id: str | None, agent_id: str | None, run_id: str | None) -> str:
    """An adapter's name for a scope: its ids where they can be one, with a hash where they can't."""
    given = [id for id in (user_id, agent_id, run_id) if id is not None]
    plain = "-".join(given) or "everyone"
    name = _NAME.sub("-", plain.lower()).strip("-._")[:50] or "adapter"
    if name != plain:
        name += f"-{digest('adapter', user_id, agent_id, run_id)[:8]}"
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseSpec:
    """Which versions become one, under which name, and whether that serves at once if it passes."""

    name: str
    adapters: tuple[AdapterVersion, ...]
    settings: TrainingSettings
    activate: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "adapters": [list(adapter) for adapter in self.adapters],
            "settings": self.settings.to_json(),
            "activate": self.activate,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FuseSpec":
        return cls(
            name=data["name"],
            adapters=tuple(AdapterVersion(*adapter) for adapter in data["adapters"]),
            settings=TrainingSettings.from_json(data["settings"]),
            activate=data["activate"],
        )


def report_name(job: Job) -> str:
    """Where a job's report lies among the objects."""
    return f"reports/{digest('tenant', job.tenant)}/{job.id}.json"


async def read_report(objects: ObjectStore, job: Job) -> GateReport:
    """What the gate found, with all answers.

    Raises:
        NotFound: there is none, or it was removed with a memory that it speaks of.
    """
    try:
        return GateReport.from_json((await objects.get(report_name(job))).decode())
    except NotFound:
        raise NotFound("report of job", job.id) from None
