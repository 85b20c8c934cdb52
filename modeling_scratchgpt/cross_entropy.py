"""Losses: cross-entropy of logits, and of hidden states without materializing the logits.

For N tokens and a vocabulary of V, the logits and their gradients are two N x V matrices: with GPT-2's vocabulary, most of the
memory of a training step. Here they are computed in chunks of a few hundred tokens: the logits of a chunk become its part of
the loss and, in place, its part of the gradients. After Liger Kernel (Hsu et al., 2024).

Notable:
- Gradients are computed in the forward pass, while the logits exist; backward only scales them: no product is repeated.
- Ignored tokens (-100) cost nothing: they are removed before the first product.
- It is one opaque operator: `torch.compile` and autograd see inputs and outputs, not the loop.
- In a compiled model on a GPU the softmax is compiled, too: four passes over the logits instead of twelve.
- Other derivatives than the first (`create_graph=True`, forward mode, `torch.func`) are computed through the logits.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from transformers import PreTrainedConfig

NumItems = Tensor | int | None
IGNORE_INDEX = -100  # `ignore_index` everywhere in transformers
LINEAR_FORWARD = nn.Linear.forward  # some libraries replace it
CHUNK_BYTES = 64 * 2**20  # of float32 logits: large enough for fast products, small compared with a model
CUDA_CHUNK_BYTES = 2**30  # GPUs have faster products, and each chunk reads and writes the gradient of the weight once more
ALIGNMENT = 64  # rows: tensor cores are slow if a side of a product is odd


def reduce_losses(losses: Tensor, num_items_in_batch: NumItems) -> Tensor:
    """Reduce losses to their mean, or to their sum divided by `num_items_in_batch` if given."""
    if num_items_in_batch is None:
        return losses.mean()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses.sum() / num_items_in_batch


def cross_entropy(logits: Tensor, labels: Tensor, num_items_in_batch: NumItems) -> Tensor:
    """Cross-entropy in float32 of logits (..., classes) on labels (...), ignoring labels of -100."""
    logits, labels = logits.float().flatten(0, -2), labels.to(logits.device).flatten()
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction=reduction)
    return reduce_losses(loss, num_items_in_batch)


def span_loss(logits: Tensor, positions: Tensor, num_items_in_batch: NumItems) -> Tensor:
    """Cross-entropy of logits (B, T) on positions (B,); those outside the text, such as -1, are ignored."""
    positions = positions.flatten()
    is_outside = (positions < 0) | (positions >= logits.shape[1])
    if num_items_in_batch is None:
        num_items_in_batch = (~is_outside).sum().clamp(min=1)  # no mean over nothing: a batch may have no answer
    return cross_entropy(logits, positions.masked_fill(is_outside, IGNORE_INDEX), num_items_in_batch)


def classification_loss(logits: Tensor, labels: Tensor, config: PreTrainedConfig, num_items_in_batch: NumItems) -> Tensor:
    """Loss of logits (B, num_labels) on classes (B,), or on class probabilities or targets (B, num_labels).

    As in transformers, `config.problem_type` is inferred from the labels and set if it is None.
    """
    if config.problem_type is None and config.num_labels == 1:
        config.problem_type = "regression"
    elif config.problem_type is None:
        is_class = labels.dtype in (torch.long, torch.int)
        config.problem_type = "single_label_classification" if is_class else "multi_label_classification"
    if config.problem_type == "single_label_classification" and not labels.is_floating_point():
        return cross_entropy(logits, labels, num_items_in_batch)
    logits, labels = logits.float(), labels.to(logits.device).float().view_as(logits)
    if config.problem_type == "single_label_classification":
        losses = functional.cross_entropy(logits, labels, reduction="none")[:, None]
        losses = losses.expand_as(labels)  # Trainer counts label elements
    elif config.problem_type == "regression":
        losses = functional.mse_loss(logits, labels, reduction="none")
    else:
        losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return reduce_losses(losses, num_items_in_batch)


def is_plain_head(head: nn.Module) -> bool:
    """Check that a call of the head only multiplies with a matrix in memory, so that its weight can be used directly.

    Not so with hooks (pruning, some norms of the weight), another `forward` (softcap, offloading), or another type of layer or
    weight (LoRA, quantization, parametrization, tensor parallelism, sparse): then the head must be called.
    """
    weight = head.weight
    if type(head) is not nn.Linear or type(weight) not in (nn.Parameter, Tensor) or weight.device.type == "meta":
        return False
    if nn.Linear.forward is not LINEAR_FORWARD or weight.layout != torch.strided:
        return False
    hooks = [f"{kind}_hooks" for kind in ("_forward", "_forward_pre", "_backward", "_backward_pre")]
    has_hooks = any(getattr(head, name) or getattr(nn.modules.module, f"_global{name}") for name in hooks)
    return head.bias is None and "forward" not in vars(head) and not has_hooks


def linear_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor, num_items_in_batch: NumItems = None) -> Tensor:
    """Memory-efficient `cross_entropy(hidden_states @ weight.T, targets)`.

    Args:
        hidden_states: (..., C), the input of the head.
        weight: (V, C), the head's weight.
        targets: (...), ids, already shifted; -100 is ignored.
        num_items_in_batch: divisor of the summed loss. Default: the number of targets that are not ignored.

    Returns:
        The loss in nats, a float32 scalar; nan for a mean over no tokens, as in torch.

    Raises:
        ValueError: the targets have another shape than the inputs, or are neither ids nor -100.
    """
    if targets.shape != hidden_states.shape[:-1]:
        raise ValueError(f"labels are {tuple(targets.shape)}: they must be {tuple(hidden_states.shape[:-1])}, like the inputs.")
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:  # as autocast does for a linear layer
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
    hidden_states, targets = hidden_states.reshape(-1, hidden_states.shape[-1]), targets.reshape(-1)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORE_INDEX).sum()
    divisor = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=hidden_states.device)
    needs_grad = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_states, weight)]
    with torch.autocast(device, enabled=False):
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return _loss_from_logits(hidden_states, weight, targets, divisor)
        is_compiled = torch.compiler.is_compiling() and device == "cuda"  # on a CPU it would not be faster
        return loss_and_gradients(hidden_states, weight, targets, divisor, *needs_grad, is_compiled)[0]


def _loss_from_logits(hidden_states: Tensor, weight: Tensor, targets: Tensor, divisor: Tensor) -> Tensor:
    """The same loss, of which autograd can compute any derivative."""
    return cross_entropy(functional.linear(hidden_states, weight.to(hidden_states.dtype)), targets, divisor)


def chunk_rows(weight: Tensor) -> int:
    """The number of tokens whose logits exist at once."""
    rows = (CUDA_CHUNK_BYTES if weight.device.type == "cuda" else CHUNK_BYTES) // (4 * weight.shape[0])
    return rows // ALIGNMENT * ALIGNMENT or max(1, rows)


def _operator_name() -> str:
    """A name that is not taken: a model directory has its own copy of this file, and torch destroys what is defined again."""
    name = "loss_and_gradients"
    while hasattr(torch.ops.scratchgpt, name):
        name += "_"
    return f"scratchgpt::{name}"


# A CUDA graph cannot contain the operator, because it waits for the number of targets that are not ignored.
@torch.library.custom_op(_operator_name(), mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def loss_and_gradients(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    divisor: Tensor,
    needs_hidden_grad: bool,
    needs_weight_grad: bool,
    is_compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss () and its gradients with respect to hidden states (N, C) and weight (V, C), empty if not needed.

    In float16 the gradients are not yet divided by the divisor: small ones would become zero before the loss scale is applied.
    """
    loss_of_logits = torch.compile(_loss_of_logits) if is_compiled else _loss_of_logits
    gradient_divisor = torch.ones_like(divisor) if hidden_states.dtype == torch.float16 else divisor
    hidden_grad, weight_grad = _zero_gradients(hidden_states, weight, needs_hidden_grad, needs_weight_grad)
    weight = weight.to(hidden_states.dtype)  # under autocast; here, so that no copy is kept for the backward pass
    loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
    scored = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    all_scored = len(scored) == len(targets)
    chunk_size = chunk_rows(weight)
    for start in range(0, len(scored), chunk_size):
        # A slice is a view; indexing would copy.
        rows = slice(start, start + chunk_size) if all_scored else scored[start : start + chunk_size]
        chunk, target = hidden_states[rows], targets[rows]  # (n, C), (n,)
        logits = weight @ chunk.T  # (V, n): faster than its transpose
        if not (needs_hidden_grad or needs_weight_grad):
            loss_sum += functional.cross_entropy(logits.float().T, target, reduction="sum")
            continue
        loss, gradient = loss_of_logits(logits, target, _select(logits, target), gradient_divisor)
        loss_sum += loss
        if needs_hidden_grad:
            hidden_grad[rows] = gradient.T @ weight
        if needs_weight_grad:
            if weight_grad.dtype == gradient.dtype:
                weight_grad.addmm_(gradient, chunk)
            elif weight.device.type == "cuda" and torch.version.hip is None:
                torch.addmm(weight_grad, gradient, chunk, out_dtype=weight_grad.dtype, out=weight_grad)
            else:  # half precision: accumulate in float32
                weight_grad += gradient @ chunk
    return loss_sum / divisor, hidden_grad, weight_grad


