"""A small random language model with a tokenizer of bytes, made in a tenth of a second."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memcube.activation.layout import KvLayout
from memcube.activation.models import LoadedModel

END = 256
"""The token that ends an answer; 0 to 255 are the symbols of ByteLevel in their order."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one that ends."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    return tokenizer


def tiny_model(*, seed: int = 0, max_positions: int = 4096, dtype: str = "float32") -> LoadedModel:
    """A Llama of two layers with random weights, sharp enough that greedy tokens are stable."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.2,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=tiny_tokenizer(),
        layout=KvLayout(num_layers=2, num_heads=2, head_dim=16, dtype=dtype),
        fingerprint=f"tiny-{seed}",
        tokenizer_fingerprint="bytes",
        name="tiny",
        max_positions=max_positions,
        eos_ids=frozenset({END}),
        why_not=None,
    )
