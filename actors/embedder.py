"""The embedder's actor: one model for the whole system, batching across all requests."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import ray
from ray.actor import ActorHandle

from actors import NAMESPACE
from actors.calls import answer
from actors.nodes import PLACED, on_head
from actors.placement import EMBEDDER_GPU
from memcube.config import Config
from memcube.embedding import open_embedder
from memcube.embedding.contract import Purpose

NAME = "embedder"
CALL_DEADLINE_S = 120.0


class EmbedderActor:
    """Hosts a ``BatchingEmbedder``."""

    def __init__(self, config: Config) -> None:
        self._embedder = open_embedder(config.embedder, config.embedder_folder())

    async def describe(self) -> tuple[str, int]:
        """The embedder's identity and dimension."""
        return self._embedder.identity, self._embedder.dim

    async def embed(self, texts: Sequence[str], purpose: Purpose) -> npt.NDArray[np.float32]:
        """Vectors of shape (len(texts), dim)."""
        return await self._embedder.embed(texts, purpose)

    async def load(self) -> dict[str, int]:
        """Texts that wait, and texts and batches done so far."""
        e = self._embedder
        return {"waiting": e.num_waiting, "texts": e.num_texts, "batches": e.num_batches}


class RemoteEmbedder:
    """An ``Embedder`` that asks the actor."""

    def __init__(self, handle: ActorHandle[Any], identity: str, dim: int) -> None:
        self.identity = identity
        self.dim = dim
        self._handle = handle

    @classmethod
    async def connect(cls, handle: ActorHandle[Any]) -> "RemoteEmbedder":
        """Wait until the model is loaded, and learn what it is."""
        described = await answer(handle.describe.remote(), of="the embedder", deadline_s=180.0)
        return cls(handle, *described)

    async def embed(self, texts: Sequence[str], purpose: Purpose) -> npt.NDArray[np.float32]:
        """Vectors of shape (len(texts), dim)."""
        call = self._handle.embed.remote(list(texts), purpose)
        return await answer(call, of="the embedder", deadline_s=CALL_DEADLINE_S)

    async def load(self) -> dict[str, int]:
        """What the actor has to do."""
        return await answer(self._handle.load.remote(), of="the embedder", deadline_s=5.0)


def spawn_embedder_actor(config: Config) -> ActorHandle[Any]:
    """The one place that states this actor's Ray options. A call is pure, so Ray may repeat it."""
    on_gpu = config.embedder.backend != "onnx" and ray.cluster_resources().get("GPU", 0) > 0
    spawned = (
        ray.remote(EmbedderActor)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=PLACED,
            num_gpus=EMBEDDER_GPU if on_gpu else 0,
            max_concurrency=1000,
            scheduling_strategy=on_head(),
            max_restarts=-1,
            max_task_retries=-1,
            enable_task_events=False,
        )
        .remote(config)
    )
    return cast(ActorHandle[Any], spawned)
