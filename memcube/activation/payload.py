"""KV below the device: what a payload is, and how it lies in a file.

A file is a safetensors file, which any reader of the format opens: the tensor ``kv`` and those that
int8 needs, with a manifest in its metadata that says what the KV is of. It is written beside its place
and renamed; a SHA-256 over every byte of it, the header's own included, is checked before anything of
it is used. So a file is read whole and right or not at all, and no fsync is needed: KV is a cache, a
file that a loss of power tore is a miss.

A reader says what it expects. A file of another key, model or layout raises ``Foreign``, one of an
older format too; a damaged one raises ``Corrupt``, of which ``Foreign`` is a kind. Nothing else comes
of any bytes whatever. Nothing is unpickled, and no size that a header claims is believed before the
file's own size agrees.

With a cipher the tensors are sealed into one, so that whoever destroys the key destroys the KV (which
can be turned back into the text it is of: arXiv 2508.09442). The manifest stays readable.
"""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import numpy as np
import torch
from torch import Tensor

from memcube.activation import quantise
from memcube.activation.layout import ITEM_BYTES, KvLayout
from memcube.activation.quantise import Arrays, Codec
from memcube.errors import Corrupt, LimitExceeded, NotFound, StorageFull, Unavailable

Kind = Literal["block", "segment"]

FORMAT = 1
MAX_HEADER_BYTES = 256 * 1024
MAX_SEALED_BYTES = 2**31 - 64
"""What AES-GCM of ``cryptography`` takes in one call."""
NEW_SUFFIX = ".new"
_ALIGNED = 64
_MAX_SIZE = 1 << 32
_CHUNK = 1 << 20
_SEALED = "sealed"
_MANIFEST, _CHECKSUM = "manifest", "checksum"
_CHECKSUM_FORM = re.compile(r"[0-9a-f]{64}")
_BLANK = "0" * 64
_TAGS = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int8": "I8"}


class Foreign(Corrupt):
    """``Foreign(where, what)``: whole, but not what was asked for."""

    code = "foreign"


class Cipher(Protocol):
    """Seals the tensors of one tenant. ``memcube.activation.keyring`` has them."""

    def seal(self, plain: bytes, about: bytes) -> bytes: ...

    def unseal(self, sealed: bytes, about: bytes) -> bytes | None:
        """The plain bytes; None where the key, the bytes or what they are about differ."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KvPayload:
    """KV of some tokens in host memory, keys un-rotated. The arrays are read-only.

    ``model`` is the fingerprint of the model that computed it. ``arrays``, by codec: see
    ``memcube.activation.quantise.array_specs``; anything else raises ValueError.
    """

    key: str
    kind: Kind
    num_tokens: int
    layout: KvLayout
    codec: Codec
    model: str
    arrays: Arrays

    def __post_init__(self) -> None:
        specs = quantise.array_specs(self.layout, self.num_tokens, self.codec)
        found = {name: (array.dtype, array.shape) for name, array in self.arrays.items()}
        if found != specs:
            raise ValueError(f"{self.codec} KV has arrays {specs}, given {found}")
        held = {name: np.ascontiguousarray(self.arrays[name]).view() for name in specs}
        for array in held.values():
            array.flags.writeable = False
        object.__setattr__(self, "arrays", held)

    @classmethod
    def of(
        cls, kv_L2HND: Tensor, *, key: str, kind: Kind, layout: KvLayout, codec: Codec, model: str
    ) -> "KvPayload":
        """The payload of a tensor with un-rotated keys."""
        return cls(
            key=key,
            kind=kind,
            num_tokens=kv_L2HND.shape[3],
            layout=layout,
            codec=codec,
            model=model,
            arrays=quantise.encode(kv_L2HND, codec),
        )

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a file says that it holds. ``note`` is what its writer wanted to find again."""

    key: str
    kind: Kind
    num_tokens: int
    layout: KvLayout
    codec: Codec
    model: str
    sealed: bool
    note: Mapping[str, Any] = field(default_factory=dict)


