import errno
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from training import cli
from training.cli import model_config, model_option, option, parse_arguments, run_main
from training.errors import UserError, printable
from training.pretrain import PretrainArguments


@dataclass
class Arguments:
    config: str = option("unused.yaml", "YAML")
    words: list[str] = option(["one"], "several")
    model: list[str] = model_option()
    number: int = option(3, "a number", minimum=1)
    rate: float = option(0.5, "a rate", above=0, maximum=1)
    verbose: bool = option(True, "a switch")


def parse(tmp_path, yaml, *typed):
    file = tmp_path / "config.yaml"
    file.write_text(yaml)
    return parse_arguments(Arguments, "test", ["--config", str(file), *typed])


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    arguments = parse(tmp_path, "number: 7\nrate: 1.0e-3\nwords: [a, b]\n", "--rate", "0.25")
    assert (arguments.number, arguments.rate, arguments.words) == (7, 0.25, ["a", "b"])
    assert parse(tmp_path, "number: 7", "--number", "8").number == 8
    assert parse(tmp_path, "words: single").words == ["single"]
    assert parse(tmp_path, "rate: 1e-3").rate == 1e-3
    assert parse(tmp_path, "words: no").words == ["no"]  # Norwegian
    assert parse(tmp_path, "words:\nnumber: null").words == ["one"]
    assert parse(tmp_path, "words: a", "--words", "b", "c", "--words", "d").words == ["b", "c", "d"]


def test_model_fields_are_overridden_one_by_one(tmp_path):
    arguments = parse(tmp_path, "model:\n  hidden_size: 64\n  num_attention_heads: 2\n", "--model", "hidden_size=128")
    config = model_config(arguments.model, vocab_size=300, context_length=32)
    assert (config.hidden_size, config.num_attention_heads, config.vocab_size) == (128, 2, 300)


@pytest.mark.parametrize(
    ("yaml", "typed", "message"),
    [
        ("numbr: 7", (), r"config\.yaml: unrecognized names: numbr: did you mean number\?"),
        ("number: many", (), r"config\.yaml: argument --number: invalid int value: 'many'"),
        ("- a\n- b", (), "it must contain `name: value` lines"),
        ("a: [", (), "invalid YAML"),
        ("number: 7", ("--numbr", "8", "--rat=1"), r"arguments: --numbr 8 --rat=1: did you mean --number and --rate\?"),
        ("number: 7", ("--lr", "8"), r"arguments: --lr 8 \(--help"),  # has no learning rate
        ("number: 7", ("--quantity", "8"), r"unrecognized arguments: --quantity 8 \(--help lists all arguments\)"),
        ("number: 7", ("--number", "x"), "argument --number: invalid int value: 'x'"),
        ("number: 7", ("stray",), "unrecognized arguments: stray"),
        ("number: 7", ("--num", "8"), "unrecognized arguments: --num 8"),  # an abbreviation, which a new option would break
        ("number: 0", (), "--number must be at least 1, got 0"),
        ("", ("--rate", "0"), r"--rate must be above 0 and at most 1, got 0\.0"),
        ("", ("--rate", "inf"), "--rate must be above 0 and at most 1, got inf"),
        ("", ("--words", "\udcff"), "is not UTF-8: rename the file or directory"),
    ],
)
def test_a_mistake_in_the_file_or_on_the_command_line(tmp_path, yaml, typed, message):
    with pytest.raises(UserError, match=message):
        parse(tmp_path, yaml, *typed)


