"""Conversations for instruction tuning: reading the common formats and splitting, without shared prompts between the splits.

In every format a conversation becomes a list of messages for a chat template: `{"role": ..., "content": ...}`. Those that begin
with the same prompt stay in one split, and so do the built-in docstrings of a module.

Notable:
- Texts are used as they are: nothing is stripped, so code keeps its indentation.
- An answer with `"weight": 0` (OpenAI), `"train": false` (axolotl) or `"loss": false` (ms-swift) is read, but not learned.
- What a row says and no chat template here can express (tools, images, preferences) is an error. Other columns are reported.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from training.cli import option
from training.data.docstrings import DOCSTRINGS_PER_LIBRARY, read_docstrings
from training.data.encoding import Encoding, encoding_of
from training.data.files import JSON_LINES, Row, Rows, ending, get_text, number_rows, read_rows, refuse_empty
from training.data.sources import find_splits, hub_splits, is_dataset
from training.data.splits import SplitArguments, Splits, check_splits, read_given, sample_per_class, split_items
from training.errors import UserError

ENDINGS = (".json", *JSON_LINES, ".parquet")
ROLES = {"developer": "system", "human": "user", "gpt": "assistant", **{it: it for it in ("system", "user", "assistant")}}
FORMATS = {  # the columns that a row must have, and the one with a text that the first column is about
    ("messages",): "",
    ("conversations",): "",
    ("prompt", "completion"): "",
    ("instruction", "output"): "input",
    ("instruction", "response"): "context",
}
SYSTEM, WEIGHTS = ("system", "system_prompt"), ("weight", "train", "loss")
FIELDS = {"role", "content", "from", "value", *WEIGHTS}  # of a message
UNSUPPORTED = (  # columns, and fields of messages
    *("tools", "functions", "tool_calls", "function_call", "tool_call_id", "images", "image", "videos", "audio", "audios"),
    *("reasoning_content", "thinking", "train_detail", "chat_template_kwargs"),
)
INSTRUCTION = "Say what this does."
SENTENCE = re.compile(r"[A-Z][^\n]{15,200}?\.(?=\s|$)")
Message = dict[str, str]


@dataclass
class ConversationArguments(SplitArguments):
    dataset: list[str] = option(
        ["docs"],
        "`docs` (describe a function by its signature); .json, .jsonl and .parquet files, directories and globs of them; ids "
        "of datasets on the Hub. Columns: instruction, output and perhaps input, system, history (Alpaca); instruction, "
        "context, response (Dolly); prompt and completion; messages (OpenAI); or conversations (ShareGPT)",
    )
    validation_fraction: float = option(0.05, "fraction held out for validation if no data is given for it", minimum=0, below=1)
    test_fraction: float = option(0.1, "fraction held out for the test if no data is given for it; 0: none", minimum=0, below=1)


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation. The last one is the assistant's answer, all before it are the prompt."""

    messages: tuple[Message, ...]
    group: str  # a group stays in one split
    without_loss: tuple[int, ...] = ()  # indices of the answers that are not learned; never that of the last

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def prompt(self) -> list[Message]:
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Conversations:
    """The splits of a run."""

    splits: Splits[Conversation]  # the test split may be empty
    duplicates: int  # conversations dropped because the same one is in their split already
    leaked: dict[str, int]  # conversations dropped from each split because one in a later split begins with the same prompt
    unused: list[str]  # columns, and fields of messages, that were ignored


def check_conversations(arguments: ConversationArguments) -> None:
    """Validate the arguments and the first row of every file before any long work, without network access."""
    for path in check_splits(arguments, ENDINGS):
        if ending(path) not in ENDINGS:
            raise UserError(f"{path} is not a file of conversations: pass one that ends with {', '.join(ENDINGS)}.")
        for location, row in islice(read_rows(path, {}, encoding_of(arguments)), 1):
            _conversation(location, row, arguments.encoding_errors, "", set())


