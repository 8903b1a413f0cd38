"""Floating-point operations and parameters of a model, counted."""

from __future__ import annotations

from mlx.utils import tree_flatten

from dylora_mlx.model.decoder.decoder import RoutedDecoder


def step_flops(
    model: RoutedDecoder, rows: int, length: int, targets: int, features_known: bool, ranks: int | None = None
) -> int:
    """Floating-point operations of one micro-batch's matrix products, forward and backward, a multiply-add as two.

    The backward computes gradients of activations only, from the lowest layer that carries experts upwards; attention
    is counted over whole score matrices, of which a CPU computes little more than half. ranks: that a token is multiplied
    with; None for those of all experts.
    """
    layers = model.base.args.num_hidden_layers
    routed = layers - min(model.shapes)
    projections, attention = _layer_flops(model, length)
    forwards = _num_forward_layers(model, features_known) + (routed if model.grad_checkpoint else 0)
    trunk = forwards * (projections + attention) + routed * (projections + 2 * attention)
    ranks = sum(expert.rank for expert in model.experts) if ranks is None else ranks
    return rows * length * (trunk + 3 * _lora_flops(model, ranks)) + 2 * head_flops(model, targets)


def evaluation_flops(
    model: RoutedDecoder, rows: int, length: int, targets: int, features_known: bool, ranks: int
) -> int:
    """Those of one batch's losses, forward only."""
    trunk = _num_forward_layers(model, features_known) * sum(_layer_flops(model, length))
    return rows * length * (trunk + _lora_flops(model, ranks)) + head_flops(model, targets)


def reading_flops(model: RoutedDecoder, rows: int, length: int) -> int:
    """Those of the base's pass over one batch, without the head."""
    return rows * length * model.base.args.num_hidden_layers * sum(_layer_flops(model, length))


def _layer_flops(model: RoutedDecoder, length: int) -> tuple[int, int]:
    """A token's forward: the projections, and attention."""
    args, head_dim = model.base.args, model.family.head_dim
    widths = head_dim * 2 * (args.num_attention_heads + args.num_key_value_heads)
    projections = 2 * args.hidden_size * (widths + 3 * args.intermediate_size)
    return projections, 4 * length * head_dim * args.num_attention_heads


def _num_forward_layers(model: RoutedDecoder, features_known: bool) -> int:
    """Layers that a token goes through."""
    return model.base.args.num_hidden_layers * (2 if model.router_layer == "final" and not features_known else 1)


def _lora_flops(model: RoutedDecoder, ranks: int) -> int:
    """A token's forward through so many ranks of experts."""
    return 2 * ranks * sum(i + o for names in model.shapes.values() for i, o in names.values())


def head_flops(model: RoutedDecoder, targets: int) -> int:
    """The head on so many positions, forward."""
    return 2 * targets * model.base.args.hidden_size * model.base.args.vocab_size


def trainable_parameters(model: RoutedDecoder) -> int:
    return sum(v.size for v in dict(tree_flatten(model.trainable_parameters())).values())


def base_parameters(model: RoutedDecoder) -> int:
    return sum(v.size for v in dict(tree_flatten(model.base.parameters())).values())
