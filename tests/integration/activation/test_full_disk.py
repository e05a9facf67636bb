"""A file system that is really full: a small tmpfs in a mount namespace of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import asyncio, sys
from pathlib import Path
from memcube.activation.media import DiskMedium, HostMedium, MediaHierarchy
from memcube.errors import StorageFull
from memcube.objects.folder import FolderStore
from memcube.testing.kv import LAYOUT, MODEL, TinyLru, item, payload, same

root, tokens = Path(sys.argv[1]), 4096
size = LAYOUT.bytes_per_token * tokens

def media_go_on():
    disk = DiskMedium.open(root / "kv", model=MODEL, layout=LAYOUT, reserve_bytes=0)
    media = MediaHierarchy([(HostMedium(), TinyLru(3 * size)), (disk, TinyLru(1 << 30))], now=0.0)
    keys = [f"k{n}" for n in range(30)]
    for now, key in enumerate(keys):
        assert media.put(payload(key, tokens), item(key, num_tokens=tokens), now / 100)
        assert same(media.get(key, now / 100), key, tokens)
    (full,) = [stats for stats in media.stats() if stats.name == "disk"]
    assert full.events["failed: StorageFull"] >= 1, full
    assert all(same(media.get(key, 1.0), key, tokens) for key in keys[-3:])
    held = [key for key in keys if media.get(key, 1.0)]
    assert len(held) > 8 and not list(root.rglob("*.new")), held
    media.delete(held)
    assert disk.used_bytes == 0
    for now, key in enumerate(keys[:6]):
        media.put(payload(key, tokens), item(key, num_tokens=tokens), 100.0 + now)
    assert disk.records()
    media.delete(keys)
    media.close()

async def objects_go_on():
    store = FolderStore.open(root / "objects")
    acknowledged = []
    try:
        for number in range(1000):
            await store.put(f"{number}", bytes([number % 256]) * 100_000)
            acknowledged.append(number)
    except StorageFull:
        pass
    assert 10 < len(acknowledged) < 100
    for number in acknowledged:
        assert await store.get(f"{number}") == bytes([number]) * 100_000
    assert not list((root / "objects" / ".tmp").iterdir())
    await store.delete("0")
    await store.put("again", b"x" * 90_000)

media_go_on()
asyncio.run(objects_go_on())
print("went on")
"""


def test_a_full_disk_stops_neither_media_nor_objects(tmp_path: Path):
    if shutil.which("unshare") is None:
        pytest.skip("no unshare to mount a small file system with")
    script = f'mount -t tmpfs -o size=4m none "{tmp_path}" && exec "{sys.executable}" -c "$0" "{tmp_path}"'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no right to mount here: {done.stderr.strip()[:200]}")
    assert done.stdout == "went on\n", done.stderr[-3000:]
