"""Instruction tuning: what is particular to it, besides what test_finetuning.py shows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, TextGenerationPipeline

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from tests.conftest import TINY
from tests.training.conftest import ANSWERS, ROOT, scores
from training import instruct


def load_chat(folder: Path) -> TextGenerationPipeline:
    return TextGenerationPipeline(
        model=ScratchGPTForCausalLM.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    )


def ask(chat: TextGenerationPipeline, text: str) -> str:
    return chat([{"role": "user", "content": text}])[0]["generated_text"][-1]["content"]


def test_printed_lines_metrics_and_card(finished):
    folder, printed = finished(instruct)
    found = scores(folder)
    assert [found["test"][name] for name in ("finished", "exact_match", "chrf")] == [1, 1, pytest.approx(100)]
    assert found["base"]["finished"] < 1
    for line in (
        "Conversations: train 64, validation 8, test 8; each of their 80 prompts is in one split only\n",
        "Ignored columns: none\n",
        "New tokens: 3. An example, with the tokens of the loss in brackets:\n\n<|bos|><|user|>night ",
        "<|assistant|>[stormy<|eos|>]" if "<|assistant|>[stormy<|eos|>]" in printed else "<|assistant|>[calm<|eos|>]",
        "Answers: 100.0% finished, 100.0% exact match, chrF 100.0; of the base: ",
    ):
        assert line in printed
    card = (folder / "README.md").read_text()
    for name, row in {"validation, before": found["before"], "validation": found["validation"], "test": found["test"]}.items():
        assert f"| {name} | {row['loss']:.3f} | {row['perplexity']:,.1f} | {row['bits_per_byte']:.3f} |" in card
    for part in ("| this model | 100.0% | 100.0% | 100.0 |", "responses.md", "chat(messages)[0]"):
        assert part in card
    responses = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert len(responses) == 8
    assert all(row["response"] == row["expected"] and row["finished"] for row in responses)
    assert "To 8 held-out prompts" in (folder / "responses.md").read_text()


def test_the_pipeline_chats(finished):
    """The chat template is the same in training, in the saved tokenizer and in the pipeline."""
    chat = load_chat(finished(instruct)[0])
    for word, answer in ANSWERS.items():
        assert ask(chat, f"night 77\n{word}") == answer
    assert chat.tokenizer.padding_side == "left"
    both = chat([[{"role": "user", "content": f"night 5\n{word}"}] for word in ANSWERS], batch_size=2)
    assert [messages[0]["generated_text"][-1]["content"] for messages in both] == list(ANSWERS.values())


@pytest.mark.parametrize("template", ["alpaca", "phi3"])
def test_other_chat_templates(tune, tmp_path, template, run):
    base = tmp_path / "base"
    model = ScratchGPTForCausalLM.from_pretrained(run)
    model.config.max_position_embeddings = 160  # Alpaca's preamble is long in tokens of a letter
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(run, trust_remote_code=False).save_pretrained(base)
    folder = tune(instruct, "--chat_template", template, "--num_train_epochs", "30", "--eval_steps", "999", base=base)
    question = "night 26\n\n### Input:\ndark" if template == "alpaca" else "night 26\ndark"
    assert ask(load_chat(folder), question) == "stormy"


@pytest.mark.parametrize(
    ("words", "metric"), [(["--packing", "--batch_size", "4"], "exact_match"), (["--no_completion_only_loss"], "finished")]
)
def test_packed_rows_and_the_loss_on_prompts(tune, words, metric):
    assert scores(tune(instruct, *words))["test"][metric] == 1


def test_a_chat_model_as_the_base_keeps_its_template_and_tokens(tune, finished):
    base, _ = finished(instruct)
    folder = tune(instruct, "--max_steps", "1", "--learning_rate", "1e-6", base=base)
    one, two = (AutoTokenizer.from_pretrained(path, trust_remote_code=False) for path in (base, folder))
    assert one.chat_template == two.chat_template
    assert len(one) == len(two) == 303
    assert scores(folder)["base"]["exact_match"] == 1


def test_transformers_chat(server, finished):
    """The chat of the command line, typed through a pipe, with `transformers serve` behind it."""
    chat = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(finished(instruct)[0]), server + "/v1"]
    process = subprocess.run(
        [*chat, "do_sample=False"],  # the chat samples by default
        input="night 26 dark\n!exit\n",
        # Offline, the client would refuse even a local server.
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert "stormy" in process.stdout


@pytest.mark.slow
def test_preference_tuning_as_in_the_readme(real_data, tmp_path, monkeypatch):
    """The program of the README on the real data: afterwards the model prefers the chosen answers to the rejected ones."""
    (snippet,) = re.findall(r"```python\n([^`]*DPOTrainer[^`]*)```", (ROOT / "training" / "README.md").read_text())
    data = real_data / "instructions"
    examples = json.loads((data / "instruction-data.json").read_text())
    tokenizer = ScratchGPTTokenizer.train([row["instruction"] + row["output"] for row in examples], 2000)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = {**TINY, "vocab_size": 2000, "max_position_embeddings": 256, "hidden_size": 128, **ids}
    ScratchGPTForCausalLM(ScratchGPTConfig(**shape)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = ["--base_model", str(tmp_path / "base"), "--dataset", str(data / "instruction-data.json"), "--report_to", "none"]
    instruct.main([*words, "--output_dir", str(tmp_path / "outputs" / "instruct")])
    (tmp_path / "instruction-data-with-preference.json").symlink_to(data / "instruction-data-with-preference.json")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    history = [row for row in names["trainer"].state.log_history if "rewards/chosen" in row]
    assert history[-1]["rewards/chosen"] > history[-1]["rewards/rejected"]
    assert history[-1]["rewards/margins"] > history[0]["rewards/margins"]
    assert history[-1]["rewards/accuracies"] > 0.6
    assert ask(load_chat(tmp_path / "outputs" / "preferred"), "What is the cube of 4?")
