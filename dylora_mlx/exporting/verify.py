"""Verify an exported folder against its run: compare float32 logits in MLX and in PyTorch.

PyTorch means PEFT, transformers or the PyTorch runtime. The text comes from the run's test splits. Needs torch,
transformers and peft, which are imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.adapters.fuse import weight_updates
from dylora_mlx.adapters.mlx_lm import module_path
from dylora_mlx.exporting import gguf_file, torch_models
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
"""Largest accepted difference of a float32 logit."""
DOCUMENTS, LENGTH, DECODED = 3, 160, 24
"""Documents of each skill's test split, tokens of each, and how many of these are decoded one by one."""


class VerificationResult(NamedTuple):
    """Outcome of one comparison."""

    name: str
    """The model that was compared."""
    worst: float
    """Largest absolute difference."""
    moved: float
    """Largest change that the adapters make."""
    gates_differ: int = 0
    """Positions whose gates differ."""
    positions: int = 0
    """Positions whose gates were compared; 0 without a router."""
    quantity: str = "logit"
    """Name of the compared quantity."""
    tolerance: float = TOLERANCE
    """Largest accepted difference."""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance, and the adapters change enough for that to mean something."""
        return self.worst <= self.tolerance and self.moved > 10 * TOLERANCE

    def __str__(self) -> str:
        gates = f"; gates differ at {self.gates_differ} of {self.positions} tokens" if self.positions else ""
        return (
            f"{self.name}: largest {self.quantity} difference {self.worst:.2e} "
            f"(adapters move {self.quantity}s by up to {self.moved:.2f}){gates}: {'ok' if self.passed else 'FAILED'}"
        )


def verification_texts(run: OpenedRun) -> list[np.ndarray]:
    """Return token ids of documents from the test split of each of the run's skills."""
    return [
        segment.tokens[:LENGTH]
        for skill in run.read_sources(run.config.skills)
        for segment in skill.test.segments[:DOCUMENTS]
    ]


def verify_experts(run: OpenedRun, out: Path, expert_ids: list[int]) -> Iterator[VerificationResult]:
    """Compare each exported expert in PEFT with the same expert in MLX."""
    documents = verification_texts(run)
    for expert_id in expert_ids:
        gates = np.eye(len(run.pool) + 1, dtype=np.float32)[expert_id]
        yield _compare_adapter(run, out / f"expert_{expert_id}", f"expert_{expert_id} in PEFT", gates, documents)


def verify_gguf_lora(run: OpenedRun, out: Path, expert_ids: list[int]) -> Iterator[VerificationResult]:
    """Compare each expert's GGUF file, added to the base's weights in transformers, with the same expert in MLX."""
    torch, documents, config = torch_models.import_torch(), verification_texts(run), vars(run.base.args)
    for expert_id in expert_ids:
        updates = gguf_file.read_updates(out / f"expert_{expert_id}.gguf", config)
        model = torch_models.load_torch_base(torch, run.base.folder, run.base.args.hidden_size)
        gates, worst, moved = np.eye(len(run.pool) + 1, dtype=np.float32)[expert_id], 0.0, 0.0
        with torch.no_grad():
            bare = [_torch_logits(torch, model, tokens) for tokens in documents]
            for name, update in updates.items():
                model.get_parameter(name).add_(torch.from_numpy(update))
            for tokens, unchanged in zip(documents, bare, strict=True):
                found = _torch_logits(torch, model, tokens)
                worst = max(worst, float(np.abs(found - _static_logits(run.model, run.pool, tokens, gates)).max()))
                moved = max(moved, float(np.abs(found - unchanged).max()))
        yield VerificationResult(f"expert_{expert_id} of the GGUF file in transformers", worst, moved)


def verify_blend(run: OpenedRun, out: Path, weights: dict[int, float]) -> Iterator[VerificationResult]:
    """Compare a blend in PEFT with the experts under constant gates in MLX. weights: by gate column."""
    gates = np.zeros(len(run.pool) + 1, np.float32)
    gates[list(weights)] = list(weights.values())
    yield _compare_adapter(run, out, "the blend in PEFT", gates, verification_texts(run))


