"""Other people's models, read: as ours, and in transformers' own class. What a source is, is recognised.

Notable:
- No pickle runs: torch loads weights only, and nanoGPT's meta.pkl is read instruction by instruction, not unpickled.
- Every tensor of the source must have its place, and every place its tensor, of the right shape and kind.
- Whatever a damaged file makes a reader stumble over ends in one line that names it.
"""

import json
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, GPT2Config, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from .. import modeling_scratchgpt
from ..configuration_scratchgpt import ScratchGPTConfig
from ..hub import is_hub_id
from ..interchange import GPT2_MATRICES, HEADS, as_scratchgpt, as_transformers, gpt2_state_dict
from ..modeling_scratchgpt import ScratchGPTForCausalLM
from ..tokenization_scratchgpt import ScratchGPTTokenizer, panics_as_errors
from .onnx import check_onnx
from .tensorflow import read_tensorflow_checkpoint

State = dict[str, torch.Tensor]
MASKS = (".attn.bias", ".attn.masked_bias")  # the causal mask of older files


@dataclass
class LoadedModel:
    """A model of ours, the same in transformers' own class, and what is known of its tokens."""

    kind: str
    ours: Any  # a PreTrainedModel, as the next
    reference: Any
    tokenizer: PreTrainedTokenizerBase | None
    remark: str = ""  # why there is no tokenizer
    is_bare: bool = False  # whether the source tells its numbers and names of nothing else


def read(source: str, to: str | None, num_attention_heads: int | None, hidden_act: str | None) -> LoadedModel:
    """Read a source.

    Args:
        source: a path, or the id of a model on the Hub.
        to: what a ScratchGPT is to become; None for a model that is to become one.
        num_attention_heads, hidden_act: of a bare state dict, which does not tell them.

    Raises:
        ValueError: it is none of those that are read here, is damaged, or cannot become what it is to be.
        OSError: it is not there.
    """
    try:
        return _ours(source, to) if to else _others(source, num_attention_heads, hidden_act)
    except OSError as error:
        if Path(source).expanduser().exists():
            raise
        said = " ".join(str(error).split())[:200]
        raise OSError(f"{source} is no file or folder here, and the Hub did not give it ({said}).") from error
    except ValueError:
        raise
    except Exception as error:  # other people's files can make a reader stumble in every way
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{source} is damaged, or is not what it says it is ({type(error).__name__}: {said}).") from error


def _others(source: str, num_attention_heads: int | None, hidden_act: str | None) -> LoadedModel:
    path = Path(source).expanduser()
    if not path.exists() and not is_hub_id(source):
        raise ValueError(f"{source} does not exist, and is not the id of a repository on the Hub.")
    if hidden_act is not None and hidden_act not in ACT2FN:
        raise ValueError(
            f"--hidden_act {hidden_act} is not one that transformers knows: these are {', '.join(sorted(ACT2FN))}."
        )
    if path.is_dir():
        if (path / "hparams.json").is_file():
            return _openai(path)
        if not (path / "config.json").is_file():
            checkpoints = [path / name for name in ("ckpt.pt", "model.pt") if (path / name).is_file()]
            if not checkpoints:
                raise ValueError(f"{path} holds neither config.json, nor hparams.json, nor ckpt.pt: give the file itself.")
            path = checkpoints[0]
    if path.is_file():
        return _state_dict(path, num_attention_heads, hidden_act)
    return _folder(source if not path.exists() else str(path))


def _folder(source: str) -> LoadedModel:
    """GPT-2's or Qwen3's, as transformers saves them, with any head."""
    fields, _ = PreTrainedConfig.get_config_dict(source)
    if fields.get("model_type") == "scratchgpt":
        raise ValueError(f"{source} is a ScratchGPT already: to make another of it, say which with --to.")
    ScratchGPTConfig(**as_scratchgpt(fields))  # says what cannot be, in words of our own
    plain = "GPT2LMHeadModel" if fields["model_type"] == "gpt2" else "Qwen3ForCausalLM"
    class_name = (fields.get("architectures") or [plain])[0]
    head = class_name.removeprefix("GPT2").removeprefix("Qwen3").replace("LMHeadModel", "ForCausalLM")
    if head not in ("Model", *HEADS):
        raise ValueError(f"{source} is a {class_name}, for which ScratchGPT has no head.")
    our_class = getattr(modeling_scratchgpt, f"ScratchGPT{head}")
    _check_files(Path(source))
    with _loading(source):
        ours, report = _with_report(our_class, source)
        _check_report(source, report)
        reference = getattr(transformers, class_name).from_pretrained(source)
    return LoadedModel(f"{class_name} of transformers", ours, reference, *tokenizer_of(source))


