import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

import training.data.conversations
import training.data.sources
from tests.training.conftest import write_rows
from training.data.conversations import Conversation, ConversationArguments, check_conversations, read_conversations
from training.data.splits import SPLITS
from training.errors import UserError

ALPACA = [
    {"instruction": f"Double {n}.", "input": "" if n % 2 else "In words.", "output": f"It is {2 * n}."} for n in range(40)
]


def as_messages(row: dict) -> list[dict]:
    question = "\n".join(filter(None, (row["instruction"], row["input"])))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def as_prompt(row: dict) -> dict:
    question, answer = as_messages(row)
    return {"prompt": question["content"], "completion": answer["content"]}


def as_two_lists(row: dict) -> dict:
    question, answer = as_messages(row)
    return {"prompt": [question], "completion": [answer]}


def read(*sources: str, mark: str = "\n", **changes):
    arguments = ConversationArguments(dataset=list(sources), **changes)
    check_conversations(arguments)
    return read_conversations(arguments, mark)


def questions(split: list[Conversation]) -> list[str]:
    return [conversation.prompt[-1]["content"] for conversation in split]


def as_parts(row: dict) -> dict:
    """As OpenAI's API writes them."""
    question, answer = as_messages(row)
    parts = [{"type": "text", "text": part} for part in question["content"].partition(" ")]
    return {"messages": [{**question, "content": parts}, {**answer, "content": [{"type": "text", "text": row["output"]}]}]}


def as_sharegpt(row: dict) -> dict:
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[it["role"]], "value": it["content"]} for it in as_messages(row)]}


def as_dolly(row: dict) -> dict:
    return {"instruction": row["instruction"], "context": row["input"], "response": row["output"]}


ROWS = [dict, as_prompt, as_two_lists, as_parts, as_sharegpt, as_dolly, lambda row: {"messages": as_messages(row)}]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("as_row", ROWS)
def test_every_format_of_row_and_file_gives_the_same_conversations(tmp_path, ending, as_row):
    found = read(write_rows(tmp_path / f"rows{ending}", [as_row(row) for row in ALPACA]))
    expected = read(write_rows(tmp_path / "other.json", ALPACA))
    assert found == expected
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 34, "validation": 2, "test": 4}
    conversations = [conversation for split in found.splits.values() for conversation in split]
    assert sorted(conversation.answer for conversation in conversations) == sorted(row["output"] for row in ALPACA)


def test_the_input_follows_a_mark(tmp_path):
    found = read(write_rows(tmp_path / "rows.json", ALPACA), mark="\n\n### Input:\n")
    everything = [question for split in found.splits.values() for question in questions(split)]
    assert "Double 2.\n\n### Input:\nIn words." in everything
    assert "Double 3." in everything


def test_real_instructions(real_data):
    found = read(str(real_data / "instructions" / "instruction-data.json"))
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 935, "validation": 55, "test": 110}


def test_duplicates_and_prompts_of_later_splits_are_dropped_and_counted(tmp_path):
    other_answer = {**ALPACA[0], "output": "Zero."}
    train = write_rows(tmp_path / "train.json", [*ALPACA, ALPACA[3], ALPACA[3], other_answer])
    test = write_rows(tmp_path / "test.json", [ALPACA[0], ALPACA[0], ALPACA[5]])
    found = read(train, test_dataset=[test])
    assert found.duplicates == 3
    assert found.leaked["train"] + found.leaked["validation"] == 3  # 0 with both answers, and 5
    assert questions(found.splits["test"]) == ["Double 0.\nIn words.", "Double 5."]
    left = {question for name in SPLITS[:2] for question in questions(found.splits[name])}
    assert not left & set(questions(found.splits["test"]))


def test_a_prompt_with_all_its_answers_stays_in_one_split(tmp_path):
    rows = [{**row, "output": f"{row['output']} {n}"} for row in ALPACA for n in range(3)]
    found = read(write_rows(tmp_path / "rows.json", rows))
    splits = [set(questions(split)) for split in found.splits.values()]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 40
    assert found.leaked == dict.fromkeys(SPLITS, 0)


