"""The recipes that start from a pretrained model: training all of it or a part, publishing, resuming, mistakes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from modeling_scratchgpt import ScratchGPTForCausalLM, ScratchGPTForSequenceClassification, ScratchGPTTokenizer
from modeling_scratchgpt.lora import load_adapter
from tests.conftest import WITHOUT_THE_PACKAGE, Processes, on_two_processes
from tests.training.conftest import (
    ANSWERS,
    ROOT,
    TUNING,
    evaluations,
    interrupted_after,
    rows,
    run_program,
    scores,
    snippet_of,
    write_rows,
)
from training import classify, instruct, pretrain
from training.data.prompts import CHAT_TEMPLATES
from training.engine.pretrained import load_config_and_tokenizer, load_model_and_tokenizer
from training.errors import UserError

BOTH = pytest.mark.parametrize("recipe", [classify, instruct], ids=["classify", "instruct"])
ALL = pytest.mark.parametrize("recipe", [pretrain, classify, instruct], ids=["pretrain", "classify", "instruct"])
TASKS = {classify: "text-classification", instruct: "text-generation", pretrain: "text-generation"}
QUESTIONS = {
    classify: "It was a dark and stormy night, like 77 before.",
    instruct: [{"role": "user", "content": "night 77\ndark"}],
}


def answer(recipe, model) -> str:
    """The label or the answer that a pipeline gives to the question."""
    (output,) = model([QUESTIONS[recipe]]) if recipe is classify else model(QUESTIONS[recipe])
    return output["label"] if recipe is classify else output["generated_text"][-1]["content"]


@ALL
def test_the_model_directory_describes_the_run(recipe, finished):
    folder, printed = finished(recipe)
    evaluated = evaluations(folder)
    first, last = ({name.removeprefix("eval_"): value for name, value in evaluated[index].items()} for index in (0, -1))
    assert f"Before training: loss {first['loss']:.3f}, " in printed
    assert f"\nstep {last['step']}: loss {last['loss']:.3f}, " in printed
    if recipe is not pretrain:
        found = scores(folder)
        assert found["before"] == {name: value for name, value in first.items() if name != "step"}
        assert found["validation"]["loss"] == last["loss"] < first["loss"] / 4
    card = (folder / "README.md").read_text()
    steps = [row for row in rows(folder) if "loss" in row]
    tokens, seconds = (sum(row[name] for row in steps) for name in ("tokens", "seconds"))
    for part in (
        f"pipeline_tag: {TASKS[recipe]}",
        f"| Training | {len(steps)} steps, {tokens:,} tokens, {seconds:.1f} seconds (excluding evaluation) |",
        "![Loss over steps](loss.png)",
        "library_name: transformers",
    ):
        assert part in card
    assert str(ROOT) not in card
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@BOTH
def test_another_seed_holds_out_the_same_data(recipe, finished, tune):
    """So a run from a model is validated on data that the model has not been trained on."""
    folder, _ = finished(recipe)
    again = tune(recipe, "--seed", "5", "--max_steps", "1", base=folder)
    last, first = evaluations(folder)[-1], evaluations(again)[0]
    assert first["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


def test_the_programs_of_the_cards_run_without_the_package(finished, tune, run, tmp_path):
    """One after another, in a process that cannot import this project; adapters give the numbers of the merged models."""
    table = [{"text": f"night {n}", "dark": n % 2, "calm": int(n % 3 > 0), "length": n / 9} for n in range(60)]
    words = [
        "--dataset",
        write_rows(tmp_path / "table.jsonl", table),
        "--lora_r",
        "4",
        "--max_steps",
        "4",
        "--learning_rate",
        "0.1",
    ]
    several = ["--problem_type", "multi_label_classification", "--label_column", "dark", "calm"]
    folders = {
        finished(classify)[0]: classify,
        finished(instruct)[0]: instruct,
        tune(classify, *words, "--label_column", "dark", output="one", base=finished(classify)[0]) / "adapter": classify,
        tune(classify, *words, *several, output="several") / "adapter": classify,
        tune(classify, *words, "--problem_type", "regression", "--label_column", "length", output="number")
        / "adapter": classify,
        tune(instruct, "--lora_r", "4", "--repetition_penalty", "3", "--max_new_tokens", "9") / "adapter": instruct,
    }
    program = WITHOUT_THE_PACKAGE
    for folder, recipe in folders.items():
        base = finished(classify)[0] if folder.parent.name == "one" else run
        snippet = snippet_of((folder / "README.md").read_text()).replace("PATH_OR_HUB_ID_OF_THE_BASE", str(base))
        use = f"classify([{QUESTIONS[classify]!r}])" if recipe is classify else f"chat({QUESTIONS[instruct]!r})"
        program += "\n" + snippet.replace("PATH_OR_HUB_ID", str(folder)) + f"\nprint('\\nRESULT' + json.dumps({use}))"
    printed = Processes(exec, tmp_path / "log", [program, {}]).wait()
    for (folder, recipe), line in zip(folders.items(), re.findall("^RESULT(.*)", printed, re.M), strict=True):
        merged = folder.parent if folder.name == "adapter" else folder
        tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=False)
        model = pipeline(TASKS[recipe], str(merged), tokenizer=tokenizer, **({"top_k": None} if recipe is classify else {}))
        if recipe is instruct:
            assert json.loads(line) == model(QUESTIONS[instruct])
            continue
        (found,), (expected,) = json.loads(line), model([QUESTIONS[classify]])
        scores = ({item["label"]: item["score"] for item in items} for items in (found, expected))
        assert next(scores) == pytest.approx(next(scores), abs=1e-5)


@BOTH
def test_the_files_of_a_run_may_be_moved(recipe, tune, nights, tmp_path):
    text = Path(nights[recipe]).read_text()
    table = json.loads(text) if recipe is instruct else [json.loads(line) for line in text.splitlines()]
    parts = {"--dataset": table[:40], "--validation_dataset": table[40:50], "--test_dataset": table[50:60]}
    names = {option: f"{option[2:]}.jsonl" for option in parts}
    for option, rows_of_part in parts.items():
        write_rows(tmp_path / names[option], rows_of_part)
    options = ["--max_steps", "4", "--save_steps", "2"]
    with interrupted_after(2):
        tune(recipe, *options, *(word for option, name in names.items() for word in (option, str(tmp_path / name))))
    (tmp_path / "moved").mkdir()
    for name in names.values():
        (tmp_path / name).rename(tmp_path / "moved" / name)
    words = (word for option, name in names.items() for word in (option, str(tmp_path / "moved" / name)))
    assert (tune(recipe, *options, "--resume", *words) / "config.json").exists()


@BOTH
def test_gpt2_is_a_base_model(recipe, tune, tmp_path):
    """It has one token for the beginning and the end, none to pad with, and learned positions."""
    base = tmp_path / "gpt2"
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(base)
    tokenizer = ScratchGPTTokenizer.train(["It was a dark and stormy night"] * 9, 290)
    end = "<|bos|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token=end, eos_token=end, unk_token=end
    ).save_pretrained(base)
    options = {classify: ("--classifier_pooling", "mean", "--num_train_epochs", "6"), instruct: ("--num_train_epochs", "20")}
    folder = tune(recipe, *options[recipe], base=base)
    assert scores(folder)["test"]["accuracy" if recipe is classify else "finished"] == 1
    model = pipeline(TASKS[recipe], str(folder), tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    assert answer(recipe, model) in (*ANSWERS, *ANSWERS.values())
    if recipe is classify:
        texts = ["It was a dark night", "It was a bright and calm night, like 7 before."]
        alone = [model(text)[0]["score"] for text in texts]
        assert [row["score"] for row in model(texts, batch_size=2)] == pytest.approx(alone, abs=1e-5)
    else:
        stop = model.tokenizer.eos_token_id  # is in no prompt, where a repetition penalty would find it
        assert stop == model.model.generation_config.eos_token_id == model.model.config.eos_token_id
        prompt = [{"role": "user", "content": "It was"}]
        assert stop not in model.tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        assert len({stop, model.tokenizer.pad_token_id, model.tokenizer.bos_token_id}) == 3
    # transformers' own GPT-2 has other names for the layers of an adapter: its program takes the package's.
    folder = tune(recipe, *options[recipe][:-2], "--num_train_epochs", "1", "--lora_r", "4", base=base, output="lora")
    card = (folder / "adapter" / "README.md").read_text().replace("PATH_OR_HUB_ID_OF_THE_BASE", str(base))
    names: dict = {}
    exec(snippet_of(card).replace("PATH_OR_HUB_ID", str(folder / "adapter")), names)
    ids = torch.tensor([[0, 40, 41]])
    torch.testing.assert_close(names["model"].eval()(ids).logits, type(names["model"]).from_pretrained(folder)(ids).logits)


@pytest.mark.parametrize(
    ("recipe", "num_layers", "trained"),
    [
        (classify, "0", {"score"}),
        (classify, "1", {"score", "norm", "layers.1"}),
        (classify, "2", {"score", "norm", "layers.0", "layers.1"}),
        (instruct, "1", {"embed_tokens", "lm_head", "norm", "layers.1"}),  # the new tokens are in the first two
    ],
)
def test_only_the_last_blocks_are_trained(recipe, num_layers, trained, tune, run):
    """Freeze first, then add the head: the other order trains no head."""
    folder = tune(recipe, "--train_last_n_layers", num_layers, "--dropout", "0", "--num_train_epochs", "1")
    after, before = load_file(folder / "model.safetensors"), load_file(run / "model.safetensors")
    changed = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
    parts = [re.fullmatch(r"(?:model\.)?(layers\.\d|\w+)\..*", name)[1] for name in changed]
    assert set(parts) == trained
    assert evaluations(folder)[-1]["eval_loss"] < evaluations(folder)[0]["eval_loss"]


@ALL
def test_the_adapter_on_its_base_equals_the_merged_model(recipe, tune, run, capsys):
    folder = tune(
        recipe, "--lora_r", "4", *([] if recipe is pretrain else ["--num_train_epochs", "16", "--optimizer", "adamw"])
    )
    trained = re.search(r"Model: ([\d,]+) of [\d,]+ parameters are trained", capsys.readouterr().out)[1]
    assert recipe is not pretrain or trained == "4,352"
    after, before = load_file(folder / "model.safetensors"), load_file(run / "model.safetensors")
    changed = {
        name
        for name in before.keys() & after.keys()
        if after[name].shape != before[name].shape or not torch.equal(after[name], before[name])
    }
    saved_whole = {"model.embed_tokens.weight", "lm_head.weight"} if recipe is instruct else set()
    assert {name for name in changed if "_proj" not in name} == saved_whole
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        names = load_file(checkpoint / "trained.safetensors").keys()
        assert any(".lora_" in name for name in names)
        assert not any("base_layer" in name or "norm" in name for name in names)
    model_class = ScratchGPTForSequenceClassification if recipe is classify else ScratchGPTForCausalLM
    merged, ids = model_class.from_pretrained(folder), torch.tensor([[0, 40, 41, 42, 1]])
    expected = merged(ids).logits.detach()
    for load in (load_adapter, PeftModel.from_pretrained):
        base = model_class.from_pretrained(run, num_labels=2) if recipe is classify else model_class.from_pretrained(run)
        base.resize_token_embeddings(merged.config.vocab_size)
        model = load(base, str(folder / "adapter")) or base
        torch.testing.assert_close(model.eval()(ids).logits.detach(), expected, atol=1e-5, rtol=1e-4)
    if recipe is not pretrain:
        assert scores(folder)["test"]["accuracy" if recipe is classify else "exact_match"] == 1
    if recipe is instruct:
        new = merged.get_input_embeddings().weight[300:]
        assert len(new) == 3
        assert not torch.allclose(new[1], new[2], atol=1e-2)  # equal before training


def check_model_directory(recipe, checkpoint: Path, base: Path) -> None:
    """A checkpoint is a model that transformers and the programs load; an adapter is merged in it."""
    auto_class = AutoModelForSequenceClassification if recipe is classify else AutoModelForCausalLM
    model, tokenizer = load_model_and_tokenizer(str(checkpoint), False, torch.device("cpu"), auto_class)
    config, _ = load_config_and_tokenizer(str(checkpoint), 8)
    assert config.hidden_size == model.config.hidden_size
    ids = torch.tensor([tokenizer("A night")["input_ids"]])
    if recipe is pretrain:
        adapted = PeftModel.from_pretrained(ScratchGPTForCausalLM.from_pretrained(base), checkpoint / "adapter").eval()
        torch.testing.assert_close(model(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(model(ids).logits, ScratchGPTForCausalLM.from_pretrained(base).eval()(ids).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("recipe", "step", "options"),
    [
        (pretrain, 10, ["--lora_r", "4", "--lora_dropout", "0.1"]),
        (classify, 12, ["--early_stopping_patience", "5", "--subword_dropout", "0.2", "--token_dropout", "0.1"]),
        (instruct, 20, ["--num_train_epochs", "4"]),
    ],
    ids=["pretrain", "classify", "instruct"],
)
def test_an_interrupted_run_resumes_with_its_own_data_and_base_only(recipe, step, options, tune, run, nights, tmp_path):
    """To the same bits as a run that was not interrupted."""
    base, data, template = tmp_path / "base", tmp_path / Path(nights[recipe]).name, tmp_path / "own.jinja"
    shutil.copytree(run, base, ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copy(nights[recipe], data)
    template.write_text(CHAT_TEMPLATES["chat"].template)
    options += ["--dataset", str(data), *(["--chat_template", str(template)] if recipe is instruct else [])]
    straight = tune(recipe, *options, output="straight", base=base)
    with interrupted_after(step):
        tune(recipe, *options, output="resumed", base=base)
    folder = tmp_path / "resumed"
    assert not (folder / "config.json").exists()
    check_model_directory(recipe, max((folder / "checkpoints").iterdir()), base)
    model = ScratchGPTForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 0.01
    model.save_pretrained(tmp_path / "other")
    changes = [(data, data.read_text().replace("stormy", "windy").encode(), "the data of the run in .* has changed since")]
    if recipe is instruct:
        changed = template.read_text().replace("<|user|>", "<|user|>Now: ").encode()
        changes.append((template, changed, "the data of the run in .* has changed since"))
    if recipe is classify:
        ScratchGPTTokenizer.train(["It was a bright and calm day"] * 9, 300).save_pretrained(tmp_path / "other")
        tokenizer = (tmp_path / "other" / "tokenizer.json").read_bytes()
        changes.append((base / "tokenizer.json", tokenizer, "the data of the run in .* has changed since"))
    if recipe is pretrain:  # with LoRA the base is not in the checkpoint
        weights = (tmp_path / "other" / "model.safetensors").read_bytes()
        changes.append((base / "model.safetensors", weights, "the base model of the run in .* has changed since"))
    if recipe is not pretrain:
        with pytest.raises(UserError, match=rf"--num_train_epochs 0.5 is \d+ steps, but the run in .* has done {step}: pass"):
            tune(recipe, *options, "--resume", "--num_train_epochs", "0.5", output="resumed", base=base)
    for path, content, message in changes:
        original = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            tune(recipe, *options, "--resume", output="resumed", base=base)
        path.write_bytes(original)
    tune(recipe, *options, "--resume", output="resumed", base=base)
    names = ["model.safetensors", *(["adapter/adapter_model.safetensors"] if recipe is pretrain else [])]
    for one, two in ((load_file(straight / name), load_file(folder / name)) for name in names):
        assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())
    for name in {pretrain: [], classify: ["metrics.json"], instruct: ["metrics.json", "responses.jsonl"]}[recipe]:
        assert (straight / name).read_bytes() == (folder / name).read_bytes()


@BOTH
def test_two_processes_train_the_same_model(recipe, finished, run, nights, tmp_path):
    folder = tmp_path / "two"
    words = ["--base_model", str(run), "--dataset", nights[recipe], "--output_dir", str(folder), *TUNING[recipe]]
    on_two_processes(run_program, tmp_path, [Path(recipe.__file__).stem, *words], ACCELERATE_USE_CPU="true")
    one, two = ([row["eval_loss"] for row in evaluations(path)] for path in (finished(recipe)[0], folder))
    assert two[0] == pytest.approx(one[0], rel=1e-4)
    test = scores(folder)["test"]
    if recipe is classify:  # dropout differs by process
        assert test["accuracy"] == 1
    else:
        assert two == pytest.approx(one, rel=2e-2)
        assert test["exact_match"] == 1
        assert len((folder / "responses.jsonl").read_text().splitlines()) == 8


MISTAKES = [
    (["--num_train_epochs", "0"], "--num_train_epochs must be above 0 and at most 1,000,000, got 0.0"),
    (["--num_train_epochs", "nan"], "--num_train_epochs must be above 0 and at most 1,000,000, got nan"),
    (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps must be at least 1, got 0"),
    (["--early_stopping_patience", "-1"], "--early_stopping_patience must be at least 0, got -1"),
    (["--dropout", "1"], "--dropout must be at least 0 and below 1, got 1.0"),
    (["--base_model", "/nowhere"], "/nowhere is not a directory: pass the directory or the Hub id of a model"),
    (["--base_model", "nowhere/at-all"], "--base_model nowhere/at-all cannot be loaded"),
    (["--context_length", "3"], "--context_length must be at least [48], got 3"),
    (["--context_length", "33"], "--context_length 33 is longer than the 32 positions"),
    (["--batch_size", "85"], r"--batch_size 85 is more than the (84 training examples|64 training rows): lower it"),
    (["--train_last_n_layers", "-2"], "--train_last_n_layers must be at least -1, got -2"),
    (["--train_last_n_layers", "3"], "--train_last_n_layers 3 is more than the 2 blocks of the model"),
    (["--train_last_n_layers", "1", "--lora_r", "2"], "--train_last_n_layers and --lora_r each choose what is trained"),
    (["--lora_r", "-1"], "--lora_r must be at least 0, got -1"),
    (["--lora_r", "99"], "r is 99, but model.layers.0.self_attn.q_proj is 32 x 32"),
    (["--lora_r", "4", "--lora_target_modules", "c_attn"], "selects no layer; the linear layers"),
    (["--lora_r", "4", "--lora_target_modules", "all-linear", "q_proj"], "pass all-linear alone"),
    (["--use_dora"], "--use_dora True is an option of LoRA: pass its rank, --lora_r, too"),
    (["--dataset", "nothing.json"], "nothing.json: no such file or directory"),
    (["--dataset", "docs", "x.json"], "--dataset docs is split by modules and cannot be combined"),
]
MISTAKES_OF_ONE = [
    (classify, ["--label_smoothing", "-0.1"], "--label_smoothing must be at least 0 and below 1"),
    (classify, ["--label_smoothing", "0.1", "--problem_type", "regression"], "--label_smoothing is for one label per text"),
    (classify, ["--context_length", "6"], "all training texts are longer than the limit of 6 tokens"),
    (classify, ["--text_column", "body"], "line 1 has no 'body'"),
    (instruct, ["--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
    (instruct, ["--repetition_penalty", "nan"], "--repetition_penalty must be at least 1 and at most 10, got nan"),
    (instruct, ["--context_length", "8"], "of 64 conversations 64 are longer than 8 tokens .use a larger --context_length"),
    (instruct, ["--chat_template", "nothing"], "--chat_template nothing: pass chat, alpaca, phi3, or a file"),
]


@pytest.mark.parametrize(
    ("recipe", "words", "message"), [*((recipe, *row) for recipe in (classify, instruct) for row in MISTAKES), *MISTAKES_OF_ONE]
)
def test_a_mistake_is_refused_before_the_first_step(recipe, words, message, tune, tmp_path):
    with pytest.raises(UserError, match=message):
        tune(recipe, *words)
    assert not (tmp_path / "model" / "metrics.jsonl").exists()
