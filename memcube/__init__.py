"""MemOS on Ray: the core, importable without Ray.

A memory operating system for language models. One unit, the MemCube, lives in
three tiers: plaintext, activation (KV caches) and parametric (LoRA adapters).
"""

__version__ = "0.1.0"
