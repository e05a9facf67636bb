"""Configuration: defaults, then a YAML file, then ``a.b=value`` overrides.

An unknown key is an error that names the nearest known one. The environment holds secrets and
addresses only: ``DATABASE_URL``, ``QDRANT_URL``, ``QDRANT_API_KEY``, and the variable that
``reader.llm.api_key_env`` names.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memcube.errors import BadRequest

_PASSWORD = re.compile(r"(://[^\s/@:]*:)[^\s@]+@")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HttpConfig(_Section):
    """Where the gateway listens."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535, description="0 picks a free port")


class RayConfig(_Section):
    """The Ray cluster: ``address`` joins an existing one, none starts a local one."""

    address: str | None = None
    object_store_mb: int | None = Field(
        default=None, ge=80, description="none is 256 and what activation.host_mb takes"
    )
    dashboard: bool = False


class CatalogConfig(_Section):
    """``url`` is a SQLAlchemy URL; none is SQLite in the data folder, or ``DATABASE_URL``."""

    url: str | None = None


class PlaintextConfig(_Section):
    """The plaintext tier. ``edge`` is the engine in the actor's process; ``server`` a Qdrant."""

    backend: Literal["edge", "server"] = "edge"
    url: str | None = None
    shards: int = Field(default=1, ge=1, le=256)


class EmbedderConfig(_Section):
    """The embedder. ``auto`` is torch with fp32 where there is a GPU, ONNX Runtime with int8 elsewhere."""

    backend: Literal["auto", "onnx", "torch"] = "auto"
    model: str = "all-MiniLM-L6-v2"
    precision: Literal["auto", "fp32", "int8"] = "auto"
    threads: int | None = Field(default=None, ge=1, description="none is half of the cores")
    max_tokens: int = Field(default=256, ge=16, le=8192)
    max_waiting_texts: int = Field(default=20_000, ge=1)


class ModelConfig(_Section):
    """The language model of the activation tier.

    ``name`` is a packaged model, a folder, or a name whose files lie in the hub's local cache; only
    with ``allow_download`` is a hub asked. ``auto`` is the GPU where there is one, and bfloat16 on
    it; float32 on a CPU.
    """

    name: str = "SmolLM2-135M-Instruct"
    revision: str | None = Field(default=None, description="of a model by name; none is main")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int | None = Field(default=None, ge=1, description="none is what torch takes")
    allow_download: bool = False


class VllmConfig(_Section):
    """vLLM as the engine. ``lora_rank`` is the largest of an adapter; 0 loads none."""

    gpu_memory_fraction: float = Field(default=0.9, gt=0, le=1)
    tensor_parallel: int = Field(default=1, ge=1, le=64)
    max_positions: int | None = Field(default=None, ge=1, description="none is the model's window")
    lora_rank: int = Field(default=0, ge=0, le=512)
    max_loras: int = Field(default=8, ge=1)


