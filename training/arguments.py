"""What a run is asked to do: a YAML file, overridden by the command line, checked before anything starts.

Notable:
- One parser for both. The YAML's keys are turned into command-line options and put before the ones that were typed, so a
  wrong type or an unknown name is refused in the same words wherever it stands, and the last word wins.
- `--model` takes any field of `ScratchGPTConfig` as `name=value`; the fields are checked by the config itself.
- A mistake of the user ends in one line and exit code 2, never in a traceback.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from modeling_scratchgpt import ScratchGPTConfig

Arguments = TypeVar("Arguments")


class UserError(Exception):
    """Something only the user can put right. The message says what was given, what is allowed and what to do."""


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and a help text; lists get a fresh copy."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


class _Parser(HfArgumentParser):
    """transformers' dataclass parser, with errors that are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all arguments)")


def parse_arguments(arguments_class: type[Arguments], description: str, argv: Sequence[str] | None = None) -> Arguments:
    """Fill the dataclass from its `config` YAML, then from the command line.

    Args:
        arguments_class: a dataclass whose fields are options; `config` holds the path of the default YAML file.
        description: what `--help` says first.
        argv: the typed arguments; those of the process when not given.

    Raises:
        UserError: no such file, not YAML, an unknown name, a value of the wrong type.
    """
    parser = _Parser(arguments_class, description=description, allow_abbrev=False)  # type: ignore[arg-type]
    typed = list(sys.argv[1:] if argv is None else argv)
    default_config = next(field.default for field in dataclasses.fields(arguments_class) if field.name == "config")  # type: ignore[arg-type]
    first_look = _Parser(allow_abbrev=False, add_help=False)
    first_look.add_argument("--config", default=default_config)
    config_file = Path(first_look.parse_known_args(typed)[0].config)
    from_file = _read_yaml(config_file)
    if "model" in from_file:  # one mapping in the file, `name=value` words on the command line
        from_file["model"] = [f"{name}={value}" for name, value in (from_file["model"] or {}).items()]
    options = [word for name, value in from_file.items() for word in _as_option(name, value)]
    try:
        parser.parse_args(options)
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from error
    arguments = arguments_class(**vars(parser.parse_args(options + typed)))
    model_in_file = from_file.get("model", [])
    if hasattr(arguments, "model") and arguments.model != model_in_file:
        arguments.model = model_in_file + arguments.model  # typed fields override the file's, one by one
    return arguments


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}. Give the path of a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"--config {path} must hold `name: value` lines.")
    return content


def _as_option(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]


def model_config(fields: Sequence[str], vocab_size: int, context_length: int) -> ScratchGPTConfig:
    """The config that `name=value` words describe; `preset=124M` starts from one of GPT-2's sizes.

    Args:
        fields: the words; values are read as YAML, so `true`, `0.1` and `null` mean what they look like.
        vocab_size: decided by the run's tokenizer.
        context_length: tokens in a training window; the model gets as many positions unless the words say otherwise.

    Raises:
        UserError: a word without `=`, a field that the config does not have, a value it refuses, too few positions.
    """
    known = {*ScratchGPTConfig.__annotations__, *ScratchGPTConfig.attribute_map, "preset"} - {"vocab_size"}
    values: dict[str, Any] = {"max_position_embeddings": context_length}
    for word in fields:
        name, equals, text = word.partition("=")
        if not equals or name not in known:
            raise UserError(
                f"--model {word}: give fields of ScratchGPTConfig as name=value, such as hidden_size=256; "
                f"there are {', '.join(sorted(known))}."
            )
        values[name] = yaml.safe_load(text)
    preset = values.pop("preset", None)
    try:
        make = ScratchGPTConfig if preset is None else partial(ScratchGPTConfig.from_preset, preset)
        config = make(vocab_size=vocab_size, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"--model: {' '.join(str(error).split())}") from error
    if config.max_position_embeddings < context_length:
        raise UserError(
            f"--context_length {context_length} is longer than the model's max_position_embeddings "
            f"({config.max_position_embeddings}): shorten the one or raise the other."
        )
    return config


def run(main: Callable[[], None]) -> None:
    """Run an entry point; a `UserError` becomes one line on stderr (from one process) and exit code 2."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