@contextmanager
def _loading(source: str) -> Iterator[None]:
    """What goes wrong while weights are loaded, in one line."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(f"{source}: a file of its weights is damaged, or more than weights, which could run code.") from error
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{source}: its weights are damaged, no weights, or too large for this memory ({error}).") from error


def _check_files(folder: Path) -> None:
    """Refuse safetensors of a local folder that are damaged, hold what is no weight, or have two tensors for one place."""
    places: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged, or is no file of weights ({error}).") from error
        for name, kind in kinds.items():
            if kind not in ("F64", "F32", "F16", "BF16") and not name.endswith(MASKS):
                raise ValueError(f"{file}: {name} is of type {kind}: weights are floating-point numbers.")
            if other := places.get(place := name.removeprefix("transformer.")):
                raise ValueError(f"{folder} has two tensors for one place: {other} and {name}.")
            places[place] = name


def _openai(folder: Path) -> LoadedModel:
    """OpenAI's own files."""
    try:
        hparams = json.loads((folder / "hparams.json").read_text(encoding="utf-8"))
        if not all(
            type(hparams[name]) is int and hparams[name] > 0 for name in ("n_vocab", "n_ctx", "n_embd", "n_layer", "n_head")
        ):
            raise ValueError("its sizes must be positive whole numbers")
        config = GPT2Config(
            vocab_size=hparams["n_vocab"],
            n_positions=hparams["n_ctx"],
            n_embd=hparams["n_embd"],
            n_layer=hparams["n_layer"],
            n_head=hparams["n_head"],
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'hparams.json'} does not give OpenAI's sizes ({error!r}).") from error
    indices = sorted(folder.glob("*.index"))
    if len(indices) != 1:
        raise ValueError(f"{folder} holds {len(indices)} files named .index: there must be one, of the checkpoint to read.")
    state = {}
    for name, array in read_tensorflow_checkpoint(indices[0]).items():
        parts = name.removeprefix("model/").split("/")
        if parts[0].startswith("h") and parts[0][1:].isdigit():
            parts[:1] = ["h", parts[0][1:]]
        parts[-1] = {"w": "weight", "g": "weight", "b": "bias"}.get(parts[-1], f"{parts[-1]}.weight")
        tensor = torch.from_numpy(array.copy())
        state[".".join(["transformer", *parts])] = tensor.squeeze(0) if parts[-1] == "weight" and tensor.ndim == 3 else tensor
    ours, reference = _models(config, state, str(indices[0]))
    return LoadedModel("OpenAI's checkpoint for TensorFlow", ours, reference, *_openai_tokenizer(folder, ours.config))


def _state_dict(file: Path, num_attention_heads: int | None, hidden_act: str | None) -> LoadedModel:
    """nanoGPT's checkpoint, or the bare weights of any model that names them as GPT-2, minGPT and nanoGPT do."""
    content = _read_tensors(file)
    kind = "bare weights"
    is_bare = True
    if isinstance(content.get("model"), dict):
        kind, hidden_act = "nanoGPT's checkpoint", hidden_act or "gelu"
        sizes = content.get("model_args")
        if isinstance(sizes, dict) and "n_head" in sizes:
            is_bare, num_attention_heads = False, sizes["n_head"]
        content = content["model"]
    state: State = {}
    for original, tensor in content.items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(original, str):
            raise ValueError(f"{file}: {original} is no tensor but a {type(tensor).__name__}: these are no weights of a model.")
        name = original.removeprefix("_orig_mod.").removeprefix("module.")  # of torch.compile, of DistributedDataParallel
        if name.endswith(MASKS):
            continue
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if name in state:
            raise ValueError(f"{file} has two tensors for one place: {original} is the second for {name}.")
        if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.is_meta:
            raise ValueError(f"{file}: {original} is of type {tensor.dtype}: weights are dense floating-point numbers.")
        state[name] = tensor
    try:
        vocab_size, width = state["transformer.wte.weight"].shape
        positions = state["transformer.wpe.weight"].shape[0]
        layout = state["transformer.h.0.attn.c_attn.weight"].shape
        inner = max(state["transformer.h.0.mlp.c_fc.weight"].shape)
        layers = {int(name.split(".")[2]) for name in state if name.startswith("transformer.h.")}
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: {error} is missing or no matrix: these are not the weights of a GPT-2.") from error
    if layers != set(range(len(layers))):
        raise ValueError(
            f"{file} has layers {sorted(layers)[:3]} to {max(layers)}, and {len(layers)} of them: some are missing."
        )
    if num_attention_heads is None:
        raise ValueError(f"{file}: its tensors do not tell how many heads it has: pass --num_attention_heads.")
    if type(num_attention_heads) is not int or num_attention_heads < 1 or width % num_attention_heads:
        raise ValueError(f"--num_attention_heads {num_attention_heads} does not divide the width of {file}, {width}.")
    if layout[0] != width:  # nn.Linear's
        matrices = tuple(f".{name}.weight" for name in GPT2_MATRICES)
        state = {name: tensor.T if name.endswith(matrices) else tensor for name, tensor in state.items()}
    widest = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    state = {name: tensor.to(widest) for name, tensor in state.items()}  # some keep the norms in a higher precision
    head = state.get("lm_head.weight")
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=positions,
        n_embd=width,
        n_layer=len(layers),
        n_head=num_attention_heads,
        n_inner=inner,
        activation_function=hidden_act or "gelu_new",
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        tie_word_embeddings=head is None or torch.equal(head, state["transformer.wte.weight"]),
        bos_token_id=None,
        eos_token_id=None,
    )
    ours, reference = _models(config, state, str(file))
    return LoadedModel(kind, ours, reference, *_characters_of(file.with_name("meta.pkl")), is_bare=is_bare)