class ActivationConfig(_Section):
    """The activation tier: engines that hold KV, and the media below them.

    ``engine`` is ours on transformers, or vLLM, which has no media below the device of ours.
    ``actors`` are engines, one a GPU or CPU slot; 0 leaves the tier and the chat out. Capacities are
    MiB of one engine (device) or of one node (the others); 0 leaves a medium out. ``object`` is the
    store of ``objects``. ``encrypt`` seals what lies on disk and in the object store with a key of
    the tenant, which goes with the tenant. ``composing`` off serves the modes blend and fast exactly;
    auto composes in those that the model's fidelity gate passed, which runs once in idle time.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    vllm: VllmConfig = VllmConfig()
    actors: int = Field(default=1, ge=0, le=64)
    composing: Literal["auto", "off"] = "auto"
    gate_cases: int = Field(
        default=12,
        ge=1,
        le=256,
        description="of the fidelity gate; each takes about 10 s of a core",
    )
    device_mb: int = Field(default=512, ge=64)
    host_mb: int = Field(default=512, ge=0)
    disk_mb: int = Field(default=8192, ge=0)
    object_mb: int = Field(default=0, ge=0)
    codec: Literal["int8", "raw"] = "int8"
    encrypt: bool = True
    block_tokens: int = Field(default=64, ge=16, le=1024)
    max_running: int = Field(default=8, ge=1)
    max_waiting: int = Field(default=64, ge=0)
    step_tokens: int = Field(default=256, ge=32)
    buffer_mb: int = Field(default=2048, ge=64)
    sweep_s: float = Field(
        default=60.0, gt=0, description="how often KV of cubes that are gone is looked for"
    )


class AdaptersConfig(_Section):
    """The parametric tier: what an adapter may take, and how much an engine holds of them."""

    max_mb: int = Field(default=64, ge=1, le=4096, description="of one adapter")
    max_rank: int = Field(default=128, ge=1, le=1024)
    resident_mb: int = Field(default=256, ge=0, description="of one engine; 0 serves none")


class ChatConfig(_Section):
    """``POST /v1/chat/completions``. ``mode`` is how stored KV is used where a request doesn't say.

    ``adapter`` auto lets the adapter answer that serves the scope of a chat; named only one that the
    request's model names.
    """

    mode: Literal["exact", "blend", "fast", "off"] = "exact"
    system: str = "You are a helpful assistant."
    query_chars: int = Field(default=2_000, ge=1, description="of the question, for the search")
    deadline_s: float = Field(default=300.0, gt=0)
    adapter: Literal["auto", "named"] = "auto"


class ObjectsConfig(_Section):
    """Where objects lie: a folder (none is in the data folder), or an S3 bucket.

    The secrets come from ``MEMCUBE_S3_ACCESS_KEY`` and ``MEMCUBE_S3_SECRET_KEY``.
    """

    folder: Path | None = None
    s3_endpoint: str | None = Field(default=None, description="host:port of a MinIO or other S3")
    s3_bucket: str = "memcube"
    s3_secure: bool = True


class LlmConfig(_Section):
    """An OpenAI-compatible endpoint for fact extraction (``infer: true``)."""

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    timeout_s: float = Field(default=60.0, gt=0)


class ReaderConfig(_Section):
    """How messages become cubes."""

    max_chars: int = Field(default=1600, ge=100, le=100_000)
    llm: LlmConfig | None = None


class Limits(_Section):
    """What a request may hold; over it the request is refused whole, with the limit named.

    No limit is below what a request gets that leaves the field out. The limits of names, tags and
    filters are the same everywhere: they stand in ``serve.models`` and ``memcube.filters``.
    """

    body_bytes: int = Field(default=16 * 1024 * 1024, ge=1024)
    text_chars: int = Field(default=200_000, ge=1)
    messages: int = Field(default=500, ge=1)
    batch_items: int = Field(default=1000, ge=1)
    batch_texts: int = Field(default=20_000, ge=1)
    query_chars: int = Field(default=8_000, ge=1)
    top_k: int = Field(default=200, ge=10)
    page: int = Field(default=500, ge=50)
    metadata_bytes: int = Field(default=16_384, ge=2)
    metadata_depth: int = Field(default=5, ge=1)
    json_values: int = Field(
        default=350_000, ge=100, description="strings, elements and brackets of a body"
    )
    members: int = Field(default=10_000, ge=1)
    token_budget: int = Field(default=32_768, ge=1024)


class GatewayConfig(_Section):
    """The ingress deployment."""

    replicas: int = Field(default=1, ge=1)
    max_ongoing_requests: int = Field(default=256, ge=1)
    max_queued_requests: int = Field(default=1024, ge=1)
    request_timeout_s: float = Field(default=120.0, gt=0)


class SchedulerConfig(_Section):
    """The control plane's loop."""

    interval_s: float = Field(default=2.0, gt=0)
    pending_grace_s: float = Field(
        default=10.0, ge=0, description="leave index work to the gateway for this long"
    )
    batch: int = Field(default=128, ge=1)
    usage_flush_s: float = Field(default=1.0, gt=0)


