"""Serving adapters: a batch of eight rows with four adapters beside the same batch without, the load
of one from the registry, and the swap of a resident one. Rank 16 on all linear layers of SmolLM2.

make bench-lora-serving

As the machine is shared, the rates are by CPU time of one thread; loads and swaps by the clock.
"""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.results import Figure, write_results
from memcube.activation.adapters import ResidentAdapters
from memcube.activation.contract import AdapterRef
from memcube.activation.forward import KvBuffer, PackedModel, Row
from memcube.activation.models import load_model
from memcube.config import Config
from memcube.ids import TenantId
from memcube.objects.folder import FolderStore
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.loading import FileLoader
from memcube.parametric.registry import AdapterFiles
from memcube.parametric.weights import AdapterWeights, LoraPair

_RANK, _ROWS, _ADAPTERS, _CONTEXT = 16, 8, 4, 256
_STEPS, _ROUNDS = 6, 4
_TENANT = TenantId("bench")


def _adapter(model: torch.nn.Module, base: str, seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.01).to(torch.bfloat16)

    pairs = {
        name: LoraPair(factor(_RANK, layer.in_features), factor(layer.out_features, _RANK))
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    return AdapterWeights(base=base, rank=_RANK, alpha=32.0, pairs=pairs)


async def _main() -> None:
    torch.set_num_threads(1)
    config = Config()
    loaded = load_model(config.model, config.model_folder())
    model = PackedModel(loaded)
    limits = AdapterLimits()
    with tempfile.TemporaryDirectory() as folder:

        async def opened() -> FolderStore:
            return FolderStore.open(Path(folder))

        files = AdapterFiles(await opened(), limits)
        refs: list[AdapterRef] = []
        size_bytes = 0
        for seed in range(_ADAPTERS):
            weights = _adapter(loaded.model, loaded.fingerprint, seed)
            sha256, size_bytes = await files.put(_TENANT, weights, {})
            refs.append(AdapterRef(str(seed), sha256))
        load = FileLoader(opened, model, base=loaded.fingerprint, limits=limits)
        loads_s: list[float] = []
        for _ in range(3):
            resident = ResidentAdapters(load, max_bytes=1 << 30)
            for ref in refs:
                began = time.perf_counter()
                async with resident.held(_TENANT, ref):
                    loads_s.append(time.perf_counter() - began)
        adapters = []
        swaps_s: list[float] = []
        for ref in refs * 50:
            began = time.perf_counter()
            async with resident.held(_TENANT, ref) as adapter:
                swaps_s.append(time.perf_counter() - began)
                adapters.append(adapter)
        resident.close()
    adapters = adapters[:_ADAPTERS]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 40_000, (_CONTEXT,), generator=generator).tolist()
    buffers = [KvBuffer(model.layout, "cpu", _CONTEXT + 512) for _ in range(_ROWS)]
    for buffer in buffers:
        model.forward([Row(buffer, ids, logits="none")])
    ways = {
        "none": [None] * _ROWS,
        "one": [adapters[0]] * _ROWS,
        "four": [adapters[index // 2] for index in range(_ROWS)],
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    prefill: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, way in ways.items():
            began = time.thread_time()
            for _ in range(_STEPS):
                model.forward([Row(b, [7], adapter=a) for b, a in zip(buffers, way, strict=True)])
            spent[name].append((time.thread_time() - began) / _STEPS)
            rows = [
                Row(KvBuffer(model.layout, "cpu", 32), ids[:32], adapter=adapter) for adapter in way
            ]
            began = time.thread_time()
            model.forward(rows)
            prefill[name].append(time.thread_time() - began)
    step_s = {name: min(took) for name, took in spent.items()}
    read_s = {name: min(took) for name, took in prefill.items()}
    write_results(
        "lora_serving",
        "make bench-lora-serving",
        [
            Figure(
                name="decode, 8 rows with 4 adapters, share of the rate without",
                value=step_s["none"] / step_s["four"],
                unit="",
                goal=">= 0.7",
                beside=f"one adapter: {step_s['none'] / step_s['one']:.2f}",
            ),
            Figure(
                name="decode, 8 rows without adapters",
                value=_ROWS / step_s["none"],
                unit="tok/CPU-s",
            ),
            Figure(
                name="decode, 8 rows with 4 adapters",
                value=_ROWS / step_s["four"],
                unit="tok/CPU-s",
            ),
            Figure(
                name="prefill, 8 rows of 32 tokens with 4 adapters, share of the rate without",
                value=read_s["none"] / read_s["four"],
                unit="",
            ),
            Figure(
                name="load from the registry, median",
                value=statistics.median(loads_s) * 1e3,
                unit="ms",
                goal="<= 250",
                beside=f"slowest of {len(loads_s)}: {max(loads_s) * 1e3:.0f} ms",
            ),
            Figure(
                name="swap of a resident adapter, slowest of 200",
                value=max(swaps_s) * 1e3,
                unit="ms",
                goal="<= 5",
                beside=f"median: {statistics.median(swaps_s) * 1e3:.3f} ms",
            ),
            Figure(name="file of an adapter", value=size_bytes / 1e6, unit="MB", goal="<= 10"),
        ],
    )


if __name__ == "__main__":
    asyncio.run(_main())
