import ast
import csv
import inspect
import itertools
import json
import os
import random
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data import corpora, docstrings
from training.data.corpora import CorpusArguments, check_corpora, read_corpora, split_documents
from training.errors import UserError


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def read(sources, **options):
    return read_corpora(CorpusArguments(sources, **options))


def check(sources, **options):
    check_corpora(CorpusArguments(sources, **options))


def texts(source, **options):
    (corpus,) = read([str(source)], **options)
    return corpus.documents["text"][:]


def documents(texts):
    return Dataset.from_dict({"text": list(texts)})


# Reading


def test_files_and_folders_in_order(tmp_path):
    one = write(tmp_path, "one.txt", "first")
    write(tmp_path, "folder/b.md", "second")
    write(tmp_path, "folder/deep/a.TXT", "third")
    write(tmp_path, "folder/rows.jsonl", '{"text": "fourth"}\n\n{"text": "fifth", "id": 5}\n')
    write(tmp_path, "folder/rows.csv", "id,text\n6,sixth\n")
    write(tmp_path, "folder/rows.tsv", 'id\ttext\n8\tthe "eighth"\n')
    pq.write_table(pa.table({"text": ["seventh"]}), tmp_path / "folder" / "rows.parquet")
    write(tmp_path, "folder/blank.txt", " \n\u3000")
    write(tmp_path, "folder/picture.png", "not read")
    first, second = read([one, str(tmp_path / "folder")])
    assert (first.name, first.documents["text"][:], first.copies) == ("one.txt", ["first"], 0)
    assert second.documents["text"][:] == ["second", "third", "sixth", "fourth", "fifth", "seventh", 'the "eighth"']
    assert (second.name, second.copies, second.near_copies) == ("folder", 0, 0)


def test_copies_are_dropped_across_sources_and_counted(tmp_path):
    one = write(tmp_path, "a/rows.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ["x", "y", "x", " ", "x"]))
    two = write(tmp_path, "b/rows.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ["z", "y", "z ", "z"]))
    first, second = read([one, two])
    assert (first.documents["text"][:], first.copies) == (["x", "y"], 2)
    assert (second.documents["text"][:], second.copies) == (["z", "z "], 2)
    assert (first.name, second.name) == (one, two)  # their short names are the same


def test_a_source_without_a_text_of_its_own_is_named(tmp_path):
    one, two = write(tmp_path, "one.txt", "same"), write(tmp_path, "two.txt", "same")
    with pytest.raises(UserError, match=r"two\.txt: every text in it stands in a source before it: leave it out"):
        read([one, two])
    with pytest.raises(UserError, match=r"blank\.txt: there is no text in it"):
        read([write(tmp_path, "blank.txt", "\n\n")])


@pytest.mark.parametrize("pattern", ["*.txt", "[ab].*", "**/?.txt"])
def test_globs(tmp_path, pattern):
    for name in "ba":
        write(tmp_path, f"{name}.txt", name)
    assert texts(tmp_path / pattern) == ["a", "b"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    assert texts(write(tmp_path, "a[1].txt", "text")) == ["text"]


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path, "a.txt", "old")
    os.utime(path, (1e9, 1e9))
    assert texts(path) == ["old"]
    write(tmp_path, "a.txt", "new")
    os.utime(path, (1e9, 1e9))  # as an archive or a copy may leave it
    assert texts(path) == ["new"]


def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl", '{"text": "once", "other": "twice"}')
    assert texts(path) == ["once"]
    monkeypatch.setattr(corpora, "read_file", None)
    assert texts(path) == ["once"]
    with pytest.raises(TypeError):  # but what another column holds is not known yet
        texts(path, text_column="other")


def test_line_ends_and_accents_are_kept(tmp_path):
    text = "ä\r\n𝄞\n"
    assert texts(write(tmp_path, "a.txt", text)) == [text]
    assert texts(write(tmp_path, "a.jsonl", json.dumps({"text": text}))) == [text]
    assert texts(write(tmp_path, "bom.txt", b"\xef\xbb\xbfa")) == ["a"]
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["text", "n"], [text, 1], ['a, "b"\n', 2], ["NA", 3], ["x" * 200_000, 4]])
    assert texts(tmp_path / "a.csv") == [text, 'a, "b"\n', "NA", "x" * 200_000]


