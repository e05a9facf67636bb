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
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from memcube.cube import Kind
from memcube.errors import BadRequest, UnknownBackend
from memcube.ids import TenantId
from memcube.scheduler.settings import MoveLimits, Profile, Profiles

_T = TypeVar("_T")
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
    node_ip: str = Field(
        default="127.0.0.1",
        description="of a local cluster: this machine's address that other nodes reach; a loopback one "
        "is the one that Ray finds",
    )
    port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="of a local cluster, for nodes to join; 0 picks a free one",
    )
    ship_code: bool = Field(
        default=True,
        description="send this checkout to the nodes of an existing cluster; false where all have it",
    )
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
    shard_per_node: bool = Field(
        default=True, description="give a node that joins a shard of its own, and tenants to it"
    )
    shard_mb: int = Field(
        default=65_536, ge=64, description="room of a shard that placement reckons with"
    )


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
    """vLLM as the engine. ``lora_rank`` is the largest of an adapter, ``max_loras`` how many one step
    holds; with rank 0 it serves none."""

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


class TrainingConfig(_Section):
    """Jobs that train adapters, and their workers. ``recipe``, ``data`` and ``gate`` change single
    defaults of ``memcube.parametric``'s Recipe, DataSettings and Thresholds. ``retrain`` queues a job
    where a memory inside a serving adapter has changed or is gone.

    ``engine`` auto is DeepSpeed where it is installed, and torch alone elsewhere, which takes one
    worker. ``zero_stage`` is what workers share instead of each holding it: 0 nothing, 1 the
    optimizer, 2 gradients too, 3 weights too. Each worker is an actor with ``cpus_per_worker`` CPUs,
    or ``gpus_per_worker`` GPUs where the model is on GPUs. All workers write to ``folder``, so on
    several machines it lies on storage that they share.
    """

    recipe: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    gate: dict[str, Any] = Field(default_factory=dict)
    retrain: bool = True
    poll_s: float = Field(default=1.0, gt=0, description="how often queued jobs are looked for")
    max_open_jobs: int = Field(default=16, ge=1, description="of one tenant")
    folder: Path | None = Field(
        default=None,
        description="where jobs work, shared by all workers; none is in the data folder",
    )
    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    zero_stage: int = Field(default=1, ge=0, le=3)
    workers: int = Field(default=1, ge=1, le=64)
    placement: Literal["pack", "spread"] = "pack"
    cpus_per_worker: int = Field(
        default=1, ge=1, le=256, description="of Ray's count, and torch's threads on a CPU"
    )
    gpus_per_worker: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="none is what an engine leaves of its GPU, and a whole one each of several",
    )
    nice: int = Field(
        default=10,
        ge=0,
        le=19,
        description="added to a worker's niceness, which Ray makes 15 (19 is the most): serving first",
    )
    place_s: float = Field(default=60.0, gt=0, description="how long to wait for free CPUs or GPUs")
    load_s: float = Field(default=300.0, gt=0, description="how long the model may take to load")
    timeout_s: float = Field(
        default=120.0, gt=0, description="how long a worker may say nothing until it is given up"
    )


class ChatConfig(_Section):
    """``POST /v1/chat/completions``. ``mode`` is how stored KV is used where a request doesn't say.

    ``adapter`` auto lets the adapter answer that serves the scope of a chat; named only one that the
    request's model names. ``parametric`` is where memories stand that this adapter holds, where a
    request doesn't say: in the prompt beside it, or in the adapter instead.
    """

    mode: Literal["exact", "blend", "fast", "off"] = "exact"
    system: str = "You are a helpful assistant."
    query_chars: int = Field(default=2_000, ge=1, description="of the question, for the search")
    deadline_s: float = Field(default=300.0, gt=0)
    adapter: Literal["auto", "named"] = "auto"
    parametric: Literal["beside", "instead"] = "beside"


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
    rollback_cubes: int = Field(default=2_000, ge=1, description="that one rollback may change")


class GatewayConfig(_Section):
    """The ingress deployment."""

    replicas: int = Field(default=1, ge=1)
    max_ongoing_requests: int = Field(default=256, ge=1)
    max_queued_requests: int = Field(default=1024, ge=1)
    request_timeout_s: float = Field(default=120.0, gt=0)


class ProfileConfig(_Section):
    """What is changed of a ``memcube.scheduler.settings.Profile``: by which policies, strategies and
    thresholds a tenant's cubes are tiered. What is left out stays as it is."""

    policies: tuple[str, ...] | None = None
    strategies: dict[str, float] | None = None
    wanted_labels: frozenset[str] | None = None
    promote_score: float | None = None
    demote_score: float | None = None
    margin: float | None = None
    stable_s: float | None = None
    settle_s: float | None = None
    rate: float | None = None
    recency_s: float | None = None
    lasting_s: float | None = None
    lasting_rate: float | None = None
    abstract: frozenset[Kind] | None = None
    min_cubes: int | None = None
    propose_every_s: float | None = None
    heal_after_s: float | None = None
    balance_gap: float | None = None


