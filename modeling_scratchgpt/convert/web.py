"""The files beside the graph of an ONNX export: the same graph with fewer bits, configs, and a card.

Notable:
- What fewer bits cost is measured: on `--text FILE`, on the text that training has held out, or on text that the model itself
  samples (then the cost estimates the divergence from its distribution). A format that costs more than 1 % is not written.
- WebGPU computes 8 bits wrong on many graphics cards, without an error: `config.json` makes transformers.js use 32 bits there.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..interchange import SPECIAL_IDS
from .onnx import MAX_BYTES, OnnxModel, silenced

HELD_OUT = "held_out.jsonl"  # in the directory of a training run
MAX_COST = 0.01
MAX_TOKENS = 20_000  # to measure on
GRAPH = "onnx/model.onnx"
SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
FORMATS = {  # by what transformers.js calls them: the file, and the name for people
    "q8": ("onnx/model_quantized.onnx", "8 bits"),
    "q8 except head and embedding": ("onnx/model_quantized.onnx", "8 bits, head and embedding 32"),
    "fp16": ("onnx/model_fp16.onnx", "16 bits"),
}
SAMPLES, SAMPLED_TOKENS = 8, 256  # texts, and the tokens of each
CAUSAL_USAGE = """import {{ pipeline }} from "@huggingface/transformers";

const generate = await pipeline("text-generation", "PATH_OR_HUB_ID");
console.log(await generate({example}, {{ max_new_tokens: 64 }}));"""
CLASSIFIER_USAGE = """import { AutoModel, AutoTokenizer } from "@huggingface/transformers";

