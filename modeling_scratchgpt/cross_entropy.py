"""Cross-entropy: plain, and straight from hidden states so that the logits are never all there at once.

For N tokens and a vocabulary of V, the logits and their gradients are two matrices N x V; at GPT-2's vocabulary they are most
of the memory of a training step. Here they exist for a few hundred tokens at a time: a chunk's logits are computed, turned into
its part of the loss and, in place, into its part of the gradients, and forgotten. After Liger Kernel (Hsu et al., 2024).

Notable:
- Gradients are computed in the forward pass, where the logits are; backward only scales them. So a training step does the same
  three matrix products as usual, and no fourth to get the logits back.
- Tokens that do not count (-100) cost nothing: they are left out before the first product.
- It is one opaque operator: `torch.compile` and autograd see inputs and outputs, not the loop.
"""

import torch
from torch.nn import functional

IGNORE_INDEX = -100
CHUNK_BYTES = 32 * 2**20  # of float32 logits: near a CPU's cache, large enough for fast products


def reduce_losses(losses: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """The mean of the losses, or their sum divided by `num_items_in_batch` when that is given."""
    if num_items_in_batch is None:
        return losses.mean()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses.sum() / num_items_in_batch


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """Cross-entropy in float32 of logits (..., classes) on labels (...), reduced over those that are not -100."""
    logits, labels = logits.float().flatten(0, -2), labels.to(logits.device).flatten()
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction=reduction)
    return reduce_losses(loss, num_items_in_batch)


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """`cross_entropy(hidden_states @ weight.T, targets)`, lean.

    Args:
        hidden_states: (..., C), what the head would read.
        weight: (V, C), the head's weight.
        targets: (...), the right ids, already shifted; -100 counts for nothing.
        num_items_in_batch: what the sum of the losses is divided by; the number of tokens that count when not given.

    Returns:
        The loss in nats, a float32 scalar. Like torch's, it is nan when it is a mean over no tokens.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):  # as autocast does for a linear layer
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    hidden_states, targets = hidden_states.reshape(-1, hidden_states.shape[-1]), targets.reshape(-1)
    with torch.autocast(device, enabled=False):
        loss_sum, *_ = _linear_cross_entropy(
            hidden_states,
            weight,
            targets,
            torch.is_grad_enabled() and hidden_states.requires_grad,
            torch.is_grad_enabled() and weight.requires_grad,
        )
    return reduce_losses(loss_sum, (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)


@torch.library.custom_op("scratchgpt::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, needs_hidden_grad: bool, needs_weight_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the losses (), and its gradients by hidden states (N, C) and weight (V, C), each empty if not needed."""
    hidden_grad, weight_grad = _empty_gradients(hidden_states, weight, needs_hidden_grad, needs_weight_grad)
    hidden_grad.zero_()
    weight_grad.zero_()
    loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
    counted = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    everything = len(counted) == len(targets)
    chunk_size = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    for rows in counted.split(chunk_size):
        # A run of rows is a view; picked rows are a copy.
        chunk = hidden_states[rows[0] : rows[-1] + 1] if everything else hidden_states[rows]  # (n, C)
        target = targets[rows]
        logits = (chunk @ weight.T).float()  # (n, V)
        if not (needs_hidden_grad or needs_weight_grad):
            loss_sum += functional.cross_entropy(logits, target, reduction="sum")
            continue
        # Loss and gradient share the softmax: loss = log(sum(exp)) - logit of the target, gradient = softmax - one-hot.
        target_logits = logits.gather(1, target[:, None])
        largest = logits.amax(1, keepdim=True)
        exponentials = logits.sub_(largest).exp_()
        total = exponentials.sum(1, keepdim=True)
        loss_sum += (total.log() + largest - target_logits).sum()
        gradient = exponentials.div_(total)
        gradient.scatter_add_(1, target[:, None], torch.full_like(target_logits, -1.0))
        gradient = gradient.to(weight.dtype)
        if needs_hidden_grad:
            hidden_grad[rows] = gradient @ weight
        if needs_weight_grad:
            if weight_grad.dtype == gradient.dtype:
                weight_grad.addmm_(gradient.T, chunk)
            else:  # half precision: the chunks are summed up in float32
                weight_grad += gradient.T @ chunk
    return loss_sum, hidden_grad, weight_grad


def _empty_gradients(
    hidden_states: torch.Tensor, weight: torch.Tensor, needs_hidden_grad: bool, needs_weight_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_grad = torch.empty_like(hidden_states if needs_hidden_grad else hidden_states[:0])
    weight_dtype = torch.promote_types(weight.dtype, torch.float32)
    weight_grad = torch.empty_like(weight if needs_weight_grad else weight[:0], dtype=weight_dtype)
    return hidden_grad, weight_grad


@_linear_cross_entropy.register_fake
def _(hidden_states, weight, targets, needs_hidden_grad, needs_weight_grad):
    loss_sum = torch.empty((), dtype=torch.float32, device=hidden_states.device)
    return loss_sum, *_empty_gradients(hidden_states, weight, needs_hidden_grad, needs_weight_grad)


def _remember(ctx, inputs, output) -> None:
    _, weight, _, ctx.needs_hidden_grad, ctx.needs_weight_grad = inputs
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(*output[1:])


def _scale(ctx, loss_grad, *_):
    hidden_grad, weight_grad = ctx.saved_tensors
    return (
        (hidden_grad * loss_grad).to(hidden_grad.dtype) if ctx.needs_hidden_grad else None,
        (weight_grad * loss_grad).to(ctx.weight_dtype) if ctx.needs_weight_grad else None,
        None,
        None,
        None,
    )


_linear_cross_entropy.register_autograd(_scale, setup_context=_remember)

__all__ = ["cross_entropy", "linear_cross_entropy", "reduce_losses"]
