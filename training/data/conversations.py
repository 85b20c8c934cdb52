"""Conversations to learn from: read in the shapes that are in use, split, and free of copies between the splits.

Notable:
- Whatever its shape, a conversation is a list of messages, as chat templates take it: `{"role": ..., "content": ...}`.
- The last message is the assistant's: it is what is asked for, and what stands before it is the prompt.
- Conversations that begin with the same prompt stay in one split; of the embedded docstrings, a module does.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from training.cli import option
from training.data.docstrings import read_docstrings
from training.data.files import Row, find_files, get_text, read_rows, refuse_empty
from training.data.sources import hub_splits, is_hub_id
from training.data.splits import (
    SplitArguments,
    check_splits,
    drawn,
    drop_leakage,
    fill_missing_splits,
    read_given,
    refuse_empty_splits,
)
from training.errors import UserError

ENDINGS = (".json", ".jsonl", ".parquet")
ROLES = ("system", "user", "assistant")
SHAPES = (("messages",), ("prompt", "completion"), ("instruction", "output"))
DOCSTRINGS = 1000  # of each library
ASKED = "Say what this does."
SENTENCE = re.compile(r"[A-Z][^\n]{15,200}?\.(?=\s|$)")
Message = dict[str, str]
AsMessages = Callable[[str, Row], tuple[Message, ...]]  # the messages of a row, given its place too


@dataclass
class ConversationArguments(SplitArguments):
    """What can be asked of the conversations of a run."""

    dataset: list[str] = option(
        ["docs"],
        "`docs` (say what this signature does); .json, .jsonl and .parquet files, folders and globs of them; ids of datasets "
        "on the Hub. Rows hold instruction, output and perhaps input (Alpaca), or prompt and completion, or messages.",
    )
    validation_fraction: float = option(0.05, "Share that is held out to choose by, if none is given.")
    test_fraction: float = option(0.1, "Share that is held out for the end, if none is given; 0 for none.")


@dataclass(frozen=True)
class Conversation:
    """Messages, and what stays in one split."""

    messages: tuple[Message, ...]
    group: str

    @property
    def prompt(self) -> list[Message]:
        """All but the last answer."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Conversations:
    """The splits of a run.

    Attributes:
        splits: train, validation and test; the last may be empty.
        duplicates: how many were dropped because the same conversation stood before in their split.
        copies: how many were dropped from a split because a conversation of a later one begins with the same prompt.
    """

    splits: dict[str, list[Conversation]]
    duplicates: int
    copies: dict[str, int]


def check_conversations(arguments: ConversationArguments) -> None:
    """Refuse nonsense, and sources that cannot be read, before any long work; looks at no network."""
    for path in check_splits(arguments, ENDINGS):
        if path.suffix.lower() not in ENDINGS:
            raise UserError(f"{path} is no file of conversations: give one that ends with {', '.join(ENDINGS)}.")
        for place, row in read_rows(path, {}, arguments.encoding_errors):
            _messages(place, row, arguments.encoding_errors, input_mark="")
            break


def read_conversations(arguments: ConversationArguments, seed: int, input_mark: str) -> Conversations:
    """The conversations of a run, as it was told.

    Args:
        input_mark: what stands between an instruction and its input.

    Raises:
        UserError: a source cannot be read; a row lacks something or does not end with an answer; a split would be empty.
    """
    as_messages = partial(_messages, errors=arguments.encoding_errors, input_mark=input_mark)
    given = read_given(arguments, lambda source: _read_source(source, arguments.encoding_errors, as_messages))
    before = sum(map(len, given.values()))
    given = {name: list({_key(it.messages): it for it in reversed(split)}.values())[::-1] for name, split in given.items()}
    duplicates = before - sum(map(len, given.values()))
    splits, copies = drop_leakage(
        fill_missing_splits(given, arguments, seed, lambda conversation: conversation.group),
        lambda conversation: _opening(conversation.messages),
    )
    refuse_empty_splits(splits, arguments)
    return Conversations(splits, duplicates, copies)


def _key(messages: Iterable[Message]) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in messages)


def _opening(messages: Iterable[Message]) -> tuple[tuple[str, str], ...]:
    """What stands before the first answer."""
    return _key(takewhile(lambda message: message["role"] != "assistant", messages))


# Sources ------------------------------------------------------------------------------------------------------------------


