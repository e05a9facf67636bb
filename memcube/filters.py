"""Filters over cubes: one small tree, read from JSON, evaluated by each store inside its index.

JSON forms, freely nested::

    {"user_id": "ann"}                                  equality
    {"created_at": {"gte": "2026-01-01T00:00:00Z"}}     one or more operators on a field
    {"and": [F, ...]}   {"or": [F, ...]}   {"not": F}
    {"user_id": "ann", "tags": {"contains": "work"}}    several keys: all must hold

Fields: those of ``FIELDS``, and ``metadata.KEY`` for any metadata key. On a field that holds a
list (``tags``, list-valued metadata) an operator holds when it holds for any element.
``ne`` and ``nin`` are the negations of ``eq`` and ``in``: a cube without the field matches them.
``contains`` is: an element equal to the value, or a text that has the value as a substring.
Strings are compared exactly, by case; times are ISO 8601, and a time without a zone is UTC.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from memcube.errors import BadFilter, LimitExceeded

MAX_DEPTH = 8
MAX_CONDITIONS = 64
MAX_VALUES = 256
MAX_STRING = 1024


class Op(StrEnum):
    EQ = "eq"
    NE = "ne"
    GT = "gt"
    GTE = "gte"
    LT = "lt"
    LTE = "lte"
    IN = "in"
    NIN = "nin"
    CONTAINS = "contains"


RANGE_OPS = frozenset({Op.GT, Op.GTE, Op.LT, Op.LTE})
LIST_OPS = frozenset({Op.IN, Op.NIN})


class FieldType(StrEnum):
    KEYWORD = "keyword"
    TIME = "time"
    INTEGER = "integer"
    ANY = "any"


FIELDS: Mapping[str, FieldType] = {
    "id": FieldType.KEYWORD,
    "user_id": FieldType.KEYWORD,
    "agent_id": FieldType.KEYWORD,
    "run_id": FieldType.KEYWORD,
    "kind": FieldType.KEYWORD,
    "state": FieldType.KEYWORD,
    "role": FieldType.KEYWORD,
    "speaker": FieldType.KEYWORD,
    "tags": FieldType.KEYWORD,
    "created_at": FieldType.TIME,
    "updated_at": FieldType.TIME,
    "event_time": FieldType.TIME,
    "version": FieldType.INTEGER,
}

Scalar = str | int | float | bool | datetime


@dataclass(frozen=True, slots=True)
class Compare:
    """One condition. ``value`` is a tuple for ``in`` and ``nin``, a scalar otherwise."""

    field: str
    op: Op
    value: Scalar | tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class And:
    parts: tuple["Filter", ...]


@dataclass(frozen=True, slots=True)
class Or:
    parts: tuple["Filter", ...]


@dataclass(frozen=True, slots=True)
class Not:
    part: "Filter"


Filter = Compare | And | Or | Not


def field_type(field: str) -> FieldType:
    """The type of a field's values; metadata may hold any JSON scalar."""
    return FieldType.ANY if field.startswith("metadata.") else FIELDS[field]


def all_of(*parts: Filter | None) -> Filter | None:
    """The conjunction of the filters that are there, flattened; None when there is none."""
    flat: list[Filter] = []
    for part in parts:
        if isinstance(part, And):
            flat.extend(part.parts)
        elif part is not None:
            flat.append(part)
    if len(flat) <= 1:
        return flat[0] if flat else None
    return And(tuple(flat))


def of_scope(user_id: str | None, agent_id: str | None, run_id: str | None) -> Filter | None:
    """What has all of the ids that are given; None where none is."""
    given = {"user_id": user_id, "agent_id": agent_id, "run_id": run_id}
    return all_of(
        *(Compare(name, Op.EQ, value) for name, value in given.items() if value is not None)
    )


def parse_filter(data: object) -> Filter | None:
    """The filter of a JSON value; None for an absent or empty one.

    Raises:
        BadFilter: an unknown field or operator, or a value of the wrong type; says where.
        LimitExceeded: deeper than MAX_DEPTH, or more than MAX_CONDITIONS conditions,
            MAX_VALUES values of an ``in``, or MAX_STRING characters of a value.
    """
    if data is None or data == {}:
        return None
    parser = _Parser()
    return parser.node(data, "filters", 1)


