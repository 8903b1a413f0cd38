"""One token through a block (cached decoding) against the block for rows, on the CPU path and on the GPU path."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from dylora_mlx.model.base import families
from dylora_mlx.model.decoder import decode_block
from dylora_mlx.model.kernels import numerics
from tests.tiny import ALL, ARGS, DENSE, close, decode_cache_of, rows_of, tiny_pool


@pytest.mark.parametrize("on_cpu", [True, False], ids=["turns", "ropes"])
@pytest.mark.parametrize("router_layer", ["final", 2])
@pytest.mark.parametrize("before", [5, 30])
def test_the_decode_block_equals_the_block_for_rows(monkeypatch, router_layer, before, on_cpu):
    """The window is 8, so the longer text has filled the KV caches of the sliding layers."""
    monkeypatch.setattr(numerics, "on_cpu", lambda: on_cpu)
    model, tokens = tiny_pool([2, 3], router_layer, ALL).model, mx.array(rows_of([[before + 3]] * 2, before + 3)[0])
    outputs = []
    for by_rows in (True, False):
        cache = decode_cache_of(model, 2)
        model(tokens[:, :before], model.decode_layout(before, cache), DENSE, cache=cache)
        for position in range(before, before + 3):
            attn_layout = model.decode_layout(1, cache)
            assert isinstance(attn_layout, decode_block.DecodePosition)
            assert (attn_layout.full is not None) == on_cpu
            out = model(
                tokens[:, position : position + 1], attn_layout.masks if by_rows else attn_layout, DENSE, cache=cache
            )
        outputs.append(out)
    for name, rows in outputs[0]._asdict().items():
        assert close(getattr(outputs[1], name), rows, 2e-5), name


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 8.0}], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("offset", [0, 1, 5000])
def test_rotary_tables_equal_the_rope_of_the_layer(monkeypatch, scaling, dtype, offset):
    monkeypatch.setattr(numerics, "on_cpu", lambda: True)
    rope = initialize_rope(ARGS.head_dim, 1e4, False, scaling, 8192)
    x = mx.array(np.random.default_rng(0).normal(size=(2, 3, 1, ARGS.head_dim)).astype(np.float32)).astype(dtype)
    tables = decode_block.rotary_tables(families.family_of(ARGS), SimpleNamespace(rope=rope), offset)
    assert tables is not None
    rotated, expected = decode_block._rotate(x, tables), rope(x, offset=offset)
    assert rotated.dtype == dtype
    assert close(rotated.astype(mx.float32), expected.astype(mx.float32), 1e-5 if dtype == mx.float32 else 1e-2)
    if offset == 5000:
        assert mx.abs(rotated - x).max() > 0.1
