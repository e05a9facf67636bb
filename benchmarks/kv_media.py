"""KV below the device: restored against recomputed, int8 against bfloat16, handed over, and damaged.

    python -m benchmarks.bench_kv --parts media

A context of 23 blocks (1,472 tokens) of this project's own documents is prefilled by the real model,
stored as the actor stores it (blocks of 64 tokens, keys un-rotated, int8), and put back into a buffer
from the disk, with the page cache emptied of it and without. CPU seconds are of one thread.
"""

import logging
import os
import pickle
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.results import ROOT, Figure
from memcube.activation.disk import DiskMedium
from memcube.activation.forward import KvBuffer, PackedModel, Row
from memcube.activation.layout import KvLayout
from memcube.activation.media import MediaHierarchy
from memcube.activation.medium import HostMedium, Record
from memcube.activation.models import LoadedModel, load_model
from memcube.activation.payload import KvPayload, decode, serialised
from memcube.activation.quantise import Codec
from memcube.activation.rope import Rope
from memcube.config import ModelConfig
from memcube.errors import MemCubeError
from memcube.policies.retention import Item, Retention

BLOCK = 64
NUM_BLOCKS = 23
CONTEXT = BLOCK * NUM_BLOCKS
NUM_CONTEXTS = 4
ANSWER_TOKENS, LONG_ANSWER = 16, 32
QUERY = "\n\nQuestion: What does the text above say about this, in one short sentence?\nAnswer: The text above says"
HANDED_BYTES = 69_000_000
WARM_PUTS, HANDED_ROUNDS = 12, 15
NUM_BAD = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class _Took:
    """The least of some rounds."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loss:
    """What a codec costs one answer: KL of the next-token distributions over a query, and how many
    greedy tokens are the same. ``margin``: of the unquantised logits where they part."""

    kl: float
    same_tokens: int
    margin: float | None


def run(cache_dir: Path, *, short: bool = False) -> list[Figure]:
    """All figures, about three minutes; in short without those of the real model."""
    if short:
        return [*handed_over(), *damaged_files()]
    loaded = load_model(ModelConfig(dtype="float32", device="cpu", threads=1), cache_dir)
    return [*_real_model(loaded), *handed_over(), *damaged_files()]


def _real_model(loaded: LoadedModel) -> list[Figure]:
    packed, rope = PackedModel(loaded), Rope(loaded.model)
    contexts = list(_contexts(loaded))
    kv_of = [_prefilled(packed, ids).view() for ids in contexts]
    with tempfile.TemporaryDirectory(dir=ROOT) as folder, _disk(Path(folder), loaded) as disk:
        recomputed = _least(lambda: _prefilled(packed, contexts[0]), rounds=2)
        blocks = [_blocks(loaded, rope, kv, str(n), "int8") for n, kv in enumerate(kv_of)]
        for block in blocks[0]:
            disk.put(block, _record(block))
        warm = _least(lambda: _restored(loaded, rope, disk, blocks[0]), rounds=7)
        cold = _least(
            lambda: _restored(loaded, rope, disk, blocks[0]),
            rounds=7,
            before=lambda: _forget_pages(Path(folder)),
        )
    figures = [
        Figure(
            name="restore 1,472 tokens from disk: times faster than recompute, cold, by the clock",
            value=recomputed.wall_s / cold.wall_s,
            unit="x",
            goal=">= 20",
            beside=f"{recomputed.wall_s:.2f} s recomputed, {cold.wall_s * 1e3:.0f} ms restored",
        ),
        Figure(
            name="restore 1,472 tokens from disk: times less CPU than recompute",
            value=recomputed.cpu_s / cold.cpu_s,
            unit="x",
            goal=">= 20",
            beside=f"{recomputed.cpu_s:.2f} CPU-s recomputed",
        ),
        Figure(
            name="restore 1,472 tokens from the page cache",
            value=warm.wall_s * 1e3,
            unit="ms",
            beside=f"{_bytes(blocks[0]) / 1e6:.1f} MB in {NUM_BLOCKS} files",
        ),
    ]
    bfloat16 = CONTEXT * loaded.layout.bytes_per_token / 2
    files = sum(sum(map(len, serialised(b, None, _record(b).note()))) for b in blocks[0])
    losses = [_loss(packed, loaded, rope, kv, own) for kv, own in zip(kv_of, blocks, strict=True)]
    plain = [
        _loss(packed, loaded, rope, kv, own)
        for kv, own in zip(kv_of, _halved(loaded, rope, kv_of), strict=True)
    ]
    return [
        *figures,
        Figure(
            name="int8 blocks: bytes of bfloat16, files with their headers",
            value=files / bfloat16,
            unit="x",
            goal="<= 0.53",
            beside=f"arrays alone {_bytes(blocks[0]) / bfloat16:.4f} x",
        ),
        Figure(
            name="int8 blocks: KL to the unquantised cache, mean of 4 contexts",
            value=statistics.mean(loss.kl for loss in losses),
            unit="",
            goal="<= 0.0001",
            beside=f"worst {max(loss.kl for loss in losses):.2g}; bfloat16 {statistics.mean(loss.kl for loss in plain):.2g}",
        ),
        Figure(
            name=f"int8 blocks: answers of {ANSWER_TOKENS} greedy tokens that are the same",
            value=sum(loss.same_tokens >= ANSWER_TOKENS for loss in losses) / NUM_CONTEXTS,
            unit="",
            goal=">= 1",
        ),
        Figure(
            name=f"int8 blocks: answers of {LONG_ANSWER} greedy tokens that are the same",
            value=sum(loss.same_tokens == LONG_ANSWER for loss in losses) / NUM_CONTEXTS,
            unit="",
            beside=_partings(losses),
        ),
    ]


def _contexts(loaded: LoadedModel) -> Iterator[list[int]]:
    """Stretches of the project's own texts, none over another."""
    paths = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "memcube").glob("*.py"))]
    ids: list[int] = []
    for path in paths:
        ids += loaded.tokenizer(path.read_text())["input_ids"]
        if len(ids) >= NUM_CONTEXTS * CONTEXT:
            break
    for start in range(0, NUM_CONTEXTS * CONTEXT, CONTEXT):
        yield ids[start : start + CONTEXT]


