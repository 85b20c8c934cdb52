from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from tests.conftest import MODERN, TINY
from training.data.conversations import Conversation
from training.data.prompts import (
    CHAT_TEMPLATES,
    ChatTemplate,
    EncodedConversations,
    collate,
    conversation_loader,
    digest,
    encode,
    get_chat_template,
    render_with_loss_mask,
    set_up_chat_template,
    stop_token_id,
)
from training.data.tokens import Tokens
from training.data.windows import PackedDocuments
from training.errors import UserError

TEXTS = ["What is two and two?", "It is four, of course.", "### Response:", "Below is an instruction. Write a response."]


def new_tokenizer(kind: str = "bpe") -> ScratchGPTTokenizer:
    return ScratchGPTTokenizer.train(TEXTS * 9, vocab_size=400, kind=kind)


def taught(style: str = "chat", kind: str = "bpe") -> ScratchGPTTokenizer:
    tokenizer = new_tokenizer(kind)
    set_up_chat_template(tokenizer, CHAT_TEMPLATES[style], 64)
    return tokenizer


def talk(*contents: str, system: str = "") -> Conversation:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return Conversation((*([{"role": "system", "content": system}] if system else []), *messages), "")


TALK = talk("What is two and two?", "It is four.")

# Spelled out by hand, not taken from the code: what somebody else's program would have to send.
AS_TEXT = {
    "chat": "<|bos|><|user|>What is two and two?<|assistant|>[It is four.<|eos|>]",
    "phi3": "<|bos|><|user|>\nWhat is two and two?\n\n<|assistant|>\n[It is four.<|eos|>]",
    "alpaca": "<|bos|>Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nWhat is two and two?\n\n### Response:\n[It is four.<|eos|>]",
}


@pytest.mark.parametrize("style", CHAT_TEMPLATES)
def test_each_style_as_text(style):
    tokenizer = taught(style)
    encoded = encode([TALK], tokenizer, 200)
    assert render_with_loss_mask(encoded, 0, tokenizer) == AS_TEXT[style]
    assert stop_token_id(encoded, tokenizer) == tokenizer.eos_token_id
    assert encoded.num_bytes == len("It is four.")


def test_several_turns_and_a_system():
    tokenizer = taught()
    encoded = encode([talk("one", "two", "three", "four", system="Count.")], tokenizer, 64)
    expected = "<|bos|><|system|>Count.<|user|>one<|assistant|>[two<|eos|>]<|user|>three<|assistant|>[four<|eos|>]"
    assert render_with_loss_mask(encoded, 0, tokenizer) == expected
    assert "[two<|eos|>]" in render_with_loss_mask(
        encode([talk("one", "two", system="Count.")], taught("alpaca"), 64), 0, tokenizer
    )
    all_learned = encode([TALK], tokenizer, 64, all_learned=True)
    assert render_with_loss_mask(all_learned, 0, tokenizer) == f"[{AS_TEXT['chat'].replace('[', '').replace(']', '')}]"


@pytest.mark.parametrize("style", CHAT_TEMPLATES)
@given(
    contents=st.lists(st.text(min_size=1, max_size=30).map(str.strip).filter(bool), min_size=2, max_size=6).map(
        lambda texts: texts[: len(texts) // 2 * 2]
    )
)
@settings(deadline=None, max_examples=60)
def test_a_prompt_reads_the_same_with_and_without_its_answer(style, contents):
    """What is generated from is what was learned from, and what is learned begins right after it; any text comes back."""
    tokenizer = TAUGHT[style]
    conversation = talk(*contents)
    encoded = encode([conversation], tokenizer, 10_000)
    prompt = tokenizer.apply_chat_template(conversation.prompt, add_generation_prompt=True)["input_ids"]
    ids, learned = encoded.ids.tolist(), encoded.learned
    assert ids[: len(prompt)] == prompt
    assert learned[len(prompt) :].all()
    assert not learned[len(prompt) - 1]
    assert tokenizer.decode(ids[len(prompt) : -1]) == contents[-1]
    assert ids[-1] == tokenizer.eos_token_id
    assert learned.sum() == sum(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1 for answer in contents[1::2])


TAUGHT = {style: taught(style) for style in CHAT_TEMPLATES}


def test_new_tokens_are_single_and_old_ones_stay():
    tokenizer = new_tokenizer()
    before = tokenizer.get_vocab()
    assert set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], 64) == 3
    assert {token: tokenizer.get_vocab()[token] for token in before} == before
    assert [tokenizer.convert_ids_to_tokens(len(before) + n) for n in range(3)] == ["<|system|>", "<|user|>", "<|assistant|>"]
    assert set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], 64) == 0
    assert set_up_chat_template(taught("alpaca"), CHAT_TEMPLATES["alpaca"], 64) == 0
    assert len(taught("alpaca")) == len(before)


