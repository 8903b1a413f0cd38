"""Run an exported mixture of LoRA experts on Gemma 3 in PyTorch.

This single file needs only torch, transformers and safetensors.

    import torch, dylora_torch
    model, tokenizer = dylora_torch.load("FOLDER", device="cuda", dtype=torch.bfloat16)
    inputs = tokenizer("SELECT", return_tensors="pt").to(model.device)
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
    ids = dylora_torch.encode_prompt(model, tokenizer, "What is 2 + 2?")  # in the form that the skills were learned in

    python dylora_torch.py FOLDER --prompt "SELECT" --device cuda

The model subclasses transformers' Gemma3ForCausalLM and adds a gate for every token and expert:
y = x W + sum_e g_e (alpha_e / r_e) (x A_e) B_e. It works wherever a loaded transformers model does: generate,
pipelines, lm-evaluation-harness (HFLM(pretrained=model)).

The router reads either the base's final states or the input of one layer. Final states need a second forward pass of
the base with its own key-value cache. For a layer input one pass is enough, because no layer below it is adapted.

`dylora export --format xlora` and `--format runtime` write FOLDER. `load` checks every file against its sha256, every
weight against its name and shape, and the base against its fingerprint.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, DynamicCache
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM

Gemma3: Any = Gemma3ForCausalLM
FORMAT = 1
MANIFEST = "dylora.json"
CLASSIFIER = "base_model.internal_xlora_classifier.layers.0."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SAMPLED = 1 << 16
"""Bytes at the start of each tensor that `fingerprint` hashes."""
CACHE = "cache" if "cache" in inspect.signature(Gemma3.forward).parameters else "past_key_values"
"""Name of forward's key-value cache argument in the installed transformers."""
EPSILON = 1e-6
"""Epsilon of the RMS norm before a router that reads a layer's input; the same as in MLX."""


class FolderError(ValueError):
    """An exported folder or a base that is missing, damaged or does not match. The message is one line."""


class PairedCache(DynamicCache):
    """A key-value cache for both passes.

    This object serves the adapted pass, and `base` the base pass that the router reads. Every method that changes the
    batch or the length changes all parts, so beam search and assisted decoding stay consistent.
    """

    router_logits: torch.Tensor | None = None
    """Router logits of all tokens so far and, as last column, 1 for a real token and 0 for padding: [B, L, E + 1].

    Stored only where the router also reads the document mean.
    """

    def __init__(self, config: Any):
        super().__init__(config=config)
        self.base = DynamicCache(config=config)

    def reset(self) -> None:
        super().reset()
        self.base.reset()
        self.router_logits = None

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        # The base cache stays empty where the router reads a layer's input: there is no base pass then.
        if self.base.get_seq_length():
            self.base.crop(*args, **kwargs)
        if self.router_logits is not None:
            self.router_logits = self.router_logits[:, : self.get_seq_length()]

    def reorder_cache(self, *args: Any, **kwargs: Any) -> None:
        super().reorder_cache(*args, **kwargs)
        self.base.reorder_cache(*args, **kwargs)
        if self.router_logits is not None:
            self.router_logits = self.router_logits.index_select(
                0, (args[0] if args else kwargs["beam_idx"]).to(self.router_logits.device)
            )

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> None:
        super().batch_repeat_interleave(*args, **kwargs)
        self.base.batch_repeat_interleave(*args, **kwargs)
        if self.router_logits is not None:
            self.router_logits = self.router_logits.repeat_interleave(args[0] if args else kwargs["repeats"], dim=0)

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> None:
        super().batch_select_indices(*args, **kwargs)
        self.base.batch_select_indices(*args, **kwargs)
        if self.router_logits is not None:
            self.router_logits = self.router_logits[args[0] if args else kwargs["indices"]]

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self.base.activate_past_recording()


class Route:
    """State of one forward pass, shared by the model and all its RoutedLinear modules."""

    ranks: torch.Tensor | None = None
    """Gate times alpha / r for each LoRA rank, [B, L, R]; None for the base alone."""
    mask: Any = None
    """The attention mask that forward received."""
    cache: PairedCache | None = None
    """The key-value cache that forward received."""


