"""From the registry's files to an adapter that a model can compute with."""

import asyncio
from collections.abc import Awaitable, Callable

from memcube.activation.contract import AdapterRef
from memcube.activation.forward import PackedModel
from memcube.activation.lora import LoraAdapter
from memcube.ids import TenantId
from memcube.objects import ObjectStore
from memcube.parametric.registry import AdapterFiles
from memcube.parametric.weights import AdapterLimits, AdapterWeights


class FileLoader:
    """Loads adapters for one model; an ``AdapterLoader`` for ``ResidentAdapters``.

    Opens the store for each load: loads are rare, and a store that is down at the start of an engine
    must not keep it from serving without adapters.
    """

    def __init__(
        self,
        opened: Callable[[], Awaitable[ObjectStore]],
        model: PackedModel,
        *,
        base: str,
        limits: AdapterLimits,
    ) -> None:
        """``base`` is the model's fingerprint."""
        self._opened = opened
        self._model = model
        self._base = base
        self._limits = limits

    def __call__(self, tenant: str, ref: AdapterRef) -> LoraAdapter:
        return self._model.lora.ready(asyncio.run(self._read(TenantId(tenant), ref)))

    async def _read(self, tenant: TenantId, ref: AdapterRef) -> AdapterWeights:
        objects = await self._opened()
        try:
            return await AdapterFiles(objects, self._limits).get(tenant, ref, base=self._base)
        finally:
            await objects.close()
