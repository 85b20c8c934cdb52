"""The files beside the graph of an ONNX export: one with 8 or 16 bits, configs, and a card.

Notable:
- What fewer bits cost is measured, on the text that training has held out or on `--text FILE`. A format that costs more than 1 %
  is not written.
- WebGPU computes 8 bits wrong on many graphics cards, without an error: there, transformers.js is told to use 32 bits.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .onnx import OnnxModel, silenced

HELD_OUT = "held_out.jsonl"  # in the directory of a training run
MAX_COST = 0.01
MAX_TOKENS = 20_000  # to measure on
GRAPH = "onnx/model.onnx"
FORMATS = {  # by what transformers.js calls them: the file, and the name for people
    "q8": ("onnx/model_quantized.onnx", "8 bits"),
    "q8 except head and embedding": ("onnx/model_quantized.onnx", "8 bits, head and embedding 32"),
    "fp16": ("onnx/model_fp16.onnx", "16 bits"),
}
CAUSAL_USAGE = """import {{ pipeline }} from "@huggingface/transformers";

const generate = await pipeline("text-generation", "PATH_OR_HUB_ID");
console.log(await generate({example}, {{ max_new_tokens: 64 }}));"""
CLASSIFIER_USAGE = """import { AutoModel, AutoTokenizer } from "@huggingface/transformers";