class _Parser:
    def __init__(self) -> None:
        self._conditions = 0

    def node(self, data: object, path: str, depth: int) -> Filter:
        if depth > MAX_DEPTH:
            raise LimitExceeded("depth of filters", MAX_DEPTH)
        if not isinstance(data, Mapping):
            raise BadFilter(f"expected an object, got {type(data).__name__}", path)
        if not data:
            raise BadFilter("an empty object here filters nothing; leave it out", path)
        parts = [self._entry(str(key), value, path, depth) for key, value in data.items()]
        flat = all_of(*parts)
        assert flat is not None
        return flat

    def _entry(self, key: str, value: object, path: str, depth: int) -> Filter:
        word = key.lower()
        if word in ("and", "or"):
            if not isinstance(value, Sequence) or isinstance(value, str) or not value:
                raise BadFilter("expected a non-empty list of filters", f"{path}.{key}")
            if len(value) > MAX_CONDITIONS:
                raise LimitExceeded("conditions of a filter", MAX_CONDITIONS, len(value))
            parts = tuple(
                self.node(part, f"{path}.{key}[{i}]", depth + 1) for i, part in enumerate(value)
            )
            return And(parts) if word == "and" else Or(parts)
        if word == "not":
            if isinstance(value, Sequence) and not isinstance(value, str):
                if not value:
                    raise BadFilter("expected a filter", f"{path}.{key}")
                return Not(self._entry("or", value, path, depth))
            return Not(self.node(value, f"{path}.{key}", depth + 1))
        return self._field(key, value, f"{path}.{key}")

    def _field(self, field: str, value: object, path: str) -> Filter:
        if field.startswith("metadata."):
            if len(field) > 256 or field == "metadata.":
                raise BadFilter("a metadata key has 1 to 247 characters", path)
        elif field not in FIELDS:
            known = ", ".join(FIELDS)
            raise BadFilter(f"no such field; there are: {known}, metadata.KEY", path)
        if isinstance(value, Mapping):
            if not value:
                raise BadFilter("expected at least one operator", path)
            parts = [self._compare(field, str(op), v, path) for op, v in value.items()]
            flat = all_of(*parts)
            assert flat is not None
            return flat
        if isinstance(value, list):
            return self._compare(field, "in", value, path)
        return self._compare(field, "eq", value, path)

    def _compare(self, field: str, op_name: str, value: object, path: str) -> Filter:
        self._conditions += 1
        if self._conditions > MAX_CONDITIONS:
            raise LimitExceeded("conditions of a filter", MAX_CONDITIONS)
        try:
            op = Op(op_name)
        except ValueError:
            known = ", ".join(Op)
            raise BadFilter(f"no operator {op_name!r}; there are: {known}", path) from None
        path = f"{path}.{op}"
        kind = field_type(field)
        if op in LIST_OPS:
            if not isinstance(value, list) or not value:
                raise BadFilter("expected a non-empty list", path)
            if len(value) > MAX_VALUES:
                raise LimitExceeded(f"values of {path}", MAX_VALUES, len(value))
            return Compare(field, op, tuple(_scalar(kind, v, op, path) for v in value))
        return Compare(field, op, _scalar(kind, value, op, path))


def _scalar(kind: FieldType, value: object, op: Op, path: str) -> Scalar:
    if isinstance(value, str):
        if len(value) > MAX_STRING:
            raise LimitExceeded(f"characters of {path}", MAX_STRING, len(value))
        if "\x00" in value:
            raise BadFilter("a value can't hold a NUL character", path)
    elif isinstance(value, float) and value != value:
        raise BadFilter("NaN compares to nothing", path)
    match kind:
        case FieldType.KEYWORD:
            if not isinstance(value, str):
                raise BadFilter(f"expected a string, got {type(value).__name__}", path)
            if op in RANGE_OPS:
                raise BadFilter("this field has no order; use eq, ne, in, nin or contains", path)
            return value
        case FieldType.TIME:
            if op is Op.CONTAINS:
                raise BadFilter("a time contains nothing; use eq, gt, gte, lt or lte", path)
            return _time(value, path)
        case FieldType.INTEGER:
            if not isinstance(value, int) or isinstance(value, bool):
                raise BadFilter(f"expected an integer, got {type(value).__name__}", path)
            return value
        case FieldType.ANY:
            if op in RANGE_OPS:
                if isinstance(value, str):
                    return _time(value, path)
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise BadFilter("expected a number or a time", path)
                return value
            if not isinstance(value, str | int | float | bool):
                raise BadFilter(
                    f"expected a string, number or boolean, got {type(value).__name__}", path
                )
            return value


def _time(value: object, path: str) -> datetime:
    if isinstance(value, str):
        try:
            parsed = datetime.fromisoformat(value)
        except ValueError:
            raise BadFilter(f"{value[:40]!r} is no ISO 8601 time", path) from None
        return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
    raise BadFilter("expected an ISO 8601 time in a string", path)
