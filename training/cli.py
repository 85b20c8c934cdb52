"""Arguments of a program: a YAML file, overridden by the command line, validated before any data is read.

Notable:
- One parser for both: the YAML is parsed as if its lines had been typed, with the same errors; `--help` shows its values.
- A range belongs to its option (`option(8, "...", minimum=1)`), and one function checks them all.
"""

import argparse
import dataclasses
import difflib
import errno
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from modeling_scratchgpt import ScratchGPTConfig
from training.errors import UserError, explain_errors, printable

Arguments = TypeVar("Arguments")
HELP = "(--help lists all arguments)"
OTHER_NAMES = {  # of the same arguments, in other programs
    "learning_rate": ["lr"], "num_train_epochs": ["epochs"], "max_steps": ["max_iters", "num_iterations"],
    "context_length": ["block_size", "max_seq_length", "max_length"], "dataset": ["data", "dataset_name", "train_file"],
    "base_model": ["model_name_or_path"], "batch_size": ["per_device_train_batch_size", "micro_batch_size"],
    "output_dir": ["out_dir"], "eval_steps": ["eval_interval"], "max_grad_norm": ["grad_clip"], "lora_r": ["lora_rank"],
    "precision": ["bf16", "fp16", "mixed_precision"], "torch_compile": ["compile"], "input": ["dataset", "file"],
}  # fmt: skip
SYNONYMS = {other: name for name, others in OTHER_NAMES.items() for other in others}
RANGES: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "minimum": ("at least", float.__ge__),
    "above": ("above", float.__gt__),
    "maximum": ("at most", float.__le__),
    "below": ("below", float.__lt__),
}
OTHERS_WAIT = 3.0  # seconds until another process than the main one prints its error
SYSTEM_ERRORS = (  # of the output directory: the user can fix them
    *(errno.EEXIST, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT, errno.EACCES),
    *(errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP),
)


def option(default: Any, help: str, **keywords: Any) -> Any:
    """A dataclass field with a default and a help text; lists get a fresh copy.

    Args:
        keywords: for argparse, such as `choices`; and `minimum`, `maximum`, `above` and `below`, which `validate` checks.
    """
    metadata = {"help": help, **keywords}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def validate(arguments: Any) -> None:
    """Raise `UserError` for a number outside the range of its option, or one that is not finite."""
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        if type(value) not in (int, float):
            continue
        limits = {name: field.metadata[name] for name in RANGES if name in field.metadata}
        if not math.isfinite(value) or not all(RANGES[name][1](float(value), float(limit)) for name, limit in limits.items()):
            rule = " and ".join(f"{RANGES[name][0]} {limit:,}" for name, limit in limits.items()) or "a finite number"
            raise UserError(f"--{field.name} must be {rule}, got {value}.")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and the description as it is written."""


class _ReplaceDefault(argparse.Action):
    """A list option that is given several times: its words add up, and replace the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


class _TextLoader(yaml.SafeLoader):
    """YAML whose values are the words of a command line: only `null` is special, so `no` and `1e-3` stay as they are."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _NumberLoader(yaml.SafeLoader):
    """YAML that also reads `1e-6` as a number, as YAML 1.2 does."""


_NumberLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"-+0123456789"])


class _Parser(HfArgumentParser):
    """transformers' parser for dataclasses, with one-line errors."""

    def add_argument(self, *names: str, **keywords: Any) -> argparse.Action:
        if keywords.get("nargs") == "+":
            keywords.setdefault("action", _ReplaceDefault)
        return super().add_argument(*names, **{key: value for key, value in keywords.items() if key not in RANGES})

    def error(self, message: str) -> NoReturn:
        _, unknown, words = message.partition("unrecognized arguments: ")
        options = [word for word in words.split() if word.startswith("--")]
        known = [name for name in self._option_string_actions if "-" not in name[2:]]  # the spelling of the documents
        raise UserError(message + _hint(options, known) if unknown else f"{message} {HELP}")


def _hint(unknown: Sequence[str], known: Sequence[str]) -> str:
    """The closest known names, or where all names are listed."""
    meant: list[str] = []
    for name in unknown:
        word = name.partition("=")[0].lstrip("-").replace("-", "_")
        dashes = "--" if name.startswith("--") else ""
        meant += difflib.get_close_matches(dashes + SYNONYMS.get(word, word), known, n=1)
    return f": did you mean {' and '.join(dict.fromkeys(meant))}?" if meant else f" {HELP}"


