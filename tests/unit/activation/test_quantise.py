"""int8 and back: what is lost, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcube.activation.layout import KvLayout
from memcube.activation.payload import KvPayload, decode
from memcube.activation.quantise import array_specs, encode

LAYOUT = KvLayout(3, 2, 16, "float32")


def kv(num_tokens: int = 64, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Keys whose channels differ by a factor of 100, as real ones do; values that don't."""
    generator = torch.Generator().manual_seed(seed)
    kv_L2HND = torch.randn(LAYOUT.shape(num_tokens), generator=generator)
    kv_L2HND[:, 0] *= torch.logspace(-1, 1, LAYOUT.head_dim)
    return kv_L2HND.to(dtype)


def payload(kv_L2HND: torch.Tensor, codec="int8", layout: KvLayout = LAYOUT) -> KvPayload:
    return KvPayload.of(kv_L2HND, key="k", kind="block", layout=layout, codec=codec, model="m@1")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_raw_keeps_every_bit_and_shares_no_memory(dtype):
    layout = KvLayout(3, 2, 16, dtype)
    before = kv(dtype=layout.torch_dtype)
    held = payload(before, "raw", layout)
    kept = before.clone()
    before.zero_()
    after = decode(held)
    assert after.dtype == layout.torch_dtype
    assert torch.equal(after, kept)
    after.zero_()
    assert torch.equal(decode(held), kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int8_is_off_by_half_a_step_of_its_channel_or_token_at_most(dtype):
    layout = KvLayout(3, 2, 16, dtype)
    before = kv(dtype=layout.torch_dtype)
    after = decode(payload(before, "int8", layout)).float()
    off = (after - before.float()).abs()
    rounding = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    key_step_LH1D = before[:, 0].float().abs().amax(2, keepdim=True) / 127
    value_step_LHN1 = before[:, 1].float().abs().amax(3, keepdim=True) / 127
    for side, step in ((0, key_step_LH1D), (1, value_step_LHN1)):
        assert (off[:, side] <= step * (0.57 + 127 * rounding) + 1e-6).all()


def test_int8_of_a_block_takes_less_than_0_53_of_its_bfloat16_bytes():
    layout = KvLayout(30, 3, 64, "bfloat16")
    held = payload(torch.randn(layout.shape(64)), "int8", layout)
    assert held.num_bytes <= 0.525 * layout.bytes_per_token * 64


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-6, 1e6, -3e4])
def test_constant_and_extreme_kv_stays_finite(value):
    before = torch.full(LAYOUT.shape(5), value)
    after = decode(payload(before))
    assert torch.isfinite(after).all()
    assert torch.allclose(after, before, rtol=1e-3, atol=4e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value):
    before = kv()
    before[1, 1, 0, 3, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        encode(before, "int8")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(-6, 3))
def test_any_kv_comes_back_within_a_step(seed, num_tokens, magnitude):
    before = kv(num_tokens, seed=seed) * 10**magnitude
    after = decode(payload(before))
    for side, dim in ((0, 2), (1, 3)):
        most = before[:, side].abs().amax(dim, keepdim=True)
        assert ((after[:, side] - before[:, side]).abs() <= most / 127 * 0.6 + 4e-6).all()


def test_a_channel_far_from_zero_loses_no_more_than_its_range_asks_for():
    before = kv()
    before[:, 0] = before[:, 0].clamp(-1, 1) / 100 + 40.0
    off = (decode(payload(before)) - before).abs()[:, 0]
    assert off.max() < 0.02 / 127  # a step of the range, not of the distance from zero


def test_a_slice_of_a_buffer_is_encoded_like_a_copy_of_it():
    whole = kv(100)
    part = whole[:, :, :, 10:74]
    assert not part.is_contiguous()
    for codec in ("raw", "int8"):
        a, b = encode(part, codec), encode(part.contiguous(), codec)
        assert all(np.array_equal(a[name], b[name]) for name in a)
        assert {n: (x.dtype, x.shape) for n, x in a.items()} == array_specs(LAYOUT, 64, codec)


def test_a_payload_is_read_only_and_of_the_stated_shape():
    held = payload(kv())
    with pytest.raises(ValueError, match="read-only"):
        held.arrays["kv"][0] = 1
    arrays = {**held.arrays, "v_scale": held.arrays["v_scale"][:, :, :5]}
    with pytest.raises(ValueError, match="arrays"):
        KvPayload(
            key="k",
            kind="block",
            num_tokens=64,
            layout=LAYOUT,
            codec="int8",
            model="m",
            arrays=arrays,
        )
