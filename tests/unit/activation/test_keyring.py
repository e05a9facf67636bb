"""Keys per tenant: kept, shared, and gone for good."""

import json
import os
import subprocess
import sys

import pytest

from memcube.activation.keyring import Keyring
from memcube.errors import BadRequest, Corrupt
from memcube.ids import TenantId

A, B = TenantId("a"), TenantId("b")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys" / "keyring.json"


def test_a_key_stays_the_same_for_its_tenant_and_differs_from_others(path):
    ring = Keyring(path)
    assert ring.find(A) is None
    sealed = ring.get(A).seal(b"plain", b"about")
    again = Keyring(path)
    assert again.get(A).unseal(sealed, b"about") == b"plain"
    assert again.get(B).unseal(sealed, b"about") is None
    assert again.get(A).unseal(sealed, b"something else") is None
    assert ring.get(A).seal(b"plain", b"about") != sealed


def test_a_forgotten_key_is_gone_at_once_everywhere_and_a_new_one_is_another(path):
    ring, other = Keyring(path), Keyring(path)
    sealed = ring.get(A).seal(b"plain", b"")
    kept = ring.get(B).seal(b"kept", b"")
    assert other.get(A).unseal(sealed, b"") == b"plain"
    other.forget(A)
    assert ring.find(A) is None
    assert ring.get(A).unseal(sealed, b"") is None
    assert other.get(B).unseal(kept, b"") == b"kept"
    other.forget(TenantId("never was"))


def test_the_file_is_the_owners_alone_and_the_old_bytes_are_overwritten(path):
    ring = Keyring(path)
    ring.get(A)
    assert path.stat().st_mode & 0o777 == 0o600
    with open(path, "rb") as old:
        held = old.read()
        ring.forget(A)
        old.seek(0)
        assert old.read() == bytes(len(held))
    assert json.loads(path.read_text())["keys"] == {}


def test_a_file_that_others_may_read_is_refused(path):
    Keyring(path).get(A)
    path.chmod(0o644)
    with pytest.raises(BadRequest, match="chmod 600"):
        Keyring(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 2, "keys": {}}',
        '{"format": 1}',
        '{"format": 1, "keys": []}',
        '{"format": 1, "keys": {"a": "c2hvcnQ="}}',
        '{"format": 1, "keys": {"a": 5}}',
        '{"format": 1, "keys": {"a": "\\u00e9"}}',
        "\udcff",
    ],
)
def test_a_damaged_file_is_told_as_such_and_left_as_it_is(path, text):
    path.parent.mkdir()
    path.write_text(text, errors="surrogateescape")
    path.chmod(0o600)
    with pytest.raises(Corrupt) as told:
        Keyring(path)
    assert "c2hvcnQ" not in str(told.value)
    assert path.read_text(errors="surrogateescape") == text


def test_processes_that_make_keys_at_once_lose_none(path):
    program = (
        "import sys; from pathlib import Path; from memcube.activation.keyring import Keyring\n"
        "ring = Keyring(Path(sys.argv[1]))\n"
        "for n in range(8): ring.get(f'{sys.argv[2]}-{n}')"
    )
    makers = [
        subprocess.Popen([sys.executable, "-c", program, str(path), str(n)]) for n in range(3)
    ]
    assert [maker.wait() for maker in makers] == [0, 0, 0]
    assert len(json.loads(path.read_text())["keys"]) == 24


def test_odd_tenants_have_keys_of_their_own(path):
    ring = Keyring(path)
    tenants = [
        TenantId(name) for name in ("", "a\x00", "a/b", "e\u0301", "\u00e9", '"', "a" * 5000)
    ]
    sealed = [ring.get(tenant).seal(os.urandom(8), b"") for tenant in tenants]
    for number, tenant in enumerate(tenants):
        opened = [Keyring(path).get(tenant).unseal(one, b"") is not None for one in sealed]
        assert opened == [n == number for n in range(len(tenants))]
