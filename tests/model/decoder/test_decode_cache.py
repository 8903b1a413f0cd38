"""Caches of decoding under mlx-lm's own generators: the greedy tokens are the same however a text is computed."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models import cache as mlx_cache

from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.model.decoder import decode_cache
from dylora_mlx.model.decoder.attention import recent
from dylora_mlx.model.decoder.decode_cache import DecoderCache
from dylora_mlx.model.routing.document_mean import DocumentMean
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.serving.engine import BaseDraft
from tests.tiny import ALL, ARGS, tiny_base, tiny_pool

COUNT = 20
WINDOW = ARGS.sliding_window
LENGTHS = (3, WINDOW + 4, 1, 2 * WINDOW, 7, 30)
"""Lengths of prompts, shorter and longer than the window; with COUNT tokens all end beyond it."""
ONE_EXPERT, BASE = np.eye(4, dtype=np.float32)[2], np.eye(4, dtype=np.float32)[0]
BLEND = np.array([0.2, 0.5, 0.3, 0.0], np.float32)
GATES = (None, ONE_EXPERT, None, BASE, None, BLEND)
"""Fixed gates of the prompts; None for the router's."""


def routed(router_layer: int | str = "final", weight: float = 0.6) -> TokenRouted:
    model = tiny_pool([2, 3, 2], router_layer, ALL).model
    model.document_mean = DocumentMean(weight, 0.9)
    return TokenRouted(model, Routing(2, mx.array(1.0)))


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, ARGS.vocab_size, length).tolist() for length in LENGTHS]


def alone(model: TokenRouted, prompt: list[int], cache: list) -> list[int]:
    return [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=COUNT, prompt_cache=cache)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """The tokens of every prompt, generated alone."""
    model = routed()
    texts = [alone(model, prompt, model.make_cache(gates)) for prompt, gates in zip(prompts(), GATES, strict=True)]
    assert len({tuple(text) for text in texts}) == len(texts)
    return texts


@pytest.mark.parametrize("router_layer", ["final", 2, 0])
@pytest.mark.parametrize("weight", [0.6, 0.0])
def test_a_batch_gives_the_tokens_and_gates_of_each_row_alone(router_layer, weight):
    """Two rows at a time: rows of other lengths and gates join and leave, and prompts are read in several steps."""
    model = routed(router_layer, weight)
    texts, gates = [], []
    for prompt, fixed in zip(prompts(), GATES, strict=True):
        cache = model.make_cache(fixed)
        texts.append(alone(model, prompt, cache))
        gates.append(np.array(decode_cache.token_gates(cache))[: len(prompt) + COUNT - 1])
    for rows in (2, len(LENGTHS)):
        batch = BatchGenerator(model, completion_batch_size=rows, prefill_batch_size=rows, prefill_step_size=5)
        caches = [model.make_cache(fixed) for fixed in GATES]
        limits = [COUNT - 5 * (number % 3) for number in range(len(LENGTHS))]
        uids = batch.insert(prompts(), limits, caches=caches)
        tokens_of = {uid: [] for uid in uids}
        while responses := batch.next_generated():
            for response in responses:
                tokens_of[response.uid].append(response.token)
                if response.finish_reason is not None:
                    row = uids.index(response.uid)
                    served = np.array(decode_cache.token_gates(response.prompt_cache))
                    # A text that ends at its limit has its last token in the caches too.
                    length = LENGTHS[row] + limits[row] - 1
                    np.testing.assert_allclose(served[:length], gates[row][:length], atol=1e-5)
        batch.close()
        assert [tokens_of[uid] for uid in uids] == [text[:limit] for text, limit in zip(texts, limits, strict=True)]


