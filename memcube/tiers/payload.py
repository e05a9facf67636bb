"""How a cube lies in a Qdrant index, and how a filter is put to it; the same for edge and server.

Metadata keys and values come from callers and may hold anything, so none is ever part of a payload
path: a key is hashed, and ``key = value`` is one keyword, the hash of both with the value's type.
Numbers and times of metadata lie under their key's hash for ranges, texts for ``contains``. The
metadata itself is kept as JSON text, exactly as given. Objects inside it are kept, not filtered.

The engine compares ranges in float64, so ``as_float`` is the order of all numbers: integers from
2**53 on, and times (microseconds since 1970) after the year 2255, are rounded in ranges; equality in
metadata is exact. The engine also reads a float of 17 digits back with an error in the last place
(one in ten, measured), so a metadata number lies as two whole numbers in the same order. Lone surrogates, which no UTF-8 engine can hold, are moved to the last private
plane (``encodable``), and a NaN compares to nothing: no content can make a put fail.
"""

import functools
import json
import re
import struct
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any, TypeGuard

from memcube.filters import And, Compare, FieldType, Filter, Not, Op, Or, Scalar, field_type
from memcube.ids import CubeId, TenantId, digest
from memcube.tiers.plaintext import IndexedCube, StoredCube, Vector

DENSE, SPARSE = "dense", "bm25"
KEYWORDS = ("id", "user_id", "agent_id", "run_id", "kind", "state", "role", "speaker", "tags", "eq")
INTEGERS = ("created_at", "updated_at", "event_time", "expires_at", "version", "slot")
_TIMES = ("created_at", "updated_at", "event_time", "expires_at")
_INTERNAL = frozenset(("tenant", "text", "eq", "numbers", "times", "texts", "metadata"))
_SURROGATE = re.compile("[\ud800-\udfff]")
_INTEGER_LIMIT = 2**63
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@functools.lru_cache(maxsize=65_536)
def point_id(tenant: TenantId, id: CubeId) -> str:
    """The id of a cube's point. No tenant's put can reach another tenant's point."""
    h = digest("point", tenant, id)
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:32]}"


def micros(time: datetime) -> int:
    delta = time - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def as_float(value: float) -> float:
    """A number as ranges compare it: float64, what is beyond its reach at the outermost value."""
    most = sys.float_info.max
    return float(max(-most, min(most, value)))


