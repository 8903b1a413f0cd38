"""An exported folder against the run it came from: float32 logits on real text, MLX beside PEFT, transformers and the runtime.

Needs torch, transformers and peft; they are imported when something is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.adapters.fuse import weight_updates
from dylora_mlx.adapters.mlx_lm import module_path
from dylora_mlx.config import Config
from dylora_mlx.data import stream
from dylora_mlx.exporting import torch_models
from dylora_mlx.exporting.folder import read_arrays
from dylora_mlx.exporting.formats import MixtureRouting
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.decoder.attention import packed_masks
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.routing import document_mean, router
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.run.run_folder import OpenedRun

TOLERANCE = 1e-3
"""Largest difference of a float32 logit."""
DOCUMENTS, LENGTH, DECODED = 3, 160, 24
"""Of each skill's test split; their tokens; how many of a document's are decoded one by one."""


class VerificationResult(NamedTuple):
    """What was compared; the largest difference of a logit, and how far adapters move logits at most; positions whose
    gates differ, out of how many (0 of 0 without a router); what the difference is of, and what is allowed."""

    name: str
    worst: float
    moved: float
    gates_differ: int = 0
    positions: int = 0
    of: str = "logit"
    allowed: float = TOLERANCE

    @property
    def passed(self) -> bool:
        return self.worst <= self.allowed and self.moved > 10 * TOLERANCE

    def __str__(self) -> str:
        gates = f"; gates differ at {self.gates_differ} of {self.positions} tokens" if self.positions else ""
        return (
            f"{self.name}: largest {self.of} difference {self.worst:.2e} (adapters move {self.of}s by up to {self.moved:.2f})"
            f"{gates}: "
            f"{'ok' if self.passed else 'FAILED'}"
        )


def verification_texts(config: Config, base: Base) -> list[np.ndarray]:
    """Token ids of real documents: from the test split of each of the run's skills."""
    found = []
    for source in config.skills:
        skill = stream.prepare_skill(source, config.data, base.tokenizer, config.seed)
        found += [piece.tokens[:LENGTH] for piece in skill.test.segments[:DOCUMENTS]]
    return found


def verify_experts(run: OpenedRun, out: Path, expert_ids: list[int]) -> Iterator[VerificationResult]:
    """Each exported expert in PEFT, beside the same expert in MLX."""
    documents = verification_texts(run.config, run.base)
    for expert_id in expert_ids:
        gates = np.eye(len(run.pool) + 1, dtype=np.float32)[expert_id]
        yield _adapter(run, out / f"expert_{expert_id}", f"expert_{expert_id} in PEFT", gates, documents)


def verify_blend(run: OpenedRun, out: Path, weights: dict[int, float]) -> Iterator[VerificationResult]:
    """A blend in PEFT, beside the experts under constant gates in MLX. weights: by gate column."""
    gates = np.zeros(len(run.pool) + 1, np.float32)
    gates[list(weights)] = list(weights.values())
    yield _adapter(run, out, "the blend in PEFT", gates, verification_texts(run.config, run.base))


