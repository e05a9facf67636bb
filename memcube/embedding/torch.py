"""The encoder on torch: on the GPU where there is one, and the source of the ONNX export."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel
from transformers.utils import logging

from memcube.config import EmbedderConfig
from memcube.embedding.model_files import ModelFiles

Vectors = npt.NDArray[np.float32]


class Pooled(torch.nn.Module):
    """An encoder with mean pooling over the real tokens, and unit length."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden_BTD = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=False
        )[0]
        mask_BT1 = attention_mask.unsqueeze(-1).to(hidden_BTD.dtype)
        mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1.0)
        return torch.nn.functional.normalize(mean_BD, dim=1)


def load_pooled(files: ModelFiles) -> Pooled:
    """The model in float32, ready to evaluate; from its folder only."""
    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(
        str(files.folder),
        local_files_only=True,
        use_safetensors=True,
        attn_implementation="eager",
        dtype=torch.float32,
    )
    return Pooled(encoder).eval()


class TorchEncoder:
    """The model on one device."""

    def __init__(self, model: Pooled, files: ModelFiles, config: EmbedderConfig) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device)
        self._tokenizer = files.tokenizer(config.max_tokens)
        self.dim = int(model.encoder.config.hidden_size)
        self.identity = f"{files.name}@torch-fp32-{config.max_tokens}-{files.fingerprint}"

    @classmethod
    def open(cls, files: ModelFiles, config: EmbedderConfig) -> "TorchEncoder":
        """Load the model. ``precision`` int8 is ONNX's alone."""
        return cls(load_pooled(files), files, config)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of shape (len(texts), dim)."""
        encoded = self._tokenizer.encode_batch_fast(list(texts))
        width = max(len(one.ids) for one in encoded)
        ids_BT = torch.zeros((len(encoded), width), dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for row, one in enumerate(encoded):
            ids_BT[row, : len(one.ids)] = torch.tensor(one.ids)
            mask_BT[row, : len(one.ids)] = 1
        with torch.inference_mode():
            vectors_BD = self._model(ids_BT.to(self._device), mask_BT.to(self._device))
        return vectors_BD.float().cpu().numpy()
