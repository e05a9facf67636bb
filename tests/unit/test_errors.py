import inspect
import pickle

import pytest

from memcube import errors

SAMPLES = {
    "LimitExceeded": ("items", 3, 4),
    "IllegalMove": ("deleted", "update", ("x",)),
    "Forbidden": ("reader", "writer"),
    "NotFound": ("cube", "a"),
    "VersionMismatch": ("a", 1, 2),
    "StaleEpoch": (1, 2),
    "Moved": ("acme", 1),
    "Corrupt": ("file", "crc"),
    "AdapterUnusable": ("a", errors.TooBusy("full", 2.0)),
    "ModelAnswerInvalid": ("m", "no JSON"),
    "UnknownBackend": ("store", "x", ("a", "b")),
    "BadFilter": ("no such field", "filters.x"),
    "MemCubeError": (),
    "Unauthenticated": (),
}
CLASSES = [
    c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.MemCubeError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_every_error_survives_pickling_with_its_fields_and_text(kind):
    error = kind(*SAMPLES.get(kind.__name__, ("something",)))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    # By their texts: no error equals another, and one may hold one.
    assert repr(again.args) == repr(error.args)
    assert repr(vars(again)) == repr(vars(error))
    assert str(again) == str(error)


def test_every_error_stands_in_the_tree_of_the_docstring():
    assert errors.__doc__
    assert [c.__name__ for c in CLASSES if c.__name__ not in errors.__doc__] == []
