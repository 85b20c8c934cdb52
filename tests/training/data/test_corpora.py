import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data import corpora, docstrings, sources
from training.data.corpora import CorpusArguments, check_corpora, read_corpora, split_documents
from training.errors import UserError


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def zipped(*contents, names="01"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in zip(names, contents, strict=False):
            archive.writestr(name, content)
    return file.getvalue()


def encrypted(archive):
    """The archive with the flag of an encrypted file in both of its headers."""
    return re.sub(rb"(PK\x03\x04..|PK\x01\x02.{4}).", lambda match: match[1] + b"\1", archive, flags=re.DOTALL)


def read(sources, **options):
    return read_corpora(CorpusArguments(sources, **options))


def check(sources, **options):
    check_corpora(CorpusArguments(sources, **options))


def texts(source, **options):
    (corpus,) = read([str(source)], **options)
    return corpus.documents["text"][:]


def split(texts, validation, test, seed=0):
    arguments = CorpusArguments(validation_fraction=validation, test_fraction=test, split_seed=seed)
    return split_documents(Dataset.from_dict({"text": list(texts)}), arguments)


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
    assert (first.name, first.documents["text"][:], first.duplicates) == ("one.txt", ["first"], 0)
    assert second.documents["text"][:] == ["second", "third", "sixth", "fourth", "fifth", "seventh", 'the "eighth"']
    assert (second.name, second.duplicates, second.near_duplicates) == ("folder", 0, 0)


def test_duplicates_are_dropped_across_sources_and_counted(tmp_path):
    one = write(tmp_path, "a/rows.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ["x", "y", "x", " ", "x"]))
    two = write(tmp_path, "b/rows.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ["z", "y", "z ", "z"]))
    first, second = read([one, two])
    assert (first.documents["text"][:], first.duplicates) == (["x", "y"], 2)
    assert (second.documents["text"][:], second.duplicates) == (["z", "z "], 2)
    assert (first.name, second.name) == (one, two)  # their short names are the same


def test_a_source_without_new_texts_is_rejected(tmp_path):
    one, two = write(tmp_path, "one.txt", "same"), write(tmp_path, "two.txt", "same")
    with pytest.raises(UserError, match=r"two\.txt: all of its texts are in earlier sources: leave it out"):
        read([one, two])
    with pytest.raises(UserError, match=r"blank\.txt: it has no text"):
        read([write(tmp_path, "blank.txt", "\n\n")])


@pytest.mark.parametrize("pattern", ["*.txt", "[ab].*", "**/?.txt"])
def test_globs(tmp_path, pattern):
    for name in "ba":
        write(tmp_path, f"{name}.txt", name)
    assert texts(tmp_path / pattern) == ["a", "b"]
    assert texts(write(tmp_path, "c[1].txt", "no pattern")) == ["no pattern"]


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path, "a.txt", "old")
    os.utime(path, (1e9, 1e9))
    assert texts(path) == ["old"]
    write(tmp_path, "a.txt", "new")
    os.utime(path, (1e9, 1e9))  # as archives and copies may set it
    assert texts(path) == ["new"]


def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl", '{"text": "once", "other": "twice"}')
    assert texts(path) == ["once"]
    monkeypatch.setattr(corpora, "read_file", None)
    assert texts(path) == ["once"]
    with pytest.raises(TypeError):  # another column has to be read
        texts(path, text_column="other")


def test_line_ends_and_accents_are_kept(tmp_path):
    text = "ä\r\n𝄞\n"
    assert texts(write(tmp_path, "a.txt", text)) == [text]
    assert texts(write(tmp_path, "a.jsonl", json.dumps({"text": text}))) == [text]
    assert texts(write(tmp_path, "bom.txt", b"\xef\xbb\xbfa")) == ["a"]
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["text", "n"], [text, 1], ['a, "b"\n', 2], ["NA", 3], ["x" * 200_000, 4]])
    assert texts(tmp_path / "a.csv") == [text, 'a, "b"\n', "NA", "x" * 200_000]


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    ".zip": zipped,
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one ü"),
        ("a.jsonl", '{"text": "one ü"}\n{"text": "two"}\n'),
        ("a.ndjson", '{"text": "one ü"}\n{"text": "two"}\n'),
        ("a.json", '{"text": "one ü"}\n{"text": "two"}\n'),
        ("a.JSON", '[{"text": "one ü"},\n{"text": "two"}]'),
        ("a.csv", "text,n\none ü,1\ntwo,2\n"),
        ("a.csv", "n;text\n1;one ü\n2;two\n"),
        ("a.csv", "n\ttext\n1\tone ü\n2\ttwo\n"),
        ("a.tsv", "text\tn\none ü\t1\ntwo\t2\n"),
    ],
)
def test_every_format_compressed_and_in_other_encodings(tmp_path, name, content, compression):
    expected = ["one ü"] if name == "a.txt" else ["one ü", "two"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "latin-1"):
        options = {"encoding": "latin-1"} if encoding == "latin-1" else {}  # the others have a mark
        path = write(tmp_path, f"{encoding}/{name}{compression}", COMPRESS[compression](content.encode(encoding)))
        assert texts(path, **options) == texts(Path(path).parent, **options) == expected


