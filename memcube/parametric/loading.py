"""From the registry's files to an adapter that a model can compute with, ours or another engine's."""

import asyncio
import json
import os
import shutil
import tempfile
from pathlib import Path

from memcube.activation.contract import AdapterRef
from memcube.activation.forward import PackedModel
from memcube.activation.lora import LoraAdapter
from memcube.ids import TenantId, digest
from memcube.objects import OpenObjects, opened
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.registry import AdapterFiles
from memcube.parametric.weights import AdapterWeights, encode


class FileLoader:
    """Loads adapters for one model; an ``AdapterLoader`` for ``ResidentAdapters``.

    Opens the store for each load: loads are rare, and a store that is down at the start of an engine
    must not keep it from serving without adapters.
    """

    def __init__(
        self,
        open_objects: OpenObjects,
        model: PackedModel,
        *,
        base: str,
        limits: AdapterLimits,
    ) -> None:
        """``base`` is the model's fingerprint."""
        self._open_objects = open_objects
        self._model = model
        self._base = base
        self._limits = limits

    def __call__(self, tenant: str, ref: AdapterRef) -> LoraAdapter:
        return self._model.lora.ready(asyncio.run(self._read(TenantId(tenant), ref)))

    async def _read(self, tenant: TenantId, ref: AdapterRef) -> AdapterWeights:
        return await _read(self._open_objects, tenant, ref, base=self._base, limits=self._limits)


class PeftFolders:
    """Lays adapters out as PEFT does, one a folder, for an engine that reads such folders by itself."""

    def __init__(
        self,
        open_objects: OpenObjects,
        root: Path,
        *,
        base: str,
        limits: AdapterLimits,
    ) -> None:
        """``base`` is the model's fingerprint. What an earlier process left in ``root`` is removed."""
        self._open_objects = open_objects
        self._root = root
        self._base = base
        self._limits = limits
        shutil.rmtree(root, ignore_errors=True)

    async def __call__(self, tenant: str, ref: AdapterRef) -> Path:
        """The folder of an adapter, whole or not there. Idempotent.

        Raises:
            Errors of ``memcube.errors``: as ``AdapterFiles.get``.
        """
        folder = self._root / digest(tenant, *ref)
        if not folder.exists():
            id = TenantId(tenant)
            weights = await _read(self._open_objects, id, ref, base=self._base, limits=self._limits)
            await asyncio.to_thread(self._write, weights, folder)
        return folder

    def _write(self, weights: AdapterWeights, folder: Path) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        about = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": weights.rank,
            "lora_alpha": weights.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": list(weights.targets),
        }
        with tempfile.TemporaryDirectory(dir=self._root) as temporary:
            made = Path(temporary) / "adapter"
            made.mkdir()
            (made / "adapter_config.json").write_text(json.dumps(about))
            (made / "adapter_model.safetensors").write_bytes(encode(weights, self._limits))
            try:
                os.rename(made, folder)
            except OSError:
                if not folder.exists():  # else another request has made it meanwhile
                    raise


async def _read(
    open_objects: OpenObjects,
    tenant: TenantId,
    ref: AdapterRef,
    *,
    base: str,
    limits: AdapterLimits,
) -> AdapterWeights:
    async with opened(open_objects) as objects:
        return await AdapterFiles(objects, limits).get(tenant, ref, base=base)