const tokenizer = await AutoTokenizer.from_pretrained("PATH_OR_HUB_ID");
const { sessions, config } = await AutoModel.from_pretrained("PATH_OR_HUB_ID");
const { input_ids, attention_mask } = tokenizer("a text", { truncation: true });
const inputs = { input_ids: input_ids.ort_tensor, attention_mask: attention_mask.ort_tensor };
console.log(config.id2label, (await sessions.model.run(inputs)).logits.data);"""


def read_held_out(file: Path, config: PreTrainedConfig, tokenizer: Any) -> Callable[[Path], float]:
    """Read a file to measure with: a text, or JSON lines with `text` or `messages`, and for a classifier `label`.

    Returns:
        The loss of the graph in a file: bits per byte of a language model; of a classifier the share of wrong labels, or the mean
        squared error of its numbers.

    Raises:
        OSError, ValueError: the file cannot be read, or has other fields.
    """
    content, is_causal = file.read_text("utf-8"), "Classification" not in config.architectures[0]
    try:
        rows = [json.loads(line) for line in content.splitlines()] if file.suffix == ".jsonl" else [{"text": content}]
        texts = [
            tokenizer.apply_chat_template(row["messages"], tokenize=False) if "messages" in row else row["text"] for row in rows
        ]
        targets = [] if is_causal else [_target(row["label"], config) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        needed = "text or messages" if is_causal else "text and label"
        raise ValueError(f"{file} cannot be measured with ({error!r}): pass JSON lines with {needed}.") from error
    length = config.max_position_embeddings
    if not is_causal:
        ids = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts]
        return lambda graph: _classification_loss(OnnxModel(graph), ids, targets, config)
    special = [[index] if index is not None else [] for index in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    windows: list[list[int]] = []
    num_bytes = 0
    for row, text in zip(rows, texts, strict=True):
        text = text[: 16 * MAX_TOKENS]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids if "messages" in row else [*special[0], *ids, *special[1]]
        windows += [ids[start : start + length] for start in range(0, len(ids), length)]
        num_bytes += len(text.encode())
        if sum(map(len, windows)) >= MAX_TOKENS:
            break
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ValueError(f"{file} has no text to measure with: pass another --text.")
    return lambda graph: _bits(OnnxModel(graph), windows) / num_bytes


def _target(label: Any, config: PreTrainedConfig) -> np.ndarray:
    if config.problem_type == "regression":
        return np.array(label, np.float32).reshape(config.num_labels)
    names = [label] if isinstance(label, str) else label
    return np.isin(np.arange(config.num_labels), [config.label2id[name] for name in names])


def _bits(model: OnnxModel, windows: list[list[int]]) -> float:
    """Information in the tokens of the windows, excluding the first of each."""
    nats = 0.0
    for window in windows:
        logits = model(np.array([window]))[0][0, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, np.array(window[1:])[:, None], 1)[:, 0]
        nats += (np.log(np.exp(logits).sum(-1)) - chosen).sum()
    return nats / math.log(2)


def _classification_loss(model: OnnxModel, texts: list[list[int]], targets: list[np.ndarray], config: Any) -> float:
    losses = []
    for ids, target in zip(texts, targets, strict=True):
        logits = model(np.array([ids]))[0][0]
        match config.problem_type:
            case "regression":
                losses.append(np.square(logits - target).mean())
            case "multi_label_classification":
                losses.append(((logits > 0) != target).mean())
            case _:
                losses.append(float(not target[logits.argmax()]))
    return float(np.mean(losses))


def write_smaller(directory: Path, config: PreTrainedConfig, loss: Callable[[Path], float], source: str) -> tuple[str, list[str]]:
    """Write the smallest format of the graph that costs no more than 1 %.

    Returns:
        The format in the words of transformers.js, or fp32 if each costs more; and lines that say what each costs.
    """
    graph, lines, accepted = directory / GRAPH, [], {}
    before, size = loss(graph), graph.stat().st_size
    is_classifier = "Classification" in config.architectures[0]
    is_share = is_classifier and config.problem_type != "regression"
    measure = "squared error" if is_classifier else "bits per byte"
    for name, (_, title) in FORMATS.items():
        file = directory / f"{name}.onnx"
        _write_format(graph, file, name)
        after = loss(file)
        cost = after - before if is_share else after / before - 1
        values = f"{measure} {before:.4f} -> {after:.4f}"
        if is_share:
            values = f"accuracy {1 - before:.2%} -> {1 - after:.2%}"
        verdict = "" if cost <= MAX_COST else "; more than 1 %, not used"
        lines.append(
            f"{title}: {file.stat().st_size / 1e6:.1f} MB instead of {size / 1e6:.1f}; {values} ({cost:+.2%}) on {source}{verdict}"
        )
        if cost <= MAX_COST:
            accepted[file] = name
        if accepted and name == "q8":
            break
    best = min(accepted, key=lambda file: file.stat().st_size, default=None)
    if best:
        best.rename(directory / FORMATS[accepted[best]][0])
    for file in directory.glob("*.onnx"):
        file.unlink()
    return accepted[best].partition(" ")[0] if best else "fp32", lines


def _write_format(graph: Path, file: Path, name: str) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with silenced():
        if name == "fp16":
            onnx.save(convert_float_to_float16(onnx.load(graph), keep_io_types=True), file)
            return
        nodes = onnx.load(graph, load_external_data=False).graph.node if name != "q8" else []
        kept = [node.name for node in nodes if "logits" in node.output or "input_ids" in node.input]
        # Unsigned: with signed weights, the sums of processors without VNNI overflow.
        quantize_dynamic(graph, file, weight_type=QuantType.QUInt8, nodes_to_exclude=kept)


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
    decoder = {
        "filename": GRAPH,
        "head_size": ours.head_dim,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {f"past_{name}_names": f"past_key_values.%d.{name}" for name in names},
        "outputs": {"logits": "logits"} | {f"present_{name}_names": f"present.%d.{name}" for name in names},
        "session_options": {"provider_options": []},
        **{name: getattr(ours, name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")},
    }
    genai = {
        "type": "decoder",
        "context_length": ours.max_position_embeddings,
        "vocab_size": ours.vocab_size,
        "decoder": decoder,
        **{name: value for name in ("bos_token_id", "eos_token_id", "pad_token_id") if (value := getattr(ours, name)) is not None},
    }
    options = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    search = {name: value for name in options if (value := getattr(generation, name)) is not None}
    search |= {"max_length": ours.max_position_embeddings, "past_present_share_buffer": False}
    (directory / "genai_config.json").write_text(json.dumps({"model": genai, "search": search}, indent=2) + "\n")


def write_card(directory: Path, name: str, tokenizer: PreTrainedTokenizerBase | None, is_causal: bool, lines: list[str]) -> None:
    """Write the card of an export: how to use it, and what its smaller format costs."""
    task = "text-generation" if is_causal else "text-classification"
    metadata = ModelCardData(library_name="transformers.js", pipeline_tag=task, tags=["onnx", "scratchgpt"])
    example = '[{ role: "user", content: "Hello" }]' if tokenizer and tokenizer.chat_template else '"Once"'
    usage = CAUSAL_USAGE.format(example=example) if is_causal else CLASSIFIER_USAGE
    costs = "\n".join(f"- {line}" for line in lines)
    text = f"---\n{metadata.to_yaml()}\n---\n\n# {name}\n\nA ScratchGPT as an ONNX graph, for browsers and onnxruntime.\n\n"
    ModelCard(f"{text}```js\n{usage}\n```\n\n## Size\n\n{costs}\n").save(directory / "README.md")