@pytest.mark.parametrize("name", ["export.zip", "v1.2.zip", "a.txt.zip"])
def test_an_archive_has_the_format_of_its_file(tmp_path, name):
    names = ["data/", "data/a.csv", "__MACOSX/data/._a.csv"]  # as macOS makes them
    path = write(tmp_path, name, zipped(b"", b"text,n\none,1\ntwo,2\n", b"\0", names=names))
    assert texts(path) == texts(tmp_path) == ["one", "two"]


def test_columns_in_objects(tmp_path):
    rows = [{"meta": {"text": text, "id": 3}} for text in ("one", "two")]
    assert texts(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))), text_column="meta.text") == ["one", "two"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", text_column="meta.text") == ["one", "two"]
    for file in ("a.jsonl", "a.parquet"):
        with pytest.raises(UserError, match=r"has no 'meta.txt'; it has meta. Set --text_column"):
            texts(tmp_path / file, text_column="meta.txt")


def test_linked_and_hidden_directories(tmp_path):
    write(tmp_path, "elsewhere/a.txt", "linked")
    for name in (".git/a.txt", ".a.txt", "__MACOSX/a.txt", "b/.ipynb_checkpoints/a.txt"):
        write(tmp_path / "data", name, "no data")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "data")
    assert texts(tmp_path / "data") == ["linked"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"a damaged \.gz file"),
        ("a.txt.xz", b"text", r"a damaged \.xz file"),
        ("a.txt.bz2", b"text", "Invalid data stream"),
        ("a.txt.zst", b"text", "ZSTD decompress failed"),
        ("a.txt.zip", b"text", r"a damaged \.zip file"),
        ("two.zip", zipped(b"1", b"2"), "contains 2 files: unpack it"),
        ("a.txt.zip", encrypted(zipped(b"1")), "cannot be read .*encrypted"),
        ("a.txt", "ü".encode("utf-16")[:3], "not utf-16 text .*: set --encoding"),
        ("a.txt", "üä".encode("utf-16-le"), "not UTF-8 text|text in another encoding: set --encoding"),
    ],
)
def test_damaged_and_undecodable_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        check([write(tmp_path, name, content)])


def test_an_unknown_encoding():
    with pytest.raises(UserError, match="--encoding rot13.* such as utf-8, latin-1"):
        check(["docs"], encoding="rot13")


