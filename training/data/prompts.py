"""From conversations to token ids, by one chat template: the tokenizer keeps it, and whoever uses the model goes by it too.

Notable:
- What the assistant says stands between `{% generation %}` and `{% endgeneration %}`, with the token that ends it. That alone
  is learned, so the model learns when to stop.
- Every `<|name|>` that a template spells is one token. A text that spells one of them itself is left out: it could put words
  into the assistant's mouth.
- Rows are padded on the right, where a causal model needs no mask: nothing looks to the right. The label after each id is set
  here, once, and what is not learned has the label that counts for nothing.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from training.data.conversations import Conversation, Message
from training.data.windows import Row
from training.errors import UserError, one_line, quiet

CONTROL = re.compile(r"<\|\w+\|>")
ANSWER = "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
UNKNOWN = "{% else %}{{ raise_exception(message.role + ' is none of the roles system, user and assistant') }}{% endif %}"


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and what stands in it between an instruction and its input."""

    template: str
    input_mark: str = "\n"


CHAT_TEMPLATES = {
    "chat": ChatTemplate(
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'system' %}{{ '<|system|>' + message.content }}"
        "{% elif message.role == 'user' %}{{ '<|user|>' + message.content }}"
        "{% elif message.role == 'assistant' %}{{ '<|assistant|>' }}" + ANSWER + UNKNOWN + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "alpaca": ChatTemplate(
        "{{ bos_token }}{% if messages[0].role != 'system' %}"
        "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}"
        "{% endif %}{% for message in messages %}"
        "{% if message.role == 'system' %}{{ message.content }}"
        "{% elif message.role == 'user' %}{{ '\n\n### Instruction:\n' + message.content }}"
        "{% elif message.role == 'assistant' %}{{ '\n\n### Response:\n' }}" + ANSWER + UNKNOWN + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}",
        input_mark="\n\n### Input:\n",
    ),
    "phi3": ChatTemplate(
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'system' %}{{ '<|system|>\n' + message.content + '\n\n' }}"
        "{% elif message.role == 'user' %}{{ '<|user|>\n' + message.content + '\n\n' }}"
        "{% elif message.role == 'assistant' %}{{ '<|assistant|>\n' }}" + ANSWER + UNKNOWN + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}


def get_chat_template(chat_template: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template that is asked for: one of ours, a file's, or, where none is named, the tokenizer's own, else `chat`.

    Raises:
        UserError: there is no such template, or no such file.
    """
    if chat_template in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[chat_template]
    if not chat_template:
        own = tokenizer.chat_template
        if isinstance(own, dict):  # several, for several uses
            own = own.get("default")
        return ChatTemplate(own) if isinstance(own, str) else CHAT_TEMPLATES["chat"]
    try:
        return ChatTemplate(Path(chat_template).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(
            f"--chat_template {chat_template}: pass {', '.join(CHAT_TEMPLATES)}, or a file with a Jinja template ({reason})."
        ) from error


def set_up_chat_template(tokenizer: PreTrainedTokenizerBase, style: ChatTemplate, max_length: int) -> int:
    """Give the tokenizer a template and the tokens that it spells, and one to pad with if it has none.

    Returns:
        How many tokens are new.

    Raises:
        UserError: it has no token that ends a text.
    """
    if not tokenizer.eos_token:
        raise UserError("the tokenizer of the model has no token that ends a text: the model could never stop.")
    known = len(tokenizer)
    special = [token for token in dict.fromkeys(CONTROL.findall(style.template)) if token not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"extra_special_tokens": special}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.chat_template = style.template
    tokenizer.model_max_length = max_length
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # what generates goes on where all prompts end
    return len(tokenizer) - known


@dataclass(frozen=True)
class EncodedConversations(Dataset[Row]):
    """
    The ids of conversations, one after another.

    Attributes:
        conversations: those that are here.
        ids: of all of them.
        starts: where each begins among them, and where the last ends.
        learned: of each id, whether the assistant says it.
        num_too_long: how many conversations were left out because they are longer than the model can read.
        num_spelled: how many because they spell a token that only a template may.
    """

    conversations: list[Conversation]
    ids: np.ndarray
    starts: np.ndarray
    learned: np.ndarray
    num_too_long: int
    num_spelled: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that are read of each: all but the last, after which nothing comes."""
        return np.diff(self.starts) - 1

    @property
    def labels(self) -> np.ndarray:
        """What each id is as a label."""
        return np.where(self.learned, self.ids, IGNORE_INDEX)

    @property
    def num_bytes(self) -> int:
        """Length of all answers in UTF-8 bytes."""
        answers = (it["content"] for talk in self.conversations for it in talk.messages if it["role"] == "assistant")
        return sum(len(answer.encode()) for answer in answers)

    def __getitem__(self, draw: int) -> Row:
        """The conversation of an index that goes on counting from epoch to epoch; one below zero stands for an empty row."""
        if draw < 0:
            return {"input_ids": torch.zeros(1, dtype=torch.long), "shift_labels": torch.full((1,), IGNORE_INDEX)}
        start, end = self.starts[draw % len(self)], self.starts[draw % len(self) + 1]
        ids = torch.from_numpy(self.ids[start:end].astype(np.int64))
        is_learned = torch.from_numpy(self.learned[start + 1 : end])
        return {"input_ids": ids[:-1], "shift_labels": ids[1:].masked_fill(~is_learned, IGNORE_INDEX)}


def encode(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int, all_learned: bool = False
) -> EncodedConversations:
    """The ids of conversations by the tokenizer's template; what is longer than `max_length` tokens is left out.

    Args:
        all_learned: whether the prompts are learned too.

    Raises:
        UserError: the template cannot be filled in, marks nothing as the assistant's, or asks otherwise than it teaches.
    """
    spelled = re.compile("|".join(map(re.escape, special_tokens(tokenizer))))
    plain = [talk for talk in conversations if not any(spelled.search(message["content"]) for message in talk.messages)]
    kept, ids, learned = [], [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=bool)]
    for first in range(0, len(plain), 1000):
        part = plain[first : first + 1000]
        found = _filled_in(tokenizer, [list(talk.messages) for talk in part], return_assistant_tokens_mask=True)
        for talk, row, mask in zip(part, found["input_ids"], found["assistant_masks"], strict=True):
            if not any(mask):
                raise UserError(
                    "the chat template marks no part as the assistant's, so nothing would be learned: put what it says between "
                    "{% generation %} and {% endgeneration %}, or give another --chat_template."
                )
            if len(row) <= max_length:
                kept.append(talk)
                ids.append(np.array(row, dtype=np.int32))
                learned.append(np.array(mask, dtype=bool) | all_learned)
        _check_prompts(part, found, tokenizer)
    starts = np.cumsum([0, *map(len, ids[1:])])
    return EncodedConversations(
        kept, np.concatenate(ids), starts, np.concatenate(learned), len(plain) - len(kept), len(conversations) - len(plain)
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of all tokens that no text may spell, be they named in the tokenizer's config or not."""
    unnamed = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**unnamed, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))}


