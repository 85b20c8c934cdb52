"""Models that others have trained, as ScratchGPT's; and ScratchGPT's as models that others run.

    python -m modeling_scratchgpt.convert openai-community/gpt2 outputs/gpt2       # GPT-2 or Qwen3, from the Hub or a folder
    python -m modeling_scratchgpt.convert models/124M outputs/gpt2                 # as OpenAI published it, for TensorFlow
    python -m modeling_scratchgpt.convert out/ckpt.pt outputs/shakespeare          # nanoGPT's
    python -m modeling_scratchgpt.convert model.pt outputs/mine --num_attention_heads 6   # minGPT's, or any bare state dict
    python -m modeling_scratchgpt.convert outputs/pretrain outputs/qwen3 --to qwen3       # the other way: gpt2, qwen3
    python -m modeling_scratchgpt.convert outputs/pretrain outputs/gguf --to gguf --type q8_0   # for llama.cpp
    python -m modeling_scratchgpt.convert outputs/pretrain outputs/onnx --to onnx           # for onnxruntime

What SOURCE is, is recognised. DESTINATION becomes a complete folder, or is not touched. Before that, the model is compared with
transformers' own of the same weights, or with what onnxruntime computes.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedConfig, TokenizersBackend

from ..atomic import atomic_directory
from .gguf import TYPES, check_gguf, write_gguf
from .onnx import FILE as ONNX_FILE
from .onnx import onnx_logits, write_onnx
from .reading import LoadedModel, check_tokenizer, read, tokenizer_as, tokenizer_of

TOLERANCE = 1e-4  # of logits that are at most 1, or of the largest
ROUNDING = {"f32": TOLERANCE, "f16": 1e-2, "q8_0": 0.2}


def verify_outputs(loaded: LoadedModel, tolerance: float = TOLERANCE) -> str:
    """A line on how far the outputs of the two models are apart in float32, on the same random ids.

    Raises:
        ValueError: further than rounding makes them.
    """
    ids = _some_ids(loaded.ours.config)
    outputs = []
    for model in (loaded.ours, loaded.reference):
        dtype = model.dtype
        with torch.no_grad():
            outputs.append(
                (model if dtype == torch.float32 else model.float())(ids, attention_mask=torch.ones_like(ids), return_dict=True)
            )
        if dtype != torch.float32:
            model.to(dtype)  # no bit of the weights has changed
    ours, reference = outputs
    key = "start_logits" if "start_logits" in ours else "logits" if "logits" in ours else "last_hidden_state"
    return _difference(ours[key], reference[key], tolerance, f"{type(loaded.reference).__name__} in transformers")


def _some_ids(config: PreTrainedConfig) -> torch.Tensor:
    """One text, since some classifiers take no more without a token to pad with; that token is not in it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, min(32, config.max_position_embeddings)), generator=generator)
    return (
        torch.where(ids == config.pad_token_id, (ids + 1) % config.vocab_size, ids) if config.pad_token_id is not None else ids
    )


