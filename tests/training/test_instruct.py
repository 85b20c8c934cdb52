"""The recipe as a user runs it, on the model that the tests of pretraining have made."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TextGenerationPipeline

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from modeling_scratchgpt.lora import load_adapter
from tests.conftest import WITHOUT_THE_PACKAGE
from tests.training.conftest import ROOT, TORCHRUN, launch, rows, snippet_of
from training import instruct
from training.data.prompts import CHAT_TEMPLATES
from training.errors import UserError
from training.results.responses import write_responses

RECIPE = instruct
TRAINING = ["--batch_size", "8", "--num_train_epochs", "12", "--learning_rate", "0.01", "--report_to", "none", "--dropout", "0"]
TRAINING += ["--validation_fraction", "0.1", "--max_new_tokens", "12"]
ANSWERS = {"dark": "stormy", "bright": "calm"}


@pytest.fixture(scope="session")
def nights(tmp_path_factory) -> str:
    """What a night was like, which one word tells."""
    path = tmp_path_factory.mktemp("conversations") / "nights.json"
    talks = [
        {"instruction": f"night {number}", "input": word, "output": answer}
        for number in range(40)
        for word, answer in ANSWERS.items()
    ]
    path.write_text(json.dumps(talks))
    return str(path)


def chat_with(folder: Path) -> TextGenerationPipeline:
    return TextGenerationPipeline(
        model=ScratchGPTForCausalLM.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    )


def asked(chat: TextGenerationPipeline, text: str) -> str:
    return chat([{"role": "user", "content": text}])[0]["generated_text"][-1]["content"]


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_it_learns_to_answer_and_says_so(finished, run):
    folder, process = finished
    found = metrics(folder)
    assert found["validation"]["loss"] < found["before"]["loss"] / 4
    assert {name: found["test"][name] for name in ("ended", "exact_match", "chrf")} == {
        "ended": 1,
        "exact_match": 1,
        "chrf": pytest.approx(100),
    }
    assert found["base"]["ended"] < 1
    for line in (
        "Conversations: train 64, validation 8, test 8",
        "New tokens: 3. A conversation, with what is learned in brackets:\n\n<|bos|><|user|>night ",
        "<|assistant|>[stormy<|eos|>]" if "<|assistant|>[stormy<|eos|>]" in process.stdout else "<|assistant|>[calm<|eos|>]",
        "Answers: 100.0% ended by themselves, 100.0% word for word as expected, chrF 100.0; of the base: ",
    ):
        assert line in process.stdout
    card = (folder / "README.md").read_text()
    scores = "| this model | 100.0% | 100.0% | 100.0 |"
    for part in ("pipeline_tag: text-generation", scores, "responses.md", "chat(messages)[0]"):
        assert part in card
    assert str(ROOT) not in card
    responses = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert len(responses) == 8
    assert all(row["response"] == row["expected"] and row["ended"] for row in responses)
    assert "To 8 held-out prompts" in (folder / "responses.md").read_text()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [row["loss"] for row in rows(folder) if "perplexity" in row][-1] == found["validation"]["loss"]


def test_the_pipeline_chats(finished):
    """The same template in training, in the saved tokenizer and in the pipeline; and the card's snippet says how."""
    chat = chat_with(finished[0])
    for word, answer in ANSWERS.items():
        assert asked(chat, f"night 77\n{word}") == answer
    assert chat.tokenizer.padding_side == "left"
    both = chat([[{"role": "user", "content": f"night 5\n{word}"}] for word in ANSWERS], batch_size=2)
    assert [talk[0]["generated_text"][-1]["content"] for talk in both] == list(ANSWERS.values())


def test_without_the_package(finished):
    """The card's own program, and one more line."""
    snippet = snippet_of((finished[0] / "README.md").read_text()).replace("PATH_OR_HUB_ID", str(finished[0]))
    more = 'print("RESULT" + json.dumps(chat([{"role": "user", "content": "night 77\\ndark"}])))'
    program = f"{WITHOUT_THE_PACKAGE}\n{snippet}\n{more}"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    (found,) = json.loads(process.stdout.partition("RESULT")[2])
    assert found["generated_text"][-1] == {"role": "assistant", "content": "stormy"}


