"""Export a ScratchGPT to GGUF, the format of llama.cpp and programs based on it. Requires the library `gguf`.

Notable:
- The architecture in the file is `gpt2` or `qwen3`, so every program that runs these runs it.
- As usual in GGUF, norms and biases stay float32. Matrices whose rows are not multiples of 32 cannot be q8_0 and become f16.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..configuration_scratchgpt import ScratchGPTConfig
from ..interchange import gpt2_state_dict
from ..modeling_scratchgpt import ScratchGPTForCausalLM

TYPES = ("f32", "f16", "q8_0")
ACTIVATIONS = {"gpt2": "gelu_pytorch_tanh", "qwen3": "silu"}  # fixed by the architecture in GGUF


def check_gguf(architecture: str, config: ScratchGPTConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Check that GGUF can express a model that is equivalent to a "gpt2" or "qwen3".

    Raises:
        ValueError: the library is missing, or GGUF cannot express the model or the tokenizer; the message names the field.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("GGUF requires the library gguf: pip install gguf.")
    if config.hidden_act.replace("gelu_new", "gelu_pytorch_tanh") != ACTIVATIONS[architecture]:
        raise ValueError(f"hidden_act is {config.hidden_act!r}, but {ACTIVATIONS[architecture]!r} in a GGUF {architecture}.")
    if architecture == "qwen3" and (config.attention_bias or config.rope_parameters["rope_type"] != "default"):
        raise ValueError("attention_bias and scaled rope_parameters cannot be exported to GGUF.")
    if tokenizer is None:
        raise ValueError("a GGUF file contains the tokenizer, but the model has none: pass --tokenizer.")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = content["pre_tokenizer"] or {}
    if content["model"]["type"] != "BPE" or words.get("type") != "ByteLevel" or not words.get("use_regex"):
        raise ValueError("GGUF can only contain the tokenizer `bpe`, byte-level BPE with GPT-2's pre-tokenization.")
    plain, processed = (tokenizer.backend_tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    if content["normalizer"] or plain != processed or words["add_prefix_space"] or content["model"]["ignore_merges"]:
        raise ValueError(
            "this tokenizer has a normalizer, ignore_merges, add_prefix_space, or a post_processor that adds tokens: programs "
            "that read GGUF would ignore these and compute other ids."
        )


def write_gguf(
    path: Path, architecture: str, model: ScratchGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, data_type: str
) -> None:
    """Write a model and its tokenizer, which `check_gguf` has accepted, to one file with matrices of one of `TYPES`."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(path.stem)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "qwen3":
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if data_type == 'f32' else 'MOSTLY'}_{data_type.upper()}"])
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    _add_tensors(writer, model, data_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    from gguf import TokenType

    tokens = [f"[PAD{index}]" for index in range(vocab_size)]  # a model may have more embeddings than tokens
    types = [TokenType.UNUSED] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        tokens[index], types[index] = token, TokenType.NORMAL
    for index in tokenizer.added_tokens_decoder:
        types[index] = TokenType.USER_DEFINED
    for index in tokenizer.all_special_ids:
        types[index] = TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_add_bos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    for name in ("bos", "eos", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)


def _add_tensors(writer: Any, model: ScratchGPTForCausalLM, data_type: str) -> None:
    import gguf

    is_gpt2 = writer.arch == "gpt2"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[writer.arch.upper()], model.config.num_hidden_layers)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, tensor in (gpt2_state_dict(state) if is_gpt2 else state).items():
        if is_gpt2 and ".h." in name and tensor.ndim == 2:
            tensor = tensor.T  # GGUF stores matrices as nn.Linear does
        array = tensor.detach().float().contiguous().numpy()
        stored = gguf.GGMLQuantizationType.F32
        if array.ndim == 2 and data_type != "f32":
            fits = data_type == "q8_0" and array.shape[1] % 32 == 0
            stored = gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.F16
        stem, _, part = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{part}", gguf.quants.quantize(array, stored), raw_dtype=stored)