def test_conversations_with_one_prompt_stay_in_one_split(tmp_path):
    """A training conversation that continues a held-out prompt would reveal its answer."""
    rows = [
        {"messages": [{"role": ("user", "assistant")[turn % 2], "content": f"{number} {turn}"} for turn in range(turns)]}
        for number in range(40)
        for turns in (2, 4)
    ]
    made = read(write_rows(tmp_path / "rows.json", rows)).splits.values()
    splits = [{conversation.prompt[0]["content"] for conversation in split} for split in made]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 40
    test = write_rows(tmp_path / "test.json", rows[:1])
    found = read(write_rows(tmp_path / "train.json", rows[1:]), test_dataset=[test])
    assert sum(found.leaked.values()) == 1


def test_rows_with_the_same_history_are_split(tmp_path):
    found = read(write_rows(tmp_path / "rows.json", [{**row, "history": [["Hello", "Hi."]]} for row in ALPACA]))
    assert [len(found.splits[name]) for name in SPLITS] == [34, 2, 4]


def test_a_given_split_that_is_empty_is_rejected(tmp_path):
    train, test = write_rows(tmp_path / "train.json", ALPACA), write_rows(tmp_path / "test.json", [])
    with pytest.raises(UserError, match="test.json has no examples"):
        read(train, test_dataset=[test])


def test_a_missing_file_is_not_looked_up_on_the_hub():
    with pytest.raises(UserError, match="customers/private.json: no such file or directory"):
        check_conversations(ConversationArguments(dataset=["customers/private.json"]))


def test_invalid_parquet(tmp_path):
    """Text that is not UTF-8 inside a list, and two columns of one name, which pyarrow reports late."""
    contents = pa.array([b"\xff", b"b"]).view(pa.string())
    said = pa.StructArray.from_arrays([pa.array(["user", "assistant"]), contents], ["role", "content"])
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays([0, 2], said)}), tmp_path / "bad.parquet")
    twice = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["instruction", "output", "output"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    for name in ("bad", "twice"):
        with pytest.raises(UserError, match=f"{name}.parquet"):
            check_conversations(ConversationArguments(dataset=[str(tmp_path / f"{name}.parquet")]))


def test_only_files_of_conversations_are_read(tmp_path):
    (tmp_path / "talks.txt").write_text("Hello?\n\nHello.")
    with pytest.raises(UserError, match="talks.txt is not a file of conversations: pass one that ends with .json"):
        check_conversations(ConversationArguments(dataset=[str(tmp_path / "talks.txt")]))


def read_one(path: Path, row: dict) -> tuple[Conversation, list[str]]:
    """The conversation of a row, and what is ignored in it."""
    found = read(write_rows(path, [row, *ALPACA]))
    everything = [conversation for split in found.splits.values() for conversation in split]
    (one,) = [it for it in everything if not re.match("Double", it.messages[0]["content"])]
    return one, found.unused


def contents(one: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in one.messages]


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "instruction": " f():\n", "output": "    y\n", "history": [["Hello", "Hi."]]},
        {"system_prompt": "Be brief.", "conversations": [
            {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."},
            {"from": "human", "value": " f():\n"}, {"from": "gpt", "value": "    y\n"}]},
        {"messages": [
            {"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello", "weight": None},
            {"role": "assistant", "content": "Hi.", "tool_calls": []}, {"role": "user", "content": " f():\n"},
            {"role": "assistant", "content": "    y\n"}]},
    ],
)  # fmt: skip
def test_system_history_and_texts_that_are_not_stripped(tmp_path, row):
    one, unused = read_one(tmp_path / "rows.jsonl", row)
    expected = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", " f():\n"), ("assistant", "    y\n")]
    assert contents(one) == expected
    assert (one.answer, len(one.prompt), one.answers, unused) == ("    y\n", 4, [2, 4], [])
    assert one.without_loss == ((2,) if "history" in row else ())  # which is part of the prompt


