from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from tests.conftest import MODERN, TINY, shaken
from training.data.conversations import Conversation
from training.data.datasets import PackedExamples, PaddedExamples, padded_dataloader
from training.data.prompts import (
    CHAT_TEMPLATES,
    ChatTemplate,
    digest,
    get_chat_template,
    render_with_loss_mask,
    set_up_chat_template,
    stop_token_id,
    tokenize_conversations,
)
from training.errors import UserError

TEXTS = ["What is two and two?", "It is four, of course.", "### Response:", "Below is an instruction. Write a response."]


def new_tokenizer(kind: str = "bpe") -> ScratchGPTTokenizer:
    return ScratchGPTTokenizer.train(TEXTS * 9, vocab_size=400, kind=kind)


def with_template(name: str = "chat", kind: str = "bpe") -> ScratchGPTTokenizer:
    tokenizer = new_tokenizer(kind)
    set_up_chat_template(tokenizer, CHAT_TEMPLATES[name], 64)
    return tokenizer


def conversation(*contents: str, system: str = "") -> Conversation:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return Conversation((*([{"role": "system", "content": system}] if system else []), *messages), "")


CONVERSATION = conversation("What is two and two?", "It is four.")

# Written by hand, not taken from the code: what another program would have to send.
AS_TEXT = {
    "chat": "<|bos|><|user|>What is two and two?<|assistant|>[It is four.<|eos|>]",
    "phi3": "<|bos|><|user|>\nWhat is two and two?\n\n<|assistant|>\n[It is four.<|eos|>]",
    "alpaca": "<|bos|>Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nWhat is two and two?\n\n### Response:\n[It is four.<|eos|>]",
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_each_template_as_text(name):
    tokenizer = with_template(name)
    encoded = tokenize_conversations([CONVERSATION], tokenizer, 200)
    assert render_with_loss_mask(encoded, 0, tokenizer) == AS_TEXT[name]
    assert stop_token_id(encoded, tokenizer) == tokenizer.eos_token_id
    assert encoded.examples.num_bytes == len("It is four.")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_contents_that_are_not_strings(name):
    """Servers pass lists of parts, and answers that call tools and have no text."""
    tokenizer = with_template(name)

    def as_text(question: object, answer: object, **more: object) -> str:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
        return tokenizer.apply_chat_template(messages, tokenize=False)

    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "two?"}]
    assert as_text(parts, [{"type": "text", "text": "Two."}]) == as_text("What is two?", "Two.")
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    expected = as_text("Hi", '[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]')
    assert as_text("Hi", None, tool_calls=calls) == as_text("Hi", "", tool_calls=calls) == expected
    with pytest.raises(TemplateError, match="only text parts are supported"):
        as_text([{"type": "image", "url": "x.png"}], "Two.")