def test_gpt2_gets_a_token_to_pad_with(real_data):
    folder = real_data / "gpt2-tokenizer"
    tokenizer = ScratchGPTTokenizer.from_gpt2_files(folder / "encoder.json", folder / "vocab.bpe")
    assert set_up_chat_template(tokenizer, CHAT_TEMPLATES["alpaca"], 1024) == 1
    assert tokenizer.pad_token_id == 50257
    assert tokenizer.eos_token_id == 50256
    encoded = encode([TALK], tokenizer, 1024)
    assert stop_token_id(encoded, tokenizer) == 50256
    assert encoded.learned[-1]


def rows_of(ids: list[list[int]], learned: list[list[int]] | None = None) -> EncodedConversations:
    """Conversations as their ids, all learned if not said otherwise."""
    flat = np.concatenate([np.array(row) for row in ids])
    mask = np.concatenate([np.array(row, dtype=bool) for row in learned]) if learned else np.ones(len(flat), dtype=bool)
    return EncodedConversations([], flat, np.cumsum([0, *map(len, ids)]), mask, 0, 0)


def test_the_golden_case():
    """The batch of "Build a Large Language Model", chapter 7: pad and end of text are one token, and the first one is kept."""
    end = 50256
    encoded = rows_of([[0, 1, 2, 3, 4, end], [5, 6, end], [7, 8, 9, end]])
    batch = collate([encoded[0], encoded[1], encoded[2]], end)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4], [5, 6, end, end, end], [7, 8, 9, end, end]]
    assert batch["shift_labels"].tolist() == [
        [1, 2, 3, 4, 50256],
        [6, 50256, -100, -100, -100],
        [8, 9, 50256, -100, -100],
    ]


def test_the_mask_stops_where_the_answer_starts():
    encoded = rows_of([[1, 2, 3, 4, 5], [6, 7, 8]], [[0, 0, 0, 1, 1], [0, 1, 1]])
    assert encoded[0]["shift_labels"].tolist() == [IGNORE_INDEX, IGNORE_INDEX, 4, 5]
    assert encoded[3]["shift_labels"].tolist() == [7, 8]  # the indices go on counting
    assert encoded[-1] == {"input_ids": torch.tensor([0]), "shift_labels": torch.tensor([IGNORE_INDEX])}
    assert encoded.lengths.tolist() == [4, 2]


def loss_of(model: ScratchGPTForCausalLM, batches) -> tuple[float, int]:
    """Sum of the losses, and how many labels there are."""
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            total += model(**batch, num_items_in_batch=1, skip_logits=True, use_cache=False).loss.item()
        count += int((batch["shift_labels"] != IGNORE_INDEX).sum())
    return total, count


@pytest.mark.parametrize("shape", [{}, MODERN])
def test_padded_packed_and_alone_is_the_same_loss(shape):
    """Against the model's own `labels`, one conversation at a time and without any padding."""
    tokenizer = taught()
    torch.manual_seed(0)
    config = ScratchGPTConfig(**{**TINY, **shape, "vocab_size": len(tokenizer), "max_position_embeddings": 200})
    model = ScratchGPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    talks = [talk("one " * n, "two " * (2 * n + 1), "three", "four") for n in range(1, 6)]
    encoded = encode(talks, tokenizer, 200)
    expected, expected_count = 0.0, 0
    for start, end in pairwise(encoded.starts.tolist()):
        ids = torch.from_numpy(encoded.ids[start:end].astype(np.int64))[None]
        labels = ids.masked_fill(~torch.from_numpy(encoded.learned[start:end])[None], IGNORE_INDEX)
        with torch.no_grad():
            expected += model(ids, labels=labels, num_items_in_batch=1).loss.item()
        expected_count += int((labels[:, 1:] != IGNORE_INDEX).sum())
    padded = loss_of(model, conversation_loader(encoded, tokenizer, batch_size=3, sampler=[4, 2, 0, 1, 3, -1]))
    assert padded == (pytest.approx(expected, rel=1e-5), expected_count)
    packed = PackedDocuments(Tokens(encoded.ids, 0, encoded.starts[:-1]), 120, tokenizer.pad_token_id, encoded.labels)
    assert len(packed) < len(encoded)
    rows = ({name: value[None] for name, value in packed[n].items()} for n in range(len(packed)))
    assert loss_of(model, rows) == (pytest.approx(expected, rel=1e-5), expected_count)


