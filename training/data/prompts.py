"""Chat templates, and conversations as token ids.

Notable:
- A template has each answer, with the token that ends it, between `{% generation %}` and `{% endgeneration %}`. By default the
  loss is computed on that part alone, so the model learns when to stop.
- Each `<|name|>` in a template is a single special token. Conversations with such a token in a text are left out, because the
  text could pretend to be a message of another role.
"""

import hashlib
import re
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from training.data.conversations import Conversation, Message
from training.data.datasets import TokenizedExamples
from training.data.tokens import loses_text
from training.errors import UserError, explain_errors, one_line, quiet

STOP = "<|end|>"  # ends the answers if the tokenizer's EOS token is also its BOS token
CONTROL = re.compile(r"<\|\w+\|>")
# The text of a message, which may be a list of parts, or None beside tool calls.
TEXT = (
    "{% macro text(message) %}{% if message.content is string %}{{ message.content }}{% elif message.content %}"
    "{% for part in message.content %}{% if part.type != 'text' %}{{ raise_exception('only text parts are supported') }}"
    "{% endif %}{{ part.text }}{% endfor %}{% endif %}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{% endmacro %}"
)
ANSWER = "{% generation %}{{ text(message) + eos_token }}{% endgeneration %}"
UNKNOWN = "{% else %}{{ raise_exception(message.role + ' is none of the roles system, user and assistant') }}{% endif %}"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template."""

    template: str
    input_mark: str = "\n"  # separates an instruction from its input


CHAT_TEMPLATES = {
    "chat": ChatTemplate(
        TEXT + "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'system' %}{{ '<|system|>' + text(message) }}"
        "{% elif message.role == 'user' %}{{ '<|user|>' + text(message) }}"
        "{% elif message.role == 'assistant' %}{{ '<|assistant|>' }}" + ANSWER + UNKNOWN + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "alpaca": ChatTemplate(
        TEXT + "{{ bos_token }}{% if messages[0].role != 'system' %}"
        "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}"
        "{% endif %}{% for message in messages %}"
        "{% if message.role == 'system' %}{{ text(message) }}"
        "{% elif message.role == 'user' %}{{ '\n\n### Instruction:\n' + text(message) }}"
        "{% elif message.role == 'assistant' %}{{ '\n\n### Response:\n' }}" + ANSWER + UNKNOWN + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}",
        input_mark="\n\n### Input:\n",
    ),
    "phi3": ChatTemplate(
        TEXT + "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'system' %}{{ '<|system|>\n' + text(message) + '\n\n' }}"
        "{% elif message.role == 'user' %}{{ '<|user|>\n' + text(message) + '\n\n' }}"
        "{% elif message.role == 'assistant' %}{{ '<|assistant|>\n' }}" + ANSWER + UNKNOWN + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}


def get_chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template of that name or file, or a `UserError`; without a name the tokenizer's own, else `chat`."""
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    if not name:
        own = tokenizer.chat_template
        if isinstance(own, dict):  # several named templates
            own = own.get("default")
        return ChatTemplate(own) if isinstance(own, str) else CHAT_TEMPLATES["chat"]
    allowed = f"{', '.join(CHAT_TEMPLATES)}, or a file with a Jinja template"
    with explain_errors(f"--chat_template {name}: pass {allowed}", (OSError, ValueError)):
        return ChatTemplate(Path(name).read_text(encoding="utf-8-sig"))


def set_up_chat_template(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, max_length: int) -> int:
    """Set the tokenizer's chat template, and add its special tokens and a pad token if they are missing.

    Returns the number of new tokens. A tokenizer without an EOS token is a `UserError`.
    """
    if not tokenizer.eos_token:
        raise UserError("the tokenizer of the model has no EOS token, so the model could never stop.")
    num_tokens = len(tokenizer)
    if tokenizer.bos_token == tokenizer.eos_token and tokenizer.chat_template != template.template:
        # As GPT-2's: it begins every prompt, so that a repetition penalty would keep the answers from ending.
        tokenizer.add_special_tokens({"eos_token": STOP})
    special = [token for token in dict.fromkeys(CONTROL.findall(template.template)) if token not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"extra_special_tokens": special}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.chat_template = template.template
    tokenizer.model_max_length = max_length
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # generation continues at the end of the prompts
    return len(tokenizer) - num_tokens


@dataclass(frozen=True)
class TokenizedConversations:
    """Conversations of a split and their token ids."""

    conversations: list[Conversation]  # those that were not dropped
    examples: TokenizedExamples  # the loss mask is True on the answers, whose length is `num_bytes`
    num_too_long: int  # conversations dropped because they are longer than the context
    special: list[str]  # special tokens in texts, one for each conversation that was dropped because of it

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> np.ndarray:
        """Input tokens of each conversation (E,): all but the last id, which is only a label."""
        return self.examples.lengths - 1