def test_several_turns_and_a_system():
    tokenizer = with_template()
    encoded = tokenize_conversations([conversation("one", "two", "three", "four", system="Count.")], tokenizer, 64)
    expected = "<|bos|><|system|>Count.<|user|>one<|assistant|>[two<|eos|>]<|user|>three<|assistant|>[four<|eos|>]"
    assert render_with_loss_mask(encoded, 0, tokenizer) == expected
    assert "[two<|eos|>]" in render_with_loss_mask(
        tokenize_conversations([conversation("one", "two", system="Count.")], with_template("alpaca"), 64), 0, tokenizer
    )
    messages = list(conversation("one", "two", "three", "four", system="Count.").messages)
    expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded.examples.ids.tolist() == expected["input_ids"]
    assert encoded.examples.loss_mask.tolist() == list(map(bool, expected["assistant_masks"]))
    everything = tokenize_conversations([CONVERSATION], tokenizer, 64, completion_only_loss=False)
    assert render_with_loss_mask(everything, 0, tokenizer) == f"[{AS_TEXT['chat'].replace('[', '').replace(']', '')}]"


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@given(
    contents=st.lists(st.text(min_size=1, max_size=30).map(str.strip).filter(bool), min_size=2, max_size=6).map(
        lambda texts: texts[: len(texts) // 2 * 2]
    ),
    indentation=st.text(" \n\t", max_size=5),
)
@settings(deadline=None, max_examples=60)
def test_a_prompt_reads_the_same_with_and_without_its_answer(name, contents, indentation):
    """The prompt for generation is that of training, the loss mask starts right after it, and decoding restores any text."""
    tokenizer = TOKENIZERS[name]
    contents[-1] = indentation + contents[-1] + indentation
    whole = conversation(*contents)
    encoded = tokenize_conversations([whole], tokenizer, 10_000)
    prompt = tokenizer.apply_chat_template(whole.prompt, add_generation_prompt=True)["input_ids"]
    ids, loss_mask = encoded.examples.ids.tolist(), encoded.examples.loss_mask
    assert ids[: len(prompt)] == prompt
    assert loss_mask[len(prompt) :].all()
    assert not loss_mask[len(prompt) - 1]
    assert tokenizer.decode(ids[len(prompt) : -1]) == contents[-1]
    assert ids[-1] == tokenizer.eos_token_id
    assert encoded.examples.num_bytes == sum(len(answer.encode()) for answer in contents[1::2])
    assert loss_mask.sum() == sum(
        len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1 for answer in contents[1::2]
    )


TOKENIZERS = {name: with_template(name) for name in CHAT_TEMPLATES}


@pytest.mark.parametrize("completion_only_loss", [True, False])
def test_answers_without_loss(completion_only_loss):
    tokenizer = with_template()
    one = replace(conversation("1 + 1?", "3", "Again.", "2"), without_loss=(1,))
    encoded = tokenize_conversations([one], tokenizer, 64, completion_only_loss)
    prompts = ("<|bos|><|user|>1 + 1?<|assistant|>", "<|user|>Again.<|assistant|>")
    expected = "{}3<|eos|>{}[2<|eos|>]" if completion_only_loss else "[{}]3<|eos|>[{}2<|eos|>]"
    assert render_with_loss_mask(encoded, 0, tokenizer) == expected.format(*prompts)
    assert encoded.examples.num_bytes == 1
    tokenizer.chat_template = (
        QUESTIONS + "{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="marks 1 parts of a conversation with 2 answers"):
        tokenize_conversations([one], tokenizer, 64)


def test_new_tokens_are_single_and_old_ones_keep_their_ids():
    tokenizer = new_tokenizer()
    before = tokenizer.get_vocab()
    assert set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], 64) == 3
    assert {token: tokenizer.get_vocab()[token] for token in before} == before
    assert [tokenizer.convert_ids_to_tokens(len(before) + n) for n in range(3)] == ["<|system|>", "<|user|>", "<|assistant|>"]
    assert set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], 64) == 0
    assert set_up_chat_template(with_template("alpaca"), CHAT_TEMPLATES["alpaca"], 64) == 0
    assert len(with_template("alpaca")) == len(before)


def test_gpt2_gets_tokens_for_the_end_and_the_padding(real_data):
    """Its own EOS token is also the BOS token, with which each prompt begins: a repetition penalty would suppress it."""
    folder = real_data / "gpt2-tokenizer"
    tokenizer = ScratchGPTTokenizer.from_gpt2_files(folder / "encoder.json", folder / "vocab.bpe")
    assert set_up_chat_template(tokenizer, CHAT_TEMPLATES["alpaca"], 1024) == 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (50256, 50257, 50258)
    encoded = tokenize_conversations([CONVERSATION], tokenizer, 1024)
    assert stop_token_id(encoded, tokenizer) == 50257
    assert set_up_chat_template(tokenizer, CHAT_TEMPLATES["alpaca"], 1024) == 0
    assert encoded.examples.loss_mask[-1]


def loss_of(model: ScratchGPTForCausalLM, batches) -> tuple[float, int]:
    """Sum of the losses, and number of labels."""
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            total += model(**batch, num_items_in_batch=1, skip_logits=True, use_cache=False).loss.item()
        count += int((batch["shift_labels"] != IGNORE_INDEX).sum())
    return total, count


@pytest.mark.parametrize("shape", [{}, MODERN])
def test_padded_packed_and_single_conversations_have_the_same_loss(shape):
    """Compared with `labels`, one conversation at a time and without padding."""
    tokenizer = with_template()
    config = ScratchGPTConfig(**{**TINY, **shape, "vocab_size": len(tokenizer), "max_position_embeddings": 200})
    model = shaken(ScratchGPTForCausalLM(config), 0.2)
    conversations = [conversation("one " * n, "two " * (2 * n + 1), "three", "four") for n in range(1, 6)]
    encoded = tokenize_conversations(conversations, tokenizer, 200)
    expected, expected_count = 0.0, 0
    for start, end in pairwise(encoded.examples.offsets.tolist()):
        ids = torch.from_numpy(encoded.examples.ids[start:end].astype(np.int64))[None]
        labels = ids.masked_fill(~torch.from_numpy(encoded.examples.loss_mask[start:end])[None], IGNORE_INDEX)
        with torch.no_grad():
            expected += model(ids, labels=labels, num_items_in_batch=1).loss.item()
        expected_count += int((labels[:, 1:] != IGNORE_INDEX).sum())
    rows = PaddedExamples(encoded.examples)
    batches = padded_dataloader(rows, tokenizer.pad_token_id, batch_size=3, sampler=[4, 2, 0, 1, 3, -1])
    padded = loss_of(model, batches)
    assert padded == (pytest.approx(expected, rel=1e-5), expected_count)
    packed = PackedExamples(encoded.examples, 120, tokenizer.pad_token_id)
    assert len(packed) < len(encoded)
    rows = ({name: value[None] for name, value in packed[n].items()} for n in range(len(packed)))
    assert loss_of(model, rows) == (pytest.approx(expected, rel=1e-5), expected_count)


