"""Convert models of other formats to ScratchGPT, and ScratchGPT to other formats.

    # to ScratchGPT: the format of SOURCE is detected
    python -m modeling_scratchgpt.convert openai-community/gpt2 outputs/gpt2      # GPT-2 or Qwen3: a directory or a Hub id
    python -m modeling_scratchgpt.convert models/124M outputs/gpt2                # OpenAI's TensorFlow checkpoint
    python -m modeling_scratchgpt.convert out/ckpt.pt outputs/shakespeare         # nanoGPT
    python -m modeling_scratchgpt.convert model.pt outputs/mine --num_attention_heads 6     # minGPT, or a bare state dict

    # from ScratchGPT
    python -m modeling_scratchgpt.convert outputs/pretrain outputs/qwen3 --to qwen3         # transformers; also gpt2
    python -m modeling_scratchgpt.convert outputs/pretrain outputs/gguf --to gguf --type q8_0    # llama.cpp
    python -m modeling_scratchgpt.convert outputs/pretrain outputs/web --to onnx    # browsers, onnxruntime; also classifiers

The outputs are compared with those of the equivalent model in transformers (for ONNX: of onnxruntime), and a model that differs
is refused. DESTINATION is a new directory, which is written completely or not at all.
"""

import argparse
import contextlib
import io
import os
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedConfig, TokenizersBackend

from ..atomic import atomic_directory
from .gguf import TYPES, check_gguf, write_gguf
from .onnx import onnx_logits, write_onnx
from .reading import LoadedModel, read, stock_config, tokenizer_as, tokenizer_of
from .tokenizer_js import as_tokenizer_js, check_tokenizer_js
from .web import GRAPH, HELD_OUT, MAX_TOKENS, read_held_out, sample_text, write_card, write_configs, write_smaller

GGUF_FILE = "model.gguf"
TOLERANCE = 1e-4  # absolute for logits up to 1, above that relative to the largest
ROUNDING = {"f32": TOLERANCE, "f16": 1e-2, "q8_0": 0.2}


def verify_outputs(loaded: LoadedModel, tolerance: float = TOLERANCE) -> str:
    """Compare the model with its reference in float32 on the same random ids, and describe the difference in one line.

    Raises:
        ValueError: the difference exceeds the tolerance.
    """
    ids = _random_ids(loaded.model.config)
    outputs = []
    for model in (loaded.model, loaded.reference):
        dtype = model.dtype
        if dtype != torch.float32:  # a quantized model cannot be cast
            model.float()
        with torch.no_grad():
            outputs.append(model(ids, attention_mask=torch.ones_like(ids), return_dict=True))
        if dtype != torch.float32:  # exact, since float32 has all values of lower precisions; buffers have always been float32
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
    key = next(name for name in ("start_logits", "logits", "last_hidden_state") if name in outputs[0])
    ours, theirs = (output[key] for output in outputs)
    return _verify(ours, theirs, tolerance, f"{type(loaded.reference).__name__} in transformers")


