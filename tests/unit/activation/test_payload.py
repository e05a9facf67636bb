"""Files of KV: what is written is read, and nothing else ever is."""

import errno
import json
import os
import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memcube.activation import payload as files
from memcube.activation.keyring import TenantCipher
from memcube.activation.layout import KvLayout
from memcube.activation.payload import Foreign, KvPayload, decode, parse, read, read_manifest, write
from memcube.errors import Corrupt, LimitExceeded, NotFound, StorageFull, Unavailable
from memcube.ids import TenantId

LAYOUT = KvLayout(2, 1, 4, "float32")
CIPHER = TenantCipher(TenantId("a"), b"k" * 32)
EXPECTED = {"key": "ab12", "model": "m@1", "layout": LAYOUT}


def payload(codec="int8", *, layout: KvLayout = LAYOUT, key: str = "ab12", model: str = "m@1"):
    kv_L2HND = torch.randn(layout.shape(8), generator=torch.Generator().manual_seed(1))
    return KvPayload.of(
        kv_L2HND.to(layout.torch_dtype),
        key=key,
        kind="block",
        layout=layout,
        codec=codec,
        model=model,
    )


def same(one: KvPayload, other: KvPayload) -> bool:
    return torch.equal(decode(one), decode(other)) and one.codec == other.codec


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ab12.safetensors"


