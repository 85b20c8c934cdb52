"""Read models in other formats, as ScratchGPT and as the reference model of transformers to compare with.

Notable:
- No pickle is executed: torch loads weights only, and nanoGPT's meta.pkl is parsed instruction by instruction.
- The tensors of the source must match those of the model exactly: in names, shapes and kind.
- Every error caused by a damaged file becomes one line that names the file.
"""

import json
import pickle
import pickletools
import re
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
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LM
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

from .. import modeling_scratchgpt
from ..configuration_scratchgpt import ScratchGPTConfig
from ..hub import is_hub_id
from ..interchange import GPT2_MATRICES, HEADS, as_scratchgpt, as_transformers, gpt2_state_dict, model_type_of
from ..modeling_scratchgpt import ScratchGPTForCausalLM
from ..tokenization_scratchgpt import ScratchGPTTokenizer, adds_prefix_space, panics_as_errors
from .onnx import check_onnx
from .tensorflow import read_tensorflow_checkpoint

State = dict[str, torch.Tensor]
REFERENCES: dict[str, Any] = {"gpt2": transformers.GPT2LMHeadModel, "qwen3": transformers.Qwen3ForCausalLM}
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks in older files
CHARACTERS = "meta.pkl"  # nanoGPT's table of the ids of characters


@dataclass
class LoadedModel:
    """A ScratchGPT, the equivalent model of transformers, and the tokenizer."""

    kind: str
    model: Any  # PreTrainedModel, like the next
    reference: Any
    tokenizer: PreTrainedTokenizerBase | None
    remark: str = ""  # why there is no tokenizer
    is_bare: bool = False  # the source has only weights: neither the number of heads nor the activation


def read(source: str, to: str | None, num_attention_heads: int | None, hidden_act: str | None) -> LoadedModel:
    """Read a model from a path or the Hub: a ScratchGPT if `to` names a target format, else another model.

    Args:
        num_attention_heads, hidden_act: of a bare state dict, which does not contain them.

    Raises:
        ValueError: the format is unknown, a file is damaged, or the model cannot be converted.
        OSError: the source does not exist.
    """
    try:
        return _read_scratchgpt(source, to) if to else _read_other(source, num_attention_heads, hidden_act)
    except OSError as error:
        if Path(source).expanduser().exists():
            raise
        raise OSError(f"{source} does not exist here, and the Hub did not provide it ({_short(error)}).") from error
    except ValueError:
        raise
    except Exception as error:  # damaged files can raise anything
        raise ValueError(f"{source} is damaged or mislabeled ({type(error).__name__}: {_short(error)}).") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _read_other(source: str, num_attention_heads: int | None, hidden_act: str | None) -> LoadedModel:
    path = Path(source).expanduser()
    if not path.exists() and not is_hub_id(source):
        raise ValueError(f"{source} does not exist, and is not the id of a repository on the Hub.")
    if hidden_act is not None and hidden_act not in ACT2FN:
        raise ValueError(f"--hidden_act {hidden_act} is unknown to transformers: choose one of {', '.join(sorted(ACT2FN))}.")
    if path.is_dir():
        if (path / "hparams.json").is_file():
            return _read_openai(path)
        if not (path / "config.json").is_file():
            checkpoints = [path / name for name in ("ckpt.pt", "model.pt") if (path / name).is_file()]
            if not checkpoints:
                raise ValueError(f"{path} has none of config.json, hparams.json and ckpt.pt: pass the file itself.")
            path = checkpoints[0]
    if path.is_file():
        return _read_state_dict(path, num_attention_heads, hidden_act)
    return _read_transformers(str(path) if path.exists() else source)


