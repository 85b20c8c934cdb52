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

IGNORE_INDEX = -100  # the label that counts for nothing, everywhere in transformers
CHUNK_BYTES = 64 * 2**20  # of float32 logits: large enough for fast products, small beside a model


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
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORE_INDEX).sum()
    divisor = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=hidden_states.device)
    with torch.autocast(device, enabled=False):
        loss, *_ = _linear_cross_entropy(
            hidden_states,
            weight,
            targets,
            divisor,
            torch.is_grad_enabled() and hidden_states.requires_grad,
            torch.is_grad_enabled() and weight.requires_grad,
        )
    return loss


@torch.library.custom_op("scratchgpt::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    divisor: torch.Tensor,
    needs_hidden_grad: bool,
    needs_weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss (), and its gradients by hidden states (N, C) and weight (V, C), each empty if not needed."""
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
        logits = (weight @ chunk.T).float()  # (V, n): this way around the product is the faster one
        if not (needs_hidden_grad or needs_weight_grad):
            loss_sum += functional.cross_entropy(logits.T, target, reduction="sum")
            continue
        # Loss and gradient share the softmax: loss = log(sum(exp)) - logit of the target, gradient = softmax - one-hot.
        columns = torch.arange(len(rows), device=rows.device)
        largest = logits.amax(0)
        loss_sum += (largest - logits[target, columns]).sum()
        exponentials = logits.sub_(largest).exp_()
        total = exponentials.sum(0)
        loss_sum += total.log().sum()
        gradient = exponentials.div_(total * divisor)
        gradient[target, columns] -= 1.0 / divisor
        gradient = gradient.to(weight.dtype)
        if needs_hidden_grad:
            hidden_grad[rows] = gradient.T @ weight
        if needs_weight_grad:
            if weight_grad.dtype == gradient.dtype:
                weight_grad.addmm_(gradient, chunk)
            else:  # half precision: the chunks are summed up in float32
                weight_grad += gradient @ chunk
    return loss_sum / divisor, hidden_grad, weight_grad


def _empty_gradients(
    hidden_states: torch.Tensor, weight: torch.Tensor, needs_hidden_grad: bool, needs_weight_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_grad = torch.empty_like(hidden_states if needs_hidden_grad else hidden_states[:0])
    weight_dtype = torch.promote_types(weight.dtype, torch.float32)
    weight_grad = torch.empty_like(weight if needs_weight_grad else weight[:0], dtype=weight_dtype)
    return hidden_grad, weight_grad


@_linear_cross_entropy.register_fake
def _(hidden_states, weight, targets, divisor, needs_hidden_grad, needs_weight_grad):
    loss = torch.empty((), dtype=torch.float32, device=hidden_states.device)
    return loss, *_empty_gradients(hidden_states, weight, needs_hidden_grad, needs_weight_grad)


def _remember(ctx, inputs, output) -> None:
    hidden_states, weight, _, _, ctx.needs_hidden_grad, ctx.needs_weight_grad = inputs
    ctx.hidden_dtype, ctx.weight_dtype = hidden_states.dtype, weight.dtype
    ctx.save_for_backward(*output[1:])


def _scale(ctx, loss_grad, *_):
    hidden_grad, weight_grad = ctx.saved_tensors
    # Mostly the loss is the end of the graph and there is nothing to scale; a look tells, but on a GPU it would mean waiting,
    # and under a compiler's tracing there is no value to look at.
    can_look = type(loss_grad) is torch.Tensor and loss_grad.device.type == "cpu"
    if not (can_look and loss_grad == 1):
        hidden_grad, weight_grad = hidden_grad * loss_grad, weight_grad * loss_grad
    return (
        hidden_grad.to(ctx.hidden_dtype) if ctx.needs_hidden_grad else None,
        weight_grad.to(ctx.weight_dtype) if ctx.needs_weight_grad else None,
        None,
        None,
        None,
        None,
    )


_linear_cross_entropy.register_autograd(_scale, setup_context=_remember)

__all__ = ["IGNORE_INDEX", "cross_entropy", "linear_cross_entropy", "reduce_losses"]