def test_the_default_file_is_that_of_the_package(tmp_path, monkeypatch):
    """Not that of another project with a directory `training/`, unless it is named."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "training" / "configs" / "pretrain.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("seed: 7")
    assert parse_arguments(PretrainArguments, "test", []).seed == 0
    assert parse_arguments(PretrainArguments, "test", ["--config", "training/configs/pretrain.yaml"]).seed == 7


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"missing\.yaml: No such file or directory"):
        parse_arguments(Arguments, "test", ["--config", str(tmp_path / "missing.yaml")])


def test_a_preset_drops_the_fields_before_it(tmp_path):
    arguments = parse(tmp_path, "model:\n  hidden_size: 64\n  norm_type: rmsnorm\n", "--model", "preset=355M", "n_layer=2")
    config = model_config(arguments.model, vocab_size=300, context_length=32)
    assert (config.hidden_size, config.num_hidden_layers, config.norm_type) == (1024, 2, "layernorm")


def test_fields_of_several_model_options_add_up(tmp_path):
    arguments = parse(tmp_path, "number: 7", "--model", "hidden_size=64", "--model", "n_head=2")
    assert arguments.model == ["hidden_size=64", "n_head=2"]


def test_an_empty_file_changes_nothing(tmp_path):
    assert parse(tmp_path, "# nothing\n").number == 3


def test_help_shows_the_files_values(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, "number: 77", "--help")
    assert "(default: 77)" in capsys.readouterr().out


@pytest.mark.parametrize("eps", ["1e-6", "1.0e-6", "0.000001"])
def test_numbers_and_nested_fields_of_a_model(tmp_path, eps):
    text = f"model:\n  norm_eps: {eps}\n  eos_token_id: [1, 2]\n  position_embedding_type: rotary\n"
    text += "  rope_parameters: {rope_type: linear, rope_theta: 1e4, factor: 2.0}\n"
    for fields in (
        parse(tmp_path, text).model,
        [
            "position_embedding_type=rotary",
            "eos_token_id=[1, 2]",
            f"norm_eps={eps}",
            "rope_parameters={rope_type: linear, rope_theta: 1e4, factor: 2.0}",
        ],
    ):
        config = model_config(fields, vocab_size=300, context_length=32)
        assert (config.norm_eps, config.eos_token_id) == (1e-6, [1, 2])
        assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


def test_texts_in_nested_fields_stay_texts(tmp_path):
    text = 'model:\n  rope_parameters: {rope_type: "a, b: [c", other: 1e5x}\n'
    with pytest.raises(UserError, match=r"rope_type 'a, b: \[c' is unknown"):
        model_config([*parse(tmp_path, text).model, "position_embedding_type=rotary"], vocab_size=300, context_length=32)


def test_presets_and_values_of_all_types():
    words = ["preset=124M", "qk_norm=true", "attention_dropout=0.1", "norm_type=rmsnorm", "head_dim=null", "n_layer=2"]
    config = model_config(words, vocab_size=300, context_length=32)
    assert (config.hidden_size, config.num_hidden_layers, config.qk_norm, config.norm_type) == (768, 2, True, "rmsnorm")
    assert config.max_position_embeddings == 32
    assert model_config(["n_positions=64"], 300, 32).max_position_embeddings == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hiden_size=3"], "--model hiden_size=3: pass fields of ScratchGPTConfig as name=value.* did you mean hidden_size?"),
        (["q=3"], "--model q=3: pass fields of ScratchGPTConfig as name=value.* the fields are .*hidden_size"),
        (["hidden_size=["], r"--model hidden_size=\[: the value is not valid YAML"),
        (["hidden_size"], "--model hidden_size: pass fields"),
        (["vocab_size=5"], "--model vocab_size=5"),
        (["hidden_size=-3"], "--model: hidden_size must be a positive integer, got -3"),
        (["hidden_size=wide"], "--model: Field 'hidden_size' expected int, got str"),
        (["preset=7B"], "--model: unknown preset '7B': choose one of 124M"),
        (["max_position_embeddings=16"], "--context_length 32 is longer than the model's max_position_embeddings"),
    ],
)
def test_an_invalid_model(words, message):
    with pytest.raises(UserError, match=message):
        model_config(words, vocab_size=300, context_length=32)


def test_a_switch_and_the_word_before_all_options(tmp_path):
    assert not parse(tmp_path, "", "--no_verbose").verbose
    assert not parse(tmp_path, "verbose: false").verbose
    assert parse_arguments(Arguments, "test", ["7", "--config", ""], positional="number").number == 7


def test_the_options_on_the_command_line_are_known(tmp_path):
    assert parse(tmp_path, "rate: 1", "--number=7", "--words", "a").typed == {"config", "number", "words"}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("pass \x1b another"), 2, "program.py: error: pass � another\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "program.py: error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "\nInterrupted.\n"),
    ],
)
def test_errors_of_the_user_are_one_line_and_an_exit_code(error, code, message, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/program.py"])
    with pytest.raises(SystemExit, match=f"^{code}$"):
        run_main(main)
    assert capsys.readouterr().err == message
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


def test_of_several_processes_the_one_that_fails_says_why(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(sys, "argv", ["program.py"])
    monkeypatch.setenv("RANK", "3")

    def main():
        raise UserError("its disk is full")

    with pytest.raises(SystemExit, match=r"^2$"):
        run_main(main)
    assert capsys.readouterr().err == "program.py, process 3: error: its disk is full\n"
    assert waited == [cli.OTHERS_WAIT]


def test_a_program_of_another_clone_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "training" / "pretrain.py")])
    with pytest.raises(SystemExit, match=r"^2$"):
        run_main(lambda: 1 / 0)
    expected = rf"would run with the modules in \S+training: run \S+training/pretrain.py, or set PYTHONPATH={tmp_path}"
    assert re.search(expected, capsys.readouterr().err)


def test_the_programs_do_not_hide_libraries(monkeypatch):
    """Python puts their directory in front of the others, and one of them is called `evaluate`."""
    directory = str(Path(cli.__file__).parent)
    monkeypatch.setattr(sys, "argv", [f"{directory}/pretrain.py"])
    monkeypatch.setattr(sys, "path", [directory, *sys.path])
    found = []
    run_main(lambda: found.append(importlib.util.find_spec("evaluate")))
    assert [spec for spec in found if spec and spec.origin.startswith(directory)] == []


def test_control_characters_are_replaced():
    assert printable("a\tb\r\nc\x1b[2J\x01\r\u202ed é") == "a\tb\nc�[2J���d é"