def decode(payload: KvPayload, device: torch.device | str = "cpu") -> Tensor:
    """A new tensor kv_L2HND in the layout's type, keys un-rotated."""
    return quantise.decode(payload.arrays, payload.layout, payload.codec, device)


def serialised(
    payload: KvPayload, cipher: Cipher | None = None, note: Mapping[str, Any] | None = None
) -> list[memoryview]:
    """The bytes of a file, in parts. Those of the tensors are the payload's own memory.

    Raises:
        LimitExceeded: the note is too large, or the tensors are for a cipher.
    """
    manifest = _manifest_text(payload, cipher is not None, note or {})
    parts = [array.data.cast("B") for array in payload.arrays.values()]
    if cipher is None:
        tensors = _tensors(payload.layout, payload.num_tokens, payload.codec)
    else:
        if payload.num_bytes > MAX_SEALED_BYTES:
            raise LimitExceeded("bytes of KV to seal", MAX_SEALED_BYTES, payload.num_bytes)
        parts = [memoryview(cipher.seal(b"".join(parts), manifest.encode()))]
        tensors = _sealed_tensor(len(parts[0]))
    metadata = {"__metadata__": {_CHECKSUM: _BLANK, _MANIFEST: manifest}}
    header = json.dumps(metadata | tensors, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNED)
    if len(header) > MAX_HEADER_BYTES:
        raise LimitExceeded("bytes of a KV file's header", MAX_HEADER_BYTES, len(header))
    header = len(header).to_bytes(8, "little") + header
    checksum = hashlib.sha256(header)
    for part in parts:
        checksum.update(part)
    header = header.replace(_BLANK.encode(), checksum.hexdigest().encode(), 1)
    return [memoryview(header), *parts]


def write(
    path: Path,
    payload: KvPayload,
    cipher: Cipher | None = None,
    note: Mapping[str, Any] | None = None,
) -> int:
    """Write a file, whole or not at all; its size. What a killed writer leaves ends in ``.new``.

    Raises:
        StorageFull: no room is left.
        Unavailable: the folder can't be written.
        LimitExceeded: as ``serialised``.
    """
    parts = serialised(payload, cipher, note)
    temporary = path.with_name(os.urandom(8).hex() + NEW_SUFFIX)
    try:
        try:
            with open(temporary, "xb", buffering=0, opener=_private) as file:
                for part in parts:
                    while part:
                        part = part[file.write(part) or 0 :]
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as failed:
        if failed.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(str(path.parent)) from None
        raise Unavailable(f"{path}: {os.strerror(failed.errno or 0)}", 5.0) from None
    return sum(map(len, parts))


def read_manifest(path: Path) -> Manifest:
    """What a file says that it holds: its header alone is read, and no checksum is checked.

    Raises:
        NotFound: there is no file.
        Corrupt, Foreign: it can't be a whole file of this format.
        Unavailable: the system can't read it now.
    """
    with _opened(path) as (handle, size):
        return _header(str(path), size, handle).manifest


def read(
    path: Path,
    *,
    key: str,
    model: str,
    layout: KvLayout,
    cipher: Cipher | None = None,
    mapped: bool = True,
) -> KvPayload:
    """The payload of a file: ``mapped`` into memory, or read into it (a sealed one always).

    A mapped one stays readable when the file is replaced or removed; each holds a file descriptor.
    With a cipher, a file that is not sealed is ``Foreign``.

    Raises:
        NotFound: there is no file.
        Corrupt, Foreign: it is damaged, or of something else.
        Unavailable: the system can't read it now.
    """
    where = str(path)
    with _opened(path) as (handle, size):
        header = _header(where, size, handle)
        _expect(where, header.manifest, key, model, layout, sealed=cipher is not None)
        checksum = header.checksum()
        if mapped and cipher is None:
            # Through read, not through the map: a page that can't be read is an error here, and
            # the end of the process there. The map then finds the pages in the cache.
            chunk = memoryview(bytearray(_CHUNK))
            for at in range(header.size, size, _CHUNK):
                piece = chunk[: size - at]
                _fill(where, handle, piece, at)
                checksum.update(piece)
            body = memoryview(mmap.mmap(handle, size, access=mmap.ACCESS_READ))[header.size :]
        else:
            body = np.empty(size - header.size, np.uint8).data
            _fill(where, handle, body, header.size)
            checksum.update(body)
    header.check(where, checksum.hexdigest())
    return _payload(where, header, body, cipher)