@pytest.mark.parametrize(("field", "bad", "good"), [("weight", 0, 1), ("train", False, None), ("loss", False, True)])
def test_answers_without_loss(tmp_path, field, bad, good):
    """They are read, but neither learned nor the answer of the test."""
    says = [
        ("user", "1 + 1?"),
        ("assistant", "3"),
        ("user", "Try again."),
        ("assistant", "2"),
        ("user", "No."),
        ("assistant", "5"),
    ]
    messages = [{"role": role, "content": content} for role, content in says]
    for index, value in ((1, bad), (3, good), (5, bad)):
        messages[index][field] = value
    one, _ = read_one(tmp_path / "rows.jsonl", {"messages": messages})
    assert contents(one) == says[:4]
    assert one.without_loss == (1,)


def test_columns_without_a_meaning_here_are_listed(tmp_path):
    row = {"id": 7, "label": "sport", "tools": [], "notes": None, **conversation(("user", "Hello"), ("assistant", "Hi."))}
    row["messages"][0]["name"] = "Ann"
    assert read_one(tmp_path / "rows.jsonl", row)[1] == ["id", "label", "name of messages"]
    preferred = {**ALPACA[0], "instruction": "Hello", "chosen": "a", "rejected": "b"}  # as in the book: `output` is the answer
    assert read_one(tmp_path / "rows.jsonl", preferred)[1] == ["chosen", "rejected"]


def test_a_hub_dataset_has_its_own_splits(monkeypatch):
    parts = {"train": ALPACA[:30], "test": ALPACA[30:], "extra": ALPACA[:3]}
    monkeypatch.setattr(
        training.data.sources, "load_dataset", lambda *_: DatasetDict({k: Dataset.from_list(v) for k, v in parts.items()})
    )
    found = read("somebody/instructions")
    assert len(found.splits["test"]) == 10
    assert len(found.splits["train"]) + len(found.splits["validation"]) == 30


def test_docstrings(monkeypatch):
    rows = [
        {"library": library, "module": f"{library}.m{n // 10}", "signature": f"def f{n}({library})",
         "docstring": f"Return the number {n} of\n    {library}. And more.\n\nArgs: none."}
        for library in ("numpy", "python") for n in range(100)
    ]  # fmt: skip
    rows += [{**rows[0], "docstring": "Return another thing altogether."}]  # a second sentence: ambiguous
    rows += [{**rows[0], "signature": "", "docstring": "A module of many functions."}]
    rows += [{**rows[0], "signature": "def g(...)"}, {**rows[0], "signature": "def h()", "docstring": "too short."}]
    monkeypatch.setattr(training.data.conversations, "read_docstrings", lambda: Dataset.from_list(rows))
    monkeypatch.setattr(training.data.conversations, "DOCSTRINGS_PER_LIBRARY", 50)
    found = read("docs", validation_fraction=0.2, test_fraction=0.2)
    conversations = [conversation for split in found.splits.values() for conversation in split]
    assert len(conversations) == 100
    for one in conversations:
        asked, number, library = re.fullmatch(r"(.*)\ndef f(\d+)\((\w+)\)", one.prompt[0]["content"]).groups()
        assert asked == "Say what this does."
        assert one.answer == f"Return the number {number} of {library}."
        assert one.group == f"{library}.m{int(number) // 10}"
    assert not any("f0(numpy)" in conversation.prompt[0]["content"] for conversation in conversations)
    modules = [{conversation.group for conversation in split} for split in found.splits.values()]
    assert sum(map(len, modules)) == len(set.union(*modules))


