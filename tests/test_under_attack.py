"""Nothing that stands in a file may do more than be refused in one line: not end in a traceback, hang, or take all memory.

Each altered file either still serves or is refused by name. The alterations are drawn from a seed, so a failure comes again.
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
from training.engine.checkpoints import find_checkpoint, save_checkpoint
from training.engine.optimizers import make_optimizers
from training.engine.pretrained import load_config_and_tokenizer, load_pretrained
from training.errors import UserError

ODD = [
    *(None, True, -1, 0, 0.5, 1e308, 2**31, 2**63, 10**30, float("nan")),
    *("", "x", "🙂", "\ud800", "../..", [], [[]], {}, {"x": []}),
]
SLOW = [pytest.mark.slow, pytest.mark.timeout(3000)]
TIMES = [pytest.param(range(60), id="some"), pytest.param(range(60, 3000), id="many", marks=SLOW)]


def altered(content: bytes, draw: random.Random) -> bytes:
    """A file with one thing wrong: a byte flipped, a piece lost or put in, a value of its JSON changed."""
    place = draw.randrange(len(content) or 1)
    other = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
    kind = draw.choice(["flip", "end", "middle", "insert", "empty", "value", "value", "value"])
    if kind == "value":
        try:
            return json.dumps(changed(json.loads(content), draw)).encode()
        except ValueError:
            kind = "flip"
    return {
        "flip": content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :] if content else b"\0",
        "end": content[:place],
        "middle": content[:place] + content[place + draw.randrange(1, 99) :],
        "insert": content[:place] + other + content[place:],
        "empty": b"",
    }[kind]


def changed(value: Any, draw: random.Random) -> Any:
    """The same with one of its values, however deep, gone or an odd one."""
    if not value or not isinstance(value, dict | list) or draw.random() < 0.1:
        return draw.choice(ODD)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy = value.copy()
    if draw.random() < 0.1:
        del copy[key]
    else:
        copy[key] = changed(copy[key], draw)
    return copy


def attack(made: Path, work: Path, times: range, use: Callable[[Path], object], refusals: tuple[type[Exception], ...]) -> None:
    """Alter one file of a folder, use it, and put it back; again and again."""
    names = sorted(path.name for path in made.iterdir() if path.suffix not in (".py", ".md"))
    refused = []
    for seed in times:
        draw = random.Random(seed)
        name = names[seed % len(names)]
        folder = work / "altered"
        shutil.copytree(made, folder)
        (folder / name).write_bytes(altered((made / name).read_bytes(), draw))
        if draw.random() < 0.05:
            (folder / name).unlink()
        try:
            use(folder)
        except refusals as error:
            refused.append(str(error))
        except BaseException as error:  # a panic of Rust's is no Exception
            raise AssertionError(f"seed {seed}: {name} is not refused") from error
        shutil.rmtree(folder)
    assert all(refused)
    assert len(refused) > len(times) / 10  # the attack is one


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "made"
    words = ScratchGPTTokenizer.train(["to be or not to be, that is the question"] * 9, 290)
    torch.manual_seed(0)
    ScratchGPTForCausalLM(ScratchGPTConfig(**{**TINY, "vocab_size": len(words)})).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("times", TIMES)
def test_a_model_to_go_on_from(model, tmp_path, times):
    def use(folder: Path) -> None:
        load_config_and_tokenizer(str(folder), 8)
        load_pretrained(ScratchGPTForCausalLM, str(folder), None)

    attack(model, tmp_path, times, use, (UserError,))


@pytest.mark.parametrize("times", TIMES)
def test_an_adapter(model, tmp_path, times):
    tuned = ScratchGPTForCausalLM.from_pretrained(model)
    add_adapter(tuned, LoraConfig(r=2))
    save_adapter(tuned, tmp_path / "adapter")

    def use(folder: Path) -> None:
        load_adapter(ScratchGPTForCausalLM.from_pretrained(model), folder)

    attack(tmp_path / "adapter", tmp_path, times, use, (ValueError, OSError))


@pytest.mark.parametrize("times", TIMES)
def test_gpt2_to_convert(tmp_path, times):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")

    def use(folder: Path) -> None:
        arguments = {"to": None, "type": None, "num_attention_heads": None, "hidden_act": None, "tokenizer": None}
        convert(Namespace(source=str(folder), destination=tmp_path / "out", **arguments))
        shutil.rmtree(tmp_path / "out")

    attack(tmp_path / "gpt2", tmp_path, times, use, (ValueError, OSError))


@pytest.mark.parametrize("times", TIMES)
def test_a_checkpoint(model, tmp_path, times):
    """What is taken is byte for byte what was written; all else is passed over for the one before."""
    trained = ScratchGPTForCausalLM.from_pretrained(model)
    ids = torch.arange(10)[None]
    trained(ids, labels=ids).loss.backward()
    optimizers = make_optimizers(trained, "muon", 0.01, 0.02, 0.1)
    for optimizer in optimizers:
        optimizer.step()
    made, passed_over = tmp_path / "made", []
    for step in (1, 2):
        save_checkpoint(made, Accelerator(), trained, optimizers, {"step": step, "validation_loss": 1.0}, keep=2)
    last = made / "step-00000002"
    contents = {path.name: path.read_bytes() for path in last.iterdir()}
    assert len(contents) == 4
    names = sorted(contents)
    for seed in times:
        draw = random.Random(seed)
        name = names[seed % len(names)]
        (last / name).write_bytes(altered(contents[name], draw))
        path, state = find_checkpoint(made, passed_over.append)
        if path == last:  # the same numbers in a manifest that is spelled differently
            assert all((last / name).read_bytes() == contents[name] for name in names if name != "manifest.json")
        assert state["step"] == int(path.name[-1])
        (last / name).write_bytes(contents[name])
    assert len(passed_over) > 0.9 * len(times)


LABELLED = [{"text": f"to be {number}", "label": f"{number % 2}"} for number in range(20)]
TALKS = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]} for n in range(20)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("kind", ["corpora", "examples", "conversations"])
def test_data(tmp_path, times, kind):
    made = tmp_path / "data"
    made.mkdir()
    table = "".join(f"{row['text']}{{0}}{row['label']}\n" for row in [{"text": "text", "label": "label"}, *LABELLED])
    files = {"rows.csv": table.format(*","), "rows.tsv": table.format(*"\t"), "rows.jsonl": lines(LABELLED), "rows.txt": table}
    if kind == "conversations":
        files = {"talks.jsonl": lines(TALKS), "talks.json": json.dumps(TALKS)}
    if kind == "examples":
        del files["rows.txt"]
    for name, text in files.items():
        (made / name).write_text(text)

    def use(folder: Path) -> None:
        for name in files:
            source = [str(folder / name)]
            if kind == "corpora":
                read_corpora(CorpusArguments(source))
            elif kind == "examples":
                arguments: Any = ExampleArguments(dataset=source, test_fraction=0.2, validation_fraction=0.2)
                check_examples(arguments)
                read_examples(arguments, 0)
            else:
                arguments = ConversationArguments(dataset=source, test_fraction=0.2, validation_fraction=0.2)
                check_conversations(arguments)
                read_conversations(arguments, 0, "\n")

    attack(made, tmp_path, times, use, (UserError,))


@dataclass
class Asked:
    config: str = option("", "YAML")
    steps: int = option(3, "A number.")
    rate: float = option(0.1, "Another.")
    names: list[str] = option(["a"], "Words.")
    resume: bool = option(False, "A choice.")


@pytest.mark.parametrize("times", TIMES)
def test_a_file_of_settings(tmp_path, times):
    made = tmp_path / "settings"
    made.mkdir()
    settings = {"steps": 5, "rate": 0.5, "names": ["b", "c"], "resume": True}
    (made / "a.yaml").write_text(json.dumps(settings))
    (made / "b.yaml").write_text("steps: 5\nrate: 0.5\nnames:\n- b\n- c\nresume: yes\n")

    def use(folder: Path) -> None:
        for name in ("a.yaml", "b.yaml"):
            parse_arguments(Asked, "x", ["--config", str(folder / name)])

    attack(made, tmp_path, times, use, (UserError,))
