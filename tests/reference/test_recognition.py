"""Where libraries decide by a class name, a model type or a mapping: the same decisions as for transformers' Qwen3."""

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.cli.serving.model_manager import ModelManager
from transformers.modelcard import TrainingSummary

import modeling_scratchgpt
from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from tests.conftest import MODERN, TINY, shaken
from tests.reference.test_against_transformers import pair_with_qwen3

IDS = torch.arange(3, 43).view(2, 20)


def pair() -> tuple[ScratchGPTForCausalLM, torch.nn.Module]:
    ours = shaken(ScratchGPTForCausalLM(ScratchGPTConfig(**TINY, **MODERN)))
    return ours, pair_with_qwen3(ours)


def trainer(model: torch.nn.Module, folder, **options) -> Trainer:
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", **options)
    return Trainer(model=model, args=arguments)


@pytest.mark.parametrize("adapter", [None, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")])
def test_label_smoothing_shifts_the_labels(adapter, tmp_path):
    losses = []
    for model in pair():
        model = model if adapter is None else peft.get_peft_model(model, adapter)
        smoothed = trainer(model, tmp_path, label_smoothing_factor=0.1)
        losses.append(smoothed.compute_loss(model, {"input_ids": IDS, "labels": IDS}).item())
    log_probabilities = model(IDS).logits[:, :-1].log_softmax(-1)
    nll = -log_probabilities.gather(-1, IDS[:, 1:, None]).mean()
    assert losses == pytest.approx([(0.9 * nll - 0.1 * log_probabilities.mean()).item()] * 2, rel=1e-5)


@pytest.mark.parametrize(
    ("head", "task"),
    [
        ("ForCausalLM", "text-generation"), ("ForSequenceClassification", "text-classification"),
        ("ForTokenClassification", "token-classification"), ("ForQuestionAnswering", "question-answering"),
    ],
)  # fmt: skip
def test_the_task_in_the_trainers_model_card(head, task, tmp_path):
    model = getattr(modeling_scratchgpt, f"ScratchGPT{head}")(ScratchGPTConfig(**TINY))
    assert TrainingSummary.from_trainer(trainer(model, tmp_path)).tasks == task


def test_the_server_knows_a_language_model():
    ours, theirs = map(ModelManager.get_model_modality, pair())
    assert ours == theirs


def test_cpt_of_peft_in_training_mode():
    """It computes its own loss from the logits, even if there are labels."""
    settings = {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]}
    losses, gradients = [], []
    for model in pair():
        tuned = peft.get_peft_model(model, peft.CPTConfig(**settings, task_type="CAUSAL_LM")).train()
        losses.append(tuned(input_ids=IDS, labels=IDS.clone()).loss)
        losses[-1].backward()
        gradients.append(tuned.prompt_encoder.default.delta_embedding.weight.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
