"""The routes of the doctor: do the parts agree, and mend what doesn't."""

from dataclasses import asdict
from typing import Annotated

from fastapi import Query
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from memcube.doctor import Diagnosis
from serve.backend import Backend
from serve.dependencies import Here, Operator, guarded
from serve.time_machine import parts_of

doctor = guarded("/v1/doctor", "doctor")
Limit = Annotated[int, Query(ge=1, le=10_000, description="Archived copies to read in this call.")]
Cursor = Annotated[str | None, Query(max_length=64, description="Go on with the archive.")]


class FindingOut(BaseModel):
    """One sort of thing that is wrong, how often, and some of them by tenant and id."""

    check: str
    kind: str
    advice: str
    count: int
    repaired: int
    examples: list[str]


class DiagnosisOut(BaseModel):
    sound: bool = Field(description="Nothing is wrong, or all of it was mended.")
    looked_at: dict[str, int]
    findings: list[FindingOut]
    next_cursor: str | None


@doctor.get("", response_model=DiagnosisOut, summary="Do the parts agree?")
async def examine(
    who: Operator, here: Here, limit: Limit = 1_000, cursor: Cursor = None
) -> JSONResponse:
    """Catalog against index, adapters' files and archived copies, in both directions, over all tenants.
    Changes nothing. While there is a `next_cursor` there are archived copies left to read."""
    return JSONResponse(await _diagnosis(here, False, cursor, limit))


@doctor.post("/repair", response_model=DiagnosisOut, summary="Mend what does not agree")
async def repair(
    who: Operator, here: Here, limit: Limit = 1_000, cursor: Cursor = None
) -> JSONResponse:
    """As `GET /v1/doctor`, and what a rule can mend is mended. May be repeated."""
    return JSONResponse(await _diagnosis(here, True, cursor, limit))


async def _diagnosis(here: Backend, repair: bool, cursor: str | None, limit: int) -> dict:
    found: Diagnosis = await parts_of(here).doctor.examine(
        here.clock(), repair=repair, cursor=cursor, limit=limit
    )
    return {
        "sound": found.sound,
        "looked_at": dict(found.looked_at),
        "findings": [asdict(finding) for finding in found.findings],
        "next_cursor": found.next_cursor,
    }
