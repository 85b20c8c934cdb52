"""Export a ScratchGPT to ONNX, for onnxruntime without torch. Requires the libraries `onnxscript` and `onnxruntime`.

One graph serves both the prompt and single tokens, in batches, with or without cached keys and values:

    input_ids, position_ids                     (batch, new), int64
    attention_mask                              (batch, past + new), int64
    input.past_key_values.layers.N.keys/values  (batch, heads, past, head_dim), float32; past may be 0
    logits                                      (batch, new, vocab), float32
    output.past_key_values.layers.N.keys/values (batch, heads, past + new, head_dim), float32

Notable:
- transformers' exporter writes it. Source locations on this machine, which the exporter adds to each operation, are removed.
"""

import contextlib
import importlib.util
import io
import logging
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

FILE = "model.onnx"
EXAMPLE, PAST = (2, 7), 3  # traced (batch, tokens) and cached tokens: dynamic sizes, which must all differ


def check_onnx(config: PreTrainedConfig) -> None:
    """Check that a model of this config can be exported.

    Raises:
        ValueError: a library is missing or too old, or a graph cannot express the model; the message names the field.
    """
    missing = [name for name in ("onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX requires the libraries onnxscript and onnxruntime: pip install {' '.join(missing)}.")
    if not hasattr(importlib.import_module("transformers.exporters.base"), "ExportedModel"):
        raise ValueError(f"ONNX requires transformers 5.23 or later, but this is {transformers.__version__}.")
    if config.position_embedding_type == "rotary" and (kind := config.rope_parameters["rope_type"]) in ("dynamic", "longrope"):
        raise ValueError(f"rope_type is {kind!r}, which depends on the length of the text: a graph cannot express it.")
    if config.max_position_embeddings < EXAMPLE[1]:
        raise ValueError(f"max_position_embeddings is {config.max_position_embeddings}: ONNX requires at least {EXAMPLE[1]}.")


def write_onnx(directory: Path, model: PreTrainedModel) -> None:
    """Write `model.onnx`, `model.onnx.data` and the configs that transformers' `ExportedModel.from_pretrained` reads.

    Args:
        model: a `ScratchGPTForCausalLM` in float32 that `check_onnx` has accepted.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    ids = torch.zeros(EXAMPLE, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with torch.no_grad():
        past = model(ids[:, :PAST], use_cache=True).past_key_values
    example = {
        "input_ids": ids[:, PAST:],
        "attention_mask": mask,
        "position_ids": torch.arange(PAST, ids.shape[1]).expand(len(ids), -1),
        "past_key_values": past,
    }
    logging.disable(logging.WARNING)  # silences the exporters of torch and transformers
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exported = OnnxExporter().export(model, example, OnnxConfig(dynamic=True))
    finally:
        logging.disable(logging.NOTSET)
    for graph in exported.program.graphs():
        for node in graph:
            node.metadata_props.clear()
    exported.generation_config = model.generation_config
    exported.save_pretrained(directory)


def onnx_logits(file: Path, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits (batch, length, vocab) of ids (batch, length >= 2) with onnxruntime, those of the last id with a cache."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    cache = {}
    for value in session.get_inputs():
        if "past_key_values" in value.name:
            _, heads, _, head_dim = value.shape
            cache[value.name] = np.zeros((len(ids), int(heads), 0, int(head_dim)), np.float32)
    last, result = ids.shape[1] - 1, []
    for start, end in ((0, last), (last, last + 1)):
        tokens = {
            "input_ids": ids[:, start:end].numpy(),
            "attention_mask": np.ones((len(ids), end), np.int64),
            "position_ids": np.arange(start, end)[None].repeat(len(ids), 0),
        }
        logits, *now = session.run(None, tokens | cache)
        cache = dict(zip(cache, now, strict=True))
        result.append(torch.from_numpy(logits))
    return torch.cat(result, dim=1)
