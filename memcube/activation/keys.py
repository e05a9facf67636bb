"""Keys of stored KV: one canonical function for every medium.

A key names all that its KV depends on: model, tokenizer, adapter, element type, the tenant's salt,
what stands before, and the tokens themselves. Each part is framed by its length, so that no two
different tuples join to the same bytes; adapter and salt stand apart (joined, they collided in
other systems), and the salt is in each key of a chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memcube.activation.contract import AdapterRef
from memcube.ids import digest


@dataclass(frozen=True, slots=True, kw_only=True)
class KvIdentity:
    """What all KV of one model, loaded in one way, has in common."""

    model: str
    tokenizer: str
    dtype: str

    def root(self, salt: str, adapter: AdapterRef | None, kind: str) -> str:
        """The parent of the first key of a chain.

        Raises:
            ValueError: no salt. Tenants would share their KV.
        """
        if not salt:
            raise ValueError("a key needs its tenant's salt")
        adapter_id, version = adapter or (None, None)
        return digest(kind, self.model, self.tokenizer, self.dtype, adapter_id, version, salt)


def block_keys(
    identity: KvIdentity,
    *,
    salt: str,
    adapter: AdapterRef | None,
    token_ids: Sequence[int],
    block_tokens: int,
) -> tuple[str, ...]:
    """The keys of the full blocks of these tokens, which stand at positions from 0 on."""
    parent = identity.root(salt, adapter, "block")
    keys: list[str] = []
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        parent = digest(parent, _bytes(token_ids[start : start + block_tokens]))
        keys.append(parent)
    return tuple(keys)


def tail_key(parent: str, token_ids: Sequence[int]) -> str:
    """The key of the last tokens of a chain, too few for a block."""
    return digest("tail", parent, _bytes(token_ids))


def segment_key(
    identity: KvIdentity,
    *,
    salt: str,
    adapter: AdapterRef | None,
    prefix_ids: Sequence[int],
    token_ids: Sequence[int],
) -> str:
    """The key of a segment that is built behind a prefix, which is then cut off."""
    parent = identity.root(salt, adapter, "segment")
    return digest(parent, _bytes(prefix_ids), _bytes(token_ids))


def _bytes(token_ids: Sequence[int]) -> bytes:
    return np.asarray(token_ids, dtype="<u4").tobytes()
