"""Export a ScratchGPT to ONNX as transformers.js, optimum and onnxruntime-genai read it: in a browser, or without torch.
Requires the libraries `onnxscript` and `onnxruntime`.

The graph of a language model serves both the prompt and single tokens, in batches, with or without cached keys and values:

    input_ids, position_ids           (batch_size, sequence_length), int64
    attention_mask                    (batch_size, total_sequence_length), int64
    past_key_values.N.key, .value     (batch_size, heads, past_sequence_length, head_dim), float32; the length may be 0
    logits                            (batch_size, sequence_length, vocabulary), float32
    present.N.key, .value             (batch_size, heads, total_sequence_length, head_dim), float32
    attentions.N                      (batch_size, heads, sequence_length, total_sequence_length), float32, if requested

The graph of a classifier has `input_ids`, `attention_mask` and `logits` (batch_size, labels): pooling is a part of it.

Notable:
- transformers' exporter writes it. Source locations on this machine, which the exporter adds to each operation, are removed.
"""

import importlib.util
import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

EXAMPLE, PAST = (2, 7), 3  # traced (batch, tokens) and cached tokens: dynamic sizes, which must all differ
MAX_BYTES = 2**31 - 2**24  # protobuf's limit for one file, less room for the graph
NEW, CACHED, ALL = "sequence_length", "past_sequence_length", "total_sequence_length"
DYNAMIC = {"attention_mask": [ALL], "past_key_values": [CACHED], "present": [ALL], "attentions": [NEW, ALL]}  # after the batch


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


@contextmanager
def silenced() -> Iterator[None]:
    """Silence the exporters of torch and transformers, and the quantizer of onnxruntime."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def write_onnx(path: Path, model: PreTrainedModel, attentions: bool = False) -> None:
    """Write the graph of a model; weights of more than 2 GB go to a file of their own, `PATH_data`.

    Args:
        model: a language model or a classifier in float32, whose config `check_onnx` has accepted.
        attentions: also return the weights of all attention heads.
    """
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    is_causal = hasattr(model, "lm_head")
    if attentions:
        model.set_attn_implementation("eager")
    model.config.output_attentions, model.config.use_cache = attentions, is_causal
    with silenced():
        graph_model = OnnxExporter().export(model, _example(model, is_causal), OnnxConfig(dynamic=True)).program
    for graph in graph_model.graphs():
        for node in graph:
            node.metadata_props.clear()
    for value in (*graph_model.graph.inputs, *graph_model.graph.outputs):
        name = value.name.replace("output.past_key_values", "present").removeprefix("input.")
        value.name = re.sub(r"layers\.(\d+)\.(key|value)s$", r"\1.\2", name)
        names = iter(["batch_size", *(DYNAMIC.get(value.name.partition(".")[0], [NEW]) if is_causal else [NEW] * 2)])
        value.shape = onnx_ir.Shape([int(size) if size.isdigit() else next(names) for size in map(str, value.shape)])
    is_large = 4 * model.num_parameters() > MAX_BYTES
    path.parent.mkdir()
    onnx_ir.save(graph_model, path, external_data=f"{path.name}_data" if is_large else None)


def _example(model: Any, is_causal: bool) -> dict[str, Any]:
    """Inputs to trace the model with."""
    ids = torch.zeros(EXAMPLE, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    if not is_causal:
        return {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        past = model(ids[:, :PAST], use_cache=True).past_key_values
    positions = torch.arange(PAST, ids.shape[1]).expand(len(ids), -1)
    return {"input_ids": ids[:, PAST:], "attention_mask": mask, "position_ids": positions, "past_key_values": past}


class OnnxModel:
    """A graph in onnxruntime on the CPU, called with token ids."""

    def __init__(self, file: Path):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(file)
        self.inputs = self.session.get_inputs()

    def __call__(self, ids: np.ndarray, cache: dict[str, np.ndarray] | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits of ids (batch, new), and keys and values for the next call; a classifier's logits, and none."""
        names = [value.name for value in self.inputs if value.name.startswith("past_key_values")]
        if cache is None:
            shapes = {value.name: value.shape for value in self.inputs}
            cache = {name: np.zeros((len(ids), shapes[name][1], 0, shapes[name][3]), np.float32) for name in names}
        past = cache[names[0]].shape[2] if names else 0
        tokens = {"input_ids": ids, "attention_mask": np.ones((len(ids), past + ids.shape[1]), np.int64)}
        if names:
            tokens["position_ids"] = np.arange(past, past + ids.shape[1])[None].repeat(len(ids), 0)
        logits, *now = self.session.run(None, tokens | cache)
        return logits, dict(zip(names, now, strict=False))  # after them: attentions


def onnx_logits(file: Path, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits of ids (batch, length >= 2) with onnxruntime; of a language model, those of the last id with a cache."""
    model = OnnxModel(file)
    if len(model.inputs) == 2:
        return torch.from_numpy(model(ids.numpy())[0])
    first, cache = model(ids[:, :-1].numpy())
    return torch.from_numpy(np.concatenate([first, model(ids[:, -1:].numpy(), cache)[0]], axis=1))