def _difference(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, whose: str) -> str:
    difference = (ours - theirs).abs().max().item()
    if not difference <= tolerance * max(1.0, theirs.abs().max().item()):
        raise ValueError(f"the outputs differ by {difference} from {whose}: nothing was written. Please report this.")
    return f"Largest difference from {whose}: {difference:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("destination", metavar="DESTINATION", type=Path)
    parser.add_argument("--to", choices=("gpt2", "qwen3", "gguf", "onnx"), help="turn a ScratchGPT into this")
    parser.add_argument("--type", choices=TYPES, help="of the matrices in a GGUF file (default: f16)")
    parser.add_argument("--num_attention_heads", type=int, help="needed for bare weights, which do not say it")
    parser.add_argument("--hidden_act", help="activation of bare weights (default: gelu_new, as GPT-2's; nanoGPT's is gelu)")
    parser.add_argument("--tokenizer", help="folder or Hub id of the tokenizer, where the source brings none")
    arguments = parser.parse_args()
    try:
        with warnings.catch_warnings(action="ignore"):  # what libraries would warn of ends in an error here
            convert(arguments)
    except KeyboardInterrupt:
        print("\nconvert: stopped; nothing was written.", file=sys.stderr)
        sys.exit(130)
    except (OSError, SafetensorError, ValueError) as error:  # the second: a disk that is full
        print(f"convert: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def convert(arguments: argparse.Namespace) -> None:
    """What the command line asks for."""
    destination = arguments.destination.expanduser()
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"DESTINATION {destination} exists already: give the name of a new folder.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.type and arguments.to != "gguf":
        raise ValueError(f"--type {arguments.type} is for --to gguf: leave it out.")
    loaded = read(arguments.source, arguments.to, arguments.num_attention_heads, arguments.hidden_act)
    if not loaded.is_bare and (arguments.num_attention_heads or arguments.hidden_act):
        raise ValueError(
            f"{arguments.source} tells its heads and its activation: leave out --num_attention_heads, --hidden_act."
        )
    if arguments.tokenizer is not None:
        loaded.tokenizer, remark = tokenizer_of(arguments.tokenizer)
        if not loaded.tokenizer:
            raise ValueError(f"--tokenizer {arguments.tokenizer}: {remark}.")
    config = loaded.ours.config
    if loaded.tokenizer:
        check_tokenizer(loaded.tokenizer, config.vocab_size)
    print(
        f"{arguments.source}: {loaded.kind}; {loaded.ours.num_parameters():,} parameters, {config.num_hidden_layers} layers x "
        f"{config.hidden_size}, {config.num_attention_heads} heads, vocabulary {config.vocab_size:,}, "
        f"{config.max_position_embeddings:,} positions"
    )
    print(f"Tokenizer: {len(loaded.tokenizer):,} tokens" if loaded.tokenizer else f"No tokenizer: {loaded.remark}")
    if loaded.reference:
        print(verify_outputs(loaded))
    if arguments.to == "gguf":
        check_gguf(config, loaded.tokenizer)
    with atomic_directory(destination) as directory:
        _write(loaded, directory, arguments)
    match arguments.to:
        case "gguf":
            print(f"{destination / 'model.gguf'} is for llama.cpp and what is built on it.")
        case "onnx":
            print(f"{destination / ONNX_FILE} is for onnxruntime and what is built on it.")
        case to:
            name, trust = (type(loaded.reference).__name__, "") if to else ("ScratchGPT", ", trust_remote_code=True")
            what = f"a complete {name}" if loaded.tokenizer else f"a {name} without a tokenizer"
            print(f"{destination}/ is {what}: {loaded.ours._auto_class}.from_pretrained({str(destination)!r}{trust})")


def _write(loaded: LoadedModel, folder: Path, arguments: argparse.Namespace) -> None:
    tokenizer = loaded.tokenizer
    if tokenizer and arguments.to:  # of no class of ours, so that it needs none of our code
        tokenizer = tokenizer_as(TokenizersBackend, tokenizer)
    match arguments.to:
        case "gguf":
            config, file = loaded.reference.config, "model.gguf"
            config.save_pretrained(folder)  # of its fields transformers' reader of GGUF takes only some from the file
            kind = arguments.type or "f16"
            write_gguf(folder / file, loaded.ours.config, loaded.ours.state_dict(), tokenizer, kind)
            loaded.reference = type(loaded.reference).from_pretrained(
                folder, gguf_file=file, config=config, dtype=torch.float32
            )
            print(f"Read back from {kind}. {verify_outputs(loaded, ROUNDING[kind])}")
            return
        case "onnx":
            write_onnx(folder, loaded.ours.float())
            ids = _some_ids(loaded.ours.config)
            with torch.no_grad():
                ours = loaded.ours(ids).logits
            print(_difference(ours, onnx_logits(folder / ONNX_FILE, ids), TOLERANCE, "what onnxruntime computes"))
        case to:
            (loaded.reference if to else loaded.ours).save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
