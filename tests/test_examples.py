"""The programs of examples/: a few steps of each in this process, and the results that training/README.md reports."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from examples import dpo, grpo
from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from training import instruct
from training.data.prompts import CHAT_TEMPLATES, set_up_chat_template

from .conftest import MODERN, TINY

BETA = 0.1  # TRL's default


def save_base(folder: Path, texts: list[str], chat: bool, **fields: int) -> None:
    """Save an untrained model and its tokenizer, with the chat template of training/instruct.py if it is for `chat`."""
    tokenizer = ScratchGPTTokenizer.train(texts, fields["vocab_size"] - 3 * chat)
    if chat:
        set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], fields["max_position_embeddings"])
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    ScratchGPTForCausalLM(ScratchGPTConfig(**TINY | MODERN | ids | fields)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reported_rewards(printed: str) -> dict[str, tuple[float, float]]:
    """Reward accuracy (0 to 1) and margin that dpo.py has printed, before and after training."""
    found = re.findall(r"^(Before|After) training, .*: reward accuracy ([\d.]+)%, reward margin (\S+)$", printed, re.M)
    return {when: (float(accuracy) / 100, float(margin)) for when, accuracy, margin in found}


def sorted_shares(printed: str) -> dict[int, float]:
    """Accuracy (0 to 1) that grpo.py has printed, by its step."""
    found = re.findall(r"^step (\d+): ([\d.]+)% of held-out prompts sorted$", printed, re.M)
    return {int(step): float(share) / 100 for step, share in found}


@torch.no_grad()
def log_probability(folder: Path, row: dict) -> dict[str, float]:
    """Log-probability of both answers with their end, after the prompt as the chat template writes it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    question = row["instruction"] + "\n" + row["input"] if row["input"] else row["instruction"]
    prompt = tokenizer(f"<|bos|><|user|>{question}<|assistant|>")["input_ids"]
    found = {}
    for name in ("chosen", "rejected"):
        answer = tokenizer(row[name] + tokenizer.eos_token)["input_ids"]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        found[name] = logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
    return found


def test_dpo_reports_the_rewards_of_the_model_it_saves(tmp_path, capsys):
    """The rewards are computed by hand from the saved model and its base."""
    rows = [
        {"instruction": f"Is {n} a number?", "input": n % 2 * "Answer.", "output": "", "chosen": "It is.", "rejected": "No."}
        for n in range(20)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps([*rows, {**rows[0], "rejected": rows[0]["chosen"]}]))
    save_base(tmp_path / "base", [json.dumps(rows)], chat=True, vocab_size=300, max_position_embeddings=64)
    dpo.main([*(str(tmp_path / name) for name in ("base", "pairs.json", "tuned")), "--max_steps", "3"])
    rewards = reported_rewards(capsys.readouterr().out)
    assert rewards["Before"] == (0, 0)
    held_out = load_dataset("json", data_files=str(tmp_path / "pairs.json"), split="train[:20]").train_test_split(0.1, seed=0)
    margins = []
    for row in held_out["test"]:
        base, tuned = (log_probability(tmp_path / name, row) for name in ("base", "tuned"))
        margins.append(BETA * ((tuned["chosen"] - base["chosen"]) - (tuned["rejected"] - base["rejected"])))
    assert len(margins) == 2
    assert rewards["After"][0] == sum(margin > 0 for margin in margins) / 2
    assert rewards["After"][1] == pytest.approx(sum(margins) / 2, abs=6e-4)
    assert rewards["After"][1] > 0.01
    assert not list((tmp_path / "tuned").glob("adapter*"))


def test_grpo_saves_a_model_and_its_curve(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grpo, "NUM_PROMPTS", 800)
    grpo.main([str(tmp_path / "sort"), "--sft_steps", "2", "--max_steps", "1"])
    printed = capsys.readouterr().out
    assert list(sorted_shares(printed)) == [0, 1]
    assert "train_runtime" not in printed
    assert Image.open(tmp_path / "sort" / "accuracy.png").width == 600
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "sort")) is ScratchGPTForCausalLM
    assert AutoTokenizer.from_pretrained(tmp_path / "sort").decode([*range(4, 15)]) == "0123456789="


@pytest.mark.parametrize(("program", "inputs"), [(dpo, ["base", "pairs.json"]), (grpo, [])])
def test_nothing_is_overwritten(program, inputs, tmp_path, capsys):
    (tmp_path / "pairs.json").touch()
    with pytest.raises(SystemExit, match="2"):
        program.main([*(str(tmp_path / name) for name in inputs), str(tmp_path)])
    assert f"{tmp_path} already exists: pass a new directory, or move it." in capsys.readouterr().err


def test_reward_of_grpo():
    answers, right = ["12345", "12354", "54321", "1234", "123456", ""], ["12345"] * 6
    assert grpo.in_place(answers, answer=right) == pytest.approx([1, 0.6, 0.2, 0, 0, 0])
    assert grpo.is_sorted(answers, answer=right) == [1, 0, 0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dpo_on_real_preferences(real_data, tmp_path, capsys):
    data = real_data / "instructions"
    texts = [row["instruction"] + row["output"] for row in json.loads((data / "instruction-data.json").read_text())]
    base, tuned, preferred = (str(tmp_path / name) for name in ("base", "instruct", "preferred"))
    save_base(tmp_path / "base", texts, chat=False, vocab_size=2000, max_position_embeddings=256, hidden_size=128)
    words = ["--base_model", base, "--dataset", str(data / "instruction-data.json"), "--report_to", "none"]
    instruct.main([*words, "--num_train_epochs", "2", "--test_fraction", "0", "--output_dir", tuned])
    capsys.readouterr()
    dpo.main([tuned, str(data / "instruction-data-with-preference.json"), preferred])
    rewards = reported_rewards(capsys.readouterr().out)
    assert rewards["Before"] == (0, 0)
    assert rewards["After"][0] > 0.6
    assert rewards["After"][1] > 0.1
    chat = pipeline("text-generation", model=preferred)
    assert chat([{"role": "user", "content": "What is the cube of 4?"}])[0]["generated_text"][-1]["content"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_grpo_learns_to_sort(tmp_path, capsys):
    """The model begins near chance, and the saved one sorts new digits."""
    grpo.main([str(tmp_path / "sort")])
    shares = sorted_shares(capsys.readouterr().out)
    assert shares[0] < 0.1
    assert shares[max(shares)] >= 0.9
    generate = pipeline("text-generation", model=str(tmp_path / "sort"))
    texts = [generate(f"{n:05}=", max_new_tokens=6, do_sample=False)[0]["generated_text"] for n in range(777, 99_999, 4_000)]
    assert sum(text[6:] == "".join(sorted(text[:5])) for text in texts) >= 0.9 * len(texts)
