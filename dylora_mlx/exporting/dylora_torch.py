"""A mixture of LoRA experts on Gemma 3, in PyTorch: torch, transformers and safetensors, and this one file.

    import torch, dylora_torch
    model, tokenizer = dylora_torch.load("FOLDER", device="cuda", dtype=torch.bfloat16)
    inputs = tokenizer("SELECT", return_tensors="pt").to(model.device)
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))

    python dylora_torch.py FOLDER --prompt "SELECT" --device cuda

The model is transformers' own Gemma 3 with a gate for every token and expert, y = x W + sum_e g_e (alpha_e / r_e) (x A_e) B_e,
so whatever takes a loaded model takes it: generate, pipelines, lm-evaluation-harness (HFLM(pretrained=model)). The router
reads the base's final states, which takes a second pass with a key-value cache of its own, or the input of one layer,
below which nothing is adapted. FOLDER is what `dylora export --format xlora` or `--format runtime` writes; every file of
it is checked against its hash, every weight against its name and shape, and the base against its fingerprint.
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
CACHE = "cache" if "cache" in inspect.signature(Gemma3.forward).parameters else "past_key_values"
"""What this version of transformers calls a cache."""
EPSILON = 1e-6


class FolderError(ValueError):
    """A folder, or a base, that is not what it should be: one line that says what and where."""


class PairedCache(DynamicCache):
    """The adapted pass's keys and values, and in `base` those of the base's pass, which the router reads. said: where the
    router reads the document's mean too, its logits of every token so far, and 1 for each that is no padding, [B, L, E + 1]."""

    said: torch.Tensor | None = None

    def __init__(self, config: Any):
        super().__init__(config=config)
        self.base = DynamicCache(config=config)

    def reset(self) -> None:
        super().reset()
        self.base.reset()
        self.said = None

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        if self.base.get_seq_length():  # empty where the router taps an inner layer
            self.base.crop(*args, **kwargs)
        if self.said is not None:
            self.said = self.said[:, : self.get_seq_length()]

    def reorder_cache(self, *args: Any, **kwargs: Any) -> None:
        super().reorder_cache(*args, **kwargs)
        self.base.reorder_cache(*args, **kwargs)
        if self.said is not None:
            self.said = self.said.index_select(0, (args[0] if args else kwargs["beam_idx"]).to(self.said.device))

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> None:
        super().batch_repeat_interleave(*args, **kwargs)
        self.base.batch_repeat_interleave(*args, **kwargs)
        if self.said is not None:
            self.said = self.said.repeat_interleave(args[0] if args else kwargs["repeats"], dim=0)

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> None:
        super().batch_select_indices(*args, **kwargs)
        self.base.batch_select_indices(*args, **kwargs)
        if self.said is not None:
            self.said = self.said[args[0] if args else kwargs["indices"]]

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self.base.activate_past_recording()


class Route:
    """What one pass reads: its projections the gates of the ranks [B, L, R], or None for the base alone; its router the
    attention mask and the cache."""

    ranks: torch.Tensor | None = None
    mask: Any = None
    cache: PairedCache | None = None


class RoutedLinear(nn.Module):
    """y = x W + ((x A) * G) B, with the factors of all experts side by side: a [inputs, R], b [R, outputs]."""

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