def _read_transformers(source: str) -> LoadedModel:
    """Read a GPT-2 or Qwen3 as transformers saves it, with any head."""
    fields, _ = PreTrainedConfig.get_config_dict(source)
    if model_type_of(fields) == "scratchgpt":
        raise ValueError(f"{source} is a ScratchGPT already: to convert it to another format, pass --to.")
    ScratchGPTConfig.from_dict(as_scratchgpt(fields))  # raises our own errors first
    class_name = (fields.get("architectures") or [REFERENCES[model_type_of(fields)].__name__])[0]
    head = class_name.removeprefix("GPT2").removeprefix("Qwen3").replace("LMHeadModel", "ForCausalLM")
    if head not in ("Model", *HEADS):
        raise ValueError(f"{source} is a {class_name}, for which ScratchGPT has no head.")
    _check_safetensors(Path(source))
    model = _load(getattr(modeling_scratchgpt, f"ScratchGPT{head}"), source)
    reference = getattr(transformers, class_name).from_pretrained(source)
    return LoadedModel(f"{class_name} of transformers", model, reference, *tokenizer_of(source))


def _read_openai(directory: Path) -> LoadedModel:
    sizes = {"n_vocab": "vocab_size", "n_ctx": "n_positions", "n_embd": "n_embd", "n_layer": "n_layer", "n_head": "n_head"}
    try:
        hparams = json.loads((directory / "hparams.json").read_text(encoding="utf-8"))
        if not all(type(hparams[name]) is int and hparams[name] > 0 for name in sizes):
            raise ValueError("its sizes must be positive integers")
        fields = {name: hparams[theirs] for theirs, name in sizes.items()}
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / 'hparams.json'} does not contain OpenAI's sizes ({error!r}).") from error
    indices = sorted(directory.glob("*.index"))
    if len(indices) != 1:
        raise ValueError(f"{directory} has {len(indices)} files named *.index: there must be exactly one.")
    state = {}
    for name, array in read_tensorflow_checkpoint(indices[0]).items():
        parts = name.removeprefix("model/").split("/")
        if parts[0].startswith("h") and parts[0][1:].isdigit():
            parts[:1] = ["h", parts[0][1:]]
        parts[-1] = {"w": "weight", "g": "weight", "b": "bias"}.get(parts[-1], f"{parts[-1]}.weight")
        tensor = torch.from_numpy(array.copy())
        state[".".join(["transformer", *parts])] = tensor.squeeze(0) if parts[-1] == "weight" and tensor.ndim == 3 else tensor
    model, reference = _build_models(fields, state, str(indices[0]))
    tokenizer, remark = None, ""
    try:
        tokenizer = ScratchGPTTokenizer.from_gpt2_files(directory / "encoder.json", directory / "vocab.bpe")
        model.config.bos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    except (OSError, ValueError) as error:
        remark = str(error)
    return LoadedModel("OpenAI's checkpoint for TensorFlow", model, reference, tokenizer, remark)


def _read_state_dict(file: Path, num_attention_heads: int | None, hidden_act: str | None) -> LoadedModel:
    """Read nanoGPT's checkpoint, or a bare state dict with the names of GPT-2, minGPT and nanoGPT."""
    content, kind, is_bare, tables = _load_tensors(file), "bare weights", True, [file.with_name(CHARACTERS)]
    if isinstance(content.get("model"), dict):
        kind, hidden_act = "nanoGPT's checkpoint", hidden_act or "gelu"
        if isinstance(settings := content.get("config"), dict):  # of the run, with its output beside the directory `data`
            tables.append(file.resolve().parent.parent / "data" / str(settings.get("dataset")) / CHARACTERS)
        model_args = content.get("model_args")
        if isinstance(model_args, dict) and "n_head" in model_args:
            is_bare, num_attention_heads = False, model_args["n_head"]
        content = content["model"]
    state = _rename_to_gpt2(content, file)
    fields = _infer_sizes(state, file)
    width = fields["n_embd"]
    if num_attention_heads is None:
        raise ValueError(f"{file} does not contain its number of heads: pass --num_attention_heads.")
    if type(num_attention_heads) is not int or num_attention_heads < 1 or width % num_attention_heads:
        raise ValueError(f"--num_attention_heads {num_attention_heads} does not divide the width of {file}, {width}.")
    if state["transformer.h.0.attn.c_attn.weight"].shape[0] != width:  # stored as in nn.Linear, not as in Conv1D
        matrices = tuple(f".{name}.weight" for name in GPT2_MATRICES)
        state = {name: tensor.T if name.endswith(matrices) else tensor for name, tensor in state.items()}
    widest = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})  # norms may have a higher precision
    state = {name: tensor.to(widest) for name, tensor in state.items()}
    head = state.get("lm_head.weight")
    tied = head is None or torch.equal(head, state["transformer.wte.weight"])
    fields |= {"n_head": num_attention_heads, "activation_function": hidden_act or "gelu_new", "tie_word_embeddings": tied}
    model, reference = _build_models(fields, state, str(file))
    return LoadedModel(kind, model, reference, *character_tokenizer(tables), is_bare=is_bare)