def encodable(text: str) -> str:
    """The text with each lone surrogate U+Dxxx as U+10Dxxx; most texts have none."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return _SURROGATE.sub(lambda found: chr(0x10_0000 + ord(found[0])), text)


def payload_of(cube: IndexedCube) -> dict[str, Any]:
    """What is stored beside the vectors. Absent fields are left out."""
    payload: dict[str, Any] = {
        "tenant": cube.tenant,
        "id": cube.id,
        "version": cube.version,
        "text": encodable(cube.text),
        "kind": cube.kind,
        "state": cube.state,
        "created_at": micros(cube.created_at),
        "updated_at": micros(cube.updated_at),
    }
    for name in ("user_id", "agent_id", "run_id", "role", "speaker", "slot", "thread", "seq"):
        value = getattr(cube, name)
        if value is not None:
            payload[name] = encodable(value) if isinstance(value, str) else value
    for name in ("event_time", "expires_at"):
        value = getattr(cube, name)
        if value is not None:
            payload[name] = micros(value)
    if cube.tags:
        payload["tags"] = [encodable(tag) for tag in cube.tags]
    if cube.metadata:
        payload["metadata"] = json.dumps(dict(cube.metadata))
        payload |= _filterable(cube.metadata)
    return payload


def _filterable(metadata: Mapping[str, Any]) -> dict[str, Any]:
    eq: list[str] = []
    numbers: dict[str, list[dict[str, int]]] = {}
    times: dict[str, list[dict[str, int]]] = {}
    texts: dict[str, list[str]] = {}
    for key, value in metadata.items():
        slot = _key(key)
        for element in value if isinstance(value, list) else (value,):
            if isinstance(element, bool | int | float | str):
                eq.append(_token(key, element))
            if isinstance(element, str):
                texts.setdefault(slot, []).append(encodable(element))
                time = _as_time(element)
                if time is not None:
                    times.setdefault(slot, []).append(_halves(micros(time)))
            elif _is_number(element):
                numbers.setdefault(slot, []).append(_halves(element))
    named = {"eq": eq, "numbers": numbers, "times": times, "texts": texts}
    return {name: value for name, value in named.items() if value}


def stored_cube(payload: Mapping[str, Any], vector: Vector | None = None) -> StoredCube:
    """A cube of what the index gave back; times are datetimes again."""
    kept = {name: value for name, value in payload.items() if name not in _INTERNAL}
    for name in _TIMES:
        if name in kept:
            kept[name] = _moment(kept[name])
    kept["metadata"] = json.loads(payload["metadata"]) if "metadata" in payload else {}
    return StoredCube(
        id=CubeId(payload["id"]),
        version=payload["version"],
        text=payload["text"],
        payload=kept,
        vector=vector,
    )


def _moment(value: int) -> datetime:
    return _EPOCH + timedelta(microseconds=value)


def as_time(value: object) -> datetime | None:
    """The time that a metadata text stands for, if it begins like an ISO 8601 date."""
    return _as_time(value) if isinstance(value, str) else None


def _as_time(text: str) -> datetime | None:
    if not _DATE.match(text):
        return None
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _halves(value: float) -> dict[str, int]:
    """A number as two whole numbers of 32 bits that compare, high before low, as the number does."""
    (bits,) = struct.unpack(">q", struct.pack(">d", as_float(value) + 0.0))
    place = bits if bits >= 0 else bits ^ 0x7FFF_FFFF_FFFF_FFFF
    return {"high": place >> 32, "low": place & 0xFFFF_FFFF}


def _key(key: str) -> str:
    return "k" + digest("key", key)[:24]


def _token(key: str, value: Scalar) -> str:
    """Equal for equal keys and values: 1 and 1.0 are equal, True and 1 are not, "1" and 1 are not."""
    if isinstance(value, bool):
        return digest("eq", key, "bool", str(value))[:32]
    if isinstance(value, int | float):
        whole = isinstance(value, int) or value.is_integer()
        return digest("eq", key, "number", hex(int(value)) if whole else repr(value))[:32]
    return digest("eq", key, "text", str(value))[:32]


class FilterTranslator:
    """Puts our filters in the words of one Qdrant binding (its module of model classes)."""

    def __init__(self, models: ModuleType | Any, *, positional: bool) -> None:
        self._m = models
        self._positional = positional

    def scope(self, tenant: TenantId, where: Filter | None, now: datetime, *more: Any) -> Any:
        """The engine's filter: this tenant's cubes that have not expired and match."""
        must = [self._match("tenant", tenant), *more]
        if where is not None:
            must.append(self.node(where))
        expired = self._range("expires_at", lte=micros(now))
        return self._m.Filter(must=must, must_not=[expired])

    def all_of_tenant(self, tenant: TenantId) -> Any:
        """The engine's filter: all cubes of a tenant, expired ones too."""
        return self._m.Filter(must=[self._match("tenant", tenant)])

    def any_of(self, field: str, values: list[str] | list[int]) -> Any:
        """A condition: the field is one of the values."""
        known = [encodable(v) if isinstance(v, str) else v for v in values]
        match = self._m.MatchAny(known) if self._positional else self._m.MatchAny(any=known)
        return self._m.FieldCondition(key=field, match=match)

    def node(self, where: Filter) -> Any:
        """One node of the tree."""
        match where:
            case And(parts):
                return self._m.Filter(must=[self.node(part) for part in parts])
            case Or(parts):
                return self._m.Filter(should=[self.node(part) for part in parts])
            case Not(part):
                return self._m.Filter(must_not=[self.node(part)])
            case Compare():
                return self._compare(where)

    def _compare(self, c: Compare) -> Any:
        if c.op is Op.NE:
            return self._m.Filter(must_not=[self._compare(Compare(c.field, Op.EQ, c.value))])
        if c.op is Op.NIN:
            return self._m.Filter(must_not=[self._compare(Compare(c.field, Op.IN, c.value))])
        kind = field_type(c.field)
        if kind is FieldType.ANY:
            return self._metadata(c.field.removeprefix("metadata."), c)
        if kind is FieldType.TIME:
            return self._time(c)
        if kind is FieldType.INTEGER and c.op in (Op.EQ, Op.IN, Op.CONTAINS):
            return self._one_of_integers(c)
        if c.op is Op.IN and isinstance(c.value, tuple):
            return self.any_of(c.field, [str(value) for value in c.value])
        if c.op is Op.EQ:
            return self._match(c.field, c.value)
        if c.op is Op.CONTAINS:
            return self._substring(c.field, str(c.value))
        return self._range(c.field, **{c.op: c.value})

    def _one_of_integers(self, c: Compare) -> Any:
        values = c.value if isinstance(c.value, tuple) else (c.value,)
        held = [v for v in values if isinstance(v, int) and abs(v) < _INTEGER_LIMIT]
        # Nothing has the empty text as its id: a condition that no cube meets.
        return self.any_of(c.field, held) if held else self._match("id", "")

    def _time(self, c: Compare) -> Any:
        if isinstance(c.value, tuple):
            return self._m.Filter(
                should=[self._time(Compare(c.field, Op.EQ, value)) for value in c.value]
            )
        assert isinstance(c.value, datetime)
        at = micros(c.value)
        if c.op is Op.EQ:
            return self._range(c.field, gte=at, lte=at)
        return self._range(c.field, **{c.op: at})

    def _metadata(self, key: str, c: Compare) -> Any:
        slot = _key(key)
        if isinstance(c.value, tuple):
            return self.any_of("eq", [_token(key, value) for value in c.value])
        if c.op is Op.EQ:
            return self._match("eq", _token(key, c.value))
        if c.op is Op.CONTAINS:
            equal = self._match("eq", _token(key, c.value))
            if not isinstance(c.value, str):
                return equal
            return self._m.Filter(should=[equal, self._substring(f"texts.{slot}", c.value)])
        if isinstance(c.value, datetime):
            return self._element(f"times.{slot}", c.op, micros(c.value))
        assert isinstance(c.value, int | float)
        return self._element(f"numbers.{slot}", c.op, c.value)

    def _element(self, field: str, op: Op, bound: float) -> Any:
        """An element of the list lies beyond the bound: its high half does, or its low half decides."""
        half = _halves(bound)
        strict = {Op.GTE: Op.GT, Op.LTE: Op.LT}.get(op, op)
        level = self._m.Filter(
            must=[
                self._range("high", gte=half["high"], lte=half["high"]),
                self._range("low", **{op: half["low"]}),
            ]
        )
        within = self._m.Filter(should=[self._range("high", **{strict: half["high"]}), level])
        if self._positional:
            return self._m.NestedCondition(field, within)
        return self._m.NestedCondition(nested=self._m.Nested(key=field, filter=within))

    def _match(self, field: str, value: Any) -> Any:
        value = encodable(value) if isinstance(value, str) else value
        match = self._m.MatchValue(value) if self._positional else self._m.MatchValue(value=value)
        return self._m.FieldCondition(key=field, match=match)

    def _substring(self, field: str, value: str) -> Any:
        value = encodable(value)
        substring = (
            self._m.MatchSubstring(value)
            if self._positional
            else self._m.MatchSubstring(substring=value)
        )
        return self._m.FieldCondition(key=field, match=substring)

    def _range(self, field: str, **bounds: Any) -> Any:
        kind = self._m.RangeFloat if self._positional else self._m.Range
        return self._m.FieldCondition(
            key=field, range=kind(**{str(op): as_float(value) for op, value in bounds.items()})
        )