class RoutedLinear(nn.Module):
    """A linear layer with all experts' LoRA factors: y = x W + ((x A) * G) B.

    A is [inputs, R] and B is [R, outputs]: the factors of all experts, concatenated along the rank. G is `route.ranks`.
    """

    a: torch.Tensor
    b: torch.Tensor

    def __init__(self, linear: nn.Module, a: torch.Tensor, b: torch.Tensor, route: Route):
        super().__init__()
        self.linear, self.route = linear, route
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y if self.route.ranks is None else y + ((x @ self.a) * self.route.ranks) @ self.b


def _decayed_cumsum(x: torch.Tensor, decay: float) -> torch.Tensor:
    """Return sum_{s <= t} decay^(t - s) x_s, [B, L, E], of x [B, L, E], in log2(L) passes."""
    step = 1
    while step < x.shape[1]:
        x = x + decay**step * torch.nn.functional.pad(x[:, :-step], (0, 0, step, 0))
        step *= 2
    return x


class RoutedGemma3ForCausalLM(Gemma3):
    """Gemma 3 with routed LoRA experts. `load` creates it."""

    names: list[str]
    """Expert names by gate column; "base", the null expert, comes first."""
    top_k: int | None
    """Experts per token; None for dense routing over all of them."""
    router_layer: int | str
    """Where the router reads: "final", or the index of the layer whose input it reads."""
    document_mean_weight: float
    """Share of the document mean in the router's logits, 0 to 1."""
    document_mean_decay: float
    """Weight of a token in that mean relative to the next one, above 0 and at most 1."""
    gate_weight: torch.Tensor
    """The router's weight, float32 [E, D]."""
    gate_bias: torch.Tensor
    """The router's bias, float32 [E]."""
    rank_scale: torch.Tensor
    """Maps gates [.., E] to ranks [.., R]: alpha_e / r_e where a rank belongs to expert e, 0 elsewhere."""
    gates: torch.Tensor | None = None
    """Gates of the last forward pass, float32 [B, L, E]."""
    prompt: dict[str, Any]
    """The form in which the skills were learned, from the manifest: see `encode_prompt`."""
    _forced: int | None = None
    """Expert that gets every token inside `routed_to`; None routes normally."""

    def attach(self, folder: Folder) -> None:
        """Add the folder's experts and router to this base: wrap each adapted projection in a RoutedLinear."""
        self.names, self.top_k = folder.names, folder.top_k
        self.router_layer, self.document_mean_weight = folder.router_layer, folder.document_mean_weight
        self.document_mean_decay = folder.document_mean_decay
        self.prompt = folder.prompt
        if self.prompt.get("eos_token_ids"):
            self.generation_config.eos_token_id = self.prompt["eos_token_ids"]
        self._route, norm = Route(), self.model.norm.weight
        on_device = {"device": norm.device}
        self.register_buffer("gate_weight", folder.weight.to(**on_device), persistent=False)
        self.register_buffer("gate_bias", folder.bias.to(**on_device), persistent=False)
        self.register_buffer("rank_scale", folder.rank_scale().to(**on_device), persistent=False)
        for path in folder.projections():
            parent, name = path.rsplit(".", 1)
            parent_module = self.get_submodule(parent)
            linear = getattr(parent_module, name)
            factors = folder.factors(path, linear.in_features, linear.out_features)
            a, b = (factor.to(dtype=norm.dtype, **on_device) for factor in factors)
            setattr(parent_module, name, RoutedLinear(linear, a, b, self._route))
        # Gemma was trained with this scale rounded to bfloat16. transformers in float32 does not round it; MLX does.
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=torch.bfloat16).float()
        self.model.embed_tokens.embed_scale.fill_(scale)
        if self.router_layer != "final":
            self.model.layers[int(self.router_layer)].register_forward_pre_hook(
                self._route_from_layer_input, with_kwargs=True
            )

    @contextmanager
    def routed_to(self, name: str) -> Iterator[None]:
        """Send every token to one expert inside this context ("base": to none). Raises KeyError for an unknown name."""
        if name not in self.names:
            raise KeyError(f"no expert '{name}', there are {', '.join(self.names)}")
        before, self._forced = self._forced, self.names.index(name)
        try:
            yield
        finally:
            self._forced = before

    def gates_of(self, features: torch.Tensor) -> torch.Tensor:
        """Return gates float32 [B, L, E] for features [B, L, D]: softmax over the top-k logits.

        Of equal logits the one with the lower expert_id wins.
        """
        logits = self._mix_document_mean(features.float() @ self.gate_weight.T + self.gate_bias)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            # A stable sort instead of torch.topk, which does not define the order of equal values.
            largest = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., : self.top_k]
            top_k_mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, largest, True)
            logits = logits.masked_fill(~top_k_mask, float("-inf"))
        return torch.softmax(logits, dim=-1)

    def _mix_document_mean(self, logits: torch.Tensor) -> torch.Tensor:
        """Mix each token's logits [B, L, E] with their mean over the document so far by document_mean_weight.

        In the mean a token counts document_mean_decay times less than the next one. Padding does not count towards it.
        The gate is linear, so this equals reading mixed features.
        """
        if not self.document_mean_weight:
            return logits
        mask, cache, length = self._route.mask, self._route.cache, logits.shape[1]
        is_padding_mask = isinstance(mask, torch.Tensor) and mask.dim() == 2
        valid_mask = mask[:, -length:, None].to(logits) if is_padding_mask else torch.ones_like(logits[..., :1])
        logits_and_mask = torch.cat([logits * valid_mask, valid_mask], -1)
        if cache is not None:
            logits_and_mask = cache.router_logits = (
                logits_and_mask if cache.router_logits is None else torch.cat([cache.router_logits, logits_and_mask], 1)
            )
        sums = _decayed_cumsum(logits_and_mask, self.document_mean_decay)[:, -length:]
        # The weights of the tokens so far sum to at least 1, but for padding before the first.
        mean = sums[..., :-1] / sums[..., -1:].clamp(min=1)
        return (1 - self.document_mean_weight) * logits + self.document_mean_weight * mean

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: Any = 0,
        **kwargs: Any,
    ) -> Any:
        """Run transformers' forward with routed experts.

        Accepts the key-value cache as `cache` or as `past_key_values`. Raises TypeError for a cache that is not a
        PairedCache, ValueError for one that the router has not read.
        """
        past_key_values = kwargs.pop("cache", None) if past_key_values is None else past_key_values
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = PairedCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, PairedCache):
            raise TypeError("past_key_values: this model needs a dylora_torch.PairedCache(model.config)")
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        self._route.mask, self._route.cache = attention_mask, past_key_values
        try:
            if self._forced is not None:
                batch_shape = (inputs_embeds if input_ids is None else input_ids).shape[:2]  # pyright: ignore
                one_hot = torch.arange(len(self.names), device=self.gate_bias.device) == self._forced
                self._set_gates(one_hot.float().expand(*batch_shape, -1))
            else:
                self._check_cache(past_key_values)
                if self.router_layer == "final":
                    # `_route.ranks` is None here, so this pass runs the base without adapters.
                    cache = None if past_key_values is None else past_key_values.base
                    with torch.no_grad():
                        base_output = self.model(**inputs, **{CACHE: cache}, use_cache=use_cache)
                    self._set_gates(self.gates_of(base_output.last_hidden_state))
            return super().forward(
                **inputs,
                **{CACHE: past_key_values},
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        finally:
            self._route.ranks = self._route.mask = self._route.cache = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' generate with a PairedCache, so that both passes decode from a key-value cache."""
        config = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("use_cache", getattr(config, "use_cache", True)) is not False:
            caches = [value for name in ("cache", "past_key_values") if (value := kwargs.pop(name, None)) is not None]
            kwargs[CACHE] = caches[0] if caches else PairedCache(self.config)
        return super().generate(*args, **kwargs)

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("keep the exported folder: it is this model; nothing else reads its weights")

    def _check_cache(self, cache: PairedCache | None) -> None:
        """Raise ValueError if the cache holds tokens that the router has not read."""
        if cache is None:
            return
        router_length = 0 if cache.router_logits is None else cache.router_logits.shape[1]
        lengths = [cache.base.get_seq_length()] * (self.router_layer == "final")
        lengths += [router_length] * bool(self.document_mean_weight)
        if any(length != cache.get_seq_length() for length in lengths):
            raise ValueError(
                "past_key_values: filled within routed_to, so the router has not read its tokens; start with a new cache"
            )

    def _set_gates(self, gates: torch.Tensor) -> None:
        self.gates = gates
        self._route.ranks = (gates @ self.rank_scale).to(self.model.norm.weight.dtype)

    def _route_from_layer_input(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Compute the gates from the RMS-normalised input of the router's layer (a forward pre-hook of that layer)."""
        if self._forced is None:
            h = args[0] if args else kwargs["hidden_states"]
            # Normalise in float32 and round back, as in MLX.
            h_float32 = h.detach().float()
            features = (h_float32 * torch.rsqrt(h_float32.pow(2).mean(-1, keepdim=True) + EPSILON)).to(h.dtype)
            self._set_gates(self.gates_of(features))


class Folder:
    """An exported folder: its manifest, router and adapters. Reading checks all of them and raises FolderError."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = self._read_json(MANIFEST)
        if self.manifest.get("format") != FORMAT:
            raise FolderError(
                f"{self.path / MANIFEST}: format {self.manifest.get('format')}, this file reads {FORMAT}; "
                "use the dylora_torch.py that lies beside it"
            )
        if self.manifest.get("kind") not in ("xlora", "runtime"):
            raise FolderError(f"{self.path}: a '{self.manifest.get('kind')}' export, not a mixture; load it with peft")
        self._check_hashes()
        try:
            self._read_manifest()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FolderError(f"{self.path / MANIFEST}: incomplete, {error} is missing or malformed") from error
        gate = self._load_weights("adapter_model.safetensors", self._gate_shapes())
        self.weight, self.bias = gate[CLASSIFIER + "weight"].float(), gate[CLASSIFIER + "bias"].float()
        self._adapters = [
            self._load_weights(f"{expert_id}/adapter_model.safetensors", None) for expert_id in range(len(self.names))
        ]
        for expert_id, arrays in enumerate(self._adapters):
            self._check_adapter(expert_id, arrays)

    def _read_manifest(self) -> None:
        manifest, base = self.manifest, self.manifest["base"]
        self.base_name, self.fingerprint = str(base["name"]), str(base["fingerprint"])
        self.first, self.layers, self.hidden = (
            int(manifest["first_layer"]),
            int(base["layers"]),
            int(base["hidden_size"]),
        )
        self.targets = [str(name) for name in manifest["projections"]]
        self.router_layer, self.top_k = manifest["router_layer"], manifest["top_k"]
        self.names = [str(expert["name"]) for expert in manifest["experts"]]
        self.ranks = [int(expert["rank"]) for expert in manifest["experts"]]
        self.alphas = [float(expert["alpha"]) for expert in manifest["experts"]]
        self.document_mean_weight = float(manifest.get("document_mean_weight", 0.0))
        self.document_mean_decay = float(manifest.get("document_mean_decay", 1.0))
        self.prompt: dict[str, Any] = dict(manifest.get("prompt") or {})
        if not 0 <= self.document_mean_weight <= 1:
            raise ValueError(f"document_mean_weight {self.document_mean_weight!r}")
        if not 0 < self.document_mean_decay <= 1:
            raise ValueError(f"document_mean_decay {self.document_mean_decay!r}")
        if self.first not in range(self.layers):
            raise ValueError(f"first_layer {self.first!r}")
        if self.router_layer != "final" and self.router_layer not in range(self.first + 1):
            raise ValueError(f"router_layer {self.router_layer!r}")
        if self.top_k is not None and self.top_k not in range(1, len(self.names) + 1):
            raise ValueError(f"top_k {self.top_k!r}")
        if min(self.ranks, default=0) < 1:
            raise ValueError(f"rank in {self.ranks}")

    def projections(self) -> list[str]:
        """Module paths in the base of the projections that carry experts."""
        return [
            f"model.layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
            for layer in range(self.first, self.layers)
            for name in self.targets
        ]

    def factors(self, path: str, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a [inputs, R] and b [R, outputs] of a projection: all experts' factors, joined along the rank."""
        parts = [[arrays[f"base_model.model.{path}.lora_{x}.weight"] for arrays in self._adapters] for x in "AB"]
        for expert_id, (a, b) in enumerate(zip(*parts, strict=True)):
            if (a.shape[1], b.shape[0]) != (inputs, outputs):
                raise FolderError(
                    f"{self.path / str(expert_id)}: '{path}' has {a.shape[1]} inputs and {b.shape[0]} outputs, the base's "
                    "has "
                    f"{inputs} and {outputs}"
                )
        return torch.cat(parts[0]).T.contiguous(), torch.cat([b.T for b in parts[1]]).contiguous()

    def rank_scale(self) -> torch.Tensor:
        """Return [E, R]: alpha_e / r_e where a rank belongs to expert e, 0 elsewhere."""
        owner = torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))
        scale = torch.tensor([alpha / rank for alpha, rank in zip(self.alphas, self.ranks, strict=True)])
        return (torch.arange(len(self.ranks))[:, None] == owner) * scale[owner]

    def _gate_shapes(self) -> dict[str, tuple[int, ...]]:
        count = len(self.names)
        return {CLASSIFIER + "weight": (count, self.hidden), CLASSIFIER + "bias": (count,)}

    def _read_json(self, name: str) -> dict:
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FolderError(f"{self.path / name}: missing; give a folder that dylora export wrote") from error
        except (OSError, ValueError, RecursionError) as error:
            raise FolderError(f"{self.path / name}: not readable as JSON") from error
        if not isinstance(value, dict):
            raise FolderError(f"{self.path / name}: not a JSON object")
        return value

    def _check_hashes(self) -> None:
        hashes = self.manifest.get("sha256")
        if not isinstance(hashes, dict):
            raise FolderError(f"{self.path / MANIFEST}: lists no files, so this is no complete export")
        for name, expected in hashes.items():
            path = self.path / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise FolderError(f"{self.path / MANIFEST}: '{name}' leads out of the folder")
            if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
                raise FolderError(f"{path}: missing from the folder")
            if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
                raise FolderError(f"{path}: damaged or changed, its sha256 is not the one in {MANIFEST}")

    def _load_weights(self, name: str, shapes: dict[str, tuple[int, ...]] | None) -> dict[str, torch.Tensor]:
        if name not in self.manifest["sha256"]:
            raise FolderError(f"{self.path / MANIFEST}: lists no '{name}'")
        try:
            arrays = load_file(self.path / name)
        except Exception as error:
            raise FolderError(f"{self.path / name}: not a safetensors file ({error})") from error
        return arrays if shapes is None else self._check_shapes(name, arrays, shapes)

    def _check_shapes(
        self, name: str, arrays: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        for key in arrays.keys() ^ shapes.keys():
            raise FolderError(f"{self.path / name}: '{key}' is {'missing' if key in shapes else 'not expected'}")
        for key, shape in shapes.items():
            if tuple(arrays[key].shape) != shape:
                raise FolderError(f"{self.path / name}: '{key}' has shape {tuple(arrays[key].shape)}, not {shape}")
        return arrays

    def _check_adapter(self, expert_id: int, arrays: dict[str, torch.Tensor]) -> None:
        """Check that every projection has two factors of the manifest's rank. `factors` compares sizes to the base."""
        name, rank = f"{expert_id}/adapter_model.safetensors", self.ranks[expert_id]
        # First, so that a damaged manifest with a huge layer count fails before `projections` builds that many names.
        if (self.layers - self.first) * len(self.targets) > len(arrays):
            raise FolderError(f"{self.path / name}: fewer weights than layers and projections in {MANIFEST}")
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.projections():
            for letter in "AB":
                key = f"base_model.model.{path}.lora_{letter}.weight"
                size = tuple(arrays[key].shape) if key in arrays else (0, 0)
                shapes[key] = (rank, size[-1]) if letter == "A" else (size[0], rank)
        self._check_shapes(name, arrays, shapes)
        config = self._read_json(f"{expert_id}/adapter_config.json")
        if (config.get("r"), config.get("lora_alpha")) != (rank, self.alphas[expert_id]):
            raise FolderError(
                f"{self.path / str(expert_id)}/adapter_config.json: r or lora_alpha is not that of {MANIFEST}"
            )


def fingerprint(folder: Path) -> str:
    """Return a base's fingerprint, a sha256.

    It covers the config, and of each weight file the name, the header and the start of every tensor. It equals the
    fingerprint that dylora_mlx computes. Raises ValueError for tensor offsets beyond the file.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    digest = hashlib.sha256(json.dumps({k: v for k, v in config.items() if k not in volatile}, sort_keys=True).encode())
    for path in sorted(folder.glob("model*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size))
            digest.update(header)
            data = file.tell()
            for name, tensor in json.loads(header).items():
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    if not 0 <= begin <= end <= path.stat().st_size:
                        raise ValueError(f"{path}: data beyond the file")
                    file.seek(data + begin)
                    digest.update(file.read(min(end - begin, SAMPLED)))
    return digest.hexdigest()


def base_folder(folder: Folder, base: str | None = None) -> Path:
    """Return the local folder of the base: `base` if given, else the one the experts were trained on.

    Downloads a hub id. Raises FolderError if the base is missing, damaged, or has another fingerprint.
    """
    name = base or folder.base_name
    path = Path(name).expanduser()
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise FolderError(f"{name}: no such base on this machine; give base= (or --base) a folder or a hub id")
        from huggingface_hub import snapshot_download  # comes with transformers

        try:
            path = Path(
                snapshot_download(name, allow_patterns=["*.json", "*.jinja", "model*.safetensors", "tokenizer*"])
            )
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise FolderError(f"{name}: cannot be downloaded ({reason[:160]})") from error
    if not (path / "config.json").is_file():
        raise FolderError(f"{path}: no config.json, so not a model folder")
    try:
        actual_fingerprint = fingerprint(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FolderError(f"{path}: damaged, its config or weights cannot be read") from error
    if actual_fingerprint != folder.fingerprint:
        raise FolderError(f"{path}: not the base that these experts were trained on ({folder.base_name})")
    return path


def load(
    folder: str | Path,
    base: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[RoutedGemma3ForCausalLM, Any]:
    """Load an exported mixture and its tokenizer, in eval mode.

    Args:
        folder: what `dylora export --format xlora` or `--format runtime` wrote.
        base: a folder or hub id, if the base has moved since the export.
        device: where the model goes.
        dtype: of the base and the experts; the router stays float32.
        **options: for transformers' from_pretrained.

    Raises FolderError for a damaged or incomplete folder, or for another base.
    """
    exported = Folder(folder)
    base_path = base_folder(exported, base)
    model = RoutedGemma3ForCausalLM.from_pretrained(base_path, dtype=dtype, **options).to(device)
    model.attach(exported)
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    if exported.prompt.get("chat_template"):
        tokenizer.chat_template = exported.prompt["chat_template"]
    return model.eval(), tokenizer


def encode_prompt(
    model: RoutedGemma3ForCausalLM,
    tokenizer: Any,
    prompt: str | list[dict[str, Any]],
    system: str | None = None,
    raw: bool = False,
) -> list[int]:
    """Return the token ids of a prompt, in the form that the skills were learned in, as in dylora_mlx.

    Args:
        model: from `load`.
        tokenizer: from `load`.
        prompt: a text, or the messages of a conversation.
        system: a system message before it; the prompt is then a chat.
        raw: take the text as it is, in whatever form the skills were learned.
    """
    is_chat = not raw and (system is not None or model.prompt.get("kind") == "chat" or not isinstance(prompt, str))
    if is_chat:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        before = [] if system is None else [{"role": "system", "content": system}]
        return tokenizer(_chat_text(tokenizer, [*before, *messages]), add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    bos = model.prompt.get("bos_token_id", tokenizer.bos_token_id)
    return ids if ids[:1] == [bos] else [bos, *ids]


def _chat_text(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """Return the prompt for the next turn. A template without generation prompt gets the answer's header."""

    def render(turns: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)

    plain, prompt_text = render(messages, False), render(messages, True)
    if prompt_text != plain:
        return prompt_text
    placeholder = "\N{SECTION SIGN}content\N{SECTION SIGN}"
    answered = render([*messages, {"role": "assistant", "content": placeholder}], False)
    if not answered.startswith(plain) or placeholder not in answered:
        return plain
    header = answered[len(plain) : answered.index(placeholder)].rstrip(" ")
    return plain + header if header.strip() else plain


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Continue a prompt with a mixture of experts.")
    parser.add_argument("folder", help="what dylora export --format xlora or --format runtime wrote")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--system", help="system message; the prompt is then asked as a chat")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, even if the skills are chats")
    parser.add_argument("--base", help="the base, if it is not where it was at the export")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args(argv)
    try:
        model, tokenizer = load(options.folder, options.base, options.device, getattr(torch, options.dtype))
    except FolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ids = encode_prompt(model, tokenizer, options.prompt, options.system, options.raw)
    inputs = torch.tensor([ids], device=model.device)
    stops = {"stop_strings": model.prompt["stop"], "tokenizer": tokenizer} if model.prompt.get("stop") else {}
    with torch.no_grad():
        answer = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=options.max_tokens, **stops
        )[0]
    is_chat = not options.raw and (options.system is not None or model.prompt.get("kind") == "chat")
    print(tokenizer.decode(answer[len(ids) :] if is_chat else answer, skip_special_tokens=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
