"""The encoder on ONNX Runtime, for CPUs: half the CPU time of torch for a query.

The graph holds pooling and unit length too. It is exported from the model's weights once and kept.
Fusing attention by ``onnxruntime.transformers`` was measured and left out: up to 15% slower here
than what the session's own optimiser makes of the plain graph.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from memcube.config import EmbedderConfig
from memcube.embedding.batching import CPU_BATCH
from memcube.embedding.model_files import ModelFiles

Vectors = npt.NDArray[np.float32]

_INT8 = "int8w7"
"""How ``_quantised`` does it, as the identity has it: other weights are other vectors."""

_EXPORT_VERSION = 2
"""Part of the graph's file name; another number when ``_export`` or ``_quantised`` makes another."""


class OnnxEncoder:
    """One session. ``encode`` releases the GIL while it computes."""

    batch = CPU_BATCH

    def __init__(
        self, session: ort.InferenceSession, files: ModelFiles, config: EmbedderConfig
    ) -> None:
        self._session = session
        # Dynamic quantisation scales by the largest activation of the whole batch: in batches of 8 a
        # vector fell to a cosine of .978 to the same text's alone. Alone costs 5% of the throughput.
        self._one_by_one = config.precision == "int8"
        self._tokenizer = files.tokenizer(config.max_tokens)
        self.max_tokens = self._tokenizer.max_tokens
        self.dim = int(session.get_outputs()[0].shape[1])
        how = _INT8 if config.precision == "int8" else config.precision
        self.identity = f"{files.name}@onnx-{how}-{self.max_tokens}-{files.fingerprint}"

    @classmethod
    def open(cls, files: ModelFiles, config: EmbedderConfig, cache_dir: Path) -> "OnnxEncoder":
        """Open the graph in ``cache_dir``; exported there first if it is missing or damaged."""
        graph = cached_graph(files, config.precision, cache_dir)
        options = ort.SessionOptions()
        options.intra_op_num_threads = config.threads or max(1, (os.cpu_count() or 2) // 2)
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Spinning threads burn the cores that the other actors need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        return cls(session, files, config)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of shape (len(texts), dim)."""
        if self._one_by_one:
            return np.concatenate([self._run([text]) for text in texts])
        return self._run(texts)

    def _run(self, texts: Sequence[str]) -> Vectors:
        ids_BT, mask_BT = self._tokenizer(texts)
        (vectors_BD,) = self._session.run(
            ["vectors"], {"input_ids": ids_BT, "attention_mask": mask_BT}
        )
        return np.asarray(vectors_BD, dtype=np.float32)


def cached_graph(files: ModelFiles, precision: str, cache_dir: Path) -> Path:
    """The exported graph's file, made if it is missing or fails its checksum.

    Safe when two processes ask at once: one exports, the other waits. A process killed on the way
    leaves a folder that the next export clears, and a graph without its checksum, made again.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    graph = cache_dir / f"{files.name}-{precision}-{files.fingerprint}-{_EXPORT_VERSION}.onnx"
    with open(cache_dir / "export.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _intact(graph):
            for left in cache_dir.glob("exporting-*"):
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(dir=cache_dir, prefix="exporting-") as folder:
                made = Path(folder) / "graph.onnx"
                _export(files, made)
                if precision == "int8":
                    made = _quantised(made)
                checksum = made.with_suffix(".json")
                checksum.write_text(json.dumps({"sha256": _sha256(made)}))
                os.replace(made, graph)
                os.replace(checksum, graph.with_suffix(".json"))
    return graph


def _intact(graph: Path) -> bool:
    try:
        stated = json.loads(graph.with_suffix(".json").read_text())["sha256"]
        return stated == _sha256(graph)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _export(files: ModelFiles, path: Path) -> None:
    import torch

    from memcube.embedding.torch import load_pooled

    model = load_pooled(files, "eager")
    ids = torch.ones((2, 7), dtype=torch.int64)
    axes = {0: "batch", 1: "tokens"}
    with warnings.catch_warnings(), torch.no_grad():
        # The tracing exporter warns of constants that it folds; the vectors are compared in a test.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (ids, torch.ones_like(ids)),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["vectors"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "vectors": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )


def _quantised(path: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = path.with_name("int8.onnx")
    # Weights of 7 bits: with 8 the sums overflow on processors without VNNI, and a vector would
    # depend on the machine. It costs .001 of the cosine to fp32.
    quantize_dynamic(path, small, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    return small