def parse_arguments(
    arguments_class: type[Arguments], description: str, argv: Sequence[str] | None = None, positional: str = ""
) -> Arguments:
    """Fill the dataclass from the YAML file of its field `config`, if it has one, then from the command line.

    Args:
        arguments_class: a dataclass whose fields are options; the default of `config` is the path of a YAML file, or empty.
        description: the first part of `--help`.
        argv: the command line; that of the process if None.
        positional: the option that the first word of the command line stands for, if that word is not an option.

    Returns:
        The arguments; their attribute `typed` holds the names of the options on the command line.

    Raises:
        UserError: a missing file, invalid YAML, an unknown name, a value of the wrong type or outside its range.
    """
    parser = _Parser(arguments_class, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)  # type: ignore[arg-type]
    argv = list(sys.argv[1:] if argv is None else argv)
    for word in argv:
        if word.encode(errors="replace").decode() != word:
            raise UserError(f"{word!r} is not UTF-8: rename the file or directory; a model card cannot hold this name.")
    if positional and argv and not argv[0].startswith("-"):
        argv.insert(0, f"--{positional}")
    if parser.get_default("config") is not None:
        _set_defaults_from_file(parser, arguments_class, argv)
    arguments: Any = arguments_class(**vars(parser.parse_args(argv)))
    arguments.typed = {word.partition("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}
    validate(arguments)
    return arguments


def _set_defaults_from_file(parser: _Parser, arguments_class: Any, argv: list[str]) -> None:
    """The values of the YAML file that `--config` names become the parser's defaults."""
    config_parser = _Parser(allow_abbrev=False, add_help=False)
    config_parser.add_argument("--config")
    typed = config_parser.parse_known_args(argv)[0].config
    config_file = parser.get_default("config") if typed is None else typed
    try:
        content = _read_yaml(config_file, is_typed=typed is not None) if config_file else {}
        names = {field.name for field in dataclasses.fields(arguments_class)} - {"config"}
        if unknown := sorted(content.keys() - names):
            raise UserError(f"unrecognized names: {', '.join(unknown)}{_hint(unknown, sorted(names))}")
        from_file = parser.parse_args(_as_options(content))
    except UserError as error:
        raise UserError(f"--config {config_file}: {error}") from error
    parser.set_defaults(**{**vars(from_file), "config": config_file})


def _read_yaml(path: str, is_typed: bool) -> dict[str, Any]:
    """The file's content. A path is relative to the working directory, or else to the directory that holds this `training/`:
    the default always is, because a user may have a directory of that name."""
    file = Path(path) if is_typed and Path(path).exists() else Path(__file__).parents[1] / path
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _TextLoader)
    except OSError as error:
        raise UserError(f"{error.strerror}. Pass the path of a YAML file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"invalid YAML: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError("it must contain `name: value` lines.")
    return content


def _as_options(content: dict[str, Any]) -> list[str]:
    """The equivalent words of the command line."""
    options = []
    for name, value in content.items():
        if isinstance(value, dict):
            value = [f"{field}={_as_yaml(field_value)}" for field, field_value in value.items()]
        if value is not None and value != []:
            options += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return options


def _as_yaml(value: Any) -> str:
    """Values of `_TextLoader` as YAML again."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_as_yaml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_yaml, value)) + "]"
    return "null" if value is None else str(value) if re.fullmatch(r"[\w.+-]+", str(value)) else json.dumps(value)


def model_option() -> Any:
    """The option `model` of a recipe: its words are added to those of the file instead of replacing them."""
    return option([], "fields of ScratchGPTConfig as name=value; preset=124M starts from one of GPT-2's sizes", action="extend")


def model_config(fields: Sequence[str], vocab_size: int, context_length: int) -> ScratchGPTConfig:
    """Build the config that `name=value` words describe; `preset=124M` starts from one of GPT-2's sizes.

    Args:
        fields: the words; values are parsed as YAML (`true`, `0.1`, `null`).
        vocab_size: that of the tokenizer.
        context_length: tokens in a training window; the default of `max_position_embeddings`.

    Raises:
        UserError: a word without `=`, an unknown field, an invalid value, fewer positions than `context_length`.
    """
    known = {*ScratchGPTConfig.__annotations__, *ScratchGPTConfig.attribute_map, "preset"} - {"vocab_size"}
    build: Any = ScratchGPTConfig
    values: dict[str, Any] = {"max_position_embeddings": context_length}
    for word in fields:
        name, equals, text = word.partition("=")
        if not equals or name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            all_names = f"the fields are {', '.join(sorted(known - set(ScratchGPTConfig.attribute_map)))}."
            hint = f"did you mean {close[0]}?" if close else all_names
            raise UserError(f"--model {word}: pass fields of ScratchGPTConfig as name=value, such as hidden_size=256; {hint}")
        if name == "preset":  # drops the fields before it, which describe another model (those of the YAML file above all)
            build, values = partial(ScratchGPTConfig.from_preset, text), {"max_position_embeddings": context_length}
        else:
            with explain_errors(f"--model {word}: the value is not valid YAML", (yaml.YAMLError, ValueError)):
                values[name] = yaml.load(text, _NumberLoader)
    try:
        config = build(vocab_size=vocab_size, **values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"--model: {error.__cause__ if isinstance(error, StrictDataclassError) else error}") from error
    if config.max_position_embeddings < context_length:
        positions = f"max_position_embeddings ({config.max_position_embeddings}): lower the first or raise the second."
        raise UserError(f"--context_length {context_length} is longer than the model's {positions}")
    return config


def _check_modules() -> None:
    """Refuse a program of one clone with the modules of another, and hide its directory, which would hide libraries."""
    modules, program = Path(__file__).resolve().parent, Path(sys.argv[0]).resolve()
    if program.parent.name == modules.name and program.suffix == ".py" and program.parent != modules:
        remedy = f"run {modules / program.name}, or set PYTHONPATH={program.parents[1]}"
        raise UserError(f"{program} would run with the modules in {modules}: {remedy}.")
    sys.path[:] = [path for path in sys.path if not path or Path(path).resolve() != modules]


def run_main(main: Callable[[], None]) -> None:
    """Run a program; `UserError`, a full disk and a missing permission become one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack some characters
    try:
        _check_modules()
        main()
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in SYSTEM_ERRORS:
            raise
        rank = os.environ.get("RANK", "0")
        if rank != "0":  # usually all fail alike: the launcher ends this process when the main one has ended
            time.sleep(OTHERS_WAIT)
        name = Path(sys.argv[0]).name + f", process {rank}" * (rank != "0")
        print(f"{name}: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