def _prefilled(packed: PackedModel, ids: Sequence[int]) -> KvBuffer:
    buffer = KvBuffer(packed.layout, "cpu", len(ids))
    packed.forward([Row(buffer, ids, logits="none")])
    return buffer


def _blocks(
    loaded: LoadedModel, rope: Rope, kv_L2HND: Tensor, name: str, codec: Codec
) -> list[KvPayload]:
    return [
        KvPayload.of(
            rope.unrotate(kv_L2HND[:, :, :, at : at + BLOCK], range(at, at + BLOCK)),
            key=f"{name}-{at}",
            kind="block",
            layout=loaded.layout,
            codec=codec,
            model=loaded.fingerprint,
        )
        for at in range(0, CONTEXT, BLOCK)
    ]


def _halved(loaded: LoadedModel, rope: Rope, kv_of: Sequence[Tensor]) -> list[list[KvPayload]]:
    """What bfloat16 would have kept, for comparison."""
    return [
        _blocks(loaded, rope, kv.bfloat16().float(), str(n), "raw") for n, kv in enumerate(kv_of)
    ]


def _restored(
    loaded: LoadedModel, rope: Rope, disk: DiskMedium, blocks: Sequence[KvPayload]
) -> KvBuffer:
    found = (disk.get(block.key) for block in blocks)
    return _buffer(loaded, rope, (block for block in found if block is not None))


def _buffer(loaded: LoadedModel, rope: Rope, blocks: Iterable[KvPayload]) -> KvBuffer:
    buffer = KvBuffer(loaded.layout, "cpu", CONTEXT + 128)
    for block in blocks:
        slots = range(buffer.length, buffer.length + block.num_tokens)
        buffer.load(rope.rotate(decode(block), slots), buffer.length)
    if buffer.length != CONTEXT:
        raise RuntimeError(f"{buffer.length} of {CONTEXT} tokens came back")
    return buffer