def _load_tensors(file: Path) -> dict[str, Any]:
    """Load a file of PyTorch or safetensors without running code from it."""
    with _loading(file):
        if file.suffix == ".safetensors":
            return load_file(file)
        is_zip = zipfile.is_zipfile(file)
        with open(file, "rb") as opened:
            if not is_zip and opened.read(1) != pickle.PROTO:
                raise ValueError("neither PyTorch nor safetensors")
        if is_zip and (bad := zipfile.ZipFile(file).testzip()):
            raise ValueError(f"the checksum of {bad} is wrong")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(content, dict):
        raise ValueError(f"{file} contains a {type(content).__name__}: pass a state dict, or nanoGPT's checkpoint.")
    return content


def _rename_to_gpt2(content: dict[Any, Any], file: Path) -> State:
    """Rename the tensors to those of `GPT2LMHeadModel` and check their types."""
    state: State = {}
    for original, tensor in content.items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(original, str):
            raise ValueError(f"{file}: {original} is a {type(tensor).__name__}, not a tensor: this is not a state dict.")
        name = re.sub(r"^((_orig_mod|module)\.)+", "", original)  # of torch.compile and DistributedDataParallel
        if name.endswith(MASKS):
            continue
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if name in state:
            raise ValueError(f"{file} has two tensors for {name}: {original} is the second.")
        if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.is_meta:
            raise ValueError(f"{file}: {original} is of type {tensor.dtype}: weights must be dense floating-point tensors.")
        state[name] = tensor
    return state


def _infer_sizes(state: State, file: Path) -> dict[str, Any]:
    """Read the sizes of a GPT-2 off the shapes of its weights, as fields of `GPT2Config`."""
    try:
        vocab_size, width = state["transformer.wte.weight"].shape
        positions = state["transformer.wpe.weight"].shape[0]
        _, inner = (max(state[f"transformer.h.0.{name}.weight"].shape) for name in ("attn.c_attn", "mlp.c_fc"))
        layers = {int(name.split(".")[2]) for name in state if name.startswith("transformer.h.")}
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: {error} is missing or not a matrix: these are not the weights of a GPT-2.") from error
    if layers != set(range(len(layers))):
        raise ValueError(f"{file} has {len(layers)} layers, from {min(layers)} to {max(layers)}: some are missing.")
    return {"vocab_size": vocab_size, "n_positions": positions, "n_embd": width, "n_layer": len(layers), "n_inner": inner}