class MovesConfig(_Section):
    """What is changed of ``memcube.scheduler.settings.MoveLimits``: bounds of a round, and of moves at once."""

    max_actions: int | None = None
    max_bytes: int | None = None
    tenant_fraction: float | None = None
    max_moves: int | None = None
    max_moves_per_node: int | None = None
    bytes_per_s: float | None = None
    burst_bytes: int | None = None


class SchedulerConfig(_Section):
    """The control plane. ``profile`` holds for all tenants, ``tenants`` changes it for single ones, and
    ``consents`` names those whose owners let their memories be trained unasked (or ``all``)."""

    interval_s: float = Field(default=2.0, gt=0)
    pending_grace_s: float = Field(
        default=10.0, ge=0, description="leave index work to the gateway for this long"
    )
    batch: int = Field(default=128, ge=1)
    usage_flush_s: float = Field(default=1.0, gt=0)
    expired_kept_s: float = Field(
        default=0.0, ge=0, description="keep what has run out for so long, unread, then wipe it"
    )
    merge: Literal["off", "propose", "apply"] = Field(
        default="propose", description="what becomes of near-duplicates and contradictions"
    )
    consolidate: Literal["off", "propose", "apply"] = Field(
        default="propose", description="what becomes of memories that could be an adapter"
    )
    compare_s: float = Field(
        default=60.0, gt=0, description="how often what lies there is compared with the catalog"
    )
    kept_days: float = Field(
        default=30.0, gt=0, description="how long the journal and the queue keep what has ended"
    )
    profile: ProfileConfig = ProfileConfig()
    tenants: dict[str, ProfileConfig] = Field(default_factory=dict)
    limits: MovesConfig = MovesConfig()
    consents: list[str] | Literal["all"] = Field(default_factory=list)

    @field_validator("consents", mode="before")
    @classmethod
    def _names_tenants(cls, given: Any) -> Any:
        if isinstance(given, str) and given != "all":
            raise BadRequest("a list of tenants, or all", "scheduler.consents")
        return given

    @model_validator(mode="after")
    def _can_be_made(self) -> "SchedulerConfig":
        self.profiles()
        self.move_limits()
        return self

    def profiles(self) -> Profiles:
        """Of all tenants.

        Raises:
            BadRequest: values that don't go together, or a name that is not built; says where.
        """
        common = self.profile.model_dump(exclude_none=True)
        default = _made(Profile, common, "scheduler.profile")
        tenants = {
            TenantId(tenant): _made(
                Profile, common | own.model_dump(exclude_none=True), f"scheduler.tenants.{tenant}"
            )
            for tenant, own in self.tenants.items()
        }
        return Profiles(default=default, tenants=tenants)

    def move_limits(self) -> MoveLimits:
        """Bounds of moves.

        Raises:
            BadRequest: one that can't be.
        """
        return _made(MoveLimits, self.limits.model_dump(exclude_none=True), "scheduler.limits")

    def consents_to_training(self, tenant: TenantId) -> bool:
        """Whether a tenant's owner lets its memories be trained unasked."""
        return self.consents == "all" or tenant in self.consents


def _made(kind: type[_T], given: Mapping[str, Any], where: str) -> _T:
    try:
        return kind(**given)
    except BadRequest as wrong:
        section, _, name = (wrong.field or "").partition(".")
        raise BadRequest(wrong.what, f"{where}.{name}" if section and name else where) from None
    except UnknownBackend as wrong:
        raise BadRequest(str(wrong), where) from None


class LifecycleConfig(_Section):
    """How memories fade, merge and are archived.

    ``forget`` is what becomes of one whose strength has fallen below ``forget_below``: it halves in
    each ``half_life_days`` without a use or a change. Frozen cubes and what a snapshot shows are kept.
    Two cubes are near-duplicates from ``merge_cosine`` and ``merge_overlap`` (of their words) on. With
    ``archive`` archived cubes are copied to the object store, sealed by tenant with
    ``archive_encrypt``: keep ``archive.keyring`` of the data folder with your backups then.
    """

    half_life_days: float = Field(default=30.0, gt=0)
    forget: Literal["off", "archive", "delete"] = "off"
    forget_below: float = Field(default=0.01, gt=0, lt=1)
    merge_cosine: float = Field(default=0.9, gt=0, le=1)
    merge_overlap: float = Field(default=0.8, gt=0, le=1)
    merge_cubes: int = Field(default=200, ge=1, le=1000, description="looked at by one search")
    archive: bool = True
    archive_encrypt: bool = True


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
    training: TrainingConfig = TrainingConfig()
    chat: ChatConfig = ChatConfig()
    objects: ObjectsConfig = ObjectsConfig()
    reader: ReaderConfig = ReaderConfig()
    gateway: GatewayConfig = GatewayConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    lifecycle: LifecycleConfig = LifecycleConfig()
    limits: Limits = Limits()
    retrieval_weights: Path | None = Field(
        default=None, description="a ranker's weights file; none is the one in the package"
    )

    def serves_adapters(self) -> bool:
        """Whether the engines do."""
        if self.activation.engine == "vllm":
            return self.activation.vllm.lora_rank > 0
        return self.adapters.resident_mb > 0

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

    def training_folder(self) -> Path:
        """Where jobs that train work."""
        return self.training.folder or Path(self.data_dir) / "jobs"

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