def parse(
    data: bytes,
    *,
    where: str,
    key: str,
    model: str,
    layout: KvLayout,
    cipher: Cipher | None = None,
) -> KvPayload:
    """As ``read``, of a file's bytes. The payload's arrays are views of them."""
    header = _header(where, len(data), data)
    _expect(where, header.manifest, key, model, layout, sealed=cipher is not None)
    body = memoryview(data)[header.size :]
    checksum = header.checksum()
    checksum.update(body)
    header.check(where, checksum.hexdigest())
    return _payload(where, header, body, cipher)


class _Header(NamedTuple):
    manifest: Manifest
    manifest_text: str
    stated: str
    raw: bytes

    @property
    def size(self) -> int:
        return len(self.raw)

    def checksum(self) -> "hashlib._Hash":
        """A checksum that has the header in it, and wants the rest."""
        return hashlib.sha256(self.raw.replace(self.stated.encode(), _BLANK.encode(), 1))

    def check(self, where: str, found: str) -> None:
        if found != self.stated:
            raise Corrupt(where, "does not have the bytes that were written (checksum)")


def _header(where: str, size: int, source: int | bytes) -> _Header:
    """The header of a file of this size, given as a handle or as bytes."""

    def first(length: int) -> bytes:
        return os.pread(source, length, 0) if isinstance(source, int) else source[:length]

    length = 8 + int.from_bytes(first(8), "little")
    if length % _ALIGNED or not _ALIGNED <= length <= 8 + MAX_HEADER_BYTES:
        raise Corrupt(where, "has no header of a KV file")
    raw = first(length)
    if len(raw) != length or size <= length:
        raise Corrupt(where, f"has {size:,} bytes, fewer than its header tells of")
    head = _object(where, raw[8:])
    metadata = head.pop("__metadata__", None)
    if not isinstance(metadata, dict):
        raise Foreign(where, "has no manifest")
    stated, text = metadata.get(_CHECKSUM), metadata.get(_MANIFEST)
    if not isinstance(text, str):
        raise Foreign(where, "has no manifest")
    manifest = _manifest(where, _object(where, text))
    if not isinstance(stated, str) or not _CHECKSUM_FORM.fullmatch(stated):
        raise Corrupt(where, "has no checksum")
    if raw.count(stated.encode()) != 1:
        raise Corrupt(where, "states its checksum more than once")
    tensors = _tensors(manifest.layout, manifest.num_tokens, manifest.codec)
    if manifest.sealed:
        tensors = _sealed_tensor(size - length)
    if head != tensors:
        raise Corrupt(where, f"has tensors {str(head)[:200]}, not {tensors}")
    if (whole := length + max(t["data_offsets"][1] for t in tensors.values())) != size:
        raise Corrupt(where, f"has {size:,} bytes of {whole:,}")
    return _Header(manifest, text, stated, raw)


def _object(where: str, text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError):
        raise Corrupt(where, "has a header that can't be read") from None
    if not isinstance(found, dict):
        raise Corrupt(where, "has a header that is no object")
    return found


def _manifest_text(payload: KvPayload, sealed: bool, note: Mapping[str, Any]) -> str:
    layout = payload.layout
    return json.dumps(
        {
            "format": FORMAT,
            "key": payload.key,
            "kind": payload.kind,
            "model": payload.model,
            "num_tokens": payload.num_tokens,
            "layout": [layout.num_layers, layout.num_heads, layout.head_dim],
            "dtype": layout.dtype,
            "codec": payload.codec,
            "sealed": sealed,
            "note": note,
        },
        separators=(",", ":"),
    )