@pytest.mark.parametrize("style", ["alpaca", "phi3"])
def test_other_styles(recipe, nights, tmp_path, style, run):
    base = tmp_path / "base"
    model = ScratchGPTForCausalLM.from_pretrained(run[0])
    model.config.max_position_embeddings = 160  # the preamble of Alpaca is long, letter by letter
    model.model.embed_positions = torch.nn.Embedding(160, 32)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(run[0], trust_remote_code=False).save_pretrained(base)
    folder = recipe("--chat_template", style, "--num_train_epochs", "30", base=base)
    question = "night 26\n\n### Input:\ndark" if style == "alpaca" else "night 26\ndark"
    assert asked(chat_with(folder), question) == "stormy"


def test_packed_rows_teach_the_same(recipe):
    found = metrics(recipe("--packing", "True", "--batch_size", "4"))
    assert found["test"]["exact_match"] == 1


def test_prompts_may_be_learned_too(recipe):
    found = metrics(recipe("--train_on_prompt", "True"))
    assert found["test"]["ended"] == 1


def test_lora_trains_the_new_tokens(recipe, run):
    folder = recipe("--lora_r", "4", "--num_train_epochs", "16")
    assert metrics(folder)["test"]["exact_match"] == 1
    merged = ScratchGPTForCausalLM.from_pretrained(folder)
    assert merged.get_input_embeddings().weight.shape[0] == 303
    new = merged.get_input_embeddings().weight[300:]
    assert not torch.allclose(new[1], new[2], atol=1e-2)  # they began as one
    # The adapter beside it, on the base with as many rows, is the same model; to PEFT too.
    ids = torch.tensor([[0, 301, 41, 42, 302]])
    with torch.no_grad():
        expected = merged.eval()(ids).logits
        for load in (load_adapter, lambda model, path: PeftModel.from_pretrained(model, path)):
            base = ScratchGPTForCausalLM.from_pretrained(run[0])
            base.resize_token_embeddings(303)
            model = load(base, str(folder / "adapter")) or base
            torch.testing.assert_close(model.eval()(ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_the_last_block_alone(recipe, run):
    folder = recipe("--train_last_n_layers", "1")
    after, before = load_file(folder / "model.safetensors"), load_file(run[0] / "model.safetensors")
    same = {name for name in before if after[name].shape == before[name].shape and torch.equal(after[name], before[name])}
    assert {name.split(".")[2] for name in same if "layers" in name} == {"0"}
    assert not any("layers.0" in name for name in before.keys() - same)
    assert metrics(folder)["validation"]["loss"] < metrics(folder)["before"]["loss"] / 2


def test_going_on_from_a_model_that_chats(recipe, finished):
    """Its template and its tokens are there already."""
    folder = recipe("--max_steps", "1", "--learning_rate", "1e-6", base=finished[0])
    one, two = (AutoTokenizer.from_pretrained(path, trust_remote_code=False) for path in (finished[0], folder))
    assert one.chat_template == two.chat_template
    assert len(one) == len(two) == 303
    assert metrics(folder)["base"]["exact_match"] == 1


def test_a_model_of_gpt2_is_a_base_too(recipe, tmp_path):
    """It has one token for the beginning and the end, none to pad with, and learned positions."""
    base = tmp_path / "gpt2"
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(base)
    tokenizer = ScratchGPTTokenizer.train(["It was a dark and stormy night"] * 9, 300)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    end = "<|bos|>"
    PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=end, eos_token=end, unk_token=end
    ).save_pretrained(base)
    folder = recipe("--num_train_epochs", "20", base=base)
    assert metrics(folder)["test"]["ended"] == 1
    saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert saved.pad_token_id != saved.eos_token_id == 0
    assert asked(chat_with(folder), "night 3\ndark") in ANSWERS.values()


def test_a_run_goes_on_where_it_was(recipe, monkeypatch, tmp_path):
    """Weights and answers are those of a run that was not stopped; with another template it does not go on."""
    template, chat = tmp_path / "own.jinja", CHAT_TEMPLATES["chat"].template
    template.write_text(chat)
    words = ("--num_train_epochs", "4", "--chat_template", str(template))
    straight = recipe(*words, output="straight")
    steps = instruct.train.__globals__["training_steps"]

    def stopped(*arguments, **keywords):
        for step in steps(*arguments, **keywords):
            yield step
            if step.number == 20:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.engine.run.training_steps", stopped)
        with pytest.raises(KeyboardInterrupt):
            recipe(*words, output="stopped")
    assert not (tmp_path / "stopped" / "config.json").exists()
    template.write_text(chat.replace("<|user|>", "<|user|>Now: "))
    with pytest.raises(UserError, match="the data of the run in .* has changed since"):
        recipe(*words, "--resume", "True", output="stopped")
    template.write_text(chat)
    resumed = recipe(*words, "--resume", "True", output="stopped")
    one, two = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name in ("metrics.json", "responses.jsonl"):
        assert (straight / name).read_text() == (resumed / name).read_text()


def test_two_processes_learn_what_one_does(finished, run, nights, caches, tmp_path):
    folder = tmp_path / "two"
    words = ["--base_model", str(run[0]), "--dataset", nights, "--output_dir", str(folder), *TRAINING]
    process = launch(TORCHRUN, *words, script="instruct.py", ACCELERATE_USE_CPU="true", **caches)
    assert process.returncode == 0, process.stderr
    one, two = ([row["loss"] for row in rows(path) if "perplexity" in row] for path in (finished[0], folder))
    assert two == pytest.approx(one, rel=2e-2)
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    assert metrics(folder)["test"]["exact_match"] == 1
    assert len((folder / "responses.jsonl").read_text().splitlines()) == 8


def test_transformers_chat_talks_to_it(server, finished):
    """The chat of the command line, typed through a pipe, and `transformers serve` behind it."""
    chat = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(finished[0]), server + "/v1"]
    process = subprocess.run(
        [*chat, "do_sample=False"],  # the chat samples unless it is told not to
        input="night 26 dark\n!exit\n",
        # Offline, the client would refuse even the server next door.
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert "stormy" in process.stdout


def test_a_judge_grades_the_answers(server, recipe, finished, monkeypatch, capsys, tmp_path):
    """By `transformers serve` with the model itself, which has never heard of grades: each verdict is counted as none."""
    judge = ["--judge_url", server + "/v1", "--judge_model", str(finished[0])]
    folder = recipe("--num_train_epochs", "1", *judge)
    found = metrics(folder)["judge"]
    assert (found["graded"], found["malformed"], found["mean"]) == (0, 8, None)
    assert all(row["judge"] is None for row in map(json.loads, (folder / "responses.jsonl").read_text().splitlines()))
    (folder / "metrics.json").write_text(json.dumps({key: it for key, it in metrics(folder).items() if key != "judge"}))
    monkeypatch.setattr(sys, "argv", ["instruct.py", "--judge", str(folder), *judge])
    capsys.readouterr()
    instruct.main()
    assert "mean grade none, over 0 answers; 8 verdicts were no grade" in capsys.readouterr().out
    assert metrics(folder)["judge"] == found
    assert f"The judge `{finished[0].name}` says: mean grade none" in (folder / "README.md").read_text()
    answers = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    answers[0]["response"] = "a\u2028b"  # the end of a line in some places, not in JSON lines
    write_responses(folder, answers)
    instruct.main()
    for rows_, message in (
        ([{}], "row 1 of responses.jsonl lacks some of base, base_ended"),
        ([1], "row 1 of responses.jsonl lacks"),
        ([], "responses.jsonl is empty"),
        ([{**answers[0], "chrf": "much"}], "holds no answers of a finished run"),
        ([{**answers[0], "response": None}], "holds no answers of a finished run"),
        ([{**answers[0], "prompt": "What?"}], "holds no answers of a finished run"),
    ):
        (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
        with pytest.raises(UserError, match=message):
            instruct.main()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_train_epochs", "0"], "--num_train_epochs must be above 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
        (["--repetition_penalty", "nan"], "--repetition_penalty must be between 1 and 10, got nan"),
        (["--context_length", "7"], "--context_length must be at least 8, got 7"),
        (["--context_length", "33"], "--context_length 33 is longer than the 32 positions"),
        (["--context_length", "8"], "of 64 conversations 64 are longer than 8 tokens .give a longer --context_length"),
        (["--batch_size", "65"], "--batch_size 65 is more than the 64 rows to train on: lower it"),
        (["--chat_template", "nothing"], "--chat_template nothing: give chat, alpaca, phi3, or a file"),
        (["--train_last_n_layers", "3"], "--train_last_n_layers 3 is more than the 2 blocks of the model"),
        (["--train_last_n_layers", "1", "--lora_r", "2"], "--train_last_n_layers and --lora_r are two ways"),
        (["--base_model", "/nowhere"], "/nowhere is no folder: give the folder or the Hub id of a model"),
        (["--dataset", "nothing.json"], "nothing.json: no such file or folder"),
        (["--dataset", "docs", "x.json"], "--dataset docs is split by modules: give it alone"),
        (["--judge_url", "http://127.0.0.1:9"], "--judge_model is missing"),
        (["--judge_model", "m"], "--judge_url is missing"),
        (["--judge_url", "file:///etc/passwd", "--judge_model", "m"], "--judge_url file:///etc/passwd must begin with http"),
        (["--judge_url", "http://127.0.0.1:9", "--judge_model", "m"], "the judge at http://127.0.0.1:9 does not answer"),
        (["--judge", "/nowhere"], "--judge_url is missing"),
        (
            ["--judge_url", "http://x", "--judge_model", "m", "--test_fraction", "0"],
            "--judge_url grades the answers to the test",
        ),
        (["--judge", "/nowhere", "--judge_url", "http://127.0.0.1:9", "--judge_model", "m"], "/nowhere holds no answers"),
    ],
)
def test_mistakes_are_refused_before_the_first_step(recipe, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        recipe(*words)
    assert not (tmp_path / "model" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_preferences_as_the_readme_says(real_data, tmp_path, monkeypatch):
    """The README's own program, on the real data: after it the model likes the chosen answers better than the rejected ones."""
    (snippet,) = re.findall(r"```python\n([^`]*DPOTrainer[^`]*)```", (ROOT / "training" / "README.md").read_text())
    data = real_data / "instructions"
    rows = json.loads((data / "instruction-data.json").read_text())
    tokenizer = ScratchGPTTokenizer.train([row["instruction"] + row["output"] for row in rows], 2000)
    config = ScratchGPTConfig(
        vocab_size=2000,
        max_position_embeddings=256,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    ScratchGPTForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = ["--base_model", str(tmp_path / "base"), "--dataset", str(data / "instruction-data.json"), "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", ["instruct.py", *words, "--output_dir", str(tmp_path / "outputs" / "instruct")])
    instruct.main()
    (tmp_path / "instruction-data-with-preference.json").symlink_to(data / "instruction-data-with-preference.json")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    history = [row for row in names["trainer"].state.log_history if "rewards/chosen" in row]
    assert history[-1]["rewards/chosen"] > history[-1]["rewards/rejected"]
    assert history[-1]["rewards/margins"] > history[0]["rewards/margins"]
    assert history[-1]["rewards/accuracies"] > 0.6
    assert asked(chat_with(tmp_path / "outputs" / "preferred"), "What is the cube of 4?")