def test_nothing_is_read_after_max_documents(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "b"}\nnot JSON')
    assert texts(path, max_documents=2) == ["a", "b"]
    with pytest.raises(UserError, match="line 3"):
        texts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"txt": "b", "id": 1}', r"line 2 has no 'text'; it has txt, id. Set --text_column"),
        ("a.jsonl", '{"text": "a"}\n{"text": 1}', r"line 2 has no text under 'text' but int"),
        ("a.jsonl", '\n["text"]', r'line 2 is not an object but list: it must look like \{"text": "..."\}'),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"', r"line 2 is not JSON \(Expecting ',' delimiter"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', r"not UTF-8 text \(byte 13 of line 2 is 0xe9\): set --encoding"),
        ("a.jsonl", '{"text": "\\ud83d"}', "line 1 has half of a character"),
        ("a.csv", "id,txt\n1,a\n", r"a\.csv has no 'text'; it has id, txt"),
        ("a.csv", "id;txt\n1;a\n", r"a\.csv, separated by semicolons, has no 'text'; it has id, txt"),
        ("a.csv", "id\ttext\n1\ta\tb\n", r"line 2 has 3 columns, the header has 2: put texts with tabs in quotes"),
        ("a.csv", "", r"a\.csv has no 'text'; it has nothing"),
        ("a.csv", "id,text\n1,a\n2,b, c\n", r"line 3 has 3 columns, the header has 2: put texts with commas in quotes"),
        ("a.csv", 'id,text\n1,"a\nb\n', r"a\.csv: line 3 is not CSV \(unexpected end of data"),
        ("a.tsv", "id\ttext\n1\ta\tb\n", r"line 2 has 3 columns, the header has 2: put texts with tabs in a \.csv file"),
        ("a.csv", b"PK\x03\x04\0\0", "a binary file"),
        ("a.parquet", "id,text\n", r"a\.parquet: not a Parquet file"),
        ("a.txt", b"one\ncaf\xe9", r"a\.txt: not UTF-8 text \(byte 3 of line 2 is 0xe9\)"),
        ("a.txt", b"\x7fELF\0\0\1", r"a\.txt: a binary file"),
        ("a.log", b"t\0", r"a\.log: a binary file"),
    ],
)
def test_errors_in_files_are_one_line(tmp_path, name, content, message):
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
    for name, compress in COMPRESS.items():
        assert texts(write(tmp_path, f"b.parquet{name}", compress(path.read_bytes()))) == ["a", "b"]
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
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file, or a corrupt one"):
        texts(path)


def test_errors_replace(tmp_path):
    assert texts(write(tmp_path, "a.txt", b"caf\xe9"), encoding_errors="replace") == ["caf�"]
    assert texts(write(tmp_path, "a.jsonl", b'{"text": "caf\xe9 \\ud83d"}'), encoding_errors="replace") == ["caf� �"]
    check([str(tmp_path / "a.txt")], encoding_errors="replace")


def test_only_the_beginning_of_a_file_is_checked(tmp_path):
    path = tmp_path / "a.txt"
    with open(path, "wb") as file:
        file.write("ü".encode() * 2**19 + b"\n" + "x€\n".encode() * 2**20)
        file.truncate(2**31 - 2)
    check([str(path)])  # it does not read the gigabytes of zeros at its end
    with open(path, "wb") as file:
        file.truncate(2**31)
    with pytest.raises(UserError, match="a document may have at most 2 GB: split the file"):
        check([str(path)])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", r"missing\.txt: no such file or directory"),
        ("missing.jsonl", r"missing\.jsonl: no such file or directory"),
        ("./" + "long" * 99, "File name too long"),
        ("./missing", "missing: no such file or directory"),
        ("a/b/c", "a/b/c: no such file or directory"),
        ("missing/*.txt", r"missing/\*\.txt: no file matches this pattern"),
    ],
)
def test_missing_sources_are_reported(source, message):
    with pytest.raises(UserError, match=message):
        check([source])