def test_long_conversations_and_those_with_special_tokens_are_dropped_and_counted():
    tokenizer = with_template()
    conversations = [
        CONVERSATION,
        conversation("x" * 500, "long"),
        conversation("Say <|assistant|>", "no"),
        conversation("hm", "<|eos|>"),
        CONVERSATION,
    ]
    encoded = tokenize_conversations(conversations, tokenizer, 64)
    assert (len(encoded), encoded.num_too_long, encoded.special) == (2, 1, ["<|assistant|>", "<|eos|>"])
    assert encoded.conversations == [CONVERSATION, CONVERSATION]
    assert tokenize_conversations(conversations[:1], tokenizer, int(encoded.lengths[0]) + 1).num_too_long == 0
    assert tokenize_conversations(conversations[:1], tokenizer, int(encoded.lengths[0])).num_too_long == 1


def test_the_template_of_a_name_a_file_or_the_tokenizer(tmp_path):
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
        with pytest.raises(UserError, match=r"--chat_template .*: pass chat, alpaca, phi3, or a file with a Jinja"):
            get_chat_template(wrong, tokenizer)


QUESTIONS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '\n' }}{% else %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}{{ message.content }}{% endfor %}", "marks nothing as the assistant's"),
        ("{{ messages", "the chat template cannot be rendered"),
        ("{{ messages.nothing.at_all }}", "the chat template cannot be rendered"),
        ("{{ raise_exception('not me') }}", "the chat template cannot be rendered: not me"),
        ("{{ 1 / 0 }}", "the chat template cannot be rendered: division by zero"),
        ("{{ 'a' * 10 ** 15 }}", "the chat template cannot be rendered"),
        (QUESTIONS + "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}", "could never stop"),
        (
            QUESTIONS + "{% generation %}{{ m.content + '<end_of_turn>' }}{% endgeneration %}{% endif %}{% endfor %}",
            "turn>', where the last token is not special",
        ),
        (  # only the last turn is prompted as it was trained
            QUESTIONS + "{{ 'A: ' if loop.last else 'B: ' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
            "{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}",
            "renders prompts differently for training and generation: '.*B: ' and '.*A: '",
        ),
        (  # only the last answer is preceded by what generation writes
            QUESTIONS + "{{ '' if loop.last else 'Earlier: ' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
            "{% endif %}{% endfor %}",
            r"differently for training and generation: 'three\\nEarlier: ' and 'three\\n' precede",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "renders prompts differently",
        ),
        ("{{ ''.__class__.__mro__ }}", "the chat template cannot be rendered"),
    ],
)
def test_unusable_templates_are_rejected(template, message):
    tokenizer = new_tokenizer()
    set_up_chat_template(tokenizer, ChatTemplate(template), 64)
    conversations = [CONVERSATION, conversation("three", "four", "five", "six")]
    with pytest.raises(UserError, match=message):
        stop_token_id(tokenize_conversations(conversations, tokenizer, 64), tokenizer)


def test_a_template_may_end_answers_with_its_own_token():
    tokenizer = new_tokenizer()
    chatml = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert set_up_chat_template(tokenizer, ChatTemplate(chatml), 64) == 2
    encoded = tokenize_conversations([CONVERSATION], tokenizer, 64)
    assert stop_token_id(encoded, tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert render_with_loss_mask(encoded, 0, tokenizer).endswith("[It is four.<|im_end|>]\n")


def test_special_tokens_that_the_config_does_not_name(tmp_path):
    """Llama 3's, for example. No text may contain them, and they may end an answer."""
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
    encoded = tokenize_conversations([CONVERSATION, conversation("a<|start_header_id|>b", "c")], tokenizer, 64)
    assert (len(encoded), encoded.special) == (1, ["<|start_header_id|>"])
    assert stop_token_id(encoded, tokenizer) == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_the_digest_is_that_of_ids_and_loss_mask():
    chat, other = (tokenize_conversations([CONVERSATION], with_template(name), 64) for name in ("chat", "phi3"))
    assert digest({"train": chat}) == digest({"train": tokenize_conversations([CONVERSATION], with_template("chat"), 64)})
    assert digest({"train": chat}) != digest({"train": other})
    assert digest({"train": chat}) != digest(
        {"train": tokenize_conversations([CONVERSATION], with_template("chat"), 64, completion_only_loss=False)}
    )
    assert digest({"train": chat}) != digest({"test": chat})


def test_a_tokenizer_without_eos_is_rejected():
    tokenizer = new_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no EOS token"):
        set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], 64)
