"""A server under many requests: clients that leave at random, seeds, and thousands of malformed bodies."""

from __future__ import annotations

import gc
import json
import random
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest

from dylora_mlx.model.routing.document_mean import DocumentMean
from dylora_mlx.run import run_folder
from tests.serving.conftest import serving
from tests.serving.test_malformed import GOOD
from tests.serving.test_requests_at_once import MODELS, jobs, leave

pytestmark = pytest.mark.slow


def test_two_hundred_requests_and_ten_thousand_malformed_ones(finished):
    run = run_folder.open_run(finished, load_experts=False)
    run.model.document_mean = DocumentMean(0.5, 0.9)
    asked, rng = jobs(len(MODELS) * 8, longest=60), random.Random(0)
    with serving(run, prompt_cache_size=4, prompt_cache_bytes=20_000_000) as server:
        alone = [server.text(*job) for job in asked]

        def work(number: int) -> bool:
            prompt, model, count = asked[number % len(asked)]
            if number % 3 == 0:
                leave(server, rng.random(), prompt=prompt, model=model, stream=number % 2 == 0)
            elif number % 11 == 0:
                server.text(prompt, model, count, seed=number, temperature=1.0)
            else:
                return server.text(prompt, model, count) == alone[number % len(asked)]
            return True

        threads_before, memory = threading.active_count(), []
        for _ in range(3):
            with ThreadPoolExecutor(8) as threads:
                assert all(threads.map(work, range(200)))
            gc.collect()
            mx.clear_cache()
            memory.append(mx.get_active_memory())
        assert memory[2] - memory[0] < 25_000_000, "at most what the prompt cache may hold"
        assert threading.active_count() <= threads_before

        good, refused = json.dumps({**GOOD, "stop": ["a"], "logit_bias": {"5": 1.5}, "top_k": 3}).encode(), 0
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(10_000):
            raw = bytearray(good)
            for _ in range(rng.randint(1, 5)):
                position = rng.randrange(len(raw))
                raw[position : position + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
            path = rng.choice(["/v1/completions", "/v1/chat/completions", "/v1/route", "/v1/nothing"])
            answer = server.send("POST", path, bytes(raw))
            assert answer.status in (200, 400, 404), (bytes(raw), answer)
            refused += answer.status != 200
        assert refused > 5000
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 200_000, "kilobytes"
        assert [server.text(*job) for job in asked] == alone
