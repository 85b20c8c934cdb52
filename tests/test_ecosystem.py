"""transformers' Trainer and pipelines, torch's compiler and exporter, ways of loading."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.masking_utils import create_causal_mask

from modeling_scratchgpt import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTModel,
    ScratchGPTTokenizer,
)
from modeling_scratchgpt import modeling_scratchgpt as modeling
from tests.conftest import IS_CURRENT

TEXTS = ["to be or not to be, that is the question", "whether 'tis nobler in the mind to suffer", "to die, to sleep"]


@pytest.fixture(scope="module")
def tokenizer() -> ScratchGPTTokenizer:
    return ScratchGPTTokenizer.train(TEXTS * 9, vocab_size=300)


def trainer_options(folder, **options) -> dict:
    """Arguments of the Trainer and of TRL."""
    defaults = {
        "output_dir": str(folder), "max_steps": 12, "per_device_train_batch_size": 6, "learning_rate": 5e-3, "seed": 0,
        "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "bf16": False, "disable_tqdm": True,  # the first is on by default in TRL
    }  # fmt: skip
    return {**defaults, **options}


def test_pretraining_with_the_trainer(tiny_model, tokenizer, tmp_path):
    data = Dataset.from_dict(dict(tokenizer(TEXTS * 16)))
    trainer = Trainer(
        model=tiny_model,
        args=TrainingArguments(**trainer_options(tmp_path)),
        train_dataset=data,
        eval_dataset=data.select(range(3)),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 1
    trainer.save_model(str(tmp_path / "model"))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "model")) is ScratchGPTForCausalLM


@pytest.mark.parametrize("head_class", [ScratchGPTForSequenceClassification, ScratchGPTForTokenClassification])
def test_the_loss_does_not_depend_on_gradient_accumulation(tiny_config, tokenizer, tmp_path, head_class):
    """transformers' GPT-2 reports 1.07 with one step and 4.3 with four: its heads ignore the size of the whole batch."""
    ids = tokenizer(TEXTS * 8)["input_ids"]
    tokens = head_class is ScratchGPTForTokenClassification
    # Rows have different numbers of labels: a mean of means would differ.
    labels = [[index % 3 for index in range(len(row))] for row in ids] if tokens else [index % 3 for index in range(len(ids))]
    data = Dataset.from_dict({"input_ids": ids, "labels": labels})
    losses = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        torch.manual_seed(0)
        model = head_class(ScratchGPTConfig(**{**tiny_config.to_dict(), "num_labels": 3}))

        def collate(rows):
            batch = tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
            width = batch["input_ids"].shape[1]
            pad = [row["labels"] + [-100] * (width - len(row["labels"])) if tokens else row["labels"] for row in rows]
            return {**batch, "labels": torch.tensor(pad)}

        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        arguments = TrainingArguments(**trainer_options(tmp_path, max_steps=3, **sizes))
        trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)


def test_classification_with_the_trainer(tiny_config, tokenizer, tmp_path):
    model = ScratchGPTForSequenceClassification(ScratchGPTConfig(**{**tiny_config.to_dict(), "num_labels": 3}))
    data = Dataset.from_dict({**tokenizer(TEXTS * 16), "labels": [0, 1, 2] * 16})
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**trainer_options(tmp_path, max_steps=30)),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    predictions = trainer.predict(data.select(range(3))).predictions.argmax(-1)
    assert predictions.tolist() == [0, 1, 2]


def test_pipelines(tiny_model, tiny_config, tokenizer):
    text = "to be or not"
    (output,) = pipeline("text-generation", model=tiny_model, tokenizer=tokenizer)(text, max_new_tokens=5, do_sample=False)
    assert output["generated_text"].startswith(text)
    three = ScratchGPTConfig(**{**tiny_config.to_dict(), "num_labels": 3})
    scores = pipeline(
        "text-classification", model=ScratchGPTForSequenceClassification(three).eval(), tokenizer=tokenizer, top_k=None
    )([text, "to die, to sleep, perchance"], batch_size=2)
    assert [sum(score["score"] for score in row) for row in scores] == pytest.approx([1, 1])
    entities = pipeline("token-classification", model=ScratchGPTForTokenClassification(three).eval(), tokenizer=tokenizer)(text)
    assert {entity["entity"] for entity in entities} <= {"LABEL_0", "LABEL_1", "LABEL_2"}
    features = pipeline("feature-extraction", model=tiny_model.model, tokenizer=tokenizer)(text)
    assert len(features[0]) == len(tokenizer(text)["input_ids"])
    assert len(features[0][0]) == tiny_config.hidden_size


@pytest.mark.parametrize("skip_logits", [False, True])
def test_compile_in_one_graph(tiny_model, skip_logits, monkeypatch):
    torch.compiler.reset()  # the limit of recompilations counts those of all models
    if IS_CURRENT:  # as transformers 5.16 does while it compiles
        always = partial(create_causal_mask, allow_is_causal_skip=False)
        monkeypatch.setattr(modeling, "create_causal_mask", always)
    ids = torch.randint(3, 300, (2, 12))
    tiny_model.train()
    masks = []

    def backend(graph, inputs):
        attention = [node for node in graph.graph.nodes if node.target is torch.nn.functional.scaled_dot_product_attention]
        masks.extend(node.kwargs["attn_mask"] for node in attention)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(tiny_model, fullgraph=True, backend=backend)
    results = []
    for model in (tiny_model, compiled):
        tiny_model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False, skip_logits=skip_logits).loss
        loss.backward()
        results.append((loss.detach(), [parameter.grad.clone() for parameter in tiny_model.parameters()]))
    assert masks == [None, None]  # of two layers: with a mask, SDPA would not take its fast kernels
    torch.testing.assert_close(results[0][0], results[1][0])
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_export(tiny_model):
    ids = torch.randint(3, 300, (2, 12))
    batch, length = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        tiny_model,
        (),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False},
        dynamic_shapes={"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}, "use_cache": None},
    )
    longer = torch.randint(3, 300, (3, 20))
    output = program.module()(input_ids=longer, attention_mask=torch.ones_like(longer), use_cache=False)
    torch.testing.assert_close(output.logits, tiny_model(longer).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_shards_load_in_bfloat16_by_device_map(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.randint(3, 300, (2, 12))
    logits = tiny_model(ids).logits
    torch.testing.assert_close(ScratchGPTForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
    half = ScratchGPTForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert (half(ids).logits.float() - logits).abs().max() < 0.1 * logits.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_stay_tied_or_untied(tiny_config, tied, tmp_path):
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**{**tiny_config.to_dict(), "tie_word_embeddings": tied})).eval()
    ids = torch.randint(3, 300, (2, 12))
    before = model(ids).logits
    model.resize_token_embeddings(310)
    assert model.config.vocab_size == 310
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    torch.testing.assert_close(model(ids).logits[..., :300], before)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(ScratchGPTForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_the_backbone_loads_the_weights_of_the_model_and_the_reverse(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    backbone = ScratchGPTModel.from_pretrained(tmp_path / "model")
    backbone.save_pretrained(tmp_path / "backbone")
    again = ScratchGPTForCausalLM.from_pretrained(tmp_path / "backbone")
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
