"""Fuzzing: a corrupt file still works or is refused with an error of one line; no traceback, no hang, no exhausted memory.

The corruptions are drawn from a seed, so a failure can be reproduced.
"""

import json
import random
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from modeling_scratchgpt.convert.__main__ import convert
from modeling_scratchgpt.lora import LoraConfig, add_adapter, load_adapter, save_adapter
from tests.conftest import TINY
from training.cli import option, parse_arguments
from training.data.conversations import ConversationArguments, check_conversations, read_conversations
from training.data.corpora import CorpusArguments, read_corpora
from training.data.examples import ExampleArguments, check_examples, read_examples
from training.engine.arguments import EngineArguments
from training.engine.checkpoints import find_checkpoint, save_checkpoint
from training.engine.optimizers import build_optimizers
from training.engine.pretrained import load_config_and_tokenizer, load_pretrained
from training.errors import UserError

UNUSUAL = [
    *(None, True, -1, 0, 0.5, 1e308, 2**31, 2**63, 10**30, float("nan")),
    *("", "x", "🙂", "\ud800", "../..", [], [[]], {}, {"x": []}),
]
SLOW = [pytest.mark.slow, pytest.mark.timeout(3000)]
SEEDS = [pytest.param(range(40), id="some"), pytest.param(range(40, 3000), id="many", marks=SLOW)]


def corrupt(content: bytes, draw: random.Random) -> bytes:
    """Flip a bit, remove or insert some bytes, or change a value of the JSON."""
    place = draw.randrange(len(content) or 1)
    other = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
    kind = draw.choice(["flip", "end", "middle", "insert", "empty", "value", "value", "value"])
    if kind == "value":
        try:
            return json.dumps(mutate(json.loads(content), draw)).encode()
        except ValueError:
            kind = "flip"
    return {
        "flip": content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :] if content else b"\0",
        "end": content[:place],
        "middle": content[:place] + content[place + draw.randrange(1, 99) :],
        "insert": content[:place] + other + content[place:],
        "empty": b"",
    }[kind]


def mutate(value: Any, draw: random.Random) -> Any:
    """Copy a JSON value with one of its values, at any depth, removed or replaced by an unusual one."""
    if not value or not isinstance(value, dict | list) or draw.random() < 0.1:
        return draw.choice(UNUSUAL)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy = value.copy()
    if draw.random() < 0.1:
        del copy[key]
    else:
        copy[key] = mutate(copy[key], draw)
    return copy


def fuzz(original: Path, work: Path, seeds: range, use: Callable[[Path], object], errors: tuple[type[Exception], ...]) -> None:
    """For each seed, use a copy of the directory in which one file is corrupt. Only the given errors may be raised."""
    names = sorted(path.name for path in original.iterdir() if path.suffix not in (".py", ".md"))
    messages = []
    for seed in seeds:
        draw = random.Random(seed)
        name = names[seed % len(names)]
        directory = work / "corrupt"
        shutil.copytree(original, directory)
        (directory / name).write_bytes(corrupt((original / name).read_bytes(), draw))
        if draw.random() < 0.05:
            (directory / name).unlink()
        try:
            use(directory)
        except errors as error:
            messages.append(str(error))
        except BaseException as error:  # a panic in Rust code is not an Exception
            raise AssertionError(f"seed {seed}: a corrupt {name} raises {type(error).__name__}") from error
        shutil.rmtree(directory)
    assert all(messages)
    assert len(messages) > len(seeds) / 10  # enough corruptions were noticed


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "original"
    tokenizer = ScratchGPTTokenizer.train(["to be or not to be, that is the question"] * 9, 290)
    torch.manual_seed(0)
    ScratchGPTForCausalLM(ScratchGPTConfig(**{**TINY, "vocab_size": len(tokenizer)})).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("seeds", SEEDS)
def test_base_model(model, tmp_path, seeds):
    def use(directory: Path) -> None:
        load_config_and_tokenizer(str(directory), 8)
        load_pretrained(ScratchGPTForCausalLM, str(directory), None)

    fuzz(model, tmp_path, seeds, use, (UserError,))


@pytest.mark.parametrize("seeds", SEEDS)
def test_adapter(model, tmp_path, seeds):
    tuned = ScratchGPTForCausalLM.from_pretrained(model)
    add_adapter(tuned, LoraConfig(r=2))
    save_adapter(tuned, tmp_path / "adapter")

    def use(directory: Path) -> None:
        load_adapter(ScratchGPTForCausalLM.from_pretrained(model), directory)

    fuzz(tmp_path / "adapter", tmp_path, seeds, use, (ValueError, OSError))