class RoutedGemma3ForCausalLM(Gemma3):
    """Gemma 3 with routed experts; made by `load`.

    names: of the experts by gate column, "base" first; top_k: experts per token, None for all; tap: "final" or a layer;
    context: share of the document's mean in what the router reads; gates: [B, L, E] of the last pass.
    """

    names: list[str]
    top_k: int | None
    router_layer: int | str
    document_mean_weight: float
    gate_weight: torch.Tensor
    gate_bias: torch.Tensor
    rank_scale: torch.Tensor
    gates: torch.Tensor | None = None
    _forced: int | None = None

    def attach(self, folder: Folder) -> None:
        """Give the base the experts and the router of a folder."""
        self.names, self.top_k = folder.names, folder.top_k
        self.router_layer, self.document_mean_weight = folder.router_layer, folder.document_mean_weight
        self._route, norm = Route(), self.model.norm.weight
        place = {"device": norm.device}
        self.register_buffer("gate_weight", folder.weight.to(**place), persistent=False)
        self.register_buffer("gate_bias", folder.bias.to(**place), persistent=False)
        self.register_buffer("rank_scale", folder.rank_scale().to(**place), persistent=False)
        for path in folder.projections():
            parent, name = path.rsplit(".", 1)
            owner = self.get_submodule(parent)
            linear = getattr(owner, name)
            factors = folder.factors(path, linear.in_features, linear.out_features)
            a, b = (factor.to(dtype=norm.dtype, **place) for factor in factors)
            setattr(owner, name, RoutedLinear(linear, a, b, self._route))
        # Gemma was trained with this scale in bfloat16; in float32 transformers would not round it.
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=torch.bfloat16).float()
        self.model.embed_tokens.embed_scale.fill_(scale)
        if self.router_layer != "final":
            self.model.layers[int(self.router_layer)].register_forward_pre_hook(self._read, with_kwargs=True)

    @contextmanager
    def routed_to(self, name: str) -> Iterator[None]:
        """Within this, every token goes to one expert ("base": to none). Raises KeyError for a name that is not there."""
        if name not in self.names:
            raise KeyError(f"no expert '{name}', there are {', '.join(self.names)}")
        before, self._forced = self._forced, self.names.index(name)
        try:
            yield
        finally:
            self._forced = before

    def gates_of(self, features: torch.Tensor) -> torch.Tensor:
        """Gates float32 [B, L, E] of features [B, L, D]: softmax over the k largest logits; of equal ones the first."""
        logits = self._in_context(features.float() @ self.gate_weight.T + self.gate_bias)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            largest = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., : self.top_k]
            kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, largest, True)
            logits = logits.masked_fill(~kept, float("-inf"))
        return torch.softmax(logits, dim=-1)

    def _in_context(self, logits: torch.Tensor) -> torch.Tensor:
        """(1 - context) of a token's logits [B, L, E] and `context` of their mean so far; of padding nothing counts."""
        if not self.document_mean_weight:
            return logits
        mask, cache, length = self._route.mask, self._route.cache, logits.shape[1]
        flat = isinstance(mask, torch.Tensor) and mask.dim() == 2
        real = mask[:, -length:, None].to(logits) if flat else torch.ones_like(logits[..., :1])
        said = torch.cat([logits * real, real], -1)
        if cache is not None:
            said = cache.said = said if cache.said is None else torch.cat([cache.said, said], 1)
        total = said.cumsum(1)[:, -length:]
        mean = total[..., :-1] / total[..., -1:].clamp(min=1)
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
        """As transformers' own, whatever it calls the cache. Raises TypeError for one of another kind than `PairedCache`."""
        past_key_values = kwargs.pop("cache", None) if past_key_values is None else past_key_values
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = PairedCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, PairedCache):
            raise TypeError("past_key_values: this model needs a dylora_torch.PairedCache(model.config)")
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        given |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        self._route.mask, self._route.cache = attention_mask, past_key_values
        try:
            if self._forced is not None:
                size = (inputs_embeds if input_ids is None else input_ids).shape[:2]  # pyright: ignore
                expert_id = torch.arange(len(self.names), device=self.gate_bias.device) == self._forced
                self._open(expert_id.float().expand(*size, -1))
            else:
                self._check_read(past_key_values)
                if self.router_layer == "final":
                    cache = None if past_key_values is None else past_key_values.base
                    with torch.no_grad():
                        read = self.model(**given, **{CACHE: cache}, use_cache=use_cache)
                    self._open(self.gates_of(read.last_hidden_state))
            return super().forward(
                **given,
                **{CACHE: past_key_values},
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        finally:
            self._route.ranks = self._route.mask = self._route.cache = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, with both caches."""
        config = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("use_cache", getattr(config, "use_cache", True)) is not False:
            given = [value for name in ("cache", "past_key_values") if (value := kwargs.pop(name, None)) is not None]
            kwargs[CACHE] = given[0] if given else PairedCache(self.config)
        return super().generate(*args, **kwargs)

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("keep the exported folder: it is this model; nothing else reads its weights")

    def _check_read(self, cache: PairedCache | None) -> None:
        """Raises ValueError for a cache of tokens that the router has not read."""
        if cache is None:
            return
        said = 0 if cache.said is None else cache.said.shape[1]
        lengths = [cache.base.get_seq_length()] * (self.router_layer == "final")
        lengths += [said] * bool(self.document_mean_weight)
        if any(length != cache.get_seq_length() for length in lengths):
            raise ValueError("past_key_values: filled within routed_to, the router has read none of it; begin anew")

    def _open(self, gates: torch.Tensor) -> None:
        self.gates = gates
        self._route.ranks = (gates @ self.rank_scale).to(self.model.norm.weight.dtype)

    def _read(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the layer that the router taps: gates from its normalised input."""
        if self._forced is None:
            h = args[0] if args else kwargs["hidden_states"]
            wide = h.detach().float()
            features = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(h.dtype)
            self._open(self.gates_of(features))


class Folder:
    """An exported folder, read and checked. Raises FolderError."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = self._json(MANIFEST)
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
        gate = self._weights("adapter_model.safetensors", self._gate_shapes())
        self.weight, self.bias = gate[CLASSIFIER + "weight"].float(), gate[CLASSIFIER + "bias"].float()
        self._adapters = [
            self._weights(f"{expert_id}/adapter_model.safetensors", None) for expert_id in range(len(self.names))
        ]
        for expert_id, arrays in enumerate(self._adapters):
            self._check_adapter(expert_id, arrays)

    def _read_manifest(self) -> None:
        said, base = self.manifest, self.manifest["base"]
        self.base_name, self.fingerprint = str(base["name"]), str(base["fingerprint"])
        self.first, self.layers, self.hidden = int(said["first_layer"]), int(base["layers"]), int(base["hidden_size"])
        self.targets = [str(name) for name in said["projections"]]
        self.router_layer, self.top_k = said["router_layer"], said["top_k"]
        self.names = [str(expert["name"]) for expert in said["experts"]]
        self.ranks = [int(expert["rank"]) for expert in said["experts"]]
        self.alphas = [float(expert["alpha"]) for expert in said["experts"]]
        self.document_mean_weight = float(said.get("document_mean_weight", 0.0))
        if not 0 <= self.document_mean_weight <= 1:
            raise ValueError(f"document_mean_weight {self.document_mean_weight!r}")
        if self.first not in range(self.layers):
            raise ValueError(f"first_layer {self.first!r}")
        if self.router_layer != "final" and self.router_layer not in range(self.first + 1):
            raise ValueError(f"router_layer {self.router_layer!r}")
        if self.top_k is not None and self.top_k not in range(1, len(self.names) + 1):
            raise ValueError(f"top_k {self.top_k!r}")
        if min(self.ranks, default=0) < 1:
            raise ValueError(f"rank in {self.ranks}")

    def projections(self) -> list[str]:
        """Paths of the projections that carry experts, as in the base."""
        return [
            f"model.layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
            for layer in range(self.first, self.layers)
            for name in self.targets
        ]

    def factors(self, path: str, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """a [inputs, R] and b [R, outputs] of a projection: the experts' factors side by side."""
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
        """[E, R]: alpha_e / r_e where a rank belongs to an expert."""
        owner = torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))
        scale = torch.tensor([alpha / rank for alpha, rank in zip(self.alphas, self.ranks, strict=True)])
        return (torch.arange(len(self.ranks))[:, None] == owner) * scale[owner]

    def _gate_shapes(self) -> dict[str, tuple[int, ...]]:
        count = len(self.names)
        return {CLASSIFIER + "weight": (count, self.hidden), CLASSIFIER + "bias": (count,)}

    def _json(self, name: str) -> dict:
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FolderError(f"{self.path / name}: missing; give a folder that dylora export wrote") from error
        except (OSError, ValueError, RecursionError) as error:
            raise FolderError(f"{self.path / name}: not readable as JSON") from error
        if not isinstance(found, dict):
            raise FolderError(f"{self.path / name}: not a JSON object")
        return found

    def _check_hashes(self) -> None:
        hashes = self.manifest.get("sha256")
        if not isinstance(hashes, dict):
            raise FolderError(f"{self.path / MANIFEST}: lists no files, so this is no complete export")
        for name, expected in hashes.items():
            path = self.path / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise FolderError(f"{self.path / MANIFEST}: '{name}' leads out of the folder")
            if not os.path.isfile(path):  # of Path's own, a name that is too long raises
                raise FolderError(f"{path}: missing from the folder")
            if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
                raise FolderError(f"{path}: damaged or changed, its sha256 is not the one in {MANIFEST}")

    def _weights(self, name: str, shapes: dict[str, tuple[int, ...]] | None) -> dict[str, torch.Tensor]:
        if name not in self.manifest["sha256"]:
            raise FolderError(f"{self.path / MANIFEST}: lists no '{name}'")
        try:
            arrays = load_file(self.path / name)
        except Exception as error:
            raise FolderError(f"{self.path / name}: not a safetensors file ({error})") from error
        return arrays if shapes is None else self._checked(name, arrays, shapes)

    def _checked(
        self, name: str, arrays: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        for key in arrays.keys() ^ shapes.keys():
            raise FolderError(f"{self.path / name}: '{key}' is {'missing' if key in shapes else 'not expected'}")
        for key, shape in shapes.items():
            if tuple(arrays[key].shape) != shape:
                raise FolderError(f"{self.path / name}: '{key}' has shape {tuple(arrays[key].shape)}, not {shape}")
        return arrays

    def _check_adapter(self, expert_id: int, arrays: dict[str, torch.Tensor]) -> None:
        """Every projection has its two factors, of the rank that is said; sizes are checked again by the base's."""
        name, rank = f"{expert_id}/adapter_model.safetensors", self.ranks[expert_id]
        if (self.layers - self.first) * len(self.targets) > len(arrays):  # before as many names are made
            raise FolderError(f"{self.path / name}: fewer weights than layers and projections in {MANIFEST}")
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.projections():
            for letter in "AB":
                key = f"base_model.model.{path}.lora_{letter}.weight"
                size = tuple(arrays[key].shape) if key in arrays else (0, 0)
                shapes[key] = (rank, size[-1]) if letter == "A" else (size[0], rank)
        self._checked(name, arrays, shapes)
        stated = self._json(f"{expert_id}/adapter_config.json")
        if (stated.get("r"), stated.get("lora_alpha")) != (rank, self.alphas[expert_id]):
            raise FolderError(
                f"{self.path / str(expert_id)}/adapter_config.json: r or lora_alpha is not that of {MANIFEST}"
            )


def fingerprint(folder: Path) -> str:
    """What a base is known by: sha256 over its architecture, and each weight file's name, header and tensor beginnings."""
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
    """Where the base lies on this machine: the one that is named, or else the one the experts were trained on."""
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
        found = fingerprint(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FolderError(f"{path}: damaged, its config or weights cannot be read") from error
    if found != folder.fingerprint:
        raise FolderError(f"{path}: not the base that these experts were trained on ({folder.base_name})")
    return path


def load(
    folder: str | Path,
    base: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[RoutedGemma3ForCausalLM, Any]:
    """The mixture, ready to be used, and its tokenizer.

    base: where the base is if not where it was; options: of transformers' from_pretrained. Raises FolderError for a
    folder that is damaged or incomplete, or for another base.
    """
    found = Folder(folder)
    place = base_folder(found, base)
    model = RoutedGemma3ForCausalLM.from_pretrained(place, dtype=dtype, **options).to(device)
    model.attach(found)
    return model.eval(), AutoTokenizer.from_pretrained(place)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Continue a prompt with a mixture of experts.")
    parser.add_argument("folder", help="what dylora export --format xlora or --format runtime wrote")
    parser.add_argument("--prompt", required=True)
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
    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        print(
            tokenizer.decode(model.generate(**inputs, max_new_tokens=options.max_tokens)[0], skip_special_tokens=True)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
