"""Conversations for instruction tuning: reading the common formats and splitting, without shared prompts between the splits.

In every format a conversation becomes a list of messages for a chat template: `{"role": ..., "content": ...}`. Those that begin
with the same prompt stay in one split, and so do the built-in docstrings of a module.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

from training.cli import option
from training.data.docstrings import DOCSTRINGS_PER_LIBRARY, read_docstrings
from training.data.files import (
    JSON_LINES,
    Encoding,
    Row,
    encoding_of,
    ending,
    get_text,
    number_rows,
    read_rows,
    refuse_empty,
)
from training.data.sources import find_splits, hub_splits, is_dataset
from training.data.splits import SplitArguments, check_splits, read_given, sample_per_class, split_items
from training.errors import UserError

ENDINGS = (".json", *JSON_LINES, ".parquet")
ROLES = ("system", "user", "assistant")
FORMATS = (("messages",), ("prompt", "completion"), ("instruction", "output"))
INSTRUCTION = "Say what this does."
SENTENCE = re.compile(r"[A-Z][^\n]{15,200}?\.(?=\s|$)")
Message = dict[str, str]


@dataclass
class ConversationArguments(SplitArguments):
    """Arguments about the conversations of a run."""

    dataset: list[str] = option(
        ["docs"],
        "`docs` (describe a function by its signature); .json, .jsonl and .parquet files, directories and globs of them; ids "
        "of datasets on the Hub. Columns: instruction, output and perhaps input (Alpaca); prompt and completion; or messages",
    )
    validation_fraction: float = option(0.05, "fraction held out for validation if no data is given for it", minimum=0, below=1)
    test_fraction: float = option(0.1, "fraction held out for the test if no data is given for it; 0: none", minimum=0, below=1)


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation. The last one is the assistant's answer, all before it are the prompt."""

    messages: tuple[Message, ...]
    group: str  # a group stays in one split

    @property
    def prompt(self) -> list[Message]:
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Conversations:
    """The splits of a run."""

    splits: dict[str, list[Conversation]]  # train, validation and test; the last may be empty
    duplicates: int  # conversations dropped because the same one is in their split already
    leaked: dict[str, int]  # conversations dropped from each split because one in a later split begins with the same prompt


def check_conversations(arguments: ConversationArguments) -> None:
    """Validate the arguments and the first row of every file before any long work, without network access."""
    for path in check_splits(arguments, ENDINGS):
        if ending(path) not in ENDINGS:
            raise UserError(f"{path} is not a file of conversations: pass one that ends with {', '.join(ENDINGS)}.")
        for location, row in islice(read_rows(path, {}, encoding_of(arguments)), 1):
            _messages(location, row, arguments.encoding_errors, input_mark="")


def read_conversations(arguments: ConversationArguments, input_mark: str) -> Conversations:
    """Read and split the conversations of a run; `input_mark` separates an instruction from its input.

    Raises:
        UserError: a source cannot be read; a row is incomplete or does not end with an answer; a split would be empty.
    """
    given = read_given(arguments, lambda source: _read_source(source, encoding_of(arguments), input_mark))
    distinct = {name: list({repr(it.messages): it for it in reversed(split)}.values())[::-1] for name, split in given.items()}
    splits, leaked = split_items(distinct, arguments, key=lambda conversation: _opening(conversation.messages))
    return Conversations(splits, sum(len(given[name]) - len(distinct[name]) for name in given), leaked)


def _opening(messages: Iterable[Message]) -> tuple[tuple[str, str], ...]:
    """Role and content of the messages before the first answer."""
    opening = takewhile(lambda message: message["role"] != "assistant", messages)
    return tuple((message["role"], message["content"]) for message in opening)


def _read_source(source: str, encoding: Encoding, input_mark: str) -> dict[str, list[Conversation]]:
    errors = encoding.errors
    if source == "docs":
        return {"train": [Conversation(_messages("docs", row, errors, input_mark), module) for module, row in _docstrings()]}
    if is_dataset(source):
        splits = {name: number_rows(rows, f"{source}: {name} row") for name, rows in hub_splits(source).items()}
    else:
        files = find_splits(source, ENDINGS)
        splits = {name: (row for path in paths for row in read_rows(path, {}, encoding)) for name, paths in files.items()}
    return {name: _conversations(rows, errors, input_mark) for name, rows in splits.items()}