class Config(_Section):
    """The whole configuration of one system."""

    data_dir: Path = Path(".memcube")
    model_cache: Path | None = Field(
        default=None, description="converted models; none is memcube in the user's cache folder"
    )
    http: HttpConfig = HttpConfig()
    ray: RayConfig = RayConfig()
    catalog: CatalogConfig = CatalogConfig()
    plaintext: PlaintextConfig = PlaintextConfig()
    embedder: EmbedderConfig = EmbedderConfig()
    model: ModelConfig = ModelConfig()
    activation: ActivationConfig = ActivationConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    chat: ChatConfig = ChatConfig()
    objects: ObjectsConfig = ObjectsConfig()
    reader: ReaderConfig = ReaderConfig()
    gateway: GatewayConfig = GatewayConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    limits: Limits = Limits()
    retrieval_weights: Path | None = Field(
        default=None, description="a ranker's weights file; none is the one in the package"
    )

    def object_store_bytes(self) -> int:
        """What Ray's object store may take of memory: messages, and KV payloads in host memory."""
        host_mb = self.activation.host_mb if self.activation.actors else 0
        return (self.ray.object_store_mb or 256 + host_mb) * 1024 * 1024

    def embedder_folder(self) -> Path:
        """Where the embedder's exported graph is kept."""
        return Path(self.data_dir) / "models"

    def model_folder(self, environ: Mapping[str, str] = os.environ) -> Path:
        """Where converted models lie. They hold nothing of a user's, so systems share them."""
        if self.model_cache is not None:
            return self.model_cache
        cache = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Path(cache) / "memcube" / "models"

    def catalog_url(self, environ: Mapping[str, str] = os.environ) -> str:
        """The catalog's address; a relative SQLite file lies in the data folder."""
        return (
            self.catalog.url
            or environ.get("DATABASE_URL")
            or f"sqlite:///{(self.data_dir / 'catalog.db').resolve()}"
        )

    def qdrant_url(self, environ: Mapping[str, str] = os.environ) -> str:
        """The Qdrant server's address.

        Raises:
            BadRequest: none is configured.
        """
        url = self.plaintext.url or environ.get("QDRANT_URL")
        if not url:
            raise BadRequest("set it, or QDRANT_URL, for plaintext.backend=server", "plaintext.url")
        return url

    def dump(self) -> str:
        """The resolved configuration as YAML. It holds no secret: passwords of addresses are masked."""
        dumped = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return _PASSWORD.sub(r"\1***@", dumped)


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a file with overrides such as ``http.port=9000``.

    Raises:
        BadRequest: unreadable file, unknown key (with the nearest known one) or a bad value.
    """
    data: dict[str, Any] = {}
    if path is not None:
        data = _read(path)
    for override in overrides:
        _override(data, override)
    try:
        return Config.model_validate(data)
    except ValidationError as invalid:
        raise _readable(invalid) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as missing:
        raise BadRequest(f"can't be read: {missing.strerror}", str(path)) from None
    except UnicodeDecodeError:
        raise BadRequest("is no text in UTF-8", str(path)) from None
    data = _yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise BadRequest("must hold a mapping", str(path))
    return data


class _Loader(yaml.SafeLoader):
    """YAML with the booleans of 1.2, true and false: a mode that is called off is a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not tag.endswith(":bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|false)$", re.IGNORECASE), list("tTfF")
)


def _yaml(text: str, field: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as broken:
        raise BadRequest(f"is no YAML: {broken}", field) from None


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise BadRequest(f"expected KEY=VALUE such as http.port=9000, got {override!r}")
    *path, last = key.split(".")
    section = data
    for name in path:
        inner = section.setdefault(name, {})
        if not isinstance(inner, dict):
            raise BadRequest("is a value, not a section", name)
        section = inner
    section[last] = _yaml(value, key)


def _readable(invalid: ValidationError) -> BadRequest:
    first = invalid.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return BadRequest(first["msg"], where)
    known = _known_keys(Config)
    near = difflib.get_close_matches(where, known, n=1, cutoff=0.0)
    return BadRequest(f"no such key; did you mean {near[0]!r}?", where)


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys.extend(_known_keys(kind, f"{prefix}{name}."))
    return keys