@pytest.mark.parametrize("codec", ["raw", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cipher", [None, CIPHER], ids=["plain", "sealed"])
@pytest.mark.parametrize("mapped", [True, False])
def test_what_was_written_is_read(path, codec, dtype, cipher, mapped):
    layout = KvLayout(2, 1, 4, dtype)
    given_ = payload(codec, layout=layout)
    size = write(path, given_, cipher, {"tenant": "a"})
    assert path.stat().st_size == size
    expected = {**EXPECTED, "layout": layout, "cipher": cipher}
    assert same(read(path, mapped=mapped, **expected), given_)
    assert same(parse(path.read_bytes(), where="pack", **expected), given_)
    manifest = read_manifest(path)
    assert (manifest.key, manifest.model, manifest.layout) == ("ab12", "m@1", layout)
    assert (manifest.sealed, manifest.note) == (cipher is not None, {"tenant": "a"})


def test_a_file_is_one_that_any_safetensors_reader_opens(path):
    for codec, dtype in (("raw", "bfloat16"), ("int8", "float32")):
        layout = KvLayout(2, 1, 4, dtype)
        write(path, payload(codec, layout=layout))
        found = safetensors.torch.load_file(path)
        assert found["kv"].shape == layout.shape(8)
        if codec == "raw":
            assert torch.equal(found["kv"], decode(payload(codec, layout=layout)))
        with safetensors.safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["manifest"])["key"] == "ab12"


def test_a_mapped_payload_outlives_its_file_and_can_not_be_written(path):
    given_ = payload()
    write(path, given_)
    found = read(path, **EXPECTED)
    write(path, payload("raw"))
    path.unlink()
    assert same(found, given_)
    with pytest.raises(ValueError, match="read-only"):
        found.arrays["kv"][0] = 1


@pytest.mark.parametrize(
    "other",
    [
        {"key": "ab13"},
        {"model": "m@2"},
        {"layout": KvLayout(2, 1, 4, "bfloat16")},
        {"layout": KvLayout(1, 2, 4, "float32")},
        {"cipher": CIPHER},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_file_of_something_else_is_foreign(path, other):
    write(path, payload())
    with pytest.raises(Foreign):
        read(path, **(EXPECTED | other))


@pytest.mark.parametrize(
    "cipher", [None, TenantCipher(TenantId("a"), b"j" * 32), TenantCipher(TenantId("b"), b"k" * 32)]
)
def test_a_sealed_file_opens_with_its_own_key_and_tenant_alone(path, cipher):
    write(path, payload(), CIPHER)
    with pytest.raises(Foreign):
        read(path, cipher=cipher, **EXPECTED)


def test_sealed_bytes_do_not_show_the_kv(path):
    given_ = payload("raw")
    write(path, given_, CIPHER)
    assert given_.arrays["kv"].tobytes()[:16] not in path.read_bytes()


def test_a_sealed_body_under_another_manifest_is_not_opened(path):
    """Who can write files can state a new checksum, but can't give one key's KV to another."""
    one, other = payload("raw"), payload("raw", key="ab13")
    sealed = [files.serialised(p, CIPHER) for p in (one, other)]
    header = bytes(sealed[1][0])
    checksum = json.loads(header[8:])["__metadata__"]["checksum"].encode()
    forged = files.hashlib.sha256(header.replace(checksum, b"0" * 64) + bytes(sealed[0][1]))
    header = header.replace(checksum, forged.hexdigest().encode())
    path.write_bytes(header + bytes(sealed[0][1]))
    with pytest.raises(Foreign, match="sealed with another key"):
        read(path, **(EXPECTED | {"key": "ab13", "cipher": CIPHER}))


@pytest.mark.parametrize("cipher", [None, CIPHER], ids=["plain", "sealed"])
def test_every_flipped_bit_is_found(path, cipher):
    write(path, payload(), cipher)
    whole = path.read_bytes()
    assert len(whole) < 2000
    for place in range(len(whole) * 8):
        bad = bytearray(whole)
        bad[place // 8] ^= 1 << place % 8
        with pytest.raises(Corrupt):
            parse(bytes(bad), where="x", cipher=cipher, **EXPECTED)


@pytest.mark.parametrize("mapped", [True, False])
def test_every_shorter_or_longer_file_is_found(path, mapped):
    write(path, payload())
    whole = path.read_bytes()
    for bad in [*(whole[:n] for n in range(len(whole))), whole + b"\x00", whole + whole]:
        path.write_bytes(bad)
        with pytest.raises(Corrupt):
            read(path, mapped=mapped, **EXPECTED)
        with pytest.raises(Corrupt):
            read_manifest(path)


def headered(head: object, data: bytes = b"") -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + data


def changed(**changes: object) -> bytes:
    """A file whose manifest was changed, with the checksum that it should have."""
    parts = [bytes(part) for part in files.serialised(payload())]
    head = json.loads(parts[0][8:])
    manifest = json.loads(head["__metadata__"]["manifest"]) | changes
    head["__metadata__"] |= {"manifest": json.dumps(manifest), "checksum": "0" * 64}
    body = b"".join(parts[1:])
    raw = headered(head)
    checksum = files.hashlib.sha256(raw + body).hexdigest()
    return raw.replace(b"0" * 64, checksum.encode(), 1) + body


def test_the_double_that_changes_manifests_makes_good_files(path):
    assert same(parse(changed(), where="x", **EXPECTED), payload())


class _Gadget:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "executed"),)


def hostile(tmp_path: Path) -> dict[str, bytes]:
    """Files that some other program wrote, or that someone made up."""
    cases = {
        "empty": b"",
        "zeros": bytes(4096),
        "pickle": pickle.dumps(_Gadget(tmp_path)) * 40,
        "padded pickle": headered(pickle.dumps(_Gadget(tmp_path))),
        "no manifest": headered(
            {"kv": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"
        ),
        "another's": safetensors.torch.save({"kv": torch.zeros(LAYOUT.shape(8))}),
        "another's metadata": headered({"__metadata__": {"format": "pt"}}, b"1"),
        "metadata a list": headered({"__metadata__": []}, b"1"),
        "manifest a number": headered(
            {"__metadata__": {"manifest": 1, "checksum": "0" * 64}}, b"1"
        ),
        "manifest no JSON": headered(
            {"__metadata__": {"manifest": "{", "checksum": "0" * 64}}, b"1"
        ),
        "a list": headered([1, 2], b"1"),
        "nested": headered(b"[" * 100_000, b"1"),
        "nested object": headered(b'{"a":' * 30_000, b"1"),
        "a long number": headered(b'{"a":' + b"9" * 5000 + b"}", b"1"),
        "utf-16": headered(json.dumps({"a": 1}).encode("utf-16"), b"1"),
        "a huge header": struct.pack("<Q", 2**63) + bytes(4096),
        "a large header": struct.pack("<Q", files.MAX_HEADER_BYTES + 56) + b" " * 600_000,
    }
    manifests = {
        "format 0": {"format": 0},
        "format true": {"format": True},
        "format 2": {"format": 2},
        "format text": {"format": "1"},
        "no format": {"format": None},
        "key a list": {"key": ["ab12"]},
        "kind unknown": {"kind": "tree"},
        "kind a list": {"kind": ["block"]},
        "codec unknown": {"codec": "pickle"},
        "codec raw": {"codec": "raw"},
        "dtype unknown": {"dtype": "object"},
        "no tokens": {"num_tokens": 0},
        "tokens below 0": {"num_tokens": -8},
        "tokens true": {"num_tokens": True},
        "tokens a fraction": {"num_tokens": 8.0},
        "too many tokens": {"num_tokens": 10**15},
        "other tokens": {"num_tokens": 4},
        "layout short": {"layout": [2, 1]},
        "layout long": {"layout": [2, 1, 4, 4]},
        "layout huge": {"layout": [2**31, 2**31, 2**31]},
        "layout text": {"layout": ["2", "1", "4"]},
        "layout turned": {"layout": [1, 2, 4]},
        "sealed": {"sealed": True},
        "sealed 0": {"sealed": 0},
        "note a list": {"note": []},
        "model none": {"model": None},
    }
    return cases | {name: changed(**change) for name, change in manifests.items()}


def test_no_hostile_file_is_served_executed_or_raises_anything_else(tmp_path):
    path = tmp_path / "x"
    for name, data in hostile(tmp_path).items():
        path.write_bytes(data)
        for cipher in (None, CIPHER):
            with pytest.raises(Corrupt):
                read(path, cipher=cipher, **EXPECTED)
            with pytest.raises(Corrupt):
                parse(data, where=name, cipher=cipher, **EXPECTED)
    assert not (tmp_path / "executed").exists()


def test_an_older_or_newer_format_is_named(path):
    path.write_bytes(changed(format=0))
    with pytest.raises(Foreign, match="format '0'"):
        read_manifest(path)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_damage_whatever_is_served(path, data):
    whole = path.read_bytes() if path.exists() else b""
    if not whole:
        write(path, payload())
        whole = path.read_bytes()
    bad = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(bad)))
        cut = data.draw(st.integers(0, 40))
        bad[at : at + cut] = data.draw(st.one_of(st.binary(max_size=40), st.just(whole[:cut])))
    if bytes(bad) == whole:
        return
    with pytest.raises(Corrupt):
        parse(bytes(bad), where="x", **EXPECTED)


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(
                st.sampled_from(["__metadata__", "manifest", "checksum", "kv", "shape", "x"]),
                inner,
                max_size=4,
            ),
        ),
        max_leaves=12,
    )
)
def test_no_header_whatever_raises_anything_else(head):
    with pytest.raises(Corrupt):
        parse(headered(head, b"data"), where="x", **EXPECTED)
    with pytest.raises(Corrupt):
        parse(
            headered({"__metadata__": {"manifest": json.dumps(head)}}, b"x"), where="x", **EXPECTED
        )


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "loop"])
def test_what_is_no_file_is_corrupt_and_never_waited_for(tmp_path, path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        target = tmp_path / "target" if kind == "link" else path
        if kind == "link":
            write(target, payload())
        path.symlink_to(target)
    for call in (lambda: read(path, **EXPECTED), lambda: read_manifest(path)):
        with pytest.raises(Corrupt):
            call()


def test_a_missing_file_is_not_found(path):
    with pytest.raises(NotFound):
        read(path, **EXPECTED)
    with pytest.raises(NotFound):
        read_manifest(path)


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, Corrupt), (errno.EMFILE, Unavailable), (errno.EACCES, Unavailable)],
)
@pytest.mark.parametrize("call", ["open", "preadv", "pread"])
def test_a_disk_that_fails_is_told_from_a_system_that_is_short(
    path, monkeypatch, call, number, kind
):
    write(path, payload())

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(kind):
        read(path, **EXPECTED)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, StorageFull), (errno.EIO, Unavailable)]
)
def test_a_failed_write_leaves_the_old_file_and_no_other(path, monkeypatch, number, kind):
    given_ = payload()
    write(path, given_)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(kind):
        write(path, payload("raw"))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert same(read(path, **EXPECTED), given_)


