"""KV in packs on a real S3 server, and the hierarchy when that server is killed."""

import pytest

from memcube.activation.media import HostMedium, MediaHierarchy, ObjectMedium
from memcube.objects.blocking import BlockingObjects
from memcube.objects.s3 import S3Store
from memcube.testing.kv import LAYOUT, MODEL, TinyLru, item, payload, same
from memcube.testing.s3 import NoS3, S3Server, s3_server

KEYS = [f"k{number}" for number in range(30)]


@pytest.fixture(scope="module")
def server():
    try:
        with s3_server() as server:
            yield server
    except NoS3 as none:
        pytest.skip(str(none))


def opened(server: S3Server) -> BlockingObjects:
    settings = server.settings(attempts=1)
    return BlockingObjects(lambda: S3Store.open(settings, create_bucket=True))


def test_a_hierarchy_over_s3_survives_its_servers_death(server):
    objects = opened(server)

    def built(now: float) -> MediaHierarchy:
        packs = ObjectMedium(
            objects, writer="node", model=MODEL, layout=LAYOUT, pack_bytes=8 * 1024
        )
        return MediaHierarchy([(HostMedium(), TinyLru(512)), (packs, TinyLru(1 << 20))], now=now)

    media = built(0.0)
    for key in KEYS:
        assert media.put(payload(key), item(key), 1.0)
    media.flush()
    assert sum(found.num_bytes for found in objects.list("kv/")) > 30 * 256
    assert len(objects.list("kv/")) < 20
    server.kill()
    assert media.get(KEYS[0], 2.0) is None
    assert same(media.get(KEYS[-1], 2.0), KEYS[-1])  # in the host
    server.start()
    assert same(media.get(KEYS[0], 40.0), KEYS[0])
    media = built(50.0)
    assert [key for key in KEYS[:-2] if not same(media.get(key, 51.0), key)] == []
    media.delete(KEYS[:20])
    assert not any(media.get(key, 52.0) for key in KEYS[:20])
    left = b"".join(objects.get(found.name) for found in objects.list("kv/"))
    assert not any(payload(key).arrays["kv"].tobytes() in left for key in KEYS[:20])
    assert same(media.get(KEYS[25], 53.0), KEYS[25])
    media.delete_tenant("a")
    assert objects.list("kv/") == []
    media.close()
    objects.close()
