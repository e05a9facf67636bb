"""Bodies of the OpenAI-shaped routes.

What these bodies don't know is passed over, as OpenAI's own server does with many of them; what
they know and can't do is refused. ``memory`` is our addition (``extra_body`` of OpenAI's client).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from memcube.activation.contract import Mode
from memcube.chat.contract import Parametric
from serve.models import CubeIds, Id, ScopeBody, Text


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")


Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class TextPart(_Lenient):
    type: Literal["text"]
    text: Text


class ChatMessage(_Lenient):
    """One turn; only text is read."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None = Field(None, examples=["Where does Ann live?"])


class MemoryBody(ScopeBody):
    """Which memories the answer may use, and in which form.

    `mode`: `exact` attaches only what equals a full reading; `blend` composes segments that were
    read apart, reading a part of them again; `fast` composes them as they are; `off` attaches none.

    `parametric`: memories that the answering adapter holds in its weights stand in the prompt
    `beside` it, or the adapter answers `instead` of their text. No adapter: all are in the prompt.
    """

    filters: dict[str, Any] | None = None
    cube_ids: CubeIds = Field(
        default_factory=list, description="Only these cubes and the members of composites."
    )
    token_budget: int = Field(1024, ge=64)
    mode: Mode | None = Field(None, description="None: the server's default.")
    parametric: Parametric | None = Field(None, description="None: the server's default.")
    write_back: bool = Field(False, description="Remember this turn and its answer.")


class StreamOptions(_Lenient):
    include_usage: bool = False


class ChatBody(_Lenient):
    """OpenAI's chat completion request, as far as it goes here, and `memory`."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "examples": [
                {
                    "model": "SmolLM2-135M-Instruct",
                    "messages": [{"role": "user", "content": "Where does Ann live?"}],
                    "memory": {"user_id": "ann", "token_budget": 1024},
                    "max_tokens": 64,
                },
                {
                    "model": "SmolLM2-135M-Instruct",
                    "messages": [{"role": "user", "content": "Where does Ann live?"}],
                    "memory": {"user_id": "ann", "parametric": "instead"},
                },
            ]
        },
    )

    model: Id
    messages: list[ChatMessage] = Field(min_length=1)
    memory: MemoryBody | Literal[False] | None = Field(
        None, description="None: those of `user`, if it is given. false: none."
    )
    user: Id | None = Field(None, description="Whose memories to use where `memory` is left out.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Literal[1] = 1
    tools: None = Field(None, description="Not built; refused rather than passed over.")
    logprobs: Literal[False] | None = None


class EmbeddingsBody(_Lenient):
    """OpenAI's embeddings request."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "examples": [{"model": "all-MiniLM-L6-v2", "input": ["Ann likes tea."]}]
        },
    )

    model: Id
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"


class CubeUseOut(BaseModel):
    """A memory in the prompt, in the form it was read in; or one that the adapter answered for,
    `parametric`. `in_adapter`: the adapter that answered holds its present text."""

    id: str
    form: Literal["exact_kv", "composed_kv", "text", "parametric"]
    in_adapter: bool


class AdapterUseOut(BaseModel):
    """The adapter that answered, in the version that serves."""

    id: str
    name: str
    version: int


class AdapterRefusalOut(AdapterUseOut):
    """The adapter of the chat's scope that could not be used, and why; the base model answered with
    the memories as text. It is tried again a minute later, or when it may find room."""

    code: str = Field(examples=["corrupt", "too_busy"])


class MemoryReportOut(BaseModel):
    """What of memory an answer used, and what it cost. Times are milliseconds."""

    mode: str
    cubes: list[CubeUseOut]
    tokens_attached: int
    tokens_composed: int
    tokens_recomputed: int
    tokens_prefilled: int
    ttft_ms: float
    queue_ms: float
    retrieval_ms: float
    engine: int
    written_back: list[str]
    adapter: AdapterUseOut | None
    adapter_refused: AdapterRefusalOut | None


class PromptDetailsOut(BaseModel):
    cached_tokens: int


class UsageOut(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetailsOut


class AnswerOut(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChoiceOut(BaseModel):
    index: int
    message: AnswerOut
    finish_reason: str
    logprobs: None = None


class ChatOut(BaseModel):
    """OpenAI's chat completion, and `memory`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChoiceOut]
    usage: UsageOut
    memory: MemoryReportOut


class ModelOut(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelsOut(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelOut]


class EmbeddingOut(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsageOut(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsOut(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingOut]
    model: str
    usage: EmbeddingsUsageOut