def read_conversations(arguments: ConversationArguments, input_mark: str) -> Conversations:
    """Read and split the conversations of a run; `input_mark` separates an instruction from its input.

    Raises:
        UserError: a source cannot be read; a row is incomplete or does not end with an answer; a split would be empty.
    """
    unused = set[str]()
    given = read_given(arguments, lambda source: _read_source(source, encoding_of(arguments), input_mark, unused))
    distinct = {name: list({repr(it): it for it in reversed(split)}.values())[::-1] for name, split in given.items()}
    splits, leaked = split_items(distinct, arguments, key=lambda it: _opening(it.messages, it.without_loss))
    return Conversations(splits, sum(len(given[name]) - len(distinct[name]) for name in given), leaked, sorted(unused))


def _opening(messages: tuple[Message, ...], without_loss: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    """Role and content, without the white space around it, of the messages before the first answer that is learned."""
    end = next(index for index, it in enumerate(messages) if it["role"] == "assistant" and index not in without_loss)
    return tuple((message["role"], message["content"].strip()) for message in messages[:end])


def _read_source(source: str, encoding: Encoding, input_mark: str, unused: set[str]) -> Splits[Conversation]:
    errors = encoding.errors
    if source == "docs":
        rows = ((module, _conversation("docs", row, errors, input_mark, unused)) for module, row in _docstrings())
        return {"train": [replace(conversation, group=module) for module, conversation in rows]}
    if is_dataset(source):
        splits = {name: number_rows(rows, f"{source}: {name} row") for name, rows in hub_splits(source).items()}
    else:
        files = find_splits(source, ENDINGS)
        splits = {name: (row for path in paths for row in read_rows(path, {}, encoding)) for name, paths in files.items()}
    return {name: _conversations(rows, errors, input_mark, unused) for name, rows in splits.items()}


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


def _conversations(rows: Rows, errors: str, input_mark: str, unused: set[str]) -> list[Conversation]:
    conversations, empty = [], []
    for location, row in rows:
        conversations.append(_conversation(location, row, errors, input_mark, unused))
        if not conversations[-1].answer.strip():
            empty.append(location)
    refuse_empty(empty, "answer")
    return conversations


def _conversation(location: str, row: Row, errors: str, input_mark: str, unused: set[str]) -> Conversation:
    """The conversation of a row in any of the formats, up to the last answer that is learned; only that one may be empty."""
    columns: tuple[str, ...] = next((columns for columns in FORMATS if all(row.get(key) is not None for key in columns)), ())
    _check_row(location, row, columns)
    used = {*columns, *SYSTEM}
    items = [{"role": "system", "content": row[key]} for key in SYSTEM if key in _given(row)]
    if all(isinstance(row[key], list) for key in columns):
        items += (item for key in columns for item in row[key])
        unused |= {f"{key} of messages" for item in items if isinstance(item, dict) for key in _given(item) - FIELDS}
    elif len(columns) == 1:
        raise UserError(f"{location} has no list of messages but {row[columns[0]]!r:.80}.")
    else:
        names = [columns[0], FORMATS[columns], columns[1]]
        *question, answer = (get_text({name: row.get(name)}, name, location, errors) for name in names)
        items += [*_history(row.get("history"), location), *_exchange(input_mark.join(filter(str.strip, question)), answer)]
        used |= {FORMATS[columns], "history"}
    unused |= _given(row) - used
    messages = tuple(_message(item, location, errors) for item in items)
    _check_messages(messages, location)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [index for index in answers if _is_learned(items[index], location)]
    if not learned:
        raise UserError(f"{location} has no answer to learn, as all have a weight of 0: leave this row out.")
    without_loss = tuple(index for index in answers if index < learned[-1] and index not in learned)
    return Conversation(messages[: learned[-1] + 1], repr(_opening(messages, without_loss)), without_loss)


def _check_row(location: str, row: Row, columns: tuple[str, ...]) -> None:
    """Refuse a row in none of the formats, and one with a judgement of its answer."""
    if {"chosen", "rejected"} <= row.keys() and (not columns or isinstance(row["chosen"], dict)):
        raise UserError(f"{location} has a chosen and a rejected answer (DPO): train on such pairs with TRL's DPOTrainer.")
    if not columns:
        expected = ", or ".join(" and ".join(columns) for columns in FORMATS)
        existing = ", ".join(f"{key} (empty)" if row[key] is None else str(key) for key in row) or "nothing"
        raise UserError(f"{location} must have {expected}; it has {existing:.200}.")
    judgements = ("true", "false", "0", "1", "0.0", "1.0")
    if key := next((key for key in ("label", "kto_tag") if str(row.get(key)).lower() in judgements), None):
        raise UserError(
            f"{location} has the {key} {row[key]} (KTO), but every answer would be learned as a good one: train with TRL's "
            "KTOTrainer, or keep the good rows only, without this column."
        )
    # "train" and "loss" may also be the names of columns of numbers.
    if any(row.get(key) is False for key in WEIGHTS) or not _is_learned({"weight": row.get("weight")}, location):
        raise UserError(f"{location} has a weight of 0, or train or loss false: leave this row out.")
    _check_supported(row, location)


def _check_supported(item: Row, location: str) -> None:
    if key := next((key for key in UNSUPPORTED if key in _given(item)), None):
        raise UserError(f"{location} has {key!r}, which is not supported: leave out the row, or {key!r}.")


def _given(item: Row) -> set[str]:
    """The keys of all values that are not empty."""
    return {key for key, value in item.items() if value not in (None, "", [], {})}


def _is_learned(message: Row, location: str) -> bool:
    for key in WEIGHTS:
        if (weight := message.get(key)) not in (None, 0, 1):
            raise UserError(f"{location} has a {key} of {weight!r:.80}: it must be 0 or 1.")
    return all(message.get(key) != 0 for key in WEIGHTS)


def _check_messages(messages: tuple[Message, ...], location: str) -> None:
    roles = [message["role"] for message in messages]
    if not roles or roles[-1] != "assistant":
        problem = f"ends with a message of the {roles[-1]}" if roles else "has no messages"
        raise UserError(f"{location} {problem}: the last message must be the assistant's, on which the loss is computed.")
    if "system" in roles[1:] or roles[: 1 + (roles[0] == "system")][-1] != "user":
        given = ", ".join(roles)
        raise UserError(f"{location} has messages of {given:.100}: the first must be the user's, or the system's before it.")
    if empty := next((message["role"] for message in messages[:-1] if not message["content"].strip()), None):
        raise UserError(f"{location} has an empty message of the {empty}: leave this row out.")


def _message(message: Any, location: str, errors: str) -> Message:
    """A message with the fields `role` and `content` or, as in ShareGPT, `from` and `value`."""
    item = message if isinstance(message, dict) else {}
    _check_supported(item, location)
    role, content = (next((key for key in keys if key in item), "") for keys in (("role", "from"), ("content", "value")))
    if not (role and content):
        raise UserError(f'{location} has a message that is not like {{"role": "user", "content": "..."}} but {message!r:.80}.')
    if item[role] not in [*ROLES]:
        raise UserError(f"{location} has a message of {item[role]!r:.80}: the roles are {', '.join(ROLES)}.")
    parts = item[content] if isinstance(item[content], list) else [{"type": "text", "text": item[content]}]
    if other := [part for part in parts if not isinstance(part, dict) or part.get("type") != "text"]:
        raise UserError(f"{location} has content that is not text but {other[0]!r:.80}: leave this row out.")
    texts = (get_text({content: part.get("text")}, content, location, errors) for part in parts)
    return {"role": ROLES[item[role]], "content": "".join(texts)}


def _history(pairs: Any, location: str) -> list[Row]:
    """Earlier exchanges, each a list of a question and its answer, as messages; part of the prompt, and so not learned."""
    if not isinstance(pairs, list | None) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs or []):
        raise UserError(f"{location} has no list of pairs under 'history' but {pairs!r:.80}.")
    return [message for question, answer in pairs or [] for message in _exchange(question, answer, weight=0)]


def _exchange(prompt: Any, answer: Any, weight: int = 1) -> list[Row]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer, "weight": weight}]