def _loss_of_logits(logits: Tensor, target: Tensor, target_logits: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss () of logits (V, n) on ids (n,), and its gradient (V, n) over the divisor. May destroy the logits.

    They share the softmax: loss = log(sum(exp)) - logit of the target, gradient = softmax - one-hot.
    """
    dtype, logits = logits.dtype, logits.float()
    largest = logits.amax(0)
    loss = (largest - target_logits).sum()
    exponentials = logits.sub_(largest).exp_()
    total = exponentials.sum(0)
    loss += total.log().sum()
    gradient = exponentials.div_(total * divisor)
    places = target, torch.arange(len(target), device=target.device)
    target_gradient = gradient[places] - 1.0 / divisor  # in float32
    gradient = gradient.to(dtype)
    gradient[places] = target_gradient.to(dtype)
    return loss, gradient


def _select(logits: Tensor, target: Tensor) -> Tensor:
    """The logits (of V, n) of the targets (n,). Unlike indexing, `gather` refuses negative ids, and does not wait for a GPU."""
    try:
        return logits.gather(0, target[None])[0]
    except RuntimeError as error:
        raise ValueError(f"labels must be ids (0 to {len(logits) - 1}) or {IGNORE_INDEX}: {error}.") from error


def _zero_gradients(
    hidden_states: Tensor, weight: Tensor, needs_hidden_grad: bool, needs_weight_grad: bool
) -> tuple[Tensor, Tensor]:
    hidden_grad = torch.zeros_like(hidden_states if needs_hidden_grad else hidden_states[:0])
    weight_dtype = torch.promote_types(weight.dtype, torch.float32)
    return hidden_grad, torch.zeros_like(weight if needs_weight_grad else weight[:0], dtype=weight_dtype)


@loss_and_gradients.register_fake
def _(hidden_states, weight, targets, divisor, needs_hidden_grad, needs_weight_grad, is_compiled=False):
    loss = torch.empty((), dtype=torch.float32, device=hidden_states.device)
    return loss, *_zero_gradients(hidden_states, weight, needs_hidden_grad, needs_weight_grad)


def _save_gradients(ctx, inputs, output) -> None:
    *tensors, ctx.needs_hidden_grad, ctx.needs_weight_grad, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _scale_gradients(ctx, loss_grad, *_):
    *tensors, hidden_grad, weight_grad = ctx.saved_tensors
    needed = ctx.needs_hidden_grad, ctx.needs_weight_grad
    if torch.is_grad_enabled():  # create_graph=True: the gradients must be functions of the inputs
        with torch.autocast(loss_grad.device.type, enabled=False):
            # Views, since with tied weights the hidden states depend on the weight, too.
            hidden_states, weight = (tensor.view_as(tensor) for tensor in tensors[:2])
            loss = _loss_from_logits(hidden_states, weight, *tensors[2:])
            hidden_grad, weight_grad = (
                torch.autograd.grad(loss, tensor, loss_grad, create_graph=True)[0] if is_needed else None
                for tensor, is_needed in zip((hidden_states, weight), needed, strict=True)
            )
        return hidden_grad, weight_grad, None, None, None, None, None
    scale = loss_grad / tensors[3] if tensors[0].dtype == torch.float16 else loss_grad
    # Usually the scale is 1 and skipped, but not if the saved gradients may be needed again, since autograd keeps what it gets.
    # Reading the scale would synchronize a GPU, and a traced or batched tensor has no value.
    is_traced = type(scale) is not Tensor or torch._C._functorch.is_legacy_batchedtensor(scale)
    if is_traced or scale.device.type != "cpu" or torch._C._autograd._get_current_graph_task_keep_graph() or scale != 1:
        hidden_grad, weight_grad = hidden_grad * scale, weight_grad * scale
    hidden_grad = hidden_grad.to(tensors[0].dtype) if ctx.needs_hidden_grad else None
    weight_grad = weight_grad.to(tensors[1].dtype) if ctx.needs_weight_grad else None
    return hidden_grad, weight_grad, None, None, None, None, None


loss_and_gradients.register_autograd(_scale_gradients, setup_context=_save_gradients)
