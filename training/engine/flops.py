"""What a model is made of and what a token costs, counted from its config alone; and what the device can do.

Notable:
- Parameters are counted by the part they belong to; a head that shares the embedding's weights is counted once, there.
- FLOPs are those of the matrix products, a multiplication and an addition for each weight: 2 forward, 4 backward.
- A device's peak is measured with one large matrix product, so that it needs no table of devices.
"""

import time

import torch

from modeling_scratchgpt import ScratchGPTConfig

SECONDS_PER_SIZE, FEWEST_PRODUCTS, LONGEST_PRODUCT = 0.05, 3, 0.5  # in measuring a device's peak


def parameters_by_part(config: ScratchGPTConfig) -> dict[str, int]:
    """How many parameters a `ScratchGPTForCausalLM` has in each of its parts.

    Returns:
        Counts for `embeddings`, `positions`, `attention`, `MLP`, `norms` and `head`, all layers together. Their sum is
        `model.num_parameters()`: a tied head has none of its own, and rotary positions have none at all.
    """
    width, layers, norm = config.hidden_size, config.num_hidden_layers, 2 if config.norm_type == "layernorm" else 1
    query, key_value, inner = widths(config)
    biases = config.attention_bias * (query + 2 * key_value + width)
    mlp_biases = config.mlp_bias * ((_mlp_matrices(config) - 1) * inner + width)
    qk_norms = 2 * (query // config.num_attention_heads) if config.qk_norm else 0
    return {
        "embeddings": config.vocab_size * width,
        "positions": config.max_position_embeddings * width if config.position_embedding_type == "learned" else 0,
        "attention": layers * (2 * width * (query + key_value) + biases),
        "MLP": layers * (_mlp_matrices(config) * width * inner + mlp_biases),
        "norms": layers * (2 * norm * width + qk_norms) + norm * width,
        "head": 0 if config.tie_word_embeddings else config.vocab_size * width,
    }


def flops_per_token(
    config: ScratchGPTConfig,
    context_length: int,
    frozen: bool = False,
    has_head: bool = True,
    trained_blocks: int | None = None,
) -> float:
    """Floating-point operations of training on one token, forward and backward, as PaLM's paper and nanoGPT count them.

    6 for each weight of a matrix that multiplies: those of the blocks, and the head's, which is a product also when its weights
    are the embedding's; looking up an embedding is none. And 12 x layers x heads x head_dim x context for attention's scores
    and its sum of values. That counts every pair of tokens; a causal model needs half of them, and a kernel that leaves the
    others out does less work than is counted here.

    Source: Chowdhery et al., 2022, "PaLM", appendix B.

    Args:
        context_length: tokens in a window.
        frozen: the weights themselves are not trained, but adapters too small to count: then it is 4 for each weight.
        has_head: whether every token is scored. A classifier scores a text, which is too little to count.
        trained_blocks: how many of the last blocks the gradient goes through; all of them if not given.
    """
    query, key_value, inner = widths(config)
    block = 2 * config.hidden_size * (query + key_value) + _mlp_matrices(config) * config.hidden_size * inner
    head = config.vocab_size * config.hidden_size if has_head else 0
    blocks = config.num_hidden_layers
    trained = blocks if trained_blocks is None else trained_blocks
    forward = 2.0 * (blocks * block + head) + 4.0 * blocks * query * context_length
    backward = (2.0 if frozen else 4.0) * (trained * block + head) + 8.0 * trained * query * context_length
    return forward + backward


@torch.no_grad()
def measured_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of the best matrix product found in about half a second: what "100 % utilisation" means here.

    The matrices grow while one product takes little time: devices differ by a factor of a million, and one that is slow in this
    dtype (bfloat16 on many CPUs) must not be kept busy for minutes. Of each size it takes the best of several: the first wake
    threads and libraries, and on a machine with other work any of them may have to wait.
    """
    best = 0.0
    for side in (128, 256, 512, 1024, 2048, 4096, 8192):
        matrix = torch.randn(side, side, device=device).to(dtype)
        start, seconds = time.perf_counter(), list[float]()
        while len(seconds) < FEWEST_PRODUCTS or time.perf_counter() - start < SECONDS_PER_SIZE:
            seconds.append(_seconds_of_product(matrix))
        best = max(best, 2 * side**3 / min(seconds))
        if 8 * min(seconds) > LONGEST_PRODUCT:  # twice the side is eight times the work
            break
    return best


def _seconds_of_product(matrix: torch.Tensor) -> float:
    start = time.perf_counter()
    product = matrix @ matrix
    product[0, 0].item()  # a GPU works on while Python runs ahead: asking for a number waits for it
    return time.perf_counter() - start


def widths(config: ScratchGPTConfig) -> tuple[int, int, int]:
    """Widths of all query heads together, of all key heads, and inside the MLP; the config has derived what was not given."""
    query, key_value = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))  # type: ignore[operator]
    return query, key_value, config.intermediate_size  # type: ignore[return-value]


def _mlp_matrices(config: ScratchGPTConfig) -> int:
    return 3 if config.mlp_type == "gated" else 2
