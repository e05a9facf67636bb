"""The encoder on torch: on the GPU where there is one, and the source of the ONNX export."""

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from memcube.config import EmbedderConfig
from memcube.embedding.batching import CPU_BATCH, GPU_BATCH
from memcube.embedding.model_files import ModelFiles, Pooling
from memcube.errors import UnknownBackend

Vectors = npt.NDArray[np.float32]


class Pooled(torch.nn.Module):
    """An encoder with pooling over the real tokens, and unit length."""

    encoder: PreTrainedModel

    def __init__(self, encoder: PreTrainedModel, pooling: Pooling) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden_BTD = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=False
        )[0]
        if self.pooling == "cls":
            pooled_BD = hidden_BTD[:, 0]
        else:
            mask_BT1 = attention_mask.unsqueeze(-1).to(hidden_BTD.dtype)
            pooled_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1.0)
        return torch.nn.functional.normalize(pooled_BD, dim=1)


def load_pooled(files: ModelFiles, attention: Literal["eager", "sdpa"]) -> Pooled:
    """The model in float32, ready to evaluate; from its folder only."""
    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(
        str(files.folder),
        local_files_only=True,
        use_safetensors=True,
        attn_implementation=attention,
        dtype=torch.float32,
    )
    return Pooled(encoder, files.pooling).eval()


class TorchEncoder:
    """The model on one device, in float32."""

    def __init__(self, model: Pooled, files: ModelFiles, config: EmbedderConfig) -> None:
        on_gpu = torch.cuda.is_available()
        self._device = torch.device("cuda" if on_gpu else "cpu")
        if not on_gpu:
            # For the whole process: torch knows no other way.
            torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 2) // 2))
        self._model = model.to(self._device)
        self._tokenizer = files.tokenizer(config.max_tokens)
        self.max_tokens = self._tokenizer.max_tokens
        self.batch = GPU_BATCH if on_gpu else CPU_BATCH
        self.dim = int(model.encoder.config.hidden_size)
        self.identity = f"{files.name}@torch-fp32-{self.max_tokens}-{files.fingerprint}"

    @classmethod
    def open(cls, files: ModelFiles, config: EmbedderConfig) -> "TorchEncoder":
        """Load the model.

        Raises:
            UnknownBackend: a precision other than fp32; int8 is ONNX Runtime's.
        """
        if config.precision != "fp32":
            raise UnknownBackend("torch embedder precision", config.precision, ("fp32",))
        return cls(load_pooled(files, "sdpa"), files, config)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of shape (len(texts), dim)."""
        ids_BT, mask_BT = (torch.from_numpy(array) for array in self._tokenizer(texts))
        with torch.inference_mode():
            vectors_BD = self._model(ids_BT.to(self._device), mask_BT.to(self._device))
        return vectors_BD.float().cpu().numpy()
