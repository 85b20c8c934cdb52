"""A ScratchGPT as an ONNX graph, which onnxruntime runs without torch. Needs the libraries `onnxscript` and `onnxruntime`.

One graph takes prompts and single tokens, in batches, with a past or without:

    input_ids, position_ids                     (batch, new), int64
    attention_mask                              (batch, past + new), int64
    input.past_key_values.layers.N.keys/values  (batch, heads, past, head_dim), float32; at first, past is 0
    logits                                      (batch, new, vocab), float32
    output.past_key_values.layers.N.keys/values (batch, heads, past + new, head_dim), float32

Notable:
- transformers' own exporter makes it. Where in which file on this machine an operation came from is taken out again.
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

FILE = "model.onnx"
EXAMPLE, PAST = (2, 7), 3  # what is traced: texts, tokens in each, of them in the past; these may vary, so all must differ


def check_onnx(config: PreTrainedConfig) -> None:
    """Whether the graph of a model of this config can be written.

    Raises:
        ValueError: a library is missing or too old, or a graph cannot say what this model is; the message names the field.
    """
    missing = [name for name in ("onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"writing ONNX takes the libraries onnxscript and onnxruntime: pip install {' '.join(missing)}.")
    if not hasattr(importlib.import_module("transformers.exporters.base"), "ExportedModel"):
        raise ValueError(f"writing ONNX takes transformers 5.23 or later, and this is {transformers.__version__}.")
    if config.position_embedding_type == "rotary" and (kind := config.rope_parameters["rope_type"]) in ("dynamic", "longrope"):
        raise ValueError(f"rope_type is {kind!r}, which depends on the length of a text: a graph has one for all.")
    if config.max_position_embeddings < EXAMPLE[1]:
        raise ValueError(f"max_position_embeddings is {config.max_position_embeddings}: ONNX takes {EXAMPLE[1]} or more.")


def write_onnx(folder: Path, model: PreTrainedModel) -> None:
    """Write `model.onnx`, `model.onnx.data`, and what transformers' `ExportedModel.from_pretrained` reads beside them.

    Args:
        model: a `ScratchGPTForCausalLM` in float32.

    Raises:
        ValueError: see `check_onnx`.
    """
    check_onnx(model.config)
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
    with _quiet():
        exported = OnnxExporter().export(model, example, OnnxConfig(dynamic=True))
    for graph in exported.program.graphs():
        for node in graph:
            node.metadata_props.clear()
    exported.generation_config = model.generation_config
    exported.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters of torch and transformers tell their whole way: errors only."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def onnx_logits(file: Path, ids: torch.Tensor) -> torch.Tensor:
    """What onnxruntime computes: the last token by itself, after all the others.

    Args:
        ids: (batch, length >= 2), int64.

    Returns:
        (batch, length, vocab), float32.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    inputs = {value.name: value for value in session.get_inputs()}
    cache = {}
    for name, value in inputs.items():
        if "past_key_values" in name:
            _, heads, _, head_dim = value.shape
            cache[name] = np.zeros((len(ids), int(heads), 0, int(head_dim)), np.float32)
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


__all__ = ["FILE", "check_onnx", "onnx_logits", "write_onnx"]
