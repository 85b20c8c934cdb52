"""A ScratchGPT as a GGUF file, which llama.cpp and what is built on it run. Needs the library `gguf`.

Notable:
- The file says `gpt2` or `qwen3`: programs that know these run it, and none has to know ScratchGPT.
- Norms and biases stay float32, whatever the type, as in every GGUF file. Rows that do not part into blocks of 32 numbers
  cannot be q8_0, and are f16.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..configuration_scratchgpt import ScratchGPTConfig
from ..interchange import as_transformers, gpt2_state_dict

TYPES = ("f32", "f16", "q8_0")
ACTIVATIONS = {"gpt2": "gelu_pytorch_tanh", "qwen3": "silu"}  # what programs compute that read `gpt2` or `qwen3`


def check_gguf(config: ScratchGPTConfig, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The architecture that the file will name.

    Raises:
        ValueError: a GGUF file cannot say what this model or this tokenizer is; the message names the field.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("writing GGUF takes the library gguf: pip install gguf.")
    architecture = "qwen3" if config.position_embedding_type == "rotary" else "gpt2"
    as_transformers(config, architecture)
    if config.hidden_act.replace("gelu_new", "gelu_pytorch_tanh") != ACTIVATIONS[architecture]:
        raise ValueError(
            f"hidden_act is {config.hidden_act!r}, and in a GGUF {architecture} has {ACTIVATIONS[architecture]!r}."
        )
    if architecture == "qwen3" and (config.attention_bias or config.rope_parameters["rope_type"] != "default"):
        raise ValueError("attention_bias and scaled rope_parameters are not written to GGUF: it needs a model without them.")
    if tokenizer is None:
        raise ValueError("a GGUF file holds the tokenizer, and there is none here: pass --tokenizer.")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = content["pre_tokenizer"] or {}
    if content["model"]["type"] != "BPE" or words.get("type") != "ByteLevel" or not words.get("use_regex"):
        raise ValueError("of ScratchGPT's tokenizers a GGUF file can only hold `bpe`, byte-level BPE with GPT-2's words.")
    plain, whole = (tokenizer.backend_tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    if content["normalizer"] or plain != whole or words["add_prefix_space"] or content["model"]["ignore_merges"]:
        raise ValueError(
            "this tokenizer has a normalizer, ignore_merges, add_prefix_space, or a post_processor that adds tokens: programs "
            "that read GGUF would do without and see other ids."
        )
    return architecture


def write_gguf(
    path: Path, config: ScratchGPTConfig, state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    """Write a model and its tokenizer into one file.

    Args:
        state: of a `ScratchGPTForCausalLM`.
        kind: `"f32"`, `"f16"` or `"q8_0"`, of the matrices.

    Raises:
        ValueError: see `check_gguf`.
    """
    import gguf

    architecture = check_gguf(config, tokenizer)
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
    kinds = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(kinds[kind])
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    _add_tensors(writer, architecture, config, state, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    from gguf import TokenType

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = set(tokenizer.all_special_ids)
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens = [names.get(index, f"[PAD{index}]") for index in range(vocab_size)]  # a model may have more rows than tokens
    types = [
        TokenType.UNUSED
        if index not in names
        else TokenType.CONTROL
        if index in special
        else TokenType.USER_DEFINED
        if index in added
        else TokenType.NORMAL
        for index in range(vocab_size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_add_bos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    for name in ("bos", "eos", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)


def _add_tensors(writer: Any, architecture: str, config: ScratchGPTConfig, state: dict[str, torch.Tensor], kind: str) -> None:
    import gguf

    arch = gguf.MODEL_ARCH.GPT2 if architecture == "gpt2" else gguf.MODEL_ARCH.QWEN3
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    if config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    for name, tensor in (gpt2_state_dict(state) if architecture == "gpt2" else state).items():
        if architecture == "gpt2" and ".h." in name and tensor.ndim == 2:
            tensor = tensor.T  # llama.cpp multiplies from the left, as nn.Linear does
        array = tensor.detach().float().contiguous().numpy()
        wanted = gguf.GGMLQuantizationType.F32
        if array.ndim == 2 and kind != "f32":
            fits = kind == "q8_0" and array.shape[1] % 32 == 0
            wanted = gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.F16
        stem, _, part = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{part}", gguf.quants.quantize(array, wanted), raw_dtype=wanted)


__all__ = ["TYPES", "check_gguf", "write_gguf"]
