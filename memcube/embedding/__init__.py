"""Texts to vectors: the contract, two encoders, and the batching that stands before them."""

from pathlib import Path

from memcube.config import EmbedderConfig
from memcube.embedding.batching import BatchingEmbedder, Encoder
from memcube.embedding.model_files import find_model


def open_embedder(config: EmbedderConfig, cache_dir: Path) -> BatchingEmbedder:
    """The embedder of a configuration. The ONNX graph is exported into ``cache_dir`` once.

    Raises:
        UnknownBackend: no such model, or a precision that its backend hasn't.
    """
    model = find_model(config.model)
    backend = config.backend
    if backend == "auto":
        backend = "torch" if _has_gpu() else "onnx"
    encoder: Encoder
    if backend == "torch":
        from memcube.embedding.torch import TorchEncoder

        encoder = TorchEncoder.open(model, config)
    else:
        from memcube.embedding.onnx import OnnxEncoder

        encoder = OnnxEncoder.open(model, config, cache_dir)
    return BatchingEmbedder(encoder, max_waiting_texts=config.max_waiting_texts)


def _has_gpu() -> bool:
    # Importing torch takes a second and 200 MB; without the driver's device there is nothing to ask.
    if not Path("/dev/nvidiactl").exists():
        return False
    import torch

    return torch.cuda.is_available()


__all__ = ["BatchingEmbedder", "Encoder", "open_embedder"]