def test_files_are_the_owners_alone(path):
    write(path, payload())
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_note_that_is_too_large_is_refused_and_nothing_written(path):
    with pytest.raises(LimitExceeded):
        write(path, payload(), None, {"members": ["x" * 100] * 3000})
    assert not path.exists()


def test_a_key_that_looks_like_a_checksum_does_no_harm(path):
    for key in ("0" * 64, "f" * 64):
        write(path, payload(key=key))
        assert same(read(path, **(EXPECTED | {"key": key})), payload(key=key))


def test_a_payload_survives_pickling_by_ray():
    given_ = payload()
    again = pickle.loads(pickle.dumps(given_, protocol=5))
    assert same(again, given_)
    assert again.key == given_.key


def test_the_source_reads_no_pickle():
    for module in Path(files.__file__).parent.glob("*.py"):
        text = module.read_text()
        assert not any(
            word in text for word in ("pickle.load", "torch.load(", "allow_pickle=True")
        ), module


def test_any_payload_comes_back_from_its_file(tmp_path):
    seed = random.Random(2)
    for number in range(20):
        layout = KvLayout(*(seed.randint(1, 5) for _ in range(3)), "float32")
        kv_L2HND = torch.from_numpy(
            np.random.default_rng(number).standard_normal(
                layout.shape(seed.randint(1, 9)), np.float32
            )
        )
        one = KvPayload.of(
            kv_L2HND, key=f"{number}", kind="segment", layout=layout, codec="raw", model="m"
        )
        path = tmp_path / f"{number}"
        write(path, one)
        found = read(path, key=f"{number}", model="m", layout=layout)
        assert torch.equal(decode(found), kv_L2HND)
