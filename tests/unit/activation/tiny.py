"""Tiny random models, and what plain transformers gives for them."""

from copy import deepcopy

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from memcube.activation.models import LoadedModel, layout_of
from memcube.activation.rope import compose_refusal

SIZES = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "linear": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "yarn": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
}
EXACT_ONLY: dict[str, PreTrainedConfig] = {
    "window": MistralConfig(**SIZES, sliding_window=24),
    "dynamic": LlamaConfig(**SIZES, rope_parameters=DYNAMIC),
    "latent": DeepseekV3Config(
        **{
            name: size
            for name, size in SIZES.items()
            if name not in ("head_dim", "num_key_value_heads")
        },
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=16,
        first_k_dense_replace=3,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
    ),
}


class Reference:
    """The same weights under transformers' own attention."""

    def __init__(self, config: PreTrainedConfig) -> None:
        torch.manual_seed(3)
        self.model = AutoModelForCausalLM.from_config(
            deepcopy(config), attn_implementation="eager"
        ).eval()
        for parameter in self.model.parameters():  # so that attention is far from uniform
            if parameter.ndim == 2:
                parameter.data *= 4.0

    @torch.inference_mode()
    def logits(self, ids: list[int], mask_11TN: Tensor | None = None, positions=None) -> Tensor:
        given = {} if positions is None else {"position_ids": torch.tensor([positions])}
        return self.model(torch.tensor([ids]), attention_mask=mask_11TN, **given).logits[0]

    def loaded(self, dtype: str = "float32") -> LoadedModel:
        """A copy of the model to be taken over."""
        model = AutoModelForCausalLM.from_config(
            deepcopy(self.model.config), attn_implementation="sdpa"
        )
        model.load_state_dict(self.model.state_dict())
        model = model.to(getattr(torch, dtype)).eval()
        return LoadedModel(
            model=model,
            tokenizer=None,  # pyright: ignore[reportArgumentType] - no test here reads text
            layout=layout_of(model),
            fingerprint="tiny",
            tokenizer_fingerprint="none",
            name="tiny",
            max_positions=512,
            eos_ids=frozenset({2}),
            why_not=compose_refusal(model),
        )


def some_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 199, (count,), generator=generator).tolist()
