"""Texts to vectors: the contract, two encoders, and the batching that stands before them."""

from pathlib import Path

from memcube.config import EmbedderConfig
from memcube.embedding.batching import BatchingEmbedder, BatchSize, Encoder
from memcube.embedding.local import LocalQueries
from memcube.embedding.model_files import find_model


def open_embedder(config: EmbedderConfig, cache_dir: Path) -> BatchingEmbedder:
    """The embedder of a configuration: its encoder with batching before it. See ``open_encoder``."""
    encoder = open_encoder(config, cache_dir)
    return BatchingEmbedder(encoder, max_waiting_texts=config.max_waiting_texts)


def open_encoder(config: EmbedderConfig, cache_dir: Path) -> Encoder:
    """The encoder of a configuration. The ONNX graph is exported into ``cache_dir`` once (some seconds).

    Backend and precision are part of the identity: what was indexed on a GPU is indexed anew when
    the system is started without one.

    Raises:
        UnknownBackend: no such model, or a precision that its backend hasn't.
        BadRequest: the model's package is missing, or it is of a kind that isn't built.
    """
    model = find_model(config.model)
    config = resolved(config)
    if config.backend == "torch":
        from memcube.embedding.torch import TorchEncoder

        return TorchEncoder.open(model, config)
    from memcube.embedding.onnx import OnnxEncoder

    return OnnxEncoder.open(model, config, cache_dir)


def resolved(config: EmbedderConfig) -> EmbedderConfig:
    """The configuration with what ``auto`` means here: int8 is ONNX Runtime's alone."""
    backend = config.backend
    if backend == "auto":
        backend = "torch" if config.precision != "int8" and _has_gpu() else "onnx"
    precision = config.precision
    if precision == "auto":
        precision = "int8" if backend == "onnx" else "fp32"
    return config.model_copy(update={"backend": backend, "precision": precision})


def _has_gpu() -> bool:
    # Importing torch takes a second and 200 MB; without the driver's device there is nothing to ask.
    if not Path("/dev/nvidiactl").exists():
        return False
    import torch

    return torch.cuda.is_available()


__all__ = [
    "BatchSize",
    "BatchingEmbedder",
    "Encoder",
    "LocalQueries",
    "open_embedder",
    "open_encoder",
    "resolved",
]