def _loss(
    packed: PackedModel,
    loaded: LoadedModel,
    rope: Rope,
    kv_L2HND: Tensor,
    blocks: Sequence[KvPayload],
) -> _Loss:
    exact = KvBuffer(loaded.layout, "cpu", CONTEXT + 128)
    exact.load(kv_L2HND, 0)
    query: list[int] = loaded.tokenizer(QUERY, add_special_tokens=False)["input_ids"]
    logits: list[Tensor] = []
    answers: list[list[int]] = []
    margins: list[list[float]] = []
    for buffer in (exact, _buffer(loaded, rope, blocks)):
        (logits_TV,) = packed.forward([Row(buffer, query, logits="all")])
        assert logits_TV is not None
        logits.append(torch.log_softmax(logits_TV.double(), dim=-1))
        last_V = logits_TV[-1]
        answers.append([])
        margins.append([])
        for _ in range(LONG_ANSWER):
            best, second = last_V.topk(2).values.tolist()
            margins[-1].append(best - second)
            answers[-1].append(int(last_V.argmax()))
            (last_1V,) = packed.forward([Row(buffer, [answers[-1][-1]])])
            assert last_1V is not None
            last_V = last_1V[-1]
    p_TV, q_TV = logits
    same = [a == b for a, b in zip(*answers, strict=True)]
    same_tokens = same.index(False) if False in same else LONG_ANSWER
    return _Loss(
        kl=float((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean()),
        same_tokens=same_tokens,
        margin=margins[0][same_tokens] if same_tokens < LONG_ANSWER else None,
    )


def _partings(losses: Sequence[_Loss]) -> str:
    return "; ".join(
        f"one parts at token {loss.same_tokens + 1}, where the best two are {loss.margin:.4f} logits apart"
        for loss in losses
        if loss.margin is not None
    )


def _least(
    work: Callable[[], object], *, rounds: int, before: Callable[[], object] = lambda: None
) -> _Took:
    took: list[tuple[float, float]] = []
    for _ in range(rounds):
        before()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        took.append((time.perf_counter() - wall, time.process_time() - cpu))
    return _Took(wall_s=min(wall for wall, _ in took), cpu_s=min(cpu for _, cpu in took))


def _forget_pages(folder: Path) -> None:
    """Make the next read of each file one from the disk."""
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


@contextmanager
def _disk(folder: Path, loaded: LoadedModel) -> Iterator[DiskMedium]:
    disk = DiskMedium.open(folder, model=loaded.fingerprint, layout=loaded.layout)
    yield disk
    disk.close()


def _record(block: KvPayload) -> Record:
    return Record(item=_item(block), members=frozenset({"0199f2c5-1111-7aaa-8bbb-0123456789ab"}))


def _item(block: KvPayload) -> Item:
    return Item(
        key=block.key, num_bytes=block.num_bytes, tenant="t", group="g", saves_s=1.0, load_s=0.0
    )


def _bytes(blocks: Sequence[KvPayload]) -> int:
    return sum(block.num_bytes for block in blocks)


# -- to another process of the node


def handed_over() -> list[Figure]:
    """KV of 1,500 tokens from one process to another through Ray's object store."""
    import ray

    with tempfile.TemporaryDirectory(prefix="kv-ray-") as folder:
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=512 * 1024**2,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            return _handed_over(ray)
        finally:
            ray.shutdown()


def _handed_over(ray: Any) -> list[Figure]:
    class Other:
        """Another process. Defined here, so that Ray ships it by value."""

        def take(self, refs: list[Any]) -> tuple[float, bool, int]:
            import psutil

            own = psutil.Process()
            before = own.memory_full_info().uss
            started = time.perf_counter()
            arrays = ray.get(refs[0])
            took_s = time.perf_counter() - started
            kv = arrays["kv"]
            return took_s, kv.flags.writeable, own.memory_full_info().uss - before

    other = ray.remote(Other).remote()
    generator = np.random.default_rng(0)
    kv = generator.standard_normal(HANDED_BYTES // 4, dtype=np.float32)
    small = generator.integers(-127, 127, HANDED_BYTES // 4, dtype=np.int8)
    found: dict[str, list[tuple[float, ...]]] = {}
    for name, array in (("raw", kv), ("int8", small)):
        rounds = found[name] = []
        # The first puts take memory from the system, page by page; the later ones what others gave back.
        for _ in range(WARM_PUTS + HANDED_ROUNDS):
            started = time.perf_counter()
            ref = ray.put({"kv": array})
            put_s = time.perf_counter() - started
            answer = ray.get(other.take.remote([ref]))
            rounds.append((put_s, time.perf_counter() - started, *answer))
            del ref
        del rounds[:WARM_PUTS]
    put_s, whole_s, get_s, writeable, grown = (list(c) for c in zip(*found["raw"], strict=True))
    int8_whole_s = [row[1] for row in found["int8"]]
    copied = _least(lambda: kv.copy(), rounds=5)
    return [
        Figure(
            name="69 MB to another process, from its object",
            value=statistics.median(get_s) * 1e3,
            unit="ms",
            goal="<= 10",
            beside="views that are " + ("writeable" if any(writeable) else "read-only"),
        ),
        Figure(
            name="69 MB to another process: memory of its own that it takes",
            value=statistics.median(grown) / 1e6,
            unit="MB",
            goal="<= 1",
        ),
        Figure(
            name="69 MB to another process: put, call and get",
            value=statistics.median(whole_s) * 1e3,
            unit="ms",
            beside=f"put alone {statistics.median(put_s) * 1e3:.1f} ms; a copy in memory {copied.wall_s * 1e3:.1f} ms",
        ),
        Figure(
            name="the same KV as int8 to another process: put, call and get",
            value=statistics.median(int8_whole_s) * 1e3,
            unit="ms",
        ),
    ]


# -- damage


class _Gadget:
    """Makes a folder if it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


def damaged_files() -> list[Figure]:
    """Files that a hierarchy finds in the place of good ones. It would log each of them."""
    logging.getLogger("memcube.activation").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layout, generator = KvLayout(4, 2, 16, "float32"), random.Random(0)
        keys = [f"{generator.getrandbits(256):064x}" for _ in range(NUM_BAD)]

        def payload(key: str, model: str = "m@2", layout: KvLayout = layout) -> KvPayload:
            kv_L2HND = torch.randn(layout.shape(BLOCK))
            return KvPayload.of(
                kv_L2HND, key=key, kind="block", layout=layout, codec="int8", model=model
            )

        disk = DiskMedium.open(folder / "disk", model="m@2", layout=layout)
        media = MediaHierarchy([(HostMedium(), Retention(1)), (disk, Retention(1 << 30))], now=0.0)
        whole = {key: payload(key) for key in keys}
        for block in whole.values():
            if not media.put(block, _item(block), 0.0):
                raise RuntimeError("a good file was not stored")
        if any(media.get(key, 1.0) is None for key in keys):
            raise RuntimeError("a good file was not read")
        other = KvLayout(4, 2, 8, "float32")
        for number, key in enumerate(keys):
            path = disk.path_of(key)
            good = path.read_bytes()
            at = generator.randrange(len(good))
            foreign = {
                4: payload(keys[number - 1]),
                5: payload(key, "m@1"),
                6: payload(key, layout=other),
            }
            match number % 10:
                case 0 | 1:
                    bad = bytearray(good)
                    bad[at] ^= 1 << generator.randrange(8)
                case 2:
                    bad = good[:at]
                case 3:
                    bad = good + b"\x00" * (1 + at)
                case 4 | 5 | 6 as kind:
                    bad = b"".join(serialised(foreign[kind], None, _record(foreign[kind]).note()))
                case 7:
                    bad = good.replace(b'\\"format\\":1', b'\\"format\\":0')
                case 8:
                    bad = pickle.dumps(_Gadget(folder / "executed")) * (1 + at % 50)
                case _:
                    bad = generator.randbytes(at)
            path.write_bytes(bad)
        served, crashes = 0, 0
        for start in range(2):
            for key in keys[start * NUM_BAD // 2 : (start + 1) * NUM_BAD // 2]:
                try:
                    served += media.get(key, 2.0) is not None
                except MemCubeError:
                    crashes += 1
            # The second half is found by a start.
            media.close()
            disk = DiskMedium.open(folder / "disk", model="m@2", layout=layout)
            media = MediaHierarchy([(disk, Retention(1 << 30))], now=3.0)
            served += sum(media.get(key, 4.0) is not None for key in keys[: start * NUM_BAD])
        media.close()
        executed = (folder / "executed").exists()
    return [
        Figure(
            name=f"{NUM_BAD} corrupted, truncated, foreign and old files: served",
            value=served,
            unit="",
            goal="<= 0",
        ),
        Figure(
            name=f"{NUM_BAD} corrupted, truncated, foreign and old files: errors or code run",
            value=crashes + executed,
            unit="",
            goal="<= 0",
        ),
    ]
