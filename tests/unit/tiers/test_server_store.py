"""The server store on the client's local mode, and on a real server where QDRANT_URL names one."""

import os
import uuid

import pytest
from qdrant_client import AsyncQdrantClient, models

from memcube.errors import Conflict, Unavailable
from memcube.testing.plaintext_contract import SPEC, PlaintextContract
from memcube.tiers.plaintext import IndexSpec
from memcube.tiers.server import ServerStore


class TestServerStoreOnLocalMode(PlaintextContract):
    @pytest.fixture
    async def store(self):
        store = await ServerStore.open(AsyncQdrantClient(":memory:"), SPEC, name="c", local=True)
        yield store
        await store.close()

    async def test_another_embedder_is_refused(self):
        client = AsyncQdrantClient(":memory:")
        await ServerStore.open(client, SPEC, name="c", local=True)
        with pytest.raises(Conflict, match=r"test@1.*other@1"):
            await ServerStore.open(
                client, IndexSpec(embedder="other@1", dim=8), name="c", local=True
            )


@pytest.mark.skipif("QDRANT_URL" not in os.environ, reason="QDRANT_URL names no Qdrant server")
class TestServerStoreOnAServer(PlaintextContract):
    @pytest.fixture
    async def store(self):
        client = AsyncQdrantClient(
            url=os.environ["QDRANT_URL"], api_key=os.environ.get("QDRANT_API_KEY")
        )
        name = f"memcube-test-{uuid.uuid4().hex}"
        store = await ServerStore.open(client, SPEC, name=name)
        yield store
        await client.delete_collection(name)
        await store.close()


async def test_a_server_that_would_ignore_the_scope_of_frequencies_is_refused(monkeypatch):
    client = AsyncQdrantClient(":memory:")

    async def info():
        return models.VersionInfo(title="qdrant", version="1.18.2-dev")

    monkeypatch.setattr(client, "info", info)
    with pytest.raises(Unavailable, match=r"1\.20 or newer"):
        await ServerStore.open(client, SPEC, name="c", local=True)


async def test_a_server_that_does_not_answer_is_unavailable():
    client = AsyncQdrantClient(url="http://127.0.0.1:9", timeout=1, check_compatibility=False)
    with pytest.raises(Unavailable, match="did not answer"):
        await ServerStore.open(client, SPEC, name="c")