def verify_mixture(run: OpenedRun, out: Path, routing: MixtureRouting, kind: str) -> Iterator[VerificationResult]:
    """Compare a mixture in PyTorch with MLX: PEFT's X-LoRA for kind "xlora", and always the PyTorch runtime.

    The runtime is checked twice: on whole documents without a cache, and token by token through its key-value caches.
    """
    torch = torch_models.import_torch()
    documents = verification_texts(run)
    mlx_results = [_routed_logits(run.model, tokens, routing) for tokens in documents]
    base_logits = [_static_logits(run.model, run.pool, tokens, None) for tokens in documents]
    moved = max(float(np.abs(a - b).max()) for (a, _), b in zip(mlx_results, base_logits, strict=True))

    def check(name: str, logits: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> VerificationResult:
        worst, differ, count = 0.0, 0, 0
        for tokens, (expected, gates) in zip(documents, mlx_results, strict=True):
            actual, actual_gates = logits(tokens)
            worst = max(worst, float(np.abs(actual - expected[: len(actual)]).max()))
            differ += int((np.abs(actual_gates - gates[: len(actual_gates)]) > TOLERANCE).any(-1).sum())
            count += len(actual_gates)
        return VerificationResult(name, worst, moved, differ, count)

    if kind == "xlora":
        yield check("the mixture in PEFT's X-LoRA", _xlora_logits(torch, run, out, routing))
    runtime = torch_models.load_runtime(out)
    model, _ = runtime.load(out, base=str(run.base.folder))

    def full_sequence(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            logits = model(torch_models.token_tensor(torch, tokens), use_cache=False).logits[0].numpy()
        return logits, model.gates[0].numpy()

    def token_by_token(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start = max(1, len(tokens) - DECODED)
        ids, cache = torch_models.token_tensor(torch, tokens), runtime.PairedCache(model.config)
        logits, gates = [], []
        with torch.no_grad():
            for begin, end in [(0, start), *((i, i + 1) for i in range(start, len(tokens)))]:
                logits.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits[0].numpy())
                gates.append(model.gates[0].numpy())
        return np.concatenate(logits), np.concatenate(gates)

    yield check("the mixture in the PyTorch runtime", full_sequence)
    yield check("the same, token by token with caches", token_by_token)


def verify_full_model(run: OpenedRun, out: Path, expert: Expert) -> Iterator[VerificationResult]:
    """Check a full model: its stored tensors, and its logits in transformers against mlx-lm."""
    torch = torch_models.import_torch()
    yield _compare_tensors(run.base, out, expert)
    torch_model, exported_base = (
        torch_models.load_torch_base(torch, out, run.base.args.hidden_size),
        load_base(str(out), "float32"),
    )
    mlx_model, worst, moved = RoutedDecoder(exported_base, [], "final"), 0.0, 0.0
    for tokens in verification_texts(run):
        with torch.no_grad():
            torch_logits = torch_model(torch_models.token_tensor(torch, tokens), use_cache=False).logits[0].numpy()
        worst = max(worst, float(np.abs(torch_logits - _logits(mlx_model, tokens, None)).max()))
        moved = max(moved, float(np.abs(torch_logits - _static_logits(run.model, run.pool, tokens, None)).max()))
    yield VerificationResult("the full model in transformers, beside mlx-lm", worst, moved)


def _compare_tensors(base: Base, out: Path, expert: Expert) -> VerificationResult:
    """Check that every fused tensor is the float32 sum of base and update, rounded once to the stored dtype. Exact."""
    updates, worst, moved, stored = weight_updates(expert), 0.0, 0.0, {}
    for path in sorted(out.glob("model*.safetensors")):
        stored |= read_arrays(path)
    for layer, projections in enumerate(expert.layers):
        for name in projections:
            path = f"{module_path(layer, name)}.weight"
            linear: Any = base.projection(layer, name)
            weight = linear.weight if not hasattr(linear, "bits") else _dequantized(linear)
            exact = weight.astype(mx.float32) + updates[path]
            rounded = exact.astype(stored[path].dtype).astype(mx.float32)
            worst = max(worst, float(mx.abs(stored[path].astype(mx.float32) - rounded).max().item()))  # pyright: ignore
            moved = max(moved, float(mx.abs(updates[path]).max().item()))  # pyright: ignore
    return VerificationResult("the full model as stored", worst, moved, quantity="weight", tolerance=0.0)


def _dequantized(linear: Any) -> mx.array:
    return mx.dequantize(
        linear.weight, linear.scales, linear.get("biases"), linear.group_size, linear.bits, mode=linear.mode
    )


def _torch_logits(torch: Any, model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return a PyTorch model's logits [L, V] of token ids [L]."""
    return model(input_ids=torch_models.token_tensor(torch, tokens), use_cache=False).logits[0].numpy()


def _compare_adapter(
    run: OpenedRun, folder: Path, name: str, gates: np.ndarray, documents: list[np.ndarray]
) -> VerificationResult:
    torch = torch_models.import_torch()
    from peft import PeftModel

    base = torch_models.load_torch_base(torch, run.base.folder, run.base.args.hidden_size)
    model: Any = PeftModel.from_pretrained(base, str(folder)).eval()
    worst, moved = 0.0, 0.0
    for tokens in documents:
        with torch.no_grad():
            torch_logits = _torch_logits(torch, model, tokens)
            with model.disable_adapter():
                bare = _torch_logits(torch, model, tokens)
        worst = max(worst, float(np.abs(torch_logits - _static_logits(run.model, run.pool, tokens, gates)).max()))
        moved = max(moved, float(np.abs(torch_logits - bare).max()))
    return VerificationResult(name, worst, moved)


def _xlora_logits(
    torch: Any, run: OpenedRun, out: Path, routing: MixtureRouting
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    from peft import PeftModel, XLoraConfig

    base = torch_models.load_torch_base(torch, run.base.folder, run.base.args.hidden_size)
    base.config.use_cache = False
    config: Any = XLoraConfig.from_pretrained(str(out))
    config.adapters = {str(expert_id): str((out / str(expert_id)).resolve()) for expert_id in range(len(run.pool) + 1)}
    model: Any = PeftModel.from_pretrained(base, str(out), config=config).eval()

    def logits(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            torch_logits = model(input_ids=torch_models.token_tensor(torch, tokens)).logits[0].numpy()
        # PEFT keeps softmax gates for dense routing, but logits for top-k: apply the same top-k softmax here.
        scalings = mx.array(model.base_model.internal_xlora_scalings[0, :, 0].float().numpy())
        return torch_logits, np.array(
            scalings if routing.top_k is None else router.top_k_softmax(scalings, routing.top_k)
        )

    return logits


def _static_logits(model: RoutedDecoder, pool: Pool, tokens: np.ndarray, gates: np.ndarray | None) -> np.ndarray:
    """Return logits [L, V] with the same gates [E] at every token; None for the base alone."""
    constant_gates = np.eye(len(pool) + 1, dtype=np.float32)[0] if gates is None else gates
    return _logits(model, tokens, mx.broadcast_to(mx.array(constant_gates), (1, len(tokens), len(constant_gates))))


def _routed_logits(model: RoutedDecoder, tokens: np.ndarray, routing: MixtureRouting) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [L, V] and gates [L, E] under a routing."""
    inputs = mx.array(tokens[None])
    masks = packed_masks(mx.ones(inputs.shape, mx.int32), model.window)
    features = (
        model.base_states(inputs, masks) if routing.router_layer == "final" else model.router_features(inputs, masks)
    )
    features = document_mean.mix_document_mean(features, routing.document_mean)
    _, gates = router.route(features, routing.gate, routing.routing)
    return _logits(model, tokens, gates), np.array(gates[0])


def _logits(model: RoutedDecoder, tokens: np.ndarray, gates: mx.array | None) -> np.ndarray:
    """Return logits float32 [L, V] under gates [1, L, E]; None runs the base without adapters."""
    inputs = mx.array(tokens[None])
    masks = packed_masks(mx.ones(inputs.shape, mx.int32), model.window)
    if gates is None:
        return np.array(model.logits(model.base_states(inputs, masks))[0].astype(mx.float32))
    output = model(inputs, masks, Routing(None, mx.array(1.0)), gates=gates)
    return np.array(model.logits(output.hidden)[0].astype(mx.float32))
