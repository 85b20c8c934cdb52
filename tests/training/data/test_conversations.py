import re

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


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("as_row", [dict, as_prompt, as_two_lists, lambda row: {"messages": as_messages(row)}])
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


def test_several_turns(tmp_path):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello\n"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye."},
    ]
    rows = [{"messages": [*conversation[:-1], {**conversation[-1], "content": f"Bye {n}."}]} for n in range(30)]
    rows[1:] = [{"messages": as_messages(row)} for row in ALPACA]
    found = read(write_rows(tmp_path / "rows.jsonl", rows))
    (long,) = [one for split in found.splits.values() for one in split if len(one.messages) == 5]
    assert [message["content"] for message in long.messages] == ["Be brief.", "Hello", "Hi.", "Bye", "Bye 0."]
    assert long.answer == "Bye 0."
    assert len(long.prompt) == 4


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
        ({"question": "a"}, "row 6 must have messages, or prompt and completion, or instruction and output; it has question"),
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
        (conversation(("user", "a"), ("tool", "b")), "row 6 has a message of 'tool': the roles are system, user, assistant"),
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


def test_too_few_conversations(tmp_path):
    with pytest.raises(UserError, match="the validation split is empty"):
        read(write_rows(tmp_path / "rows.json", ALPACA[:3]))
