"""TRL, lm_eval, transformers serve and a quantizer, each in a short real run."""

import json
import math
import urllib.request
from importlib.util import find_spec

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig, pipeline

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from modeling_scratchgpt.lora import LoraConfig, add_adapter

from .conftest import TINY, shaken
from .test_ecosystem import trainer_options

PAIRS = [
    ("to be or not to be,", " that is the question"), ("whether 'tis nobler in the mind", " to suffer"),
    ("to die,", " to sleep"),
]  # fmt: skip
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> ScratchGPTTokenizer:
    tokenizer = ScratchGPTTokenizer.train([prompt + completion for prompt, completion in PAIRS] * 9, vocab_size=300)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path) -> str:
    """The directory of a model and its tokenizer."""
    tiny_model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_trl_sft_on_completions(tiny_model, tokenizer, tmp_path):
    """TRL has its own loss over the backbone: it is the same, ignores the prompt, and the completions are learned."""
    from trl import SFTConfig, SFTTrainer

    pairs = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    trainer = SFTTrainer(
        model=tiny_model,
        args=SFTConfig(**trainer_options(tmp_path, max_steps=60), max_length=64),
        train_dataset=Dataset.from_list(pairs * 8),
        eval_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    (batch,) = trainer.get_eval_dataloader()
    scored = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert scored == [completion + tokenizer.eos_token for _, completion in PAIRS]
    with torch.no_grad():
        ours = tiny_model.eval()(**batch).loss.item()
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(ours, rel=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1 * before

    trainer.save_model(str(tmp_path / "tuned"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert type(tuned) is ScratchGPTForCausalLM
    for prompt, completion in PAIRS:
        output = tuned.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=20, do_sample=False)
        assert tokenizer.decode(output[0]) == prompt + completion + tokenizer.eos_token


def test_trl_packing(tiny_model, tokenizer, tmp_path):
    """TRL packs documents into one row without a mask, for flash attention; here the positions keep them separate."""
    from trl import SFTConfig, SFTTrainer

    texts = [prompt + completion for prompt, completion in PAIRS]
    trainer = SFTTrainer(
        model=tiny_model,
        args=SFTConfig(**trainer_options(tmp_path, per_device_train_batch_size=3), max_length=64, packing=True),
        train_dataset=Dataset.from_dict({"text": texts * 12}),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert batch["input_ids"].shape[0] == 1
    assert "attention_mask" not in batch
    # The row is longer than the model has positions, none of its documents is.
    assert len(starts) > 6
    assert batch["input_ids"].shape[1] > TINY["max_position_embeddings"]
    tiny_model.eval()
    with torch.no_grad():
        documents = batch["input_ids"].tensor_split(starts[1:], dim=1)
        separate = sum(tiny_model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in documents)
        packed = tiny_model(**batch).loss.item()
        trl_loss = trainer.compute_loss(tiny_model, dict(batch)).item()
    expected = separate.item() / (batch["labels"] != -100).sum().item()
    assert packed == pytest.approx(expected, rel=1e-4)
    assert trl_loss == pytest.approx(expected, rel=1e-4)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]


DROPOUT = dict.fromkeys(("hidden_dropout", "embedding_dropout", "attention_dropout"), 0.4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_trl_disables_every_dropout(tiny_config, attention):
    """Also those of an adapter: in training mode, the model then computes what it computes in evaluation mode."""
    from trl.trainer.utils import disable_dropout_in_model

    config = ScratchGPTConfig(**{**tiny_config.to_dict(), **DROPOUT}, attn_implementation=attention)
    model = shaken(ScratchGPTForCausalLM(config), 0.2)
    add_adapter(model, LoraConfig(r=4, lora_dropout=0.4, init_lora_weights=False))
    ids = torch.randint(3, 300, (2, 20))
    expected = model(ids).logits
    assert (model.train()(ids).logits - expected).abs().max() > 0.1
    disable_dropout_in_model(model)
    torch.testing.assert_close(model(ids).logits, expected)


def test_trl_dpo(tiny_config, tokenizer, tmp_path):
    """TRL loads the model twice and disables dropout: the policy moves away from the reference, which stays as it is."""
    from trl import DPOConfig, DPOTrainer

    folder = str(tmp_path / "saved")
    shaken(ScratchGPTForCausalLM(ScratchGPTConfig(**{**tiny_config.to_dict(), **DROPOUT})), 0.2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    completions = [completion for _, completion in PAIRS]
    rows = [
        {"prompt": prompt, "chosen": completion, "rejected": completions[index - 1]}
        for index, (prompt, completion) in enumerate(PAIRS)
    ]
    trainer = DPOTrainer(
        model=folder,
        args=DPOConfig(**trainer_options(tmp_path, max_steps=15, learning_rate=1e-3), max_length=64, trust_remote_code=True),
        train_dataset=Dataset.from_list(rows * 8),
    )
    reference = {name: tensor.clone() for name, tensor in trainer.ref_model.state_dict().items()}
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    # The models are equal before the first step.
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert history[-1]["rewards/margins"] > 0.5
    assert history[-1]["rewards/chosen"] > history[-1]["rewards/rejected"]
    for name, tensor in trainer.ref_model.state_dict().items():
        assert torch.equal(tensor, reference[name]), name


CHOICE_TASK = {
    "task": "choice", "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}],
    "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
}  # fmt: skip
TEXT_TASK = {
    "task": "text", "output_type": "loglikelihood_rolling", "metric_list": [{"metric": "bits_per_byte"}],
    "doc_to_text": "", "doc_to_target": "{{text}}",
}  # fmt: skip


@torch.no_grad()
def test_lm_eval_log_likelihoods(tiny_model, tokenizer, folder, tmp_path):
    """Of choices, and of a text longer than the context of the model, against those computed by hand."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    questions = [
        {"question": "to be or not to", "choices": ["be", "die, to sleep", "suffer"], "answer": 0},
        {"question": "whether 'tis nobler in the", "choices": ["mind", "question"], "answer": 0},
    ]
    texts = ["to be or not to be", "naïve zyx wvu " * 9]
    for task, rows in ((CHOICE_TASK, questions), (TEXT_TASK, [{"text": text} for text in texts])):
        lines = tmp_path / f"{task['task']}.jsonl"
        lines.write_text("\n".join(json.dumps(row) for row in rows))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(lines)}}, "test_split": "test"}
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps({**task, **data}))  # JSON is YAML
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": folder, "trust_remote_code": True},
        tasks=["choice", "text"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        log_samples=True,
    )

    def log_likelihood(context: list[int], continuation: list[int]) -> float:
        logits = tiny_model(torch.tensor([context + continuation[:-1]])).logits[0, -len(continuation) :]
        return logits.log_softmax(-1)[range(len(continuation)), continuation].sum().item()

    right = 0
    for row, sample in zip(questions, results["samples"]["choice"], strict=True):
        context = tokenizer(row["question"])["input_ids"]
        by_hand = [log_likelihood(context, tokenizer(" " + choice)["input_ids"]) for choice in row["choices"]]
        assert [likelihood for likelihood, _ in sample["filtered_resps"]] == pytest.approx(by_hand, rel=1e-4)
        right += by_hand.index(max(by_hand)) == row["answer"]
    assert results["results"]["choice"]["acc,none"] == right / 2

    # A long text is scored in windows of the context length, which is in the config; the last one overlaps the one before.
    width, total = TINY["max_position_embeddings"], 0.0
    for text, sample in zip(texts, results["samples"]["text"], strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        by_hand = 0.0
        for start in range(1, len(ids), width):
            end = min(start + width, len(ids))
            by_hand += log_likelihood(ids[max(0, end - 1 - width) : start], ids[start:end])
        assert sample["filtered_resps"] == pytest.approx([by_hand], rel=1e-4)
        total += by_hand
    assert len(ids) > width + 2
    size = sum(len(text.encode()) for text in texts)
    assert results["results"]["text"]["bits_per_byte,none"] == pytest.approx(-total / size / torch.tensor(2.0).log().item())


def ask(address: str, request: dict) -> bytes:
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(request).encode(), headers), timeout=60) as answer:
        return answer.read()


@pytest.fixture
def memorized(tiny_config, tokenizer, tmp_path) -> tuple[ScratchGPTForCausalLM, str]:
    """A model that has memorized one line, and its directory."""
    model = ScratchGPTForCausalLM(tiny_config)
    ids = tokenizer("\n".join(PAIRS[0]) + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "memorized")
    tokenizer.save_pretrained(tmp_path / "memorized")
    return model.eval(), str(tmp_path / "memorized")


def test_transformers_serve(server, memorized, tokenizer):
    """A completion, a chat and a stream are the output of `generate`."""
    model, folder = memorized
    prompt, completion = PAIRS[0]
    ids = tokenizer(prompt + "\n", return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(output) == completion + tokenizer.eos_token
    options = {"model": folder, "max_tokens": 20, "temperature": 0}
    answer = json.loads(ask(server + "/v1/completions", {**options, "prompt": prompt + "\n"}))
    assert answer["choices"][0]["text"] == completion
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == ids.shape[1]
    assert answer["usage"]["completion_tokens"] == len(output)
    del options["max_tokens"]  # the server then asks for 1,024, more than there are learned positions
    answer = json.loads(ask(server + "/v1/completions", {**options, "prompt": prompt + "\n"}))
    assert answer["choices"][0]["text"] == completion
    options |= {"max_tokens": 20, "messages": [{"role": "user", "content": prompt}]}
    answer = json.loads(ask(server + "/v1/chat/completions", options))
    assert answer["choices"][0]["message"]["content"] == completion
    stream = ask(server + "/v1/chat/completions", {**options, "stream": True}).decode()
    chunks = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    assert len(chunks) > 3
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == completion


@pytest.mark.parametrize("add", ["get_peft_model", "mixed", "add_adapter", "inject"])
def test_peft_has_default_targets(tiny_model, monkeypatch, add):
    """For all methods for which Qwen3 has some: its modules have the same names. For LoRA, all linear layers."""
    tables = [
        table
        for name, table in vars(peft.utils.constants).items()
        if name.endswith("_TARGET_MODULES_MAPPING") and "qwen3" in table
    ]
    for table in tables:
        monkeypatch.delitem(table, "scratchgpt", raising=False)
    tiny_model.config.to_dict()
    assert not any("scratchgpt" in table for table in tables)  # only PEFT makes us write into its tables
    if add == "add_adapter":
        tiny_model.add_adapter(peft.LoHaConfig())
    elif add == "inject":
        peft.inject_adapter_in_model(peft.LoHaConfig(), tiny_model)
    else:
        peft.get_peft_model(tiny_model, peft.LoHaConfig(), mixed=add == "mixed")
    adapted = {name.split(".")[4] for name, _ in tiny_model.named_parameters() if "hada_w1_a" in name}
    lora = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    layers = {name.rpartition(".")[2] for name, _ in tiny_model.named_modules()}
    assert adapted == (layers & {*lora["scratchgpt"]} if add == "mixed" else {*lora["qwen3"]})  # PEFT mixes by LoRA's table
    assert len(tables) > 25
    assert all(table["scratchgpt"] == table["qwen3"] for table in tables if table is not lora)


needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not installed: pip install -c constraints.txt -e '.[quantization]'"
)


@needs_torchao
@torch.no_grad()
def test_int8_weights(tiny_model, folder, tmp_path):
    """By torchao: nearly the same logits, with and without a cache, and the same after saving and loading."""
    from torchao.quantization import Int8WeightOnlyConfig

    quantization = TorchAoConfig(Int8WeightOnlyConfig())
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map="cpu")
    assert type(quantized.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    logits, exact = quantized(ids).logits, tiny_model(ids).logits
    assert 1e-4 < (logits - exact).norm() / exact.norm() < 0.05
    output = quantized.generate(ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    at_once = quantized(output.sequences).logits[:, 19:-1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), at_once, atol=1e-4, rtol=1e-4)
    quantized.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map="cpu")
    torch.testing.assert_close(again(ids).logits, logits)


@needs_torchao
def test_the_loss_of_an_int8_head(tiny_config, tmp_path):
    """The loss without logits reads the weight of the head; a quantized head is called instead."""
    from torchao.quantization import Int8WeightOnlyConfig

    untied = ScratchGPTConfig(**{**tiny_config.to_dict(), "tie_word_embeddings": False})
    ScratchGPTForCausalLM(untied).save_pretrained(tmp_path)
    quantization = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map="cpu")
    assert type(model.lm_head.weight) is not torch.nn.Parameter
    ids = torch.randint(3, 300, (2, 20))
    with_logits = model(ids, labels=ids).loss
    torch.testing.assert_close(model.train()(ids, labels=ids, skip_logits=True).loss, with_logits)


def test_pipeline_in_batches(folder):
    """The continuation of a prompt does not depend on the others in its batch."""
    generate = pipeline("text-generation", model=folder, trust_remote_code=True)
    prompts = ["to be or not to be", "to", "whether 'tis nobler in the mind to suffer", "die"]
    options = {"max_new_tokens": 8, "do_sample": False, "return_tensors": True}
    alone = [generate(prompt, **options)[0]["generated_token_ids"] for prompt in prompts]
    batched = [output[0]["generated_token_ids"] for output in generate(prompts, batch_size=2, **options)]
    padding = AutoTokenizer.from_pretrained(folder).pad_token_id
    assert [[token for token in row if token != padding] for row in batched] == alone