def _build_models(fields: dict[str, Any], state: State, file: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Build a ScratchGPT and transformers' GPT-2 from fields and weights with the names and the layout of the latter."""
    config = GPT2Config(**fields, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=None, eos_token_id=None)
    our_config = ScratchGPTConfig(**as_scratchgpt(config.to_dict()))
    with torch.device("meta"):
        reference = transformers.GPT2LMHeadModel(config)
    expected = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
        expected.pop("lm_head.weight")
    biases = tuple(f"{name}.bias" for name in ("ln_1", "ln_2", "ln_f", *GPT2_MATRICES))
    has_biases = any(name.endswith(biases) for name in state)
    if not has_biases:  # nanoGPT's bias=False: the reference and the norms here need biases of zero
        state = state | {name: torch.zeros(shape) for name, shape in expected.items() if name.endswith(biases)}
    _check_names(file, missing=expected.keys() - state.keys(), unexpected=state.keys() - expected.keys())
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise ValueError(f"{file}: {name} is {tuple(state[name].shape)}, expected {tuple(shape)}.")
    reference.load_state_dict(state, strict=False, assign=True)
    reference.tie_weights()
    if not has_biases:
        our_config.attention_bias = our_config.mlp_bias = False
        state = {name: tensor for name, tensor in state.items() if not name.endswith(biases) or ".ln_" in name}
    return _load(ScratchGPTForCausalLM, None, file, config=our_config, state_dict=state), reference.eval()


def _load(model_class: Any, path: str | None, name: str | None = None, **options: Any) -> Any:
    """Load a model, all of whose weights must be in the source (called `name` in errors) and finite."""
    source = name or path
    with _loading(source):
        model, report = model_class.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    _check_names(source, report["missing_keys"], report["unexpected_keys"], [key[0] for key in report["mismatched_keys"]])
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{source}: {key} has values that are not finite.")
    head = getattr(model, "lm_head", None)
    if head is not None and head.weight is not model.model.embed_tokens.weight:
        model.config.tie_word_embeddings = False  # a file may contain a separate head, whatever its config says
    return model


def _check_names(source: str, missing: Any = (), unexpected: Any = (), mismatched: Any = ()) -> None:
    for problem, names in (("lacks", missing), ("has the unknown", unexpected), ("has the wrong shape for", mismatched)):
        if names:
            listed = ", ".join(sorted(names)[:5])
            raise ValueError(f"{source} {problem} {listed}{', ...' if len(names) > 5 else ''}: it is another model or damaged.")


@contextmanager
def _loading(source: str | Path) -> Iterator[None]:
    """Raise errors while loading weights as a `ValueError` of one line."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{source} contains more than weights, which could run code, or is damaged: it is not read. Save the state "
            "dict alone, with the program that made this file: torch.save(model.state_dict(), NEW_FILE)."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        or_memory = ", or exceeds the memory" if isinstance(error, RuntimeError) else ""
        reason = f"{type(error).__name__}: {_short(error)}"
        raise ValueError(f"{source} is damaged or not a file of weights{or_memory} ({reason}).") from error


def _check_safetensors(directory: Path) -> None:
    """Refuse local safetensors that are damaged, not floating-point, or contain a weight twice."""
    seen: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with _loading(file), safe_open(file, "pt") as opened:
            dtypes = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        for name, dtype in dtypes.items():
            if dtype not in ("F64", "F32", "F16", "BF16") and not name.endswith(MASKS):
                raise ValueError(f"{file}: {name} is of type {dtype}: weights must be floating-point tensors.")
            if other := seen.get(key := name.removeprefix("transformer.")):
                raise ValueError(f"{directory} has two tensors for one weight: {other} and {name}.")
            seen[key] = name


def _read_scratchgpt(source: str, to: str) -> LoadedModel:
    """Read a ScratchGPT with its reference: GPT-2 or Qwen3; for GGUF, whichever fits; none for ONNX."""
    if Path(source).is_file():
        raise ValueError(f"{source} is a file: --to takes the directory of a ScratchGPT.")
    fields, _ = PreTrainedConfig.get_config_dict(source)
    if fields.get("model_type") != "scratchgpt":
        raise ValueError(f"{source} is a {fields.get('model_type')} model: --to takes a ScratchGPT.")
    architecture = (fields.get("architectures") or ["ScratchGPTForCausalLM"])[0]
    heads = ["ForCausalLM", *(["ForSequenceClassification"] if to == "onnx" else [])]
    head = next((head for head in heads if architecture.endswith(head)), None)
    if not head:
        allowed = " or a ".join(f"ScratchGPT{head}" for head in heads)
        raise ValueError(f"{source} is a {architecture}: --to {to} takes a {allowed}.")
    if Path(source, "adapter_config.json").is_file():
        raise ValueError(f"{source} also has an adapter, which would be lost: merge it into the model first.")
    _check_safetensors(Path(source))
    our_config = ScratchGPTConfig.from_dict(fields)
    if to == "onnx":
        check_onnx(our_config)
    model_type = to if to in REFERENCES else None
    as_transformers(our_config, model_type)  # raises its errors before the weights are loaded
    model = _load(getattr(modeling_scratchgpt, f"ScratchGPT{head}"), source)
    if to == "onnx":
        return LoadedModel("ScratchGPT", model, None, *tokenizer_of(source))
    config = as_transformers(model.config, model_type)
    state = gpt2_state_dict(model.state_dict()) if config.model_type == "gpt2" else model.state_dict()
    reference = REFERENCES[config.model_type].from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    reference.generation_config = model.generation_config
    return LoadedModel("ScratchGPT", model, reference, *tokenizer_of(source))


def stock_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the equivalent language model or classifier of transformers."""
    config = as_transformers(model.config)
    table = CAUSAL_LM if hasattr(model, "lm_head") else CLASSIFIERS
    config.architectures, config.problem_type = [table[config.model_type]], model.config.problem_type
    return config


def tokenizer_of(source: str) -> tuple[ScratchGPTTokenizer | None, str]:
    """Load the tokenizer of a directory or repository as a ScratchGPTTokenizer, or say why there is none."""
    directory = Path(source)
    loader: Any = AutoTokenizer
    found = [name for name in ("tokenizer.json", "vocab.json", "vocab.txt") if (directory / name).is_file()]
    settings = directory / "tokenizer_config.json"
    names_class = settings.is_file() and "tokenizer_class" in settings.read_text(encoding="utf-8", errors="replace")
    if directory.is_dir() and not found and not names_class:
        return None, f"{source} has none"
    if found == ["vocab.txt"] and not names_class:
        loader = transformers.BertTokenizer  # of many Chinese GPT-2s, whose configs do not name it
    try:
        with panics_as_errors():
            tokenizer = loader.from_pretrained(source, trust_remote_code=False)
        if not tokenizer.is_fast or len(tokenizer) == len(tokenizer.added_tokens_decoder):
            return None, f"{source} has none"
    except Exception as error:  # transformers, tokenizers and the Hub each have their own
        return None, f"that of {source} cannot be read ({_short(error)})"
    return tokenizer_as(ScratchGPTTokenizer, tokenizer), ""


def tokenizer_as(tokenizer_class: Any, tokenizer: Any) -> Any:
    """Convert a tokenizer to another class, with all settings that are not in `tokenizer.json`."""
    names = ["model_max_length", "extra_special_tokens", "chat_template", "padding_side", "truncation_side"]
    names += ["clean_up_tokenization_spaces", "split_special_tokens"]
    settings = {name: getattr(tokenizer, name) for name in names}
    passed = ("add_bos_token", "add_eos_token", "pad_to_multiple_of", "pad_token_type_id", "stride", "truncation_strategy")
    settings |= {name: tokenizer.init_kwargs[name] for name in passed if name in tokenizer.init_kwargs}
    settings["model_input_names"] = [name for name in tokenizer.model_input_names if name != "token_type_ids"]  # BERT's
    settings |= {"add_prefix_space": adds_prefix_space(tokenizer.backend_tokenizer), **tokenizer.special_tokens_map}
    return tokenizer_class(tokenizer_object=tokenizer.backend_tokenizer, **settings)


def character_tokenizer(tables: list[Path]) -> tuple[ScratchGPTTokenizer | None, str]:
    """Read nanoGPT's table of characters, from the first of these files that exists."""
    file = next((table for table in tables if table.is_file()), None)
    if not file:
        return None, f"the weights come without one, and without nanoGPT's {CHARACTERS}: pass --tokenizer"
    try:
        ids = parse_plain_pickle(file.read_bytes())["stoi"]
        if not all(isinstance(text, str) and len(text) == 1 for text in ids) or sorted(ids.values()) != [*range(len(ids))]:
            raise ValueError("stoi must number characters from 0")
        # Unlike BPE, it does not drop unknown characters: the unknown token is not in the vocabulary, which is an error.
        tokenizer = Tokenizer(models.WordLevel(vocab=ids, unk_token="<|unk|>"))
    except Exception as error:  # a damaged file can raise anything, and `tokenizers` raises bare exceptions
        raise ValueError(f"{file} is not nanoGPT's table of characters ({error!r}).") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return ScratchGPTTokenizer(tokenizer_object=tokenizer), ""


def parse_plain_pickle(content: bytes) -> Any:
    """Parse a pickle of dictionaries, strings and integers from its instructions, without unpickling.

    Raises:
        ValueError: it has an instruction that would import, call or build anything else.
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
                raise ValueError(f"it contains more than dictionaries, strings and integers: {name}")
    raise ValueError("it has no end")