const tokenizer = await AutoTokenizer.from_pretrained("PATH_OR_HUB_ID");
const { sessions, config } = await AutoModel.from_pretrained("PATH_OR_HUB_ID");
const { input_ids, attention_mask } = tokenizer("a text");
const inputs = { input_ids: input_ids.ort_tensor, attention_mask: attention_mask.ort_tensor };
console.log(config.id2label, (await sessions.model.run(inputs)).logits.data);"""


def read_held_out(file: Path, config: PreTrainedConfig, tokenizer: Any) -> Callable[[Path], float]:
    """Read what to measure on: a text, or JSON lines with `text` or `messages`, and for a classifier `label`.

    Returns:
        The loss of the graph in a file: bits per byte; of a classifier the share of wrong labels, or its mean squared error.

    Raises:
        OSError, ValueError: the file cannot be read, or has other fields.
    """
    is_causal, length = "Classification" not in config.architectures[0], config.max_position_embeddings
    try:
        content, has_lines = file.read_text("utf-8-sig"), file.suffix == ".jsonl"
        rows = [json.loads(line) for line in content.split("\n") if line.strip()] if has_lines else [{"text": content}]
        texts = [
            tokenizer.apply_chat_template(row["messages"], tokenize=False) if "messages" in row else row["text"] for row in rows
        ]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("text must be a string")
        if is_causal:
            windows, num_bytes = _windows(texts, tokenizer, length)
        else:
            targets = [_target(row["label"], config) for row in rows]
            ids = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts]
    except OSError:
        raise
    except Exception as error:  # of the encoding, of JSON, of the chat template, of the tokenizer
        needed = "text or messages" if is_causal else "text and label"
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} cannot be measured on ({problem:.200}): pass JSON lines with {needed}.") from error
    if not (windows if is_causal else ids and all(ids)):
        raise ValueError(f"{file} has no text to measure on: pass another --text.")
    if is_causal:
        return lambda graph: _bits(OnnxModel(graph), windows) / num_bytes
    return lambda graph: _classification_loss(OnnxModel(graph), ids, targets, config)


def _windows(texts: list[str], tokenizer: Any, length: int) -> tuple[list[list[int]], int]:
    """Token ids in windows, each but the first of a text beginning with the last id of the one before, and bytes of text."""
    windows, num_bytes, room = list[list[int]](), 0, MAX_TOKENS
    start = tokenizer.bos_token or tokenizer.eos_token or ""
    for text in texts:
        if room < 2:
            break
        text = text.removeprefix(start)[: 16 * room]
        while len(ids := tokenizer(start + text, add_special_tokens=False)["input_ids"]) > room:
            text = text[: int(len(text) * room / (len(ids) + 1))]
        windows += [ids[first : first + length] for first in range(0, len(ids) - 1, length - 1)]
        num_bytes, room = num_bytes + len(text.encode()), room - len(ids)
    return windows, num_bytes


def sample_text(model: Any, tokenizer: Any) -> Callable[[Path], float]:
    """Let a causal model sample texts from its distribution; returns the bits per byte of the graph in a file on them."""
    length = min(model.config.max_position_embeddings, SAMPLED_TOKENS)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id or 0
    first = torch.full((SAMPLES, 1), start)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = model.generate(
            first, attention_mask=torch.ones_like(first), min_new_tokens=length - 1, max_new_tokens=length - 1, **sampling
        )
    num_bytes = sum(len(text.encode()) for text in tokenizer.batch_decode(ids[:, 1:]))
    return lambda graph: _bits(OnnxModel(graph), ids.tolist()) / max(num_bytes, 1)


def _target(label: Any, config: PreTrainedConfig) -> np.ndarray:
    if config.problem_type == "regression":
        if not np.isfinite(values := np.array(label, np.float32).reshape(config.num_labels)).all():
            raise ValueError(f"label {label} is not finite")
        return values
    names, known = label if isinstance(label, list) else [str(label)], [*config.id2label.values()]
    if unknown := set(names) - set(known):
        raise ValueError(f"the model has no label {unknown.pop()}")
    return np.isin(known, names)


def _bits(model: OnnxModel, windows: list[list[int]]) -> float:
    """The information in the tokens of all windows, excluding the first of each."""
    nats = 0.0
    for window in windows:
        logits = torch.from_numpy(model(np.array([window]))[0][0, :-1]).double()
        nats += cross_entropy(logits, torch.tensor(window[1:]), reduction="sum").item()
    return nats / math.log(2)


def _classification_loss(
    model: OnnxModel, texts: list[list[int]], targets: list[np.ndarray], config: PreTrainedConfig
) -> float:
    logits, labels = np.stack([model(np.array([ids]))[0][0] for ids in texts]), np.stack(targets)
    if config.problem_type == "regression":
        return float(np.square(logits - labels).mean())
    if config.problem_type == "multi_label_classification":
        return float(((logits > 0) != labels).mean())
    return float((~labels[range(len(labels)), logits.argmax(-1)]).mean())


def write_smaller(
    directory: Path, config: PreTrainedConfig, loss: Callable[[Path], float], source: str
) -> tuple[str, list[str]]:
    """Write the smallest format of the graph that costs no more than 1 %.

    Returns:
        transformers.js's name of the format, or fp32 if each costs more; and for each that was measured a line with its cost.
    """
    graph, lines, chosen = directory / GRAPH, [], "fp32"
    before, is_classifier = loss(graph), "Classification" in config.architectures[0]
    for name, file in _write_formats(graph, directory):
        after, (path, title) = loss(file), FORMATS[name]
        if is_classifier and config.problem_type != "regression":
            cost, values = after - before, f"accuracy {1 - before:.2%} -> {1 - after:.2%}"
        else:
            cost = (after - before) / (before or 1)
            values = f"{'squared error' if is_classifier else 'bits per byte'} {before:.4f} -> {after:.4f} ({cost:+.2%})"
        small, large = (
            sum(each.stat().st_size for each in start.parent.glob(f"{start.name}*")) / 1e6 for start in (file, graph)
        )
        verdict = "" if cost <= MAX_COST else ": more than 1 %, not used"
        lines.append(f"{title}: {small:.1f} MB instead of {large:.1f}; {values} on {source}{verdict}")
        if cost <= MAX_COST:
            chosen = name.partition(" ")[0]
            file.rename(directory / path)
            break
    for name in FORMATS:
        (directory / f"{name}.onnx").unlink(missing_ok=True)
    return chosen, lines


def _write_formats(graph: Path, directory: Path) -> Iterator[tuple[str, Path]]:
    """Write 8 bits, then, if the caller goes on, the other formats that fit into one file, and yield them by size."""
    size = sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))
    others = [name for name in FORMATS if name != "q8" and (name != "fp16" or size < 2 * MAX_BYTES)]
    for names in (["q8"], others):
        files = {name: directory / f"{name}.onnx" for name in names}
        for name, file in files.items():
            write_format(graph, file, name)
        yield from sorted(files.items(), key=lambda item: item[1].stat().st_size)


def write_format(graph: Path, file: Path, name: str) -> None:
    """Write the graph in another of `FORMATS`. With 8 bits it is optimized here, which takes a browser a third of a second."""
    import onnx
    from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with silenced():
        if name == "fp16":  # from a path, since a model in memory must not exceed 2 GB
            onnx.save(convert_float_to_float16(str(graph), keep_io_types=True), file)
            return
        model = onnx.load(graph)
        nodes, weights = model.graph.node, {tensor.name: tensor for tensor in model.graph.initializer}
        # A tied head multiplies by the transposed embedding, which is quantized only if it is a constant.
        for node in [node for node in nodes if node.op_type == "Transpose" and node.input[0] in weights]:
            transposed = onnx.numpy_helper.to_array(weights[node.input[0]]).T
            model.graph.initializer.append(onnx.numpy_helper.from_array(transposed, node.output[0]))
            nodes.remove(node)
        kept = [node.name for node in nodes if name != "q8" and ("logits" in node.output or "input_ids" in node.input)]
        # Unsigned: sums of products with signed weights overflow on processors with AVX2 and without VNNI.
        quantize_dynamic(model, file, weight_type=QuantType.QUInt8, nodes_to_exclude=kept)
        options = SessionOptions()
        options.optimized_model_filepath = str(file)
        options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # what does not depend on the processor
        InferenceSession(file.read_bytes(), options)


def write_configs(directory: Path, model: PreTrainedModel, config: PreTrainedConfig, data_type: str) -> None:
    """Write the configs: of the equivalent model in transformers, of generation, and of onnxruntime-genai."""
    settings: dict[str, Any] = {"dtype": data_type}
    if data_type == "q8":
        settings["device_config"] = {"webgpu": {"dtype": "fp32"}}
    if (directory / f"{GRAPH}_data").exists():
        settings["use_external_data_format"] = {"model.onnx": 1}
    setattr(config, "transformers.js_config", settings)
    config.save_pretrained(directory)
    if not hasattr(model, "lm_head"):
        return
    generation = model.generation_config
    generation.save_pretrained(directory)
    ours, names = model.config, ("key", "value")
    decoder = {name: getattr(ours, name) for name in SIZES} | {
        "filename": GRAPH,
        "head_size": ours.head_dim,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {f"past_{name}_names": f"past_key_values.%d.{name}" for name in names},
        "outputs": {"logits": "logits"} | {f"present_{name}_names": f"present.%d.{name}" for name in names},
        "session_options": {"provider_options": []},
    }
    genai = {name: value for name in SPECIAL_IDS if (value := getattr(ours, name)) is not None}
    genai |= {
        "type": "decoder",
        "context_length": ours.max_position_embeddings,
        "vocab_size": ours.vocab_size,
        "decoder": decoder,
    }
    options = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    search = {name: value for name in options if (value := getattr(generation, name)) is not None}
    search |= {"max_length": ours.max_position_embeddings, "past_present_share_buffer": False}
    (directory / "genai_config.json").write_text(json.dumps({"model": genai, "search": search}, indent=2) + "\n")


def write_card(
    directory: Path, name: str, tokenizer: PreTrainedTokenizerBase | None, is_causal: bool, lines: list[str]
) -> None:
    """Write the card of an export: how to use it, and what its smaller format costs."""
    task = "text-generation" if is_causal else "text-classification"
    metadata = ModelCardData(library_name="transformers.js", pipeline_tag=task, tags=["onnx", "scratchgpt"])
    example = '[{ role: "user", content: "Hello" }]' if tokenizer and tokenizer.chat_template else '"Once"'
    usage = CAUSAL_USAGE.format(example=example) if is_causal else CLASSIFIER_USAGE
    costs = "\n".join(f"- {line}" for line in lines)
    text = f"---\n{metadata.to_yaml()}\n---\n\n# {name}\n\nA ScratchGPT as an ONNX graph, for browsers and onnxruntime.\n\n"
    ModelCard(f"{text}```js\n{usage}\n```\n\n## Size\n\n{costs}\n").save(directory / "README.md")