def conversation(*messages: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "row 6 must have messages, or conversations, or prompt and completion, or .*; it has question"),
        ({"instruction": "a"}, "row 6 must have messages, or"),
        ({"instruction": "a", "output": " "}, "row 6 has an empty answer: leave this row out"),
        ({"instruction": "", "output": "b"}, "row 6 has an empty message of the user"),
        ({"instruction": 1, "output": "b"}, "row 6 has no text under 'instruction' but int"),
        ({"prompt": "a", "completion": ["b"]}, "row 6 has no text under 'completion' but list"),
        ({"messages": "hello"}, "row 6 has no list of messages but 'hello'"),
        ({"messages": []}, "row 6 has no messages"),
        ({"messages": ["hello"]}, "row 6 has a message that is not like"),
        (conversation(("user", "a")), "row 6 ends with a message of the user: the last message must be the assistant's"),
        (conversation(("assistant", "a")), "row 6 has messages of assistant: the first must be the user's"),
        (conversation(("user", "a"), ("system", "b"), ("assistant", "c")), "row 6 has messages of user, system, assistant"),
        (
            conversation(("user", "a"), ("tool", "b")),
            "row 6 has a message of 'tool': the roles are developer, human, gpt, system",
        ),
        ({"prompt": "a", "completion": "b", "label": False}, "row 6 has the label False .KTO.*: train with TRL's KTOTrainer"),
        ({"prompt": "a", "completion": "b", "label": "False"}, "row 6 has the label False .KTO"),
        ({"prompt": "a", "completion": "b", "kto_tag": 1.0}, "row 6 has the kto_tag 1.0 .KTO"),
        (
            {**conversation(("user", "a")), **{it: {"role": "assistant", "content": it} for it in ("chosen", "rejected")}},
            "row 6 has a chosen and a rejected answer .DPO",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "row 6 has a chosen and a rejected answer .DPO.*with TRL's DPOTrainer",
        ),
        ({**ALPACA[0], "weight": 0}, "row 6 has a weight of 0, or train or loss false: leave this row out"),
        ({**ALPACA[0], "train": False}, "row 6 has a weight of 0, or train or loss false"),
        ({**ALPACA[0], "tools": [{"name": "add"}]}, "row 6 has 'tools', which is not supported: leave out the row, or 'tools'"),
        ({**ALPACA[0], "history": ["Hello"]}, "row 6 has no list of pairs under 'history' but"),
        (
            {"messages": [*as_messages(ALPACA[0])[:1], {"role": "assistant", "content": "b", "weight": 0}]},
            "has no answer to learn",
        ),
        ({"messages": [{"role": role, "content": "a", "weight": 0.5} for role in ("user", "assistant")]}, "weight of 0.5"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]},
            "row 6 has 'tool_calls', which is not",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "row 6 has content that is not text but {'type'",
        ),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "row 6 has a message of .'user'.: the roles are"),
        ({"instruction": "\ud800", "output": "b"}, "row 6 has half of a character"),
        ("hello", "row 6 is not an object but str"),
    ],
)
def test_errors_in_rows_are_one_line(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as error:
        read(write_rows(tmp_path / "rows.json", [*ALPACA[:5], row, *ALPACA[6:]]))
    assert "\n" not in str(error.value)


def test_empty_answers_are_counted(tmp_path):
    rows = [{**row, "output": "" if n in (4, 9, 30) else row["output"]} for n, row in enumerate(ALPACA)]
    with pytest.raises(UserError, match="row 5 has an empty answer, and so have 2 more rows: leave them out"):
        read(write_rows(tmp_path / "rows.json", rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "rows.json is not JSON .*: it must be a list of objects, or one object per line"),
        ("{}", "rows.json: line 1 must have messages"),
        ("[]", "has no examples"),
        ("[" * 100_000, "rows.json is not JSON"),
    ],
)
def test_a_file_that_is_not_a_list(tmp_path, content, message):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / "rows.json"))


def test_too_few_conversations_or_prompts(tmp_path):
    many_answers = [{**ALPACA[0], "output": str(number)} for number in range(30)]
    for rows in (ALPACA[:3], many_answers):
        with pytest.raises(
            UserError, match="the validation split is empty .*, since .* the same text or prompt stay in one split"
        ):
            read(write_rows(tmp_path / "rows.json", rows))
