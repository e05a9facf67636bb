"""Whether to compute in bfloat16: where the machine can do it faster than in float32."""

import torch

_SLOW = ("DEFAULT", "NO AVX", "AVX2")
"""CPUs for which torch has no bfloat16 arithmetic: there a product takes some 60 times as long as in float32."""


def casts(device_type: str, wanted: bool) -> bool:
    """Whether what a recipe wants pays on this device. It is no part of a recipe's identity: work that moves to
    another kind of machine goes on, and ends within rounding of where it would have."""
    return wanted and (device_type != "cpu" or torch.backends.cpu.get_cpu_capability() not in _SLOW)


def autocast(device_type: str, wanted: bool) -> torch.autocast:
    """bfloat16 where it is wanted and pays (``casts``), as a context."""
    return torch.autocast(device_type, torch.bfloat16, enabled=casts(device_type, wanted))