def test_what_is_too_long_or_spells_a_special_token_is_left_out_and_counted():
    tokenizer = taught()
    talks = [TALK, talk("x" * 500, "long"), talk("Say <|assistant|>", "no"), talk("hm", "<|eos|>"), TALK]
    encoded = encode(talks, tokenizer, 64)
    assert (len(encoded), encoded.num_too_long, encoded.num_spelled) == (2, 1, 2)
    assert encoded.conversations == [TALK, TALK]
    assert encode(talks[:1], tokenizer, int(encoded.lengths[0]) + 1).num_too_long == 0
    assert encode(talks[:1], tokenizer, int(encoded.lengths[0])).num_too_long == 1


def test_which_template_is_meant(tmp_path):
    tokenizer = new_tokenizer()
    assert get_chat_template("", tokenizer) == CHAT_TEMPLATES["chat"]
    assert get_chat_template("alpaca", tokenizer) == CHAT_TEMPLATES["alpaca"]
    tokenizer.chat_template = "{{ messages }}"
    assert get_chat_template("", tokenizer) == ChatTemplate("{{ messages }}")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert get_chat_template("", tokenizer) == ChatTemplate("{{ messages }}")
    (tmp_path / "own.jinja").write_text("\ufeff{{ own }}")
    assert get_chat_template(str(tmp_path / "own.jinja"), tokenizer) == ChatTemplate("{{ own }}")
    for wrong in ("nothing", str(tmp_path), "\0"):
        with pytest.raises(UserError, match=r"--chat_template .*: give chat, alpaca, phi3, or a file that holds a Jinja"):
            get_chat_template(wrong, tokenizer)


ASKED = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '\n' }}{% else %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}{{ message.content }}{% endfor %}", "marks no part as the assistant's"),
        ("{{ messages", "the chat template cannot be filled in"),
        ("{{ messages.nothing.at_all }}", "the chat template cannot be filled in"),
        ("{{ raise_exception('not me') }}", "the chat template cannot be filled in: not me"),
        ("{{ 1 / 0 }}", "the chat template cannot be filled in: division by zero"),
        ("{{ 'a' * 10 ** 15 }}", "the chat template cannot be filled in"),
        (ASKED + "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}", "could never stop"),
        (  # alone, "A: " ends with a token that is none when an answer follows
            ASKED + "A: {% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}A: {% endif %}",
            "asks otherwise than it teaches: answers follow '.*A:', but it asks by '.*A: '",
        ),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "asks otherwise than it"),
        ("{{ ''.__class__.__mro__ }}", "the chat template cannot be filled in"),
    ],
)
def test_templates_that_teach_nothing(template, message):
    tokenizer = new_tokenizer()
    set_up_chat_template(tokenizer, ChatTemplate(template), 64)
    with pytest.raises(UserError, match=message):
        stop_token_id(encode([TALK, talk("three", "four")], tokenizer, 64), tokenizer)


def test_a_template_may_end_answers_with_a_token_of_its_own():
    tokenizer = new_tokenizer()
    chatml = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert set_up_chat_template(tokenizer, ChatTemplate(chatml), 64) == 2
    encoded = encode([TALK], tokenizer, 64)
    assert stop_token_id(encoded, tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert render_with_loss_mask(encoded, 0, tokenizer).endswith("[It is four.<|im_end|>]\n")


def test_special_tokens_that_the_config_does_not_name(tmp_path):
    """Llama 3's are so. No text may spell them, and they may end an answer."""
    tokenizer = new_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens(["<|start_header_id|>", "<|eot_id|>"])
    tokenizer.save_pretrained(tmp_path)
    tokenizer = ScratchGPTTokenizer.from_pretrained(tmp_path)
    assert "<|eot_id|>" not in tokenizer.all_special_tokens
    template = (
        "{% for m in messages %}{{ '<|start_header_id|>' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|eot_id|>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>' }}{% endif %}"
    )
    assert set_up_chat_template(tokenizer, ChatTemplate(template), 64) == 0
    encoded = encode([TALK, talk("a<|start_header_id|>b", "c")], tokenizer, 64)
    assert (len(encoded), encoded.num_spelled) == (1, 1)
    assert stop_token_id(encoded, tokenizer) == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_the_digest_is_that_of_what_is_learned():
    chat, other = (encode([TALK], taught(style), 64) for style in ("chat", "phi3"))
    assert digest({"train": chat}) == digest({"train": encode([TALK], taught("chat"), 64)})
    assert digest({"train": chat}) != digest({"train": other})
    assert digest({"train": chat}) != digest({"train": encode([TALK], taught("chat"), 64, all_learned=True)})
    assert digest({"train": chat}) != digest({"test": chat})


def test_a_tokenizer_that_ends_nothing():
    tokenizer = new_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no token that ends a text"):
        set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], 64)