def test_max_documents_and_nothing_of_the_rest(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "b"}\nnot JSON')
    assert texts(path, max_documents=2) == ["a", "b"]
    with pytest.raises(UserError, match="line 3"):
        texts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n{"txt": "b", "id": 1}',
            r"a\.jsonl: line 2 has no 'text'; it has txt, id. Set --text_column",
        ),
        ("a.jsonl", '{"text": "a"}\n{"text": 1}', r"line 2 has no text under 'text' but int"),
        ("a.jsonl", '\n["text"]', r'line 2 is no object but list: it must look like \{"text": "..."\}'),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"', r"line 2 is not JSON \(Expecting ',' delimiter"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}',
            r"a\.jsonl: not UTF-8 text \(byte 13 of line 2 is 0xe9\): save it as",
        ),
        ("a.jsonl", '{"text": "\\ud83d"}', "line 1 holds half of a character"),
        ("a.csv", "id,txt\n1,a\n", r"a\.csv has no 'text'; it has id, txt"),
        ("a.csv", "", r"a\.csv has no 'text'; it has nothing"),
        ("a.csv", "id,text\n1,a\n2,b, c\n", r"line 3 has 3 columns, the header has 2: put texts that hold commas into quotes"),
        ("a.csv", 'id,text\n1,"a\nb\n', r"a\.csv: line 3 is not CSV \(unexpected end of data"),
        ("a.tsv", "id\ttext\n1\ta\tb\n", r"line 2 has 3 columns, the header has 2: put texts that hold tabs into a \.csv file"),
        ("a.csv", b"PK\x03\x04\0\0", "this is a binary file"),
        ("a.parquet", "id,text\n", r"a\.parquet: this is not a Parquet file"),
        ("a.txt", b"one\ncaf\xe9", r"a\.txt: not UTF-8 text \(byte 3 of line 2 is 0xe9\)"),
        ("a.txt", b"\x7fELF\0\0\1", r"a\.txt: this is a binary file"),
        ("a.log", b"t\0", r"a\.log: this is a binary file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as caught:
        read([path])
    assert "\n" not in str(caught.value)
    if "line 2" not in message and "line 3" not in message:
        with pytest.raises(UserError, match=message):
            check([path])


def test_parquet_columns_rows_and_nulls(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", None, "b"], pa.large_string()), "n": [1, 2, 3]}), path)
    assert texts(path) == ["a", "b"]
    with pytest.raises(UserError, match=r"a\.parquet has no 'txt'; it has text, n"):
        check([str(path)], text_column="txt")
    with pytest.raises(UserError, match="row 1 has no text under 'n' but int"):
        check([str(path)], text_column="n")
    wrong = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"ab\xff"))
    pq.write_table(pa.table({"text": wrong}), path)
    with pytest.raises(UserError, match="byte 1 of row 2 is 0xff"):
        texts(path)
    assert texts(path, encoding_errors="replace") == ["a", "b�"]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"a\.parquet: this is not a Parquet file, or a damaged one"):
        texts(path)


def test_errors_replace(tmp_path):
    assert texts(write(tmp_path, "a.txt", b"caf\xe9"), encoding_errors="replace") == ["caf�"]
    assert texts(write(tmp_path, "a.jsonl", b'{"text": "caf\xe9 \\ud83d"}'), encoding_errors="replace") == ["caf� �"]
    check([str(tmp_path / "a.txt")], encoding_errors="replace")


def test_a_look_at_the_beginning_is_enough_for_a_check(tmp_path):
    path = tmp_path / "a.txt"
    with open(path, "wb") as file:
        file.write("ü".encode() * 2**19 + b"\n" + "x€\n".encode() * 2**20)
        file.truncate(2**31 - 2)
    check([str(path)])  # the zeros at its end would take it gigabytes to see
    with open(path, "wb") as file:
        file.truncate(2**31)
    with pytest.raises(UserError, match="a document can have 2 GB at most: cut the file"):
        check([str(path)])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", r"missing\.txt: no such file or folder"),
        ("missing.jsonl", r"missing\.jsonl: no such file or folder"),
        ("./missing", "missing: no such file or folder"),
        ("a/b/c", "a/b/c: no such file or folder"),
        ("missing/*.txt", r"missing/\*\.txt: no file here matches this pattern"),
    ],
)
def test_missing_sources_are_named(source, message):
    with pytest.raises(UserError, match=message):
        check([source])