def test_fixed_gates_are_used_for_every_token():
    model = routed()
    for fixed in (ONE_EXPERT, BASE, BLEND):
        cache = model.make_cache(fixed)
        alone(model, prompts()[1], cache)
        assert np.array_equal(decode_cache.token_gates(cache), np.tile(fixed, (LENGTHS[1] + COUNT, 1)))
        assert np.array_equal(decode_cache.fixed_gates(cache), fixed)
    free = model.make_cache()
    assert decode_cache.fixed_gates(free) is None
    assert decode_cache.token_gates(free).shape == (0, 4)
    bare = [token for token, _ in generate_step(mx.array(prompts()[1]), tiny_base().model, max_tokens=COUNT)]
    assert alone(model, prompts()[1], model.make_cache(BASE)) == bare


@pytest.mark.parametrize("row", range(len(LENGTHS)))
def test_a_trimmed_beginning_continues_as_a_whole_prompt_does(expected, row):
    model, prompt = routed(), prompts()[row]
    cache = model.make_cache(GATES[row])
    alone(model, [*prompt, 5, 6], cache)
    assert mlx_cache.can_trim_prompt_cache(cache), "beyond the window too"
    kept = max(len(prompt) - 2, 0)
    mlx_cache.trim_prompt_cache(cache, DecoderCache.of(cache).position - kept)
    assert alone(model, prompt[kept:], cache) == expected[row]


@pytest.mark.parametrize("row", [1, 4])
def test_saved_caches_continue(tmp_path, expected, row):
    model, prompt, file = routed(), prompts()[row], str(tmp_path / "cache.safetensors")
    cache = model.make_cache(GATES[row])
    mx.eval(model(mx.array(prompt[:-2])[None], cache))
    mlx_cache.save_prompt_cache(file, cache, {})
    assert alone(model, prompt[-2:], mlx_cache.load_prompt_cache(file)) == expected[row]


@pytest.mark.parametrize("row", range(len(LENGTHS)))
def test_drafts_of_the_base_change_no_token(expected, row):
    model, draft = routed(), BaseDraft(tiny_base().model)
    cache = model.make_cache(GATES[row]) + draft.make_cache()
    assert len(model.make_cache()) == len(model.layers), "mlx-lm divides the list there"
    steps = speculative_generate_step(
        mx.array(prompts()[row]), model, draft, num_draft_tokens=3, max_tokens=COUNT, prompt_cache=cache
    )
    drafted = list(steps)
    assert [token for token, _, _ in drafted] == expected[row]
    if GATES[row] is BASE:
        assert sum(from_draft for _, _, from_draft in drafted) >= COUNT // 2, "the draft is the model itself"


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("filled", [0, 2, WINDOW - 1, WINDOW, 3 * WINDOW])
def test_sliding_layers_read_the_window_alone(length, filled):
    """The mask and the keys that are left, against the definition: a token sees itself and the WINDOW - 1 before it."""
    rows = [model_cache_of(filled, padding) for padding in (0, min(2, filled))]
    merged = DecoderCache.of([type(layer[0]).merge(list(layer)) for layer in zip(*rows, strict=True)])
    for cache, starts in ((DecoderCache.of(rows[0]), [0]), (merged, [0, min(2, filled)])):
        mask = decode_cache.decode_masks(cache, length, WINDOW).sliding
        total = filled + length
        positions = np.array(recent(mx.arange(total)[None, None, :, None], length, WINDOW))[0, 0, :, 0]
        query, key = np.arange(filled, total)[:, None], positions[None]
        for row, start in enumerate(starts):
            seen = (key <= query) & (key > query - WINDOW) & (key >= start)
            if mask is None or isinstance(mask, str):
                wanted = np.ones_like(seen) if mask is None else np.tril(np.ones((length, total)), filled)
            else:
                wanted = np.broadcast_to(np.array(mask), (len(starts), 1, *seen.shape))[row, 0]
            assert np.array_equal(seen, wanted)


def model_cache_of(filled: int, padding: int) -> list:
    """Return caches of a row of `filled` - `padding` tokens, which is padded on the left when it is merged with a longer one."""
    cache = routed().make_cache()
    if filled > padding:
        mx.eval(routed()(mx.ones((1, filled - padding), mx.int32), cache))
    return cache
