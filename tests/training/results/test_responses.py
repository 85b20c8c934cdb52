import json

import pytest
import torch

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from tests.conftest import MODERN, TINY
from training.data.conversations import Conversation
from training.data.datasets import PaddedExamples, collate_padded
from training.data.prompts import CHAT_TEMPLATES, set_up_chat_template, tokenize_conversations
from training.results.responses import Response, respond, response_rows, score_responses, write_responses

QUESTIONS = ["One?", "What comes after one, and before three?", "Three?", "What is the one that comes after three?"]
ANSWERS = ["One.", "It is two.", "    Three.", "Four, I think."]


def conversations() -> list[Conversation]:
    pairs = zip(QUESTIONS, ANSWERS, strict=True)
    return [
        Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), "")
        for question, answer in pairs
    ]


@pytest.fixture(scope="module")
def tokenizer() -> ScratchGPTTokenizer:
    tokenizer = ScratchGPTTokenizer.train(QUESTIONS * 9 + ANSWERS * 9, vocab_size=300)
    set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], 64)
    return tokenizer


@pytest.fixture(scope="module", params=["gpt2", "modern"])
def model(request, tokenizer) -> ScratchGPTForCausalLM:
    """A model that has memorized these answers."""
    torch.manual_seed(0)
    shape = {**TINY, **(MODERN if request.param == "modern" else {}), "vocab_size": len(tokenizer)}
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    rows = PaddedExamples(tokenize_conversations(conversations(), tokenizer, 64).examples)
    batch = collate_padded([rows[index] for index in range(4)], tokenizer.pad_token_id)
    for _ in range(120):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.update(do_sample=False, eos_token_id=1, pad_token_id=2)
    return model.eval()


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_answers_in_batches_equal_single_ones(model, tokenizer, batch_size):
    """Those of `generate` without padding; each ends at its stop token although others in the batch are longer."""
    prompts = [conversation.prompt for conversation in conversations()]
    found = respond(model, tokenizer, prompts, batch_size, 20)
    for prompt, response in zip(prompts, found, strict=True):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=20)[0, ids.shape[1] :].tolist()
        assert alone[-1] == tokenizer.eos_token_id
        assert response == Response(tokenizer.decode(alone[:-1]), True)
    assert [response.text for response in found] == ANSWERS


def test_a_truncated_answer_is_marked(model, tokenizer):
    prompts = [conversation.prompt for conversation in conversations()]
    for response, answer in zip(respond(model, tokenizer, prompts, 4, 2), ANSWERS, strict=True):
        assert not response.finished
        assert answer.startswith(response.text)
        assert str(response) == response.text + " ..."


def test_answers_end_at_the_last_position(model, tokenizer):
    long = [[{"role": "user", "content": "three " * 12}], conversations()[0].prompt]
    assert len(respond(model, tokenizer, long, 2, 1000)) == 2


def test_scores_by_hand():
    """Without chrF, which is sacrebleu's."""
    responses = [Response("One.", True), Response("It is two", False), Response("", True), Response("Four, I think.", False)]
    scores = score_responses(responses, conversations())
    assert (scores.finished, scores.exact_match) == (0.5, 0.5)
    assert 0 < scores.chrf < 100
    same = score_responses([Response(answer, True) for answer in ANSWERS], conversations())
    assert (same.finished, same.exact_match, same.chrf) == (1, 1, pytest.approx(100))
    assert score_responses([Response("qqqq", True)] * 4, conversations()).chrf == 0


def test_files(tmp_path):
    base = [Response("| a `b` |", False)] * 4
    tuned = [Response(answer, True) for answer in ANSWERS]
    rows = response_rows(conversations(), base, tuned)
    rows[0]["judge"] = 85
    rows[2]["response"] = "1. a `b`\n2. ```c```"
    write_responses(tmp_path, rows)
    assert [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()] == rows
    assert rows[1] == {
        "prompt": conversations()[1].prompt,
        "expected": "It is two.",
        "base": "| a `b` |",
        "base_finished": False,
        "response": "It is two.",
        "finished": True,
        "chrf": 100.0,
    }
    page = (tmp_path / "responses.md").read_text()
    assert "To 4 held-out prompts" in page
    assert "- **user**: `One?`" in page
    assert "- **tuned (chrF 100, judge 85)**: `One.`" in page
    assert "- **base** *(truncated)*: " in page
    assert "- **tuned (chrF 100)**:\n\n  ````\n  1. a `b`\n  2. ```c```\n  ````\n" in page