def test_nothing_to_read_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no \.txt, \.md, \.jsonl, \.parquet, \.csv, \.tsv file in this folder"):
        check([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="--dataset is empty"):
        check([])


# The Hub


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_id_without_network_is_named(streaming):
    with pytest.raises(UserError, match="somebody/something: no such file or folder here, and the Hub did not give it"):
        read(["somebody/something"], streaming=streaming)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset in the place of one on the Hub; what is asked of it is noted."""
    asked = []
    rows = "".join(json.dumps({"text": f"text {number}", "number": number}) + "\n" for number in range(100))
    path = write(tmp_path, "hub/rows.jsonl", rows)

    def load(real):
        def loaded(name, configuration, **options):
            asked.append((name, configuration))
            return real("json", data_files=path, **options)

        return loaded

    monkeypatch.setattr(corpora, "load_dataset", load(datasets.load_dataset))
    monkeypatch.setattr(corpora, "load_dataset_builder", load(datasets.load_dataset_builder))
    return asked


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_datasets(hub, streaming):
    (corpus,) = read(["owner/name:part"], streaming=streaming, max_documents=3)
    assert hub == [("owner/name", "part")]
    assert (corpus.name, corpus.documents.features) == ("owner/name:part", docstrings.TEXT)
    assert corpus.documents["text"][:] == ["text 0", "text 1", "text 2"]
    assert len(texts("owner/name", streaming=streaming)) == 100
    assert hub[-1] == ("owner/name", None)
    with pytest.raises(UserError, match="owner/name has no 'txt'; it has text, number"):
        texts("owner/name", streaming=streaming, text_column="txt")
    with pytest.raises(UserError, match="no text"):
        texts("owner/name", streaming=streaming, text_column="number")


def test_streaming_reads_no_more_than_asked_for(monkeypatch):
    read = []

    def rows():
        for number in range(1000):
            read.append(number)
            yield {"text": f"text {number}"}

    class Builder:
        hash = "commit"

        def as_streaming_dataset(self, split):
            return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(corpora, "load_dataset_builder", lambda name, configuration: Builder())
    for _ in range(2):  # the second time from the cache
        assert texts("owner/streamed", streaming=True, max_documents=5) == [f"text {number}" for number in range(5)]
        assert len(read) <= 6
    Builder.hash = "new commit"
    texts("owner/streamed", streaming=True, max_documents=5)
    assert len(read) > 6


# Near copies


def numbered(numbers):
    return " ".join(f"w{number}" for number in numbers)


def test_near_copies_by_hand(tmp_path):
    """100 words have 96 runs of five. One word changed in the middle changes 5 of them: 91 / 101 = 0.901 are common."""
    first = numbered(range(100))
    near = numbered([*range(50), 1000, *range(51, 100)])
    far = numbered(range(50, 150))  # 46 / 146 = 0.315
    path = write(tmp_path, "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in [first, far, near, "short", first]))
    other = write(tmp_path, "b.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ["short  ", near + " end"]))
    pytest.importorskip("datasketch")
    assert corpora._jaccard(corpora._shingles(first), corpora._shingles(near)) == 91 / 101
    assert corpora._jaccard(corpora._shingles(first), corpora._shingles(far)) == 46 / 146
    for _ in range(2):  # the second time from the cache
        one, two = read([path, other, write(tmp_path, "c.txt", "else")], near_duplicates=0.9)[:2]
        assert (one.documents["text"][:], one.copies, one.near_copies) == ([first, far, "short"], 1, 1)
        assert (two.documents["text"][:], two.copies, two.near_copies) == ([near + " end"], 0, 1)  # 91 / 102 < 0.9
    one = read([path], near_duplicates=0.91)[0]
    assert (one.near_copies, len(one.documents)) == (0, 4)
    one = read([path], near_duplicates=0.3)[0]
    assert (one.near_copies, len(one.documents)) == (2, 2)


def test_near_copies_as_comparing_all_pairs_finds_them():
    pytest.importorskip("datasketch")
    draw = random.Random(0)
    originals = [[draw.randrange(500) for _ in range(60)] for _ in range(30)]
    noisy = [[word if draw.random() < 0.98 else 999 for word in draw.choice(originals)] for _ in range(70)]
    corpus = [numbered(words) for words in originals + noisy]
    kept: list[int] = []
    for index, text in enumerate(corpus):
        sets = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (corpus[k].split() for k in kept)]
        words = text.split()
        mine = {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
        if all(len(mine & other) / len(mine | other) < 0.7 for other in sets):
            kept.append(index)
    assert 30 < len(kept) < 100
    assert list(corpora._first_of_each_kind(documents(corpus), 0.7)) == kept


def test_near_copies_without_the_package_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match="--near_duplicates needs another package: pip install datasketch"):
        read([write(tmp_path, "a.txt", "a")], near_duplicates=0.8)


# Splitting


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 200),
    validation=st.floats(0.01, 0.6),
    test=st.one_of(st.just(0.0), st.floats(0.01, 0.39)),
    seed=st.integers(0, 2**32 - 1),
)
def test_nothing_is_lost_and_nothing_comes_twice(count, validation, test, seed):
    whole = [f"document {index} " + "of words to cut the end off between two " * 10 for index in range(count)]
    by_document = count * validation >= 1 and (not test or count * test >= 1)
    if by_document and round(count * validation) + round(count * test) >= count:
        with pytest.raises(UserError, match="leave none to train on"):
            split_documents(documents(whole), validation, test, seed)
        return
    splits = split_documents(documents(whole), validation, test, seed)
    sides = [side["text"][:] for side in (splits.train, splits.validation, splits.test)]
    if by_document:
        assert [len(side) for side in sides[1:]] == [round(count * validation), round(count * test)]
        assert sorted(itertools.chain(*sides)) == sorted(whole)
        assert all(side == sorted(side, key=whole.index) for side in sides)
    else:
        assert ["".join(parts) for parts in itertools.zip_longest(*sides, fillvalue="")] == whole
    assert all(sides[:2])
    assert bool(sides[2]) == bool(test)


def test_splits_depend_on_the_seed_and_not_on_the_order():
    whole = [f"document {index}" for index in range(200)]
    splits = split_documents(documents(whole), 0.1, 0.05, seed=3)
    shuffled = random.Random(0).sample(whole, k=200)
    again = split_documents(documents(shuffled), 0.1, 0.05, seed=3)
    for side in ("train", "validation", "test"):
        assert set(getattr(splits, side)["text"]) == set(getattr(again, side)["text"])
    other = split_documents(documents(whole), 0.1, 0.05, seed=4)
    assert len(set(splits.validation["text"]) & set(other.validation["text"])) < 10  # 2 are expected
    assert set(splits.test["text"]) == set(split_documents(documents(whole), 0.3, 0.05, seed=3).test["text"])
    assert set(splits.validation["text"]) == set(split_documents(documents(whole), 0.1, 0.0, seed=3).validation["text"])


def test_a_growing_corpus_moves_few_documents():
    whole = [f"document {index}" for index in range(1000)]
    before = set(split_documents(documents(whole[:900]), 0.1, 0.0, seed=0).validation["text"])
    after = set(split_documents(documents(whole), 0.1, 0.0, seed=0).validation["text"])
    assert len(before - after) < 20  # drawn afresh, 81 of the 90 would leave


def test_a_single_book_gives_its_end():
    splits = split_documents(documents(["x" * 70 + "y" * 20 + "z" * 10]), 0.2, 0.1, seed=0)
    assert [side["text"][:] for side in (splits.train, splits.validation, splits.test)] == [["x" * 70], ["y" * 20], ["z" * 10]]
    splits = split_documents(documents(["one two three\nfour five six"]), 0.4, 0.0, seed=0)
    assert (splits.train["text"][:], splits.validation["text"][:]) == (["one two three\n"], ["four five six"])
    assert (len(splits.test), splits.test.features) == (0, splits.train.features)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=300), test=st.sampled_from([0.0, 0.2]))
def test_the_ends_of_any_book_make_the_whole(text, test):
    try:
        splits = split_documents(documents([text]), 0.3, test, seed=0)
    except UserError:
        return
    sides = [side["text"][0] for side in (splits.train, splits.validation, splits.test) if len(side)]
    assert "".join(sides) == text or (len(sides) == 2 and test)


@pytest.mark.parametrize(
    ("count", "validation", "test", "message"),
    [
        (1, 0.01, 0.0, "--validation_fraction 0.01 of this corpus is no text at all: give more text"),
        (1, 0.5, 0.01, "--test_fraction 0.01 of this corpus is no text at all: give more text"),
        (1, 0.99, 0.0, "leave no text of this corpus to train on"),
        (3, 0.5, 0.45, "of 3 documents leave none to train on: lower one of them"),
        (3, 0.0, 0.1, "make the first positive"),
        (3, 0.5, 0.5, "both together less than 1"),
    ],
)
def test_a_side_that_would_be_empty_is_refused(count, validation, test, message):
    with pytest.raises(UserError, match=message):
        split_documents(documents(f"ab{index}"[:2] + " " * index for index in range(count)), validation, test, seed=0)


# The embedded corpus


def test_docstrings_are_those_that_python_sees():
    source = inspect.getsource(json)
    entries = dict(docstrings._entries(ast.parse(source)))
    assert entries[""] == inspect.getdoc(json)
    (loads,) = [text for signature, text in entries.items() if signature.startswith("def loads(")]
    assert loads == inspect.getdoc(json.loads)


def test_signatures():
    tree = ast.parse(
        'class A(B, metaclass=C):\n    "a"\n    async def f(self, x: int = 1, *, y) -> str:\n        "f"\n'
        "def g(" + ", ".join(f"argument_{index}" for index in range(40)) + '):\n    "g"\n'
    )
    assert list(docstrings._entries(tree)) == [
        ("class A(B)", "a"),
        ("def f(self, x: int=1, *, y) -> str", "f"),
        ("def g(...)", "g"),
    ]


def test_documents_of_docs_leave_out_copies():
    entries = [
        {"library": "l", "module": "a", "signature": "", "docstring": "About a."},
        {"library": "l", "module": "a", "signature": "def f()", "docstring": "Does\nthis."},
        {"library": "l", "module": "b", "signature": "def f()", "docstring": "Does\nthis."},
        {"library": "l", "module": "c", "signature": "class C", "docstring": "Is that."},
    ]
    assert [row["text"] for row in docstrings._docs_documents(entries)] == [
        "module a\n\nAbout a.\n\ndef f():\n    Does\n    this.\n",
        "module c\n\nclass C:\n    Is that.\n",
    ]


def test_docs_are_a_source_like_any_other(tmp_path, monkeypatch):
    for name in "abc":
        write(tmp_path, f"library/{name}.py", f'"""About {name}."""\ndef f():\n    "Does this."\n')
    own = write(tmp_path, "own.txt", "module c\n\nAbout c.\n")
    monkeypatch.setattr(docstrings, "DOCS_LIBRARIES", ())
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "library")})
    first, docs = read([own, "docs"])
    assert docs.documents["text"][:] == ["module a\n\nAbout a.\n\ndef f():\n    Does this.\n", "module b\n\nAbout b.\n"]
    assert (docs.name, docs.copies, docs.documents.features) == ("docs", 1, first.documents.features)
    assert len(read(["docs"], max_documents=1)[0].documents) == 1


def test_nothing_of_the_harvest_is_run(tmp_path):
    path = tmp_path / "trap.py"
    path.write_text(f'"""A docstring."""\nopen({str(tmp_path / "ran")!r}, "w")\n')
    rows = list(docstrings._docstrings([("library", str(path), "trap.py", 0)]))
    assert rows == [{"library": "library", "module": "library.trap", "signature": "", "docstring": "A docstring."}]
    assert not (tmp_path / "ran").exists()