def _manifest(where: str, told: dict[str, Any]) -> Manifest:
    if (version := told.get("format")) != FORMAT or isinstance(version, bool):
        raise Foreign(where, f"is of format {str(version)[:20]!r}, not {FORMAT}")

    def of(name: str, kind: type) -> Any:
        value = told.get(name)
        if type(value) is not kind:
            raise Corrupt(where, f"has no usable {name!r} in its manifest")
        return value

    kind, codec, dtype, sizes = (
        of("kind", str),
        of("codec", str),
        of("dtype", str),
        of("layout", list),
    )
    if kind not in get_args(Kind) or codec not in quantise.CODECS or dtype not in ITEM_BYTES:
        raise Corrupt(
            where, f"is of an unknown kind: {kind[:20]!r}, {codec[:20]!r}, {dtype[:20]!r}"
        )
    sizes = [*sizes, of("num_tokens", int)]
    if len(sizes) != 4 or not all(type(n) is int and 0 < n < _MAX_SIZE for n in sizes):
        raise Corrupt(where, f"has sizes that can't be: {str(sizes)[:80]}")
    return Manifest(
        key=of("key", str),
        kind=cast("Kind", kind),
        num_tokens=sizes[3],
        layout=KvLayout(sizes[0], sizes[1], sizes[2], dtype),
        codec=cast("Codec", codec),
        model=of("model", str),
        sealed=of("sealed", bool),
        note=of("note", dict),
    )


def _tensors(layout: KvLayout, num_tokens: int, codec: Codec) -> dict[str, Any]:
    """What a header says of a payload's arrays, which lie in this order."""
    tensors: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in quantise.array_specs(layout, num_tokens, codec).items():
        size = dtype.itemsize * prod(shape)
        offsets = [end, end := end + size]
        tensors[name] = {"dtype": _TAGS[dtype.name], "shape": [*shape], "data_offsets": offsets}
    return tensors


def _sealed_tensor(size: int) -> dict[str, Any]:
    return {_SEALED: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}


def _expect(
    where: str, manifest: Manifest, key: str, model: str, layout: KvLayout, *, sealed: bool
) -> None:
    expected = {"key": key, "model": model, "layout": layout, "sealed": sealed}
    for name, value in expected.items():
        if (held := getattr(manifest, name)) != value:
            raise Foreign(where, f"has {name} {str(held)[:100]!r}, not {str(value)[:100]!r}")


def _payload(where: str, header: _Header, body: memoryview, cipher: Cipher | None) -> KvPayload:
    manifest = header.manifest
    specs = quantise.array_specs(manifest.layout, manifest.num_tokens, manifest.codec)
    if cipher is not None:
        plain = cipher.unseal(bytes(body), header.manifest_text.encode())
        if plain is None:
            raise Foreign(where, "is sealed with another key")
        if len(plain) != sum(dtype.itemsize * prod(shape) for dtype, shape in specs.values()):
            raise Corrupt(where, "holds another number of bytes than its manifest tells")
        body = memoryview(plain)
    arrays: dict[str, np.ndarray] = {}
    at = 0
    for name, (dtype, shape) in specs.items():
        arrays[name] = np.frombuffer(body, dtype, prod(shape), at).reshape(shape)
        at += arrays[name].nbytes
    return KvPayload(
        key=manifest.key,
        kind=manifest.kind,
        num_tokens=manifest.num_tokens,
        layout=manifest.layout,
        codec=manifest.codec,
        model=manifest.model,
        arrays=arrays,
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """A handle for reading and the file's size."""
    try:
        # A pipe must not make us wait, and a link not lead us elsewhere.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode):
                raise Corrupt(str(path), "is no file")
            yield handle, about.st_size
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise NotFound("KV file", str(path)) from None
    except OSError as failed:
        why = os.strerror(failed.errno or 0)
        if failed.errno in (errno.EIO, errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise Corrupt(str(path), f"can't be read: {why}") from None
        raise Unavailable(f"{path} can't be read: {why}", 5.0) from None


def _fill(where: str, handle: int, into: memoryview, at: int) -> None:
    while into:
        count = os.preadv(handle, [into], at)
        if count == 0:
            raise Corrupt(where, "became shorter while it was read")
        into, at = into[count:], at + count


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
