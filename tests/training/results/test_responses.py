import json

import pytest
import torch
from accelerate import Accelerator

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from tests.conftest import MODERN, TINY
from training.data.conversations import Conversation
from training.data.prompts import CHAT_TEMPLATES, collate, encode, set_up_chat_template
from training.results.responses import Response, respond, respond_together, response_rows, score_responses, write_responses

QUESTIONS = ["One?", "What comes after one, and before three?", "Three?", "What is the one that comes after three?"]
ANSWERS = ["One.", "It is two.", "Three.", "Four, I think."]


def talks() -> list[Conversation]:
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
    """A model that has learned these answers by heart."""
    torch.manual_seed(0)
    shape = {**TINY, **(MODERN if request.param == "modern" else {}), "vocab_size": len(tokenizer)}
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    encoded = encode(talks(), tokenizer, 64)
    batch = collate([encoded[index] for index in range(4)], tokenizer.pad_token_id)
    for _ in range(120):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.update(do_sample=False, eos_token_id=1, pad_token_id=2)
    return model.eval()


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_answers_in_batches_are_those_one_at_a_time(model, tokenizer, batch_size):
    """Against `generate` on the bare prompt, without padding; each ends where it should although others go on."""
    prompts = [talk.prompt for talk in talks()]
    found = respond(model, tokenizer, prompts, batch_size, 20)
    for prompt, response in zip(prompts, found, strict=True):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=20)[0, ids.shape[1] :].tolist()
        assert alone[-1] == tokenizer.eos_token_id
        assert response == Response(tokenizer.decode(alone[:-1]), True)
    assert [response.text for response in found] == ANSWERS


def test_an_answer_that_does_not_end_is_said_to_be_cut(model, tokenizer):
    prompts = [talk.prompt for talk in talks()]
    for response, answer in zip(respond(model, tokenizer, prompts, 4, 2), ANSWERS, strict=True):
        assert not response.ended
        assert answer.startswith(response.text)
        assert str(response) == response.text + " ..."


def test_no_more_is_said_than_there_are_positions(model, tokenizer):
    long = [[{"role": "user", "content": "three " * 12}], talks()[0].prompt]
    assert len(respond(model, tokenizer, long, 2, 1000)) == 2


def test_processes_share_the_prompts(model, tokenizer):
    prompts = [talk.prompt for talk in talks()]
    found = respond_together(Accelerator(cpu=True), model, tokenizer, prompts, "", batch_size=2, max_new_tokens=20)
    assert [response.text for response in found] == ANSWERS


def test_scores_by_hand():
    """The F-score of characters by sacrebleu; of the others there is nothing to compute."""
    responses = [Response("One.", True), Response("It is two", False), Response("", True), Response("Four, I think.", False)]
    scores = score_responses(responses, talks())
    assert (scores.ended, scores.exact_match) == (0.5, 0.5)
    assert 0 < scores.chrf < 100
    same = score_responses([Response(answer, True) for answer in ANSWERS], talks())
    assert (same.ended, same.exact_match, same.chrf) == (1, 1, pytest.approx(100))
    assert score_responses([Response("qqqq", True)] * 4, talks()).chrf == 0


def test_what_is_written(tmp_path):
    base = [Response("| a `b` |", False)] * 4
    tuned = [Response(answer, True) for answer in ANSWERS]
    rows = response_rows(talks(), base, tuned)
    rows[0]["judge"] = 85
    rows[2]["response"] = "1. a `b`\n2. ```c```"
    write_responses(tmp_path, rows)
    assert [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()] == rows
    assert rows[1] == {
        "prompt": talks()[1].prompt,
        "expected": "It is two.",
        "base": "| a `b` |",
        "base_ended": False,
        "response": "It is two.",
        "ended": True,
        "chrf": 100.0,
    }
    page = (tmp_path / "responses.md").read_text()
    assert "To 4 held-out prompts" in page
    assert "- **user**: `One?`" in page
    assert "- **tuned (chrF 100, judge 85)**: `One.`" in page
    assert "- **base** *(cut: it did not end)*: " in page
    assert "- **tuned (chrF 100)**:\n\n  ````\n  1. a `b`\n  2. ```c```\n  ````\n" in page
