"""Count floating-point operations (FLOPs) and parameters of a model.

Only matrix products are counted, a multiply-add as two operations.
"""

from __future__ import annotations

from mlx.utils import tree_flatten

from dylora_mlx.model.decoder.decoder import RoutedDecoder


def step_flops(
    model: RoutedDecoder, rows: int, length: int, targets: int, features_known: bool, ranks: int | None = None
) -> int:
    """Return the FLOPs of one micro-batch, forward and backward.

    In the frozen base, the backward pass computes gradients of activations only, from the lowest layer with experts
    upwards. Attention counts full score matrices, of which a CPU computes little more than half.

    Args:
        model: The routed model.
        rows: Rows of the batch.
        length: Positions per row.
        targets: Positions with a loss.
        features_known: Whether the router's features come from the feature cache, which saves the base pass.
        ranks: LoRA ranks that each token is multiplied with; None for the ranks of all experts.
    """
    layers = model.base.args.num_hidden_layers
    routed_layers = layers - min(model.shapes)
    projections, attention = _layer_flops(model, length)
    forwards = _num_forward_layers(model, features_known) + (routed_layers if model.grad_checkpoint else 0)
    base_flops = forwards * (projections + attention) + routed_layers * (projections + 2 * attention)
    ranks = sum(expert.rank for expert in model.experts) if ranks is None else ranks
    # Experts: forward, gradient of the input, gradient of the factors. Head: forward and gradient of its input.
    return rows * length * (base_flops + 3 * _lora_flops(model, ranks)) + 2 * head_flops(model, targets)


def evaluation_flops(
    model: RoutedDecoder, rows: int, length: int, targets: int, features_known: bool, ranks: int
) -> int:
    """Return the FLOPs of evaluating one batch, forward only. Arguments as in `step_flops`."""
    base_flops = _num_forward_layers(model, features_known) * sum(_layer_flops(model, length))
    return rows * length * (base_flops + _lora_flops(model, ranks)) + head_flops(model, targets)


def base_pass_flops(model: RoutedDecoder, rows: int, length: int) -> int:
    """Return the FLOPs of the base pass over one batch, without the head."""
    return rows * length * model.base.args.num_hidden_layers * sum(_layer_flops(model, length))


def _layer_flops(model: RoutedDecoder, length: int) -> tuple[int, int]:
    """Return forward FLOPs per token and layer: linear projections (attention and MLP), and attention itself."""
    args, head_dim = model.base.args, model.family.head_dim
    widths = head_dim * 2 * (args.num_attention_heads + args.num_key_value_heads)
    projections = 2 * args.hidden_size * (widths + 3 * args.intermediate_size)
    return projections, 4 * length * head_dim * args.num_attention_heads


def _num_forward_layers(model: RoutedDecoder, features_known: bool) -> int:
    """Return the number of layer passes per token.

    Twice the depth if the router reads final states that are not cached: a base pass, then the adapted pass.
    """
    return model.base.args.num_hidden_layers * (2 if model.router_layer == "final" and not features_known else 1)


def _lora_flops(model: RoutedDecoder, ranks: int) -> int:
    """Return forward FLOPs per token through `ranks` LoRA ranks in every adapted projection."""
    return 2 * ranks * sum(i + o for names in model.shapes.values() for i, o in names.values())


def head_flops(model: RoutedDecoder, targets: int) -> int:
    """Return forward FLOPs of the output head on `targets` positions."""
    return 2 * targets * model.base.args.hidden_size * model.base.args.vocab_size


def trainable_parameters(model: RoutedDecoder) -> int:
    """Return the number of trainable parameters: unfrozen experts and the router."""
    return sum(v.size for v in dict(tree_flatten(model.trainable_parameters())).values())


def base_parameters(model: RoutedDecoder) -> int:
    """Return the number of parameters of the base model, of a quantised one as before it was quantised."""
    from mlx_lm.utils import get_total_parameters

    return get_total_parameters(model.base)
