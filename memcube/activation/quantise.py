"""KV of the device to arrays of the host, and back.

``raw`` keeps the bits. ``int8`` keeps one byte an element, with steps of float16: a key's is per
channel, since before rotation a key's channels differ far more than its tokens do; a value's is per
token. A key's channel is counted from the middle of its range, which is seldom zero. Keys must be
un-rotated: rotation mixes the channels and spreads their outliers.

Blocks of 64 tokens of SmolLM2, KL to the unquantised cache: 3.1e-5, at 0.523 of the bytes of bfloat16
(whose own is 9e-6). Without the middles it is 1.1e-4 at 0.516; with middles for the values too 2.4e-5 at
0.531; with keys per token or values per channel 1.1e-4 from these alone.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from memcube.activation.layout import KvLayout

Codec = Literal["raw", "int8"]
Array = np.ndarray
Arrays = Mapping[str, Array]

CODECS: tuple[Codec, ...] = ("raw", "int8")
_MOST = 127.0
_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""numpy has no bfloat16: its bits are kept as uint16."""


def array_specs(
    layout: KvLayout, num_tokens: int, codec: Codec
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """The arrays of a payload: type and shape of each, by name, in the order of a file."""
    shape = layout.shape(num_tokens)
    if codec == "raw":
        return {"kv": (np.dtype(_NUMPY[layout.dtype]), shape)}
    L, _, H, N, D = shape
    half = np.dtype(np.float16)
    return {
        "k_middle": (half, (L, H, 1, D)),
        "k_scale": (half, (L, H, 1, D)),
        "v_scale": (half, (L, H, N, 1)),
        "kv": (np.dtype(np.int8), shape),
    }


def encode(kv_L2HND: Tensor, codec: Codec) -> dict[str, Array]:
    """Arrays of KV with un-rotated keys. They share no memory with the tensor.

    Raises:
        ValueError: int8 of something that is not finite.
    """
    if codec == "raw":
        bits = kv_L2HND.detach().to("cpu", copy=True).contiguous()
        if bits.dtype == torch.bfloat16:
            bits = bits.view(torch.uint16)
        return {"kv": bits.numpy()}
    k_LHND, v_LHND = (kv_L2HND[:, side].detach().float() for side in (0, 1))
    k_middle_LH1D = _half((k_LHND.amin(2, keepdim=True) + k_LHND.amax(2, keepdim=True)) / 2)
    k_scale_LH1D, k_steps_LHND = _quantised(k_LHND - k_middle_LH1D.float(), dim=2)
    v_scale_LHN1, v_steps_LHND = _quantised(v_LHND, dim=3)
    return {
        "k_middle": k_middle_LH1D.cpu().numpy(),
        "k_scale": k_scale_LH1D.cpu().numpy(),
        "v_scale": v_scale_LHN1.cpu().numpy(),
        "kv": torch.stack((k_steps_LHND, v_steps_LHND), dim=1).cpu().numpy(),
    }


def decode(
    arrays: Arrays, layout: KvLayout, codec: Codec, device: torch.device | str = "cpu"
) -> Tensor:
    """A new tensor kv_L2HND in the layout's type, keys un-rotated."""
    kv_L2HND = _tensor(arrays["kv"], device)
    if codec == "raw":
        return kv_L2HND.view(layout.torch_dtype)
    k_middle_LH1D = _tensor(arrays["k_middle"], device).float()
    k_scale_LH1D = _tensor(arrays["k_scale"], device).float()
    v_scale_LHN1 = _tensor(arrays["v_scale"], device).float()
    out_L2HND = torch.empty(kv_L2HND.shape, dtype=layout.torch_dtype, device=device)
    out_L2HND[:, 0] = kv_L2HND[:, 0].float().mul_(k_scale_LH1D).add_(k_middle_LH1D)
    out_L2HND[:, 1] = kv_L2HND[:, 1].float().mul_(v_scale_LHN1)
    return out_L2HND


def _quantised(x_LHND: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    """Step of float16 along ``dim``, and the number of steps to each element."""
    most = x_LHND.abs().amax(dim, keepdim=True)
    if not torch.isfinite(most).all():
        raise ValueError("KV holds values that are not finite")
    # Rounded first and then used: the rounding of the step itself costs nothing.
    scale = _half(most / _MOST)
    steps = scale.float()
    quotient = torch.where(steps > 0, x_LHND / steps, torch.zeros_like(x_LHND))
    return scale, quotient.round_().clamp_(-_MOST, _MOST).to(torch.int8)


def _half(x: Tensor) -> Tensor:
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most).half()


def _tensor(array: Array, device: torch.device | str) -> Tensor:
    # A copy, as torch has no read-only tensors; on a GPU it would be one anyway.
    held = torch.empty(array.shape, dtype=_TORCH[array.dtype.name])
    held.numpy()[...] = array
    return held.to(device)


_TORCH = {
    "float32": torch.float32,
    "float16": torch.float16,
    "uint16": torch.uint16,
    "int8": torch.int8,
}