def digest(texts: dict[str, EncodedConversations]) -> str:
    """Tells apart what is trained on and what is held out, as ids and labels: the data, the template, and the tokenizer."""
    content = hashlib.sha256()
    for name, text in texts.items():
        for part in (text.ids, text.starts, text.learned):
            content.update(name.encode() + part.tobytes())
    return content.hexdigest()


def _filled_in(tokenizer: PreTrainedTokenizerBase, talks: list[list[Message]], **how: Any) -> Any:
    try:
        with quiet():  # what it says of templates without marks is said here
            return tokenizer.apply_chat_template(talks, return_dict=True, **how)
    except Exception as error:  # a template is a program: it can fail in any way
        raise UserError(f"the chat template cannot be filled in: {one_line(error)}.") from error


def _check_prompts(conversations: Sequence[Conversation], encoded: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that asks otherwise than it teaches: the model would go on from where no answer has ever begun."""
    asked = _filled_in(tokenizer, [talk.prompt for talk in conversations], add_generation_prompt=True)["input_ids"]
    for prompt, row, mask in zip(asked, encoded["input_ids"], encoded["assistant_masks"], strict=True):
        end = len(mask) - mask[::-1].index(1)
        begin = next((place for place in range(end, 0, -1) if not mask[place - 1]), 0)  # of the last answer
        if row[:begin] != prompt:
            taught, told = (tokenizer.decode(ids)[-40:] for ids in (row[:begin], prompt))
            raise UserError(
                f"the chat template asks otherwise than it teaches: answers follow {taught!r}, but it asks by {told!r}. "
                "Have add_generation_prompt write all that stands before {% generation %}, and end that with a special token "
                "or a line."
            )


def stop_token_id(encoded: EncodedConversations, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends every answer.

    Raises:
        UserError: there is none: what is learned would never stop.
    """
    bounds = pairwise(encoded.starts.tolist())
    ends = {int(encoded.ids[start:end][encoded.learned[start:end]][-1]) for start, end in bounds}
    if len(ends) > 1 or not ends <= set(special_tokens(tokenizer).values()):
        raise UserError(
            "the chat template has no special token at the end of what the assistant says, so the model could never stop: put "
            "one before {% endgeneration %}, such as {{ eos_token }}, or give another --chat_template."
        )
    return ends.pop()


def render_with_loss_mask(encoded: EncodedConversations, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as the model reads it, with what is learned in brackets."""
    start, end = encoded.starts[index], encoded.starts[index + 1]
    pairs = zip(encoded.learned[start:end].tolist(), encoded.ids[start:end].tolist(), strict=True)
    parts = []
    for is_learned, run in groupby(pairs, key=itemgetter(0)):
        text = tokenizer.decode([token_id for _, token_id in run])
        parts.append(f"[{text}]" if is_learned else str(text))
    return "".join(parts)


def collate(rows: Sequence[Row], pad_token_id: int) -> Row:
    """Rows of different lengths as one batch, padded on the right; no label stands on a pad."""
    fillers = {"input_ids": pad_token_id, "shift_labels": IGNORE_INDEX}
    return {name: pad_sequence([row[name] for row in rows], True, filler) for name, filler in fillers.items()}


def conversation_loader(encoded: EncodedConversations, tokenizer: PreTrainedTokenizerBase, **how: Any) -> DataLoader:
    """A loader of padded batches; `how` says which, in the DataLoader's terms."""
    return DataLoader(encoded, collate_fn=partial(collate, pad_token_id=tokenizer.pad_token_id), **how)