def _read_source(source: str, errors: str, as_messages: AsMessages) -> dict[str, list[Conversation]]:
    """The conversations of a source by their split; all of them are `train` where it has none."""
    if source == "docs":
        return {"train": [Conversation(as_messages("docs", row), module) for module, row in _docstrings()]}
    rows: dict[str, Iterator[tuple[str, Row]]]
    if is_hub_id(source):
        rows = {
            name: ((f"{source}: {name} row {number}", row) for number, row in enumerate(split, start=1))
            for name, split in hub_splits(source).items()
        }
    else:
        rows = {"train": (row for path in find_files(source, ENDINGS) for row in read_rows(path, {}, errors))}
    return {name: _conversations(split, as_messages) for name, split in rows.items()}


def _docstrings() -> Iterator[tuple[str, Row]]:
    """A signature and the first sentence of its docstring, in Alpaca's shape, with the module that they are from: a thousand of
    each library; what has several is left out."""
    sentences, places = defaultdict(set), {}
    for entry in read_docstrings():
        sentence = SENTENCE.match(" ".join(entry["docstring"].partition("\n\n")[0].split()))
        if sentence and entry["signature"] and not entry["signature"].endswith("(...)"):
            sentences[entry["signature"]].add(sentence[0])
            places[entry["signature"]] = entry
    signatures = [signature for signature, found in sentences.items() if len(found) == 1]
    kept = defaultdict[str, list[int]](list)
    for index in drawn(signatures, 0, "docstrings"):
        of_library = kept[places[signatures[index]]["library"]]
        if len(of_library) < DOCSTRINGS:
            of_library.append(index)
    for index in sorted(index for indices in kept.values() for index in indices):
        signature = signatures[index]
        (sentence_,) = sentences[signature]
        yield places[signature]["module"], {"instruction": ASKED, "input": signature, "output": sentence_}


def _conversations(rows: Iterable[tuple[str, Row]], as_messages: AsMessages) -> list[Conversation]:
    conversations, empty = [], []
    for place, row in rows:
        messages = as_messages(place, row)
        if messages[-1]["content"]:
            conversations.append(Conversation(messages, repr(_opening(messages))))
        else:
            empty.append(place)
    refuse_empty(empty, "answer")
    return conversations


def _messages(place: str, row: Row, errors: str, input_mark: str) -> tuple[Message, ...]:
    """The messages of a row, whatever its shape; only the last may be empty."""
    shape = next((shape for shape in SHAPES if all(row.get(key) is not None for key in shape)), None)
    if shape is None:
        wanted = ", or ".join(" and ".join(shape) for shape in SHAPES)
        there = ", ".join(f"{key} (empty)" if row[key] is None else str(key) for key in row) or "nothing"
        raise UserError(f"{place} must have {wanted}; it has {there:.200}.")
    if shape == ("instruction", "output"):
        texts = {"input": None, **row}
        instruction, given, output = (get_text(texts, key, place, errors).strip() for key in ("instruction", "input", "output"))
        messages = _exchange(input_mark.join(filter(None, (instruction, given))), output)
    elif all(isinstance(row[key], list) for key in shape):
        messages = tuple(_message(message, place, errors) for key in shape for message in row[key])
    elif shape == ("messages",):
        raise UserError(f"{place} has no list of messages but {row['messages']!r:.80}.")
    else:
        prompt, answer = (get_text(row, key, place, errors).strip() for key in ("prompt", "completion"))
        messages = _exchange(prompt, answer)
    roles = [message["role"] for message in messages]
    if not roles or roles[-1] != "assistant":
        end = f"ends with the {roles[-1]}" if roles else "has no message"
        raise UserError(f"{place} {end}: the last message must be the assistant's, it is what is learned.")
    if "system" in roles[1:] or roles[: 1 + (roles[0] == "system")][-1] != "user":
        raise UserError(f"{place} has messages of {', '.join(roles):.100}: the first must be the user's, but for a system's.")
    if empty := next((message["role"] for message in messages[:-1] if not message["content"]), None):
        raise UserError(f"{place} has an empty message of the {empty}: leave this row out.")
    return messages


def _message(message: Any, place: str, errors: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise UserError(f'{place} has a message that is not like {{"role": "user", "content": "..."}} but {message!r:.80}.')
    if message["role"] not in ROLES:
        raise UserError(f"{place} has a message of {message['role']!r:.80}: the roles are {', '.join(ROLES)}.")
    if message.get("tool_calls"):
        raise UserError(f"{place} has a message that calls tools, which is not taught here: leave this row out.")
    return {"role": message["role"], "content": get_text(message, "content", place, errors).strip()}


def _exchange(question: str, answer: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
