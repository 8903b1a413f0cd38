"""Generation equals the full forward token for token, past the window's edge, for every way to route."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dylora_mlx.generation import decode, stream
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.generation.stream import GenerationSummary, Sampling, StopStrings, TextPiece
from dylora_mlx.model.decoder import decode_cache
from dylora_mlx.model.decoder.attention import packed_masks
from dylora_mlx.model.routing.router import Routing

TOP2 = Routing(2, mx.array(1.0))
DENSE = Routing(None, mx.array(1.0))


def prompt(base, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, base.args.vocab_size, length).astype(np.int32)


def greedy(model, tokens: np.ndarray, found: list[int], gates=None) -> tuple[list[int], list[int]]:
    """For each token of a text that follows `tokens`: the token that the full forward likes best there, and its likeliest
    expert. One pass over the whole text, so a text that these equal is the one that greedy decoding finds."""
    inputs = mx.array(np.append(tokens, np.array(found[:-1], np.int32))[None])
    where = packed_masks(mx.ones(inputs.shape, mx.int32), model.window)
    fixed = None if gates is None else mx.broadcast_to(mx.array(gates), (1, inputs.shape[1], len(gates)))
    out = model(inputs, where, TOP2, gates=fixed)
    last = len(tokens) - 1
    likeliest = np.array(model.logits(out.hidden)[0, last:]).argmax(-1)
    return likeliest.tolist(), np.array(out.gates[0, last:]).argmax(-1).tolist()


def run(model, base, tokens: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    found = [token for token, _ in generate_step(mx.array(tokens), model, max_tokens=count, prompt_cache=cache)]
    if not isinstance(model, TokenRouted):
        return found, []
    gates = np.array(decode_cache.token_gates(cache))
    return found, gates[len(tokens) - 1 :].argmax(-1).tolist()[:count]


@pytest.mark.parametrize(
    ("router_layer", "length"), [("final", 20), ("final", 120), (3, 120), ("final", 150), (1, 150), (5, 150)]
)
def test_token_routed_text_is_the_full_forwards(base, make_pool, router_layer, length):
    """The window is 128: prompts of 120 cross it while they are continued, those of 150 are longer."""
    pool = make_pool([4, 3, 2], router_layer)
    tokens = prompt(base, length)
    found, expert_ids = run(TokenRouted(pool.model, TOP2), base, tokens, 20)
    expected, served = greedy(pool.model, tokens, found)
    assert len(found) == 20
    assert found == expected
    assert expert_ids == served
    assert len(set(served)) > 1, "the router has a choice"


def test_folded_text_is_that_of_constant_gates(base, make_pool):
    pool = make_pool([4, 3])
    tokens, gates = prompt(base, 120), np.array([0.0, 6.0, 5.0], np.float32)
    plain, _ = run(base.model, base, tokens, 12)
    with decode.fused_experts(base, pool.model, gates) as model:
        found, _ = run(model, base, tokens, 12)
    assert len(found) == 12
    assert found == greedy(pool.model, tokens, found, gates)[0]
    assert found != plain
    assert run(base.model, base, tokens, 12)[0] == plain, "the base is as it was"


def test_the_base_is_as_it_was_after_an_error(base, make_pool):
    pool = make_pool([4])
    before = base.model.model.layers[0].self_attn.q_proj

    def fail() -> None:
        with decode.fused_experts(base, pool.model, np.array([0.0, 1.0], np.float32)):
            assert base.model.model.layers[0].self_attn.q_proj is not before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert base.model.model.layers[0].self_attn.q_proj is before


def test_a_quantised_projection_keeps_its_bits():
    linear = nn.QuantizedLinear.from_linear(nn.Linear(64, 32, bias=False), group_size=32, bits=4)
    a, b = mx.random.normal((64, 3)), mx.random.normal((3, 32))
    x = mx.random.normal((2, 5, 64))
    assert mx.allclose(decode._QuantizedWithLoRA(linear, a, b)(x), linear(x) + x @ a @ b, atol=1e-4)


def test_a_prompts_gates_are_its_mean_logits_gates(base, make_pool):
    pool = make_pool([4, 3])
    tokens = prompt(base, 30)
    found = decode.prompt_gates(pool.model, tokens, DENSE)
    inputs = mx.array(tokens[None])
    features = pool.model.router_features(inputs, packed_masks(mx.ones(inputs.shape, mx.int32), pool.model.window))
    np.testing.assert_allclose(found, np.array(mx.softmax(pool.model.router(features).mean(1), axis=-1))[0], atol=1e-5)
    assert (decode.prompt_gates(pool.model, tokens, TOP2) > 0).sum() == 2


@pytest.mark.parametrize(
    ("parts", "stops", "shown"),
    [
        (["a b", " c"], ["zz"], "a b c"),
        (["one ST", "OP two"], ["STOP"], "one "),
        (["one S", "T", "x"], ["STOP"], "one STx"),
        (["x;y", "z"], ["z", ";"], "x"),
        (["aab"], ["ab", ""], "a"),
        (["end S"], ["STOP"], "end S"),
    ],
)
def test_stop_strings_end_a_text_wherever_they_are_cut(parts, stops, shown):
    stopper, text = StopStrings(stops), ""
    for part in parts:
        text += stopper.push(part)
        if stopper.stopped:
            break
    else:
        text += stopper.rest()
    assert text == shown


def test_pieces_then_a_summary(base, make_pool):
    pool = make_pool([4, 3])
    tokens = np.array(base.tokenizer.encode("import requests"), np.int32)
    found = list(stream.stream_text(TokenRouted(pool.model, TOP2), base.tokenizer.wrapped, tokens, 6, Sampling()))
    *pieces, summary = found
    assert isinstance(summary, GenerationSummary)
    assert (summary.prompt_tokens, summary.tokens, summary.reason) == (len(tokens), 6, "length")
    assert all(isinstance(p, TextPiece) and p.expert_id in (0, 1, 2) for p in pieces)
    text = "".join(p.text for p in pieces)
    stop = text[len(text) // 2 :][:3]
    again = list(
        stream.stream_text(TokenRouted(pool.model, TOP2), base.tokenizer.wrapped, tokens, 6, Sampling(), [stop])
    )
    assert "".join(p.text for p in again[:-1]) == text[: text.find(stop)]
    assert again[-1].reason == "stop"


def test_sampling_follows_the_seed(base, make_pool):
    pool = make_pool([4])
    tokens, hot = prompt(base, 8), Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2)

    def text(seed: int) -> str:
        mx.random.seed(seed)
        pieces = stream.stream_text(TokenRouted(pool.model, TOP2), base.tokenizer.wrapped, tokens, 12, hot)
        return "".join(p.text for p in pieces if isinstance(p, TextPiece))

    assert text(1) == text(1)
    assert text(1) != text(2)