def _docstrings() -> Iterator[tuple[str, Row]]:
    """Yield (module, row in Alpaca's format) for each signature whose docstrings all begin with the same sentence."""
    sentences, entries = defaultdict(set), {}
    for entry in read_docstrings():
        sentence = SENTENCE.match(" ".join(entry["docstring"].partition("\n\n")[0].split()))
        if sentence and entry["signature"] and not entry["signature"].endswith("(...)"):
            sentences[entry["signature"]].add(sentence[0])
            entries[entry["signature"]] = entry
    signatures = [signature for signature, found in sentences.items() if len(found) == 1]
    libraries = [entries[signature]["library"] for signature in signatures]
    for index in sample_per_class(signatures, libraries, DOCSTRINGS_PER_LIBRARY, 0, "docstrings"):
        signature = signatures[index]
        (output,) = sentences[signature]
        yield entries[signature]["module"], {"instruction": INSTRUCTION, "input": signature, "output": output}


def _conversations(rows: Iterable[tuple[str, Row]], errors: str, input_mark: str) -> list[Conversation]:
    conversations, empty = [], []
    for location, row in rows:
        messages = _messages(location, row, errors, input_mark)
        if messages[-1]["content"]:
            conversations.append(Conversation(messages, repr(_opening(messages))))
        else:
            empty.append(location)
    refuse_empty(empty, "answer")
    return conversations


def _messages(location: str, row: Row, errors: str, input_mark: str) -> tuple[Message, ...]:
    """The messages of a row in any of the formats; only the last may be empty."""
    columns = next((columns for columns in FORMATS if all(row.get(key) is not None for key in columns)), None)
    if columns is None:
        expected = ", or ".join(" and ".join(columns) for columns in FORMATS)
        existing = ", ".join(f"{key} (empty)" if row[key] is None else str(key) for key in row) or "nothing"
        raise UserError(f"{location} must have {expected}; it has {existing:.200}.")
    if columns == ("instruction", "output"):
        texts = {"input": None, **row}
        instruction, given, answer = (
            get_text(texts, key, location, errors).strip() for key in ("instruction", "input", "output")
        )
        messages = _exchange(input_mark.join(filter(None, (instruction, given))), answer)
    elif all(isinstance(row[key], list) for key in columns):
        messages = tuple(_message(message, location, errors) for key in columns for message in row[key])
    elif columns == ("messages",):
        raise UserError(f"{location} has no list of messages but {row['messages']!r:.80}.")
    else:
        messages = _exchange(*(get_text(row, key, location, errors).strip() for key in columns))
    _check_messages(messages, location)
    return messages


def _check_messages(messages: tuple[Message, ...], location: str) -> None:
    roles = [message["role"] for message in messages]
    if not roles or roles[-1] != "assistant":
        problem = f"ends with a message of the {roles[-1]}" if roles else "has no messages"
        raise UserError(f"{location} {problem}: the last message must be the assistant's, on which the loss is computed.")
    if "system" in roles[1:] or roles[: 1 + (roles[0] == "system")][-1] != "user":
        raise UserError(
            f"{location} has messages of {', '.join(roles):.100}: the first must be the user's, or the system's before it."
        )
    if empty := next((message["role"] for message in messages[:-1] if not message["content"]), None):
        raise UserError(f"{location} has an empty message of the {empty}: leave this row out.")


def _message(message: Any, location: str, errors: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise UserError(f'{location} has a message that is not like {{"role": "user", "content": "..."}} but {message!r:.80}.')
    if message["role"] not in ROLES:
        raise UserError(f"{location} has a message of {message['role']!r:.80}: the roles are {', '.join(ROLES)}.")
    if message.get("tool_calls"):
        raise UserError(f"{location} has a message with tool calls, which are not supported: leave this row out.")
    return {"role": message["role"], "content": get_text(message, "content", location, errors).strip()}


def _exchange(prompt: str, answer: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
