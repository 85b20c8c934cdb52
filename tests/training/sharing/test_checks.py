"""Which files are uploaded, and which models are refused."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForQuestionAnswering
from tests.conftest import Processes
from tests.training.conftest import ROOT
from tests.training.sharing.conftest import UPLOADED
from training.errors import UserError
from training.sharing import checks


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


def append(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text((directory / name).read_text() + text)


def export(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "onnx").mkdir()


def write_nan(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("config.json"), "holds an unfinished run: pass the directory of a finished"),
        (remove("cross_entropy.py"), "cross_entropy.py is missing, although the config"),
        (
            append("cross_entropy.py", "# 1\n"),
            "not the code of this package, .*: cross_entropy.py. Load model and tokenizer without trust_",
        ),
        (remove("model.safetensors"), "has no safetensors weights"),
        (export, "is an ONNX export: pass the directory of its model, with --space to upload both"),
        (write("model.safetensors", "x"), "model.safetensors cannot be read"),
        (write_nan, "model.norm.weight has values that are not finite"),
        (remove("README.md"), "README.md is missing: write a model card"),
        (write("README.md", "---\nlicense: [\n---\n"), "README.md: its metadata is not that of a model card"),
        (write("README.md", "---\nlicense:\n---\n"), "README.md names no license: pass --license apache-2.0"),
        (write("README.md", "---\nlicense: mit\nbase_model: gpt\n---\n"), "README.md: base_model 'gpt' is not a Hub id"),
        (append("metrics.jsonl", '{"key": "hf_' + "a" * 34 + '"}'), "metrics.jsonl contains what looks like a token or a key"),
        (append("README.md", "my-own-secret-value"), r"README.md contains the value of \$WANDB_API_KEY, in line"),
        (write("mistakes.md", f"{ROOT}/data.csv"), "mistakes.md contains a path of this machine"),
    ],
)
def test_refused_models(hub, model, upload, monkeypatch, spoil, message):
    monkeypatch.setenv("WANDB_API_KEY", "my-own-secret-value")
    monkeypatch.chdir(ROOT)
    spoil(model)
    with pytest.raises(UserError, match=message) as error:
        upload(model, "ann/book")
    assert "my-own-secret" not in str(error.value)
    assert not hub.requests


CARDS = [
    "", "no head", "---\n- a\n---\nx",
    *(
        f"---\nlicense: mit\n{more}\n---\n"
        for more in (
            "self: x", "1: 2", "x: \0", "x: " + "[" * 3000 + "]" * 3000, "model-index: foo", "model-index: [foo]",
            "model-index:\n- name: x\n  results:", "eval_results: [1]\nmodel_name: x", "license: {a: b}", "base_model: 3",
            "? [a]\n: b", "x: 2024-99-99", "a: &a [*a]", 'x: "\\uD800"', 'x: !!binary "@@"', "x: " + "9" * 5000,
        )
    ),
]  # fmt: skip
JSONS = [
    "[]", '"x"', "null", "3", "", "{", "[" * 100_000, '{"a": 1}'.encode("utf-16"), '{"x": ' + "9" * 5000 + "}",
    *(
        f'{{"auto_map": {value}}}'
        for value in (
            '"x"', '{"a": 3}', '{"a": {"b": 1}}', '{"a": "/etc/passwd.x"}', f'{{"a": "{"x" * 5000}.x"}}', '{"a": "\\u0000.x"}',
            '{"a": "\\ud800.x"}', '{"a": "folder.x"}', '{"a": "binary.x"}', '{"a": "pipe.x"}',
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer_config.json", "adapter_config.json"])
def test_malformed_files_are_accepted_or_refused_in_one_line(model, name):
    """No other exception is raised, and reading never blocks on a pipe."""
    shutil.copy(model / "config.json", model / "adapter_config.json")
    (model / "folder.py").mkdir()
    (model / "binary.py").write_bytes(b"\xff\xfe\0")
    os.mkfifo(model / "pipe.py")
    errors = []
    for content in CARDS if name == "README.md" else JSONS:
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            checks.model_files(model, True)
            checks.model_files(model, True, checks.ADAPTER_CONFIG)
            checks.prepare_adapter_config(model, "ann/base")
            checks.prepare_card(model, "ann/book", "", "")
        except UserError as error:
            errors.append(str(error))
    assert len(errors) > 8
    assert all("\n" not in error and (name in error or ".py" in error) for error in errors), errors


def test_exact_names_and_no_links_out_of_the_directory(model, tmp_path):
    similar = ("optimizer.safetensors", ".x.safetensors", "api_tokens.json", ".tokens.json", "tokenizer-old.json", "vocab.txt~")
    for name in similar:
        (model / name).write_text("{}")
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    for name in adapter:  # in one directory with its model
        (model / name).write_text("{}")
    assert checks.model_files(model, False).keys() == UPLOADED
    code = {name for name in UPLOADED if name.endswith(".py")} - {"tokenization_scratchgpt.py"}
    of_adapter = checks.model_files(model, False, checks.ADAPTER_CONFIG).keys()
    assert of_adapter == UPLOADED - code - {"config.json", "model.safetensors"} | adapter
    (tmp_path / "elsewhere.json").write_text("{}")
    (model / "vocab.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="vocab.json is a link out of its directory"):
        checks.model_files(model, False)
    (model / "vocab.json").unlink()
    os.mkfifo(model / "LICENSE")
    with pytest.raises(UserError, match="LICENSE is not a regular file"):
        checks.model_files(model, False)


def test_model_in_the_cache_of_the_hub(model, tmp_path):
    """Its files are links to blobs that all its versions share."""
    snapshot, blobs = tmp_path / "models--ann--book" / "snapshots" / "abc", tmp_path / "models--ann--book" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(model, blobs)
    for name in UPLOADED:
        (snapshot / name).symlink_to(blobs / name)
    assert checks.model_files(snapshot, False).keys() == UPLOADED


@pytest.mark.parametrize(("trained_on", "revision"), [("ann/base", "abc"), ("ann/other", None), ("outputs/base", None)])
def test_the_revision_of_the_base_is_that_of_its_repository(tmp_path, trained_on, revision):
    config = {"base_model_name_or_path": trained_on, "revision": "abc"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = json.loads(checks.prepare_adapter_config(tmp_path, "ann/base"))
    assert found == {"base_model_name_or_path": "ann/base", "revision": revision}


@pytest.fixture
def code_that_must_not_run(tmp_path) -> Iterator[str]:
    yield f"open({str(tmp_path / 'ran')!r}, 'w')\ngenerate = lambda *_, **__: 0\n"
    assert not (tmp_path / "ran").exists()


def test_model_that_does_not_work_for_others(model, code_that_must_not_run, tmp_path):
    """Two of these load, but would generate nonsense. Transformers would run `custom_generate` from the directory itself."""
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code_that_must_not_run)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(json.dumps({**json.loads(config), "eos_token_id": 5}))
    with pytest.raises(UserError, match="would not work for others: eos_token_id is 5 in config.json and 1 in the tokenizer"):
        checks.check_loads(model, checks.model_files(model, False))
    shutil.rmtree(model / "custom_generate")  # the same program is quicker in a forked process, which reads the directory
    program = f"import sys\nsys.argv = ['', {str(model)!r}]\n{checks.LOAD_PROGRAM}"
    (model / "config.json").write_text(json.dumps({**json.loads(config), "num_hidden_layers": 3}))
    printed = Processes(exec, tmp_path / "log", [program, {}]).wait()
    assert "missing keys in its weights: model.layers.2." in printed.splitlines()[-1]
    (model / "config.json").write_text(json.dumps({**json.loads(config), "architectures": None}))
    assert "architectures in config.json is None" in Processes(exec, tmp_path / "log", [program, {}]).wait().splitlines()[-1]
    answering = {"architectures": ["ScratchGPTForQuestionAnswering"], "num_labels": 2}
    ScratchGPTForQuestionAnswering(ScratchGPTConfig(**json.loads(config) | answering)).save_pretrained(model)
    assert Processes(exec, tmp_path / "log", [program, {}]).wait().splitlines()[-1] == ""
    (model / "chat_template.jinja").write_text("{% for %}")
    assert "TemplateSyntaxError" in Processes(exec, tmp_path / "log", [program, {}]).wait(1).splitlines()[-1]


def test_a_second_config_with_other_code_is_not_run(model, code_that_must_not_run):
    """Transformers would run this, too."""
    config = json.loads((model / "config.json").read_text())
    config["configuration_files"] = ["config.4.0.0.json"]
    (model / "config.json").write_text(json.dumps(config))
    config["auto_map"] = {name: f"evil.{path.rpartition('.')[2]}" for name, path in config["auto_map"].items()}
    (model / "config.4.0.0.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(code_that_must_not_run)
    with pytest.raises(UserError, match="would not work for others"):
        checks.check_loads(model, checks.model_files(model, False))