def verify_mixture(run: OpenedRun, out: Path, how: MixtureRouting, kind: str) -> Iterator[VerificationResult]:
    """A mixture in PEFT's X-LoRA, and in the runtime: whole texts, and token by token through its caches."""
    torch = torch_models.import_torch()
    documents = verification_texts(run.config, run.base)
    ours = [_routed(run.model, tokens, how) for tokens in documents]
    bare = [_static(run.model, run.pool, tokens, None) for tokens in documents]
    moved = max(float(np.abs(a - b).max()) for (a, _), b in zip(ours, bare, strict=True))

    def check(name: str, logits: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> VerificationResult:
        worst, differ, count = 0.0, 0, 0
        for tokens, (expected, gates) in zip(documents, ours, strict=True):
            found, theirs = logits(tokens)
            worst = max(worst, float(np.abs(found - expected[: len(found)]).max()))
            differ += int((np.abs(theirs - gates[: len(theirs)]) > TOLERANCE).any(-1).sum())
            count += len(theirs)
        return VerificationResult(name, worst, moved, differ, count)

    if kind == "xlora":
        yield check("the mixture in PEFT's X-LoRA", _xlora(torch, run, out, how))
    runtime = torch_models.load_runtime(out)
    model, _ = runtime.load(out, base=str(run.base.folder))

    def whole(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            found = model(torch_models.token_tensor(torch, tokens), use_cache=False).logits[0].numpy()
        return found, model.gates[0].numpy()

    def decoded(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start = max(1, len(tokens) - DECODED)
        ids, cache = torch_models.token_tensor(torch, tokens), runtime.PairedCache(model.config)
        logits, gates = [], []
        with torch.no_grad():
            for begin, end in [(0, start), *((i, i + 1) for i in range(start, len(tokens)))]:
                logits.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits[0].numpy())
                gates.append(model.gates[0].numpy())
        return np.concatenate(logits), np.concatenate(gates)

    yield check("the mixture in the PyTorch runtime", whole)
    yield check("the same, token by token with caches", decoded)


def verify_full_model(run: OpenedRun, out: Path, expert: Expert) -> Iterator[VerificationResult]:
    """A full model: every tensor is the base's plus the update, rounded once; and transformers computes with these weights
    what mlx-lm does."""
    torch = torch_models.import_torch()
    yield _tensors(run.base, out, expert)
    theirs, loaded = (
        torch_models.load_torch_base(torch, out, run.base.args.hidden_size),
        load_base(str(out), "float32"),
    )
    plain, worst, moved = RoutedDecoder(loaded, [], "final"), 0.0, 0.0
    for tokens in verification_texts(run.config, run.base):
        with torch.no_grad():
            found = theirs(torch_models.token_tensor(torch, tokens), use_cache=False).logits[0].numpy()
        worst = max(worst, float(np.abs(found - _logits(plain, tokens, None)).max()))
        moved = max(moved, float(np.abs(found - _static(run.model, run.pool, tokens, None)).max()))
    yield VerificationResult("the full model in transformers, beside mlx-lm", worst, moved)


def _tensors(base: Base, out: Path, expert: Expert) -> VerificationResult:
    """Every folded tensor is the sum in float32, rounded once to what it is stored as: nothing else will do."""
    added, worst, moved, stored = weight_updates(expert), 0.0, 0.0, {}
    for path in sorted(out.glob("model*.safetensors")):
        stored |= read_arrays(path)
    for layer, projections in enumerate(expert.layers):
        for name in projections:
            path = f"{module_path(layer, name)}.weight"
            linear: Any = base.projection(layer, name)
            weight = linear.weight if not hasattr(linear, "bits") else _plain(linear)
            exact = weight.astype(mx.float32) + added[path]
            rounded = exact.astype(stored[path].dtype).astype(mx.float32)
            worst = max(worst, float(mx.abs(stored[path].astype(mx.float32) - rounded).max().item()))  # pyright: ignore
            moved = max(moved, float(mx.abs(added[path]).max().item()))  # pyright: ignore
    return VerificationResult("the full model as stored", worst, moved, of="weight", allowed=0.0)


def _plain(linear: Any) -> mx.array:
    return mx.dequantize(
        linear.weight, linear.scales, linear.get("biases"), linear.group_size, linear.bits, mode=linear.mode
    )


def _adapter(
    run: OpenedRun, place: Path, name: str, gates: np.ndarray, documents: list[np.ndarray]
) -> VerificationResult:
    torch = torch_models.import_torch()
    from peft import PeftModel

    base = torch_models.load_torch_base(torch, run.base.folder, run.base.args.hidden_size)
    model: Any = PeftModel.from_pretrained(base, str(place)).eval()
    worst, moved = 0.0, 0.0
    for tokens in documents:
        with torch.no_grad():
            found = model(input_ids=torch_models.token_tensor(torch, tokens), use_cache=False).logits[0].numpy()
            with model.disable_adapter():
                bare = model(input_ids=torch_models.token_tensor(torch, tokens), use_cache=False).logits[0].numpy()
        worst = max(worst, float(np.abs(found - _static(run.model, run.pool, tokens, gates)).max()))
        moved = max(moved, float(np.abs(found - bare).max()))
    return VerificationResult(name, worst, moved)


def _xlora(
    torch: Any, run: OpenedRun, out: Path, how: MixtureRouting
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    from peft import PeftModel, XLoraConfig

    base = torch_models.load_torch_base(torch, run.base.folder, run.base.args.hidden_size)
    base.config.use_cache = False
    config: Any = XLoraConfig.from_pretrained(str(out))
    config.adapters = {str(expert_id): str((out / str(expert_id)).resolve()) for expert_id in range(len(run.pool) + 1)}
    model: Any = PeftModel.from_pretrained(base, str(out), config=config).eval()

    def logits(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            found = model(input_ids=torch_models.token_tensor(torch, tokens)).logits[0].numpy()
        # What PEFT keeps are softmax gates where routing is dense, and logits where it is not: chosen here as it chooses.
        kept = mx.array(model.base_model.internal_xlora_scalings[0, :, 0].float().numpy())
        return found, np.array(kept if how.top_k is None else router.top_k_softmax(kept, how.top_k))

    return logits


def _static(model: RoutedDecoder, pool: Pool, tokens: np.ndarray, gates: np.ndarray | None) -> np.ndarray:
    """Logits with the same gates [E] at every token; None: the base alone."""
    fixed = np.eye(len(pool) + 1, dtype=np.float32)[0] if gates is None else gates
    return _logits(model, tokens, mx.broadcast_to(mx.array(fixed), (1, len(tokens), len(fixed))))


def _routed(model: RoutedDecoder, tokens: np.ndarray, how: MixtureRouting) -> tuple[np.ndarray, np.ndarray]:
    """Logits [L, V] and gates [L, E] under a routing."""
    inputs = mx.array(tokens[None])
    where = packed_masks(mx.ones(inputs.shape, mx.int32), model.window)
    read = model.base_states(inputs, where) if how.router_layer == "final" else model.router_features(inputs, where)
    read = document_mean.mix_document_mean(read, how.document_mean_weight)
    _, gates = router.route(read, how.gate, how.routing)
    return _logits(model, tokens, gates), np.array(gates[0])


def _logits(model: RoutedDecoder, tokens: np.ndarray, gates: mx.array | None) -> np.ndarray:
    inputs = mx.array(tokens[None])
    where = packed_masks(mx.ones(inputs.shape, mx.int32), model.window)
    if gates is None:
        return np.array(model.logits(model.base_states(inputs, where))[0].astype(mx.float32))
    found = model(inputs, where, Routing(None, mx.array(1.0)), gates=gates)
    return np.array(model.logits(found.hidden)[0].astype(mx.float32))