@pytest.mark.parametrize("seeds", SEEDS)
def test_conversion_from_gpt2(tmp_path, seeds):
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")

    def use(directory: Path) -> None:
        names = ("to", "type", "num_attention_heads", "hidden_act", "tokenizer", "text", "attentions")
        arguments = dict.fromkeys(names)
        convert(Namespace(source=str(directory), destination=tmp_path / "out", **arguments))
        shutil.rmtree(tmp_path / "out")

    fuzz(tmp_path / "gpt2", tmp_path, seeds, use, (ValueError, OSError))


@pytest.mark.parametrize("seeds", SEEDS)
def test_checkpoint(model, tmp_path, seeds):
    """A corrupt checkpoint is skipped in favour of the one before; the files of a loaded one are unchanged."""
    trained = ScratchGPTForCausalLM.from_pretrained(model)
    ids = torch.arange(10)[None]
    trained(ids, labels=ids).loss.backward()
    optimizers = build_optimizers(EngineArguments(optimizer="muon", learning_rate=0.01, warmup_ratio=0.0), trained)
    for optimizer in optimizers:
        optimizer.step()
    checkpoints, skipped = tmp_path / "checkpoints", []
    for step in (1, 2):
        state = {"step": step, "eval_loss": 1.0}
        save_checkpoint(
            checkpoints, Accelerator(), trained, optimizers, state, 2, lambda path, _: trained.save_pretrained(path)
        )
    last = checkpoints / "step-00000002"
    contents = {path.name: path.read_bytes() for path in last.iterdir()}
    assert {"config.json", "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"} <= contents.keys()
    names = sorted(contents)
    for seed in seeds:
        draw = random.Random(seed)
        name = names[seed % len(names)]
        (last / name).write_bytes(corrupt(contents[name], draw))
        path, state = find_checkpoint(checkpoints, skipped.append)
        if path == last:  # the manifest is formatted differently, with the same values
            assert all((last / name).read_bytes() == contents[name] for name in names if name != "manifest.json")
        assert state["step"] == int(path.name[-1])
        (last / name).write_bytes(contents[name])
    assert len(skipped) > 0.9 * len(seeds)


LABELLED = [{"text": f"to be {number}", "label": f"{number % 2}"} for number in range(20)]
CHATS = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]} for n in range(20)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("kind", ["corpora", "examples", "conversations"])
def test_datasets(tmp_path, seeds, kind):
    data = tmp_path / "data"
    data.mkdir()
    table = "".join(f"{row['text']}{{0}}{row['label']}\n" for row in [{"text": "text", "label": "label"}, *LABELLED])
    files = {"rows.csv": table.format(*","), "rows.tsv": table.format(*"\t"), "rows.jsonl": lines(LABELLED), "rows.txt": table}
    if kind == "conversations":
        files = {"talks.jsonl": lines(CHATS), "talks.json": json.dumps(CHATS)}
    if kind == "examples":
        del files["rows.txt"]
    for name, text in files.items():
        (data / name).write_text(text)

    def use(directory: Path) -> None:
        for name in files:
            source = [str(directory / name)]
            if kind == "corpora":
                read_corpora(CorpusArguments(source))
            elif kind == "examples":
                arguments: Any = ExampleArguments(dataset=source, test_fraction=0.2, validation_fraction=0.2)
                check_examples(arguments)
                read_examples(arguments)
            else:
                arguments = ConversationArguments(dataset=source, test_fraction=0.2, validation_fraction=0.2)
                check_conversations(arguments)
                read_conversations(arguments, "\n")

    fuzz(data, tmp_path, seeds, use, (UserError,))


@dataclass
class Options:
    config: str = option("", "YAML")
    steps: int = option(3, "An integer.")
    rate: float = option(0.1, "A float.")
    names: list[str] = option(["a"], "A list.")
    resume: bool = option(False, "A flag.")


@pytest.mark.parametrize("seeds", SEEDS)
def test_yaml_config(tmp_path, seeds):
    configs = tmp_path / "configs"
    configs.mkdir()
    settings = {"steps": 5, "rate": 0.5, "names": ["b", "c"], "resume": True}
    (configs / "a.yaml").write_text(json.dumps(settings))
    (configs / "b.yaml").write_text("steps: 5\nrate: 0.5\nnames:\n- b\n- c\nresume: yes\n")

    def use(directory: Path) -> None:
        for name in ("a.yaml", "b.yaml"):
            parse_arguments(Options, "x", ["--config", str(directory / name)])

    fuzz(configs, tmp_path, seeds, use, (UserError,))
