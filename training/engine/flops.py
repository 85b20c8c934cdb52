"""Parameters and FLOPs of a model, from its config alone; and the peak speed of the device.

FLOPs are those of the matrix products, one multiplication and one addition per weight: 2 forward, 4 backward.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.benchmark import Timer

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM

# Words in the names of parameters; the last that occurs decides.
PARTS = {
    "embed_tokens": "embeddings", "embed_positions": "positions", "self_attn": "attention", "mlp": "MLP", "norm": "norms",
    "lm_head": "head",
}  # fmt: skip
SECONDS_PER_SIZE, MAX_PRODUCT_SECONDS = 0.02, 0.1  # of the measurement of a device's peak


def meta_model(config: ScratchGPTConfig) -> ScratchGPTForCausalLM:
    """The language model on the meta device, where tensors have shapes but no memory."""
    with torch.device("meta"):
        return ScratchGPTForCausalLM(config)


def parameters_by_part(config: ScratchGPTConfig) -> dict[str, int]:
    """Number of parameters of a `ScratchGPTForCausalLM` in each of its `PARTS`, all layers together; a tied head has none."""
    counts = dict.fromkeys(PARTS.values(), 0)
    for name, parameter in meta_model(config).named_parameters():
        counts[next(PARTS[word] for word in reversed(PARTS) if word in name)] += parameter.numel()
    return counts


def flops_per_token(
    config: ScratchGPTConfig,
    context_length: int,
    frozen: bool = False,
    has_head: bool = True,
    trained_blocks: int | None = None,
) -> float:
    """Floating-point operations of training on one token, forward and backward (Chowdhery et al., 2022, appendix B).

    6 per weight of a matrix product: of the blocks, and of the head, also if it is tied; the lookup of an embedding has none.
    And 12 x layers x heads x head_dim x context for attention's scores and weighted sum of values. This counts every pair of
    tokens: a causal model needs half of them, and a kernel that skips the others does fewer operations than counted here.

    Args:
        context_length: tokens in a window.
        frozen: the weights are not trained, only adapters too small to count: 4 per weight instead of 6.
        has_head: whether every token is scored. A classifier scores a text, which is too little to count.
        trained_blocks: number of last blocks that the gradient passes through; all blocks by default.
    """
    layers = meta_model(config).model.layers
    block = sum(module.weight.numel() for module in layers[0].modules() if isinstance(module, nn.Linear))
    head = config.vocab_size * config.hidden_size if has_head else 0
    attention = 2.0 * config.num_attention_heads * config.head_dim * context_length  # type: ignore[operator]
    trained = len(layers) if trained_blocks is None else trained_blocks
    forward = 2.0 * (len(layers) * block + head) + 2 * len(layers) * attention
    backward = (2.0 if frozen else 4.0) * (trained * block + head) + 4 * trained * attention
    return forward + backward


def autocast_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the matrix products of a run."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def measured_peak(accelerator: Accelerator) -> float:
    """FLOP/s of all processes in the fastest matrix product found in about a quarter of a second: a utilization of 100 %.

    The matrices grow while a product is quick: devices differ by a factor of a million, and one that is slow in this dtype
    (bfloat16 on many CPUs) must not be busy for minutes. The best of several measurements counts, as others may have to wait.
    """
    dtype, best = autocast_dtype(accelerator), 0.0
    for side in (128, 256, 512, 1024, 2048, 4096, 8192):
        matrix = torch.randn(side, side, device=accelerator.device).to(dtype)
        timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
        seconds = min(timer.blocked_autorange(min_run_time=SECONDS_PER_SIZE).times)
        best = max(best, 2 * side**3 / seconds)
        if 8 * seconds > MAX_PRODUCT_SECONDS:  # twice the side is eight times the work
            break
    return best * accelerator.num_processes