def tokenize_conversations(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int, completion_only_loss: bool = True
) -> TokenizedConversations:
    """Tokenize conversations with the tokenizer's chat template, and drop those that are longer than `max_length` tokens.

    Answers are tokenized separately from the text before them, as in generation, so that no token is part of both.

    Raises:
        UserError: the template fails, does not mark the answers, or renders prompts differently for generation.
    """
    pattern = re.compile("|".join(map(re.escape, special_tokens(tokenizer))))
    found = [next(filter(None, (pattern.search(it["content"]) for it in one.messages)), None) for one in conversations]
    plain = [conversation for conversation, match in zip(conversations, found, strict=True) if match is None]
    kept, ids, masks = [], [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=bool)]
    for first in range(0, len(plain), 1000):
        part = plain[first : first + 1000]
        rendered = _render(part, tokenizer)
        texts = [text for pieces in rendered for text, _ in pieces]
        encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])  # no warning about long texts
        for conversation, pieces in zip(part, rendered, strict=True):
            indices = [index for _, index in pieces]
            has_loss = [it not in conversation.without_loss and (it is not None or not completion_only_loss) for it in indices]
            rows = list(islice(encoded, len(pieces)))
            if sum(map(len, rows)) <= max_length:
                kept.append(conversation)
                ids.append(np.concatenate(rows).astype(np.int32))
                masks.append(np.repeat(has_loss, [*map(len, rows)]))
    answers = [it.messages[index]["content"] for it in kept for index in it.answers if index not in it.without_loss]
    all_ids = np.concatenate(ids)
    examples = TokenizedExamples(
        all_ids,
        np.cumsum([0, *map(len, ids[1:])]),
        num_bytes=None if loses_text(tokenizer, all_ids, answers[:20]) else sum(len(answer.encode()) for answer in answers),
        loss_mask=np.concatenate(masks),
    )
    return TokenizedConversations(kept, examples, len(plain) - len(kept), [match[0] for match in found if match])


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of all special tokens, including those that the tokenizer's config does not name."""
    unnamed = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**unnamed, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))}


def digest(splits: dict[str, TokenizedConversations]) -> str:
    """SHA-256 of the ids and loss masks of all splits, and so of the data, the template and the tokenizer."""
    content = hashlib.sha256()
    for name, tokenized in splits.items():
        for array in (tokenized.examples.ids, tokenized.examples.offsets, tokenized.examples.loss_mask):
            content.update(name.encode() + np.asarray(array).tobytes())
    return content.hexdigest()


def _call_template(tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]], **options: Any) -> Any:
    """The rendered conversations, and with `return_assistant_tokens_mask` the bounds of what the template marks in each."""
    try:
        options |= {"chat_template": tokenizer.get_chat_template(), **tokenizer.special_tokens_map}
        with quiet():  # transformers' warning about unmarked answers; an error follows
            return render_jinja_template(conversations, **options)
    except Exception as error:  # a template is a program and can fail in any way
        raise UserError(f"the chat template cannot be rendered: {one_line(error)}.") from error


def _render(conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[list[tuple[str, int | None]]]:
    """Each conversation as pieces of text: answers, each with the index of its message, and the rest, with None."""
    rendered, prompts, expected = [], [], []
    texts, spans = _call_template(tokenizer, [[*it.messages] for it in conversations], return_assistant_tokens_mask=True)
    for conversation, text, bounds in zip(conversations, texts, spans, strict=True):
        starts, ends = ({bound[side] for bound in bounds} for side in (0, 1))
        bounds = [*zip(sorted(starts - ends), sorted(ends - starts), strict=True)]  # adjacent parts are one
        answers = conversation.answers
        if not bounds or len(bounds) > len(answers) or (conversation.without_loss and len(bounds) < len(answers)):
            marked = "nothing" if not bounds else f"{len(bounds)} parts of a conversation with {len(answers)} answers"
            raise UserError(
                f"the chat template marks {marked} as the assistant's, so the loss would not be that of the answers: put each "
                "between {% generation %} and {% endgeneration %}, or pass another --chat_template."
            )
        pieces: list[tuple[str, int | None]] = []
        end = 0
        # A template may leave out earlier answers: the last part is the last answer.
        for index, (start, next_end) in zip(answers[-len(bounds) :], bounds, strict=True):
            pieces += [(text[end:start], None), (text[start:next_end], index)]
            prompts.append([*conversation.messages[:index]])
            expected.append(text[:start])
            end = next_end
        rendered.append([*pieces, (text[end:], None)])
    for generated, trained in zip(_call_template(tokenizer, prompts, add_generation_prompt=True)[0], expected, strict=True):
        if generated != trained:
            raise UserError(
                f"the chat template renders prompts differently for training and generation: {trained[-40:]!r} and "
                f"{generated[-40:]!r} precede an answer. Have add_generation_prompt write all that precedes {{% generation %}}."
            )
    return rendered


def stop_token_id(tokenized: TokenizedConversations, tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the special token that ends every answer; a `UserError` if there is none, since the model would never stop."""
    examples = tokenized.examples
    loss_mask, bounds = np.asarray(examples.loss_mask), pairwise(examples.offsets.tolist())
    answers = [examples.ids[start:end][loss_mask[start:end]] for start, end in bounds]
    ends = {int(answer[-1]) for answer in answers}
    if len(ends) > 1 or not ends <= set(special_tokens(tokenizer).values()):
        raise UserError(
            f"the chat template ends answers with {tokenizer.decode(answers[0])[-20:]!r}, where the last token is not special, "
            "so the model could never stop: put a special token before {% endgeneration %}, such as {{ eos_token }} or, to add "
            "one to the tokenizer, <|end_of_turn|>; or pass another --chat_template."
        )
    return ends.pop()


def render_with_loss_mask(tokenized: TokenizedConversations, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as the model reads it, with the parts that the loss is computed on in brackets."""
    examples = tokenized.examples
    part = slice(examples.offsets[index], examples.offsets[index + 1])
    pairs = zip(np.asarray(examples.loss_mask)[part].tolist(), examples.ids[part].tolist(), strict=True)
    runs = ((has_loss, tokenizer.decode([token_id for _, token_id in run])) for has_loss, run in groupby(pairs, itemgetter(0)))
    return "".join(f"[{text}]" if has_loss else str(text) for has_loss, text in runs)