def test_sources_without_files_are_rejected(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"this directory has no \.txt, \.md, \.jsonl, \.ndjson, \.json, \.parquet, \.csv, \.tsv file"
    ):
        check([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="--dataset is empty"):
        check([])


# The Hub


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub_without_network_is_reported(streaming):
    with pytest.raises(
        UserError, match="somebody/something: no such local file or directory, and loading it from the Hub failed"
    ):
        read(["somebody/something"], streaming=streaming)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local dataset instead of one on the Hub; yields the list of what was requested."""
    requests = []
    rows = "".join(json.dumps({"text": f"text {number}", "number": number}) + "\n" for number in range(100))
    path = write(tmp_path, "hub/rows.jsonl", rows)

    def load(real):
        def loaded(name, configuration, **options):
            requests.append((name, configuration))
            return real("json", data_files=path, **options)

        return loaded

    monkeypatch.setattr(sources, "load_dataset", load(datasets.load_dataset))
    monkeypatch.setattr(corpora, "load_dataset_builder", load(datasets.load_dataset_builder))
    return requests


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


def test_streaming_reads_no_more_than_max_documents(monkeypatch):
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


# Splitting


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 200),
    validation=st.floats(0.01, 0.6),
    test=st.one_of(st.just(0.0), st.floats(0.01, 0.39)),
    seed=st.integers(0, 2**32 - 1),
)
def test_splits_are_disjoint_and_complete(count, validation, test, seed):
    whole = [f"document {index} " + "of words to cut the end off between two " * 10 for index in range(count)]
    by_document = count * validation >= 1 and (not test or count * test >= 1)
    if by_document and round(count * validation) + round(count * test) >= count:
        with pytest.raises(UserError, match="leave none to train on"):
            split(whole, validation, test, seed)
        return
    splits = split(whole, validation, test, seed)
    sides = [side["text"][:] for side in splits.values()]
    if by_document:
        assert [len(side) for side in sides[1:]] == [round(count * validation), round(count * test)]
        assert sorted(itertools.chain(*sides)) == sorted(whole)
        assert all(side == sorted(side, key=whole.index) for side in sides)
    else:
        assert ["".join(parts) for parts in itertools.zip_longest(*sides, fillvalue="")] == whole
    assert all(sides[:2])
    assert bool(sides[2]) == bool(test)


def test_the_end_of_a_single_book_is_held_out():
    splits = split(["x" * 70 + "y" * 20 + "z" * 10], 0.2, 0.1)
    assert [side["text"][:] for side in splits.values()] == [["x" * 70], ["y" * 20], ["z" * 10]]
    splits = split(["one two three\nfour five six"], 0.4, 0.0)
    assert (splits["train"]["text"][:], splits["validation"]["text"][:]) == (["one two three\n"], ["four five six"])
    assert (len(splits["test"]), splits["test"].features) == (0, splits["train"].features)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=300), test=st.sampled_from([0.0, 0.2]))
def test_the_splits_of_any_book_add_up_to_it(text, test):
    try:
        splits = split([text], 0.3, test)
    except UserError:
        return
    sides = [side["text"][0] for side in splits.values() if len(side)]
    assert "".join(sides) == text or (len(sides) == 2 and test)


def test_fractions_must_leave_something_to_train_on(tmp_path):
    with pytest.raises(UserError, match="--validation_fraction 0.6 and --test_fraction 0.4 leave nothing to train on"):
        check([write(tmp_path, "a.txt", "a")], validation_fraction=0.6, test_fraction=0.4)


@pytest.mark.parametrize(
    ("count", "validation", "test", "message"),
    [
        (1, 0.01, 0.0, "--validation_fraction 0.01 of this corpus has no text: pass more text"),
        (1, 0.5, 0.01, "--test_fraction 0.01 of this corpus has no text: pass more text"),
        (1, 0.99, 0.0, "leave no text of this corpus to train on"),
        (3, 0.5, 0.45, "of 3 documents leave none to train on: lower one of them"),
        (3, 0.5, 0.5, "of 3 documents leave none to train on: lower one of them"),
    ],
)
def test_empty_splits_are_rejected(count, validation, test, message):
    with pytest.raises(UserError, match=message):
        split((f"ab{index}"[:2] + " " * index for index in range(count)), validation, test)


def test_docs_as_a_source(tmp_path, monkeypatch):
    for name in "abc":
        write(tmp_path, f"library/{name}.py", f'"""About {name}."""\ndef f():\n    "Does this."\n')
    write(tmp_path, "library/d.py", 'class D(int):\n    "Is\\nthat."\n')
    own = write(tmp_path, "own.txt", "module c\n\nAbout c.\n")
    monkeypatch.setattr(docstrings, "DOCS_LIBRARIES", ())
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "library")})
    first, docs = read([own, "docs"])
    assert docs.documents["text"][:] == [
        "module a\n\nAbout a.\n\ndef f():\n    Does this.\n",
        "module b\n\nAbout b.\n",
        "module d\n\nclass D(int):\n    Is\n    that.\n",
    ]
    assert (docs.name, docs.duplicates, docs.documents.features) == ("docs", 1, first.documents.features)
    assert len(read(["docs"], max_documents=1)[0].documents) == 1