def _random_ids(config: PreTrainedConfig) -> torch.Tensor:
    """One text without padding tokens: some classifiers pool by the padding id, and need it for more than one text."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, min(32, config.max_position_embeddings)), generator=generator)
    return ids if config.pad_token_id is None else torch.where(ids == config.pad_token_id, (ids + 1) % config.vocab_size, ids)


def _verify(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, reference: str) -> str:
    difference = (ours - theirs).abs().max().item()
    if not difference <= tolerance * max(1.0, theirs.abs().max().item()):
        raise ValueError(f"the outputs differ by {difference} from {reference}: nothing was written. Please report this.")
    return f"Largest difference from {reference}: {difference:.1e}"


def expanded_path(name: str) -> Path:
    return Path(name).expanduser()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m modeling_scratchgpt.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "source", metavar="SOURCE", type=os.path.expanduser, help="model to convert: a file, a directory or a Hub id"
    )
    parser.add_argument("destination", metavar="DESTINATION", type=expanded_path, help="directory to create")
    parser.add_argument("--to", choices=("gpt2", "qwen3", "gguf", "onnx"), help="target format of a ScratchGPT")
    parser.add_argument("--type", choices=TYPES, help="data type of the matrices in a GGUF file (default: f16)")
    parser.add_argument("--num_attention_heads", type=int, help="number of heads, if SOURCE is a bare state dict")
    parser.add_argument(
        "--hidden_act", help="activation, if SOURCE is a bare state dict (default: gelu_new, GPT-2's; gelu for nanoGPT)"
    )
    parser.add_argument("--tokenizer", type=os.path.expanduser, help="directory or Hub id of a tokenizer, if SOURCE has none")
    parser.add_argument("--attentions", action="store_true", help="ONNX: also return the weights of all attention heads")
    parser.add_argument(
        "--text",
        type=expanded_path,
        metavar="FILE",
        help="ONNX: measure what 8 bits cost on this text, or JSON lines with text or messages, and label "
        "(default: what the training run of SOURCE has held out, else text that a causal model samples)",
    )
    arguments = parser.parse_args(argv)
    try:
        with warnings.catch_warnings(action="ignore"):  # what libraries warn about is an error here
            convert(arguments)
    except KeyboardInterrupt:
        print("\nconvert: interrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)
    except (OSError, SafetensorError, ValueError) as error:  # SafetensorError: a full disk
        print(f"convert: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def convert(arguments: argparse.Namespace) -> None:
    """Read, verify and write a model as the command-line arguments say.

    Raises:
        ValueError, OSError: the model cannot be converted or written; nothing is left at the destination.
    """
    destination = arguments.destination
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"DESTINATION {destination} exists: pass the name of a new directory.")
    if arguments.type and arguments.to != "gguf":
        raise ValueError(f"--type {arguments.type} is for --to gguf: leave it out.")
    if (arguments.attentions or arguments.text) and arguments.to != "onnx":
        raise ValueError("--attentions and --text are for --to onnx: leave them out.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    loaded = read(arguments.source, arguments.to, arguments.num_attention_heads, arguments.hidden_act)
    if not loaded.is_bare and (arguments.num_attention_heads or arguments.hidden_act):
        raise ValueError(
            f"{arguments.source} contains its heads and its activation: leave out --num_attention_heads and --hidden_act."
        )
    if arguments.tokenizer is not None:
        loaded.tokenizer, remark = tokenizer_of(arguments.tokenizer)
        if not loaded.tokenizer:
            raise ValueError(f"--tokenizer {arguments.tokenizer}: {remark}.")
    config = loaded.model.config
    largest = max(loaded.tokenizer.get_vocab().values(), default=0) if loaded.tokenizer else 0
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, but the model {config.vocab_size} embeddings: pass --tokenizer."
        )
    if loaded.tokenizer:  # a tokenizer may have no maximum, or one of another model
        loaded.tokenizer.model_max_length = min(loaded.tokenizer.model_max_length, config.max_position_embeddings)
    print(
        f"{arguments.source}: {loaded.kind}; {loaded.model.num_parameters():,} parameters, {config.num_hidden_layers} layers x "
        f"{config.hidden_size}, {config.num_attention_heads} heads, vocabulary {config.vocab_size:,}, "
        f"{config.max_position_embeddings:,} positions"
    )
    print(f"Tokenizer: {len(loaded.tokenizer):,} tokens" if loaded.tokenizer else f"No tokenizer: {loaded.remark}")
    if loaded.reference:
        print(verify_outputs(loaded))
    if arguments.to == "gguf":
        check_gguf(loaded.reference.config.model_type, config, loaded.tokenizer)
    if arguments.to == "onnx" and loaded.tokenizer:
        check_tokenizer_js(loaded.tokenizer)
    elif arguments.text:
        raise ValueError(f"--text {arguments.text} is measured with a tokenizer, but the model has none: pass --tokenizer.")
    with atomic_directory(destination) as directory:
        _write(loaded, directory, arguments)
    print(_describe_result(loaded, destination, arguments.to))


def _write(loaded: LoadedModel, directory: Path, arguments: argparse.Namespace) -> None:
    tokenizer = loaded.tokenizer
    if tokenizer and arguments.to:  # a class of transformers, so that it loads without our code
        tokenizer = tokenizer_as(TokenizersBackend, tokenizer)
    match arguments.to:
        case "gguf":
            config, data_type = loaded.reference.config, arguments.type or "f16"
            config.save_pretrained(directory)  # transformers reads only some of its fields from a GGUF file
            write_gguf(directory / GGUF_FILE, config.model_type, loaded.model, tokenizer, data_type)
            options = {"gguf_file": GGUF_FILE, "config": config, "dtype": torch.float32}
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar, which cannot be disabled
                loaded.reference = type(loaded.reference).from_pretrained(directory, **options)
            print(f"Read back from {data_type}. {verify_outputs(loaded, ROUNDING[data_type])}")
            return
        case "onnx":
            _write_web(loaded, directory, arguments)
            return
        case to:
            (loaded.reference if to else loaded.model).save_pretrained(directory)
    if tokenizer:
        tokenizer.save_pretrained(directory)


def _write_web(loaded: LoadedModel, directory: Path, arguments: argparse.Namespace) -> None:
    """Write the graph of a model, the same with fewer bits, and what transformers.js needs beside it."""
    model, tokenizer, data_type = loaded.model.float(), loaded.tokenizer, "fp32"
    config = stock_config(model)
    held_out = arguments.text or Path(arguments.source, HELD_OUT)
    is_causal, loss, source = hasattr(model, "lm_head"), None, held_out.name
    if tokenizer and (arguments.text or held_out.is_file()):
        loss = read_held_out(held_out, config, tokenizer)  # raises its errors before any work
        source = f"at most {MAX_TOKENS:,} tokens of {source}" if is_causal else source
    print("Writing the ONNX graph, which takes about a minute", flush=True)
    write_onnx(directory / GRAPH, model, arguments.attentions)
    ids = _random_ids(model.config)
    with torch.no_grad():
        ours = model(ids).logits
    print(_verify(ours, onnx_logits(directory / GRAPH, ids), TOLERANCE, "onnxruntime"))
    if tokenizer and is_causal and not loss:
        loss, source = sample_text(model, tokenizer), "text that the model has sampled"
    lines = ["32 bits only: to measure what 8 bits cost, pass --text FILE."]
    if loss:
        data_type, lines = write_smaller(directory, config, loss, source)
    print(*lines, sep="\n")
    write_configs(directory, model, config, data_type)
    write_card(directory, Path(arguments.source).resolve().name, tokenizer, is_causal, lines)
    if tokenizer:
        as_tokenizer_js(tokenizer_as(TokenizersBackend, tokenizer)).save_pretrained(directory, save_jinja_files=False)


def _describe_result(loaded: LoadedModel, destination: Path, to: str | None) -> str:
    if to == "gguf":
        return f"Wrote {destination / GGUF_FILE} for llama.cpp and programs based on it."
    if to == "onnx":
        return f"{destination}/ is for transformers.js, onnxruntime and onnxruntime-genai."
    name, trust = (type(loaded.reference).__name__, "") if to else ("ScratchGPT", ", trust_remote_code=True")
    model = f"a complete {name}" if loaded.tokenizer else f"a {name} without a tokenizer"
    return f"{destination}/ is {model}: {loaded.model._auto_class}.from_pretrained({str(destination)!r}{trust})"


if __name__ == "__main__":
    main()