def _read_tensors(file: Path) -> dict[str, Any]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with open(file, "rb") as opened:
            begins_as_pickle = opened.read(1) == pickle.PROTO
        if not begins_as_pickle and not zipfile.is_zipfile(file):
            raise ValueError("it is neither a file of PyTorch's nor of safetensors")
        if zipfile.is_zipfile(file) and (bad := zipfile.ZipFile(file).testzip()):
            raise ValueError(f"{bad} in it has changed since it was written")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is no file of weights alone: reading it could run code that it brings, so it is not read."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged, or is no file of weights ({' '.join(str(error).split())[:200]}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}: give a state dict, or nanoGPT's checkpoint.")
    return content


def _models(config: GPT2Config, state: State, file: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Ours and transformers' GPT-2 with these weights, which bear its names and lie as it wants them."""
    our_config = ScratchGPTConfig(**as_scratchgpt(config.to_dict()))
    with torch.device("meta"):
        reference = transformers.GPT2LMHeadModel(config)
    expected = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
        expected.pop("lm_head.weight")
    is_bias = tuple(f"{name}.bias" for name in ("ln_1", "ln_2", "ln_f", *GPT2_MATRICES))
    has_biases = any(name.endswith(is_bias) for name in state)
    if not has_biases:  # nanoGPT's bias=False; in the norms and in reference GPT-2 there must be one: zero
        state = state | {name: torch.zeros(shape) for name, shape in expected.items() if name.endswith(is_bias)}
    _refuse(file, "lacks", expected.keys() - state.keys())
    _refuse(file, "has no place for", state.keys() - expected.keys())
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise ValueError(f"{file}: {name} is {tuple(state[name].shape)}, and should be {tuple(shape)}.")
    reference.load_state_dict(state, strict=False, assign=True)
    reference.tie_weights()
    if not has_biases:
        our_config.attention_bias = our_config.mlp_bias = False
        state = {name: tensor for name, tensor in state.items() if not name.endswith(is_bias) or ".ln_" in name}
    ours, report = _with_report(ScratchGPTForCausalLM, None, config=our_config, state_dict=state)
    _check_report(file, report)
    return ours, reference.eval()


def _with_report(model_class: Any, source: str | None, **options: Any) -> tuple[Any, dict[str, Any]]:
    model, report = model_class.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{source or 'the source'}: {name} holds numbers that are not finite.")
    head = getattr(model, "lm_head", None)
    if head is not None and head.weight is not model.model.embed_tokens.weight:
        model.config.tie_word_embeddings = False  # a file may have a head of its own, whatever its config says
    return model, report


def _check_report(source: str, report: dict[str, Any]) -> None:
    _refuse(source, "lacks", report["missing_keys"])
    _refuse(source, "has no place for", report["unexpected_keys"])
    _refuse(source, "has the wrong shape for", [str(key[0]) for key in report["mismatched_keys"]])


def _refuse(source: str, what: str, names: Any) -> None:
    if names:
        listed = ", ".join(sorted(names)[:5])
        raise ValueError(f"{source} {what} {listed}{', ...' if len(names) > 5 else ''}: it is not the model it should be.")


def _ours(source: str, to: str) -> LoadedModel:
    """A folder of ours, also as transformers' GPT-2 or Qwen3; for GGUF, as whichever of them it is; for ONNX, as neither.

    Raises:
        ValueError: it is no ScratchGPT, or cannot be what is wanted; the message names the field of its config.
    """
    if Path(source).is_file():
        raise ValueError(f"{source} is a file: --to takes the folder of a ScratchGPT.")
    fields, _ = PreTrainedConfig.get_config_dict(source)
    if fields.get("model_type") != "scratchgpt":
        raise ValueError(f"{source} is a {fields.get('model_type')} model: --to takes a ScratchGPT.")
    if (architecture := (fields.get("architectures") or [""])[0]) and not architecture.endswith("ForCausalLM"):
        raise ValueError(f"{source} is a {architecture}: --to takes a language model, a ScratchGPTForCausalLM.")
    if Path(source, "adapter_config.json").is_file():
        raise ValueError(f"{source} also holds an adapter, which would be left out: merge it into the model first.")
    _check_files(Path(source))
    our_config = ScratchGPTConfig.from_dict(fields)
    model_type = ("qwen3" if our_config.position_embedding_type == "rotary" else "gpt2") if to == "gguf" else to
    if to == "onnx":
        check_onnx(our_config)
    else:
        as_transformers(our_config, model_type)
    with _loading(source):
        ours, report = _with_report(ScratchGPTForCausalLM, source)
        _check_report(source, report)
    reference = None
    if to != "onnx":
        config = as_transformers(ours.config, model_type)
        reference_class = transformers.GPT2LMHeadModel if model_type == "gpt2" else transformers.Qwen3ForCausalLM
        state = gpt2_state_dict(ours.state_dict()) if model_type == "gpt2" else ours.state_dict()
        reference = reference_class.from_pretrained(None, config=config, state_dict=state, dtype=ours.dtype)
        reference.generation_config = ours.generation_config
    return LoadedModel("ScratchGPT", ours, reference, *tokenizer_of(source))


# Tokenizers -----------------------------------------------------------------------------------------------------------


def tokenizer_of(source: str) -> tuple[ScratchGPTTokenizer | None, str]:
    """A folder's or a repository's own, as ours."""
    folder, files = Path(source), ("tokenizer.json", "vocab.json", "tokenizer_config.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in files):
        return None, f"{source} holds none"
    try:
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if not tokenizer.is_fast or len(tokenizer) == len(tokenizer.added_tokens_decoder):
            return None, f"{source} holds none"
    except Exception as error:  # transformers, tokenizers and the Hub each have their own
        return None, f"that of {source} cannot be read ({' '.join(str(error).split())[:200]})"
    return tokenizer_as(ScratchGPTTokenizer, tokenizer), ""


def tokenizer_as(tokenizer_class: Any, tokenizer: Any) -> Any:
    """A tokenizer as one of another class."""
    return tokenizer_class(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_max_length=min(tokenizer.model_max_length, 2**40),
        extra_special_tokens=tokenizer.extra_special_tokens,
        chat_template=tokenizer.chat_template,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        **tokenizer.special_tokens_map,
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, and the model rows for {vocab_size} tokens: pass --tokenizer."
        )


def _openai_tokenizer(folder: Path, config: PreTrainedConfig) -> tuple[ScratchGPTTokenizer | None, str]:
    try:
        tokenizer = ScratchGPTTokenizer.from_gpt2_files(folder / "encoder.json", folder / "vocab.bpe")
    except (OSError, ValueError) as error:
        return None, str(error)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    return tokenizer, ""


def _plain_content(content: bytes) -> Any:
    """The dictionaries, strings and whole numbers that a pickle describes, put together from a list of its instructions.

    Nothing is unpickled: an instruction that would name, call or build anything else ends it.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for instruction, argument, _ in pickletools.genops(content):
        match instruction.name:
            case "PROTO" | "FRAME":
                continue
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2":
                stack.append(argument)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "SETITEM" | "SETITEMS" as name:
                start = marks.pop() if name == "SETITEMS" else len(stack) - 2
                items = stack[start:]
                del stack[start:]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case name:
                raise ValueError(f"it holds more than dictionaries, strings and whole numbers: {name}")
    raise ValueError("it has no end")


def _characters_of(file: Path) -> tuple[ScratchGPTTokenizer | None, str]:
    """nanoGPT's table of characters, if it lies beside the checkpoint."""
    if not file.is_file():
        return None, f"the file of weights brings none, and no {file.name} lies beside it: pass --tokenizer"
    try:
        ids = _plain_content(file.read_bytes())["stoi"]
        if not all(isinstance(text, str) and len(text) == 1 for text in ids) or sorted(ids.values()) != [*range(len(ids))]:
            raise ValueError("stoi does not number characters from 0 on")
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], cache_capacity=0))
    except Exception as error:  # it can be wrong in every way, and `tokenizers` raises bare exceptions
        raise ValueError(f"{file} is not nanoGPT's table of characters ({error!r}).") from error
    tokenizer.decoder = decoders.Fuse()
    return ScratchGPTTokenizer(tokenizer_object=tokenizer), ""


__all__ = ["LoadedModel", "check_tokenizer", "read", "tokenizer_as", "tokenizer_of"]
