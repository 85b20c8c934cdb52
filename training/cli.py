"""What a run is asked to do: a YAML file, overridden by the command line, checked before anything starts.

Notable:
- One parser for both. The YAML is read as if its lines had been typed, so a wrong type or an unknown name is refused in the
  same words wherever it stands; what it says becomes the defaults of the command line, and shows in `--help`.
- `--model` takes any field of `ScratchGPTConfig` as `name=value`, one by one over the file's; the config checks them.
- A mistake of the user ends in one line and exit code 2, never in a traceback.
"""

import argparse
import dataclasses
import difflib
import errno
import io
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
from training.errors import UserError, printable

Arguments = TypeVar("Arguments")
HELP = "(--help lists all arguments)"


def option(default: Any, help: str, **keywords: Any) -> Any:
    """A dataclass field with a default, a help text and more words for argparse; lists get a fresh copy."""
    metadata = {"help": help, **keywords}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def model_option() -> Any:
    """The `model` field of a recipe: words that add to those of the file instead of replacing them."""
    return option(
        [], "Fields of ScratchGPTConfig as name=value; preset=124M starts afresh from a size of GPT-2.", action="extend"
    )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the options, the description as it was written."""


class _Parser(HfArgumentParser):
    """transformers' dataclass parser, with errors that are one line."""

    def error(self, message: str) -> NoReturn:
        _, unknown, words = message.partition("unrecognized arguments: ")
        options = [word for word in words.split() if word.startswith("--")]
        known = [name for name in self._option_string_actions if "-" not in name[2:]]  # as they are told everywhere else
        raise UserError(message + _hint(options, known) if unknown else f"{message} {HELP}")


def _hint(unknown: Sequence[str], known: Sequence[str]) -> str:
    """What may have been meant, or where all names are listed."""
    close = [difflib.get_close_matches(name.partition("=")[0], known, n=1) for name in unknown]
    meant = " and ".join(dict.fromkeys(names[0] for names in close if names))
    return f": did you mean {meant}?" if meant else f" {HELP}"


def parse_arguments(arguments_class: type[Arguments], description: str, argv: Sequence[str] | None = None) -> Arguments:
    """Fill the dataclass from its `config` YAML, then from the command line.

    Args:
        arguments_class: a dataclass whose fields are options; `config` holds the path of the default YAML file, or nothing.
        description: what `--help` says first.
        argv: the typed arguments; those of the process when not given.

    Raises:
        UserError: no such file, not YAML, an unknown name, a value of the wrong type.
    """
    parser = _Parser(arguments_class, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)  # type: ignore[arg-type]
    typed = list(sys.argv[1:] if argv is None else argv)
    for word in typed:
        if word.encode(errors="replace").decode() != word:
            raise UserError(f"{word!r} is not UTF-8: files and models with other names cannot be told of in a card.")
    first_look = _Parser(allow_abbrev=False, add_help=False)
    first_look.add_argument("--config", default=parser.get_default("config"))
    config_file = first_look.parse_known_args(typed)[0].config
    try:
        content = _read_yaml(config_file) if config_file else {}
        names = {field.name for field in dataclasses.fields(arguments_class)} - {"config"}  # type: ignore[arg-type]
        if unknown := sorted(content.keys() - names):
            raise UserError(f"unrecognized names: {', '.join(unknown)}{_hint(unknown, sorted(names))}")
        from_file = parser.parse_args(_as_options(content))
    except UserError as error:
        raise UserError(f"--config {config_file}: {error}") from error
    parser.set_defaults(**{**vars(from_file), "config": config_file})
    return arguments_class(**vars(parser.parse_args(typed)))


def _read_yaml(path: str) -> dict[str, Any]:
    """The file's content; a path is looked up here, then in the folder that holds `training/`."""
    file = Path(path) if Path(path).exists() else Path(__file__).parents[1] / path
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{error.strerror}. Give the path of a YAML file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError("it must hold `name: value` lines.")
    return content


def _as_options(content: dict[str, Any]) -> list[str]:
    """The words that would say the same on the command line."""
    options = []
    for name, value in content.items():
        if isinstance(value, dict):
            value = [f"{field}={'null' if field_value is None else field_value}" for field, field_value in value.items()]
        if value is not None and value != []:
            options += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return options


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
    preset = None
    for word in fields:
        name, equals, text = word.partition("=")
        if not equals or name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"did you mean {close[0]}?"
                if close
                else f"there are {', '.join(sorted(known - set(ScratchGPTConfig.attribute_map)))}."
            )
            raise UserError(f"--model {word}: give fields of ScratchGPTConfig as name=value, such as hidden_size=256; {hint}")
        if name == "preset":  # starts afresh: what was said before, in the file above all, belongs to another model
            preset, values = text, {"max_position_embeddings": context_length}
        else:
            values[name] = _yaml_value(word, text)
    try:
        make = ScratchGPTConfig if preset is None else partial(ScratchGPTConfig.from_preset, preset)
        config = make(vocab_size=vocab_size, **values)
    except StrictDataclassError as error:
        raise UserError(f"--model: {error.__cause__}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"--model: {error}") from error
    if config.max_position_embeddings < context_length:
        raise UserError(
            f"--context_length {context_length} is longer than the model's max_position_embeddings "
            f"({config.max_position_embeddings}): shorten the one or raise the other."
        )
    return config


def own_fields(config: ScratchGPTConfig) -> dict[str, Any]:
    """What makes this model, field by field, as `--model` and the YAML name it."""
    return {name: getattr(config, name) for name in ScratchGPTConfig.__annotations__ if hasattr(config, name)}


def _yaml_value(word: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--model {word}: the value is not YAML: {' '.join(str(error).split())}") from error


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; a `UserError`, a full disk and a missing permission become one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character is no reason to end
    try:
        main()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (
            errno.EEXIST,
            errno.ENOTDIR,
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENAMETOOLONG,
            errno.ELOOP,
        ):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
