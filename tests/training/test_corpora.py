import ast
import inspect
import json
import os

import pytest
from datasets import Dataset

from training import corpora
from training.arguments import UserError
from training.corpora import check_sources, read_corpus, split_documents


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_files_and_folders_in_order_without_duplicates_and_blanks(tmp_path):
    one = write(tmp_path, "one.txt", "first")
    write(tmp_path, "folder/b.md", "second")
    write(tmp_path, "folder/deep/a.txt", "third")
    write(tmp_path, "folder/copy.txt", "first")
    write(tmp_path, "folder/blank.txt", " \n")
    write(tmp_path, "folder/picture.png", "not read")
    corpus = read_corpus([one, str(tmp_path / "folder")])
    assert corpus["text"][:] == ["first", "second", "third"]


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path, "a.txt", "old")
    os.utime(path, (1e9, 1e9))
    assert read_corpus([path])["text"][:] == ["old"]
    write(tmp_path, "a.txt", "new")
    os.utime(path, (1e9, 1e9))  # as an archive or a copy may leave it
    assert read_corpus([path])["text"][:] == ["new"]


def test_line_ends_and_accents_are_kept(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("ä\r\n𝄞\n".encode())
    assert read_corpus([str(path)])["text"][:] == ["ä\r\n𝄞\n"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", r"missing\.txt: no such file or folder"),
        ("./missing", "missing: no such file or folder"),
        ("a/b/c", "a/b/c: no such file or folder"),
    ],
)
def test_missing_sources_are_named(source, message):
    with pytest.raises(UserError, match=message):
        check_sources([source])


def test_sources_that_hold_no_text_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no \.txt or \.md file in this folder"):
        check_sources([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="there is no text in it"):
        read_corpus([write(tmp_path, "blank.txt", "\n\n")])
    with pytest.raises(UserError, match="--dataset is empty"):
        check_sources([])


def test_binary_and_wrongly_encoded_files_are_named(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\x7fELF\0\0\1")
    with pytest.raises(UserError, match=r"binary\.txt: this is a binary file"):
        check_sources([str(tmp_path / "binary.txt")])
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 text \(byte 3 is 0xe9\)"):
        check_sources([str(tmp_path / "latin.txt")])


def test_a_hub_id_without_network_is_named():
    with pytest.raises(UserError, match="somebody/something: no such file or folder here, and the Hub did not give it"):
        read_corpus(["somebody/something"])


@pytest.mark.parametrize("count", [10, 137])
def test_documents_are_held_out_whole_and_never_twice(count):
    corpus = Dataset.from_dict({"text": [f"document {index}" for index in range(count)]})
    training, validation = split_documents(corpus, 0.1, seed=3)
    assert len(validation) == -(-count // 10)
    assert sorted([*training["text"], *validation["text"]]) == sorted(corpus["text"])
    again = split_documents(corpus, 0.1, seed=3)[1]
    assert again["text"][:] == validation["text"][:]
    assert split_documents(corpus, 0.1, seed=4)[1]["text"][:] != validation["text"][:]


def test_a_single_book_gives_its_end():
    training, validation = split_documents(Dataset.from_dict({"text": ["x" * 90 + "y" * 10]}), 0.1, seed=0)
    assert (training["text"][:], validation["text"][:]) == (["x" * 90], ["y" * 10])


def test_a_corpus_too_small_to_split_is_refused():
    with pytest.raises(UserError, match="it is too small"):
        split_documents(Dataset.from_dict({"text": ["ab"]}), 0.01, seed=0)


def test_docstrings_are_those_that_python_sees():
    source = inspect.getsource(json)
    entries = dict(corpora._entries(ast.parse(source)))
    assert entries[""] == inspect.getdoc(json)
    (loads,) = [text for signature, text in entries.items() if signature.startswith("def loads(")]
    assert loads == inspect.getdoc(json.loads)


def test_signatures():
    tree = ast.parse(
        'class A(B, metaclass=C):\n    "a"\n    async def f(self, x: int = 1, *, y) -> str:\n        "f"\n'
        "def g(" + ", ".join(f"argument_{index}" for index in range(40)) + '):\n    "g"\n'
    )
    assert list(corpora._entries(tree)) == [
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
    assert [row["text"] for row in corpora._docs_documents(entries)] == [
        "module a\n\nAbout a.\n\ndef f():\n    Does\n    this.\n",
        "module c\n\nclass C:\n    Is that.\n",
    ]


def test_nothing_of_the_harvest_is_run(tmp_path):
    path = tmp_path / "trap.py"
    path.write_text(f'"""A docstring."""\nopen({str(tmp_path / "ran")!r}, "w")\n')
    rows = list(corpora._docstrings([("library", str(path), "trap.py", 0)]))
    assert rows == [{"library": "library", "module": "library.trap", "signature": "", "docstring": "A docstring."}]
    assert not (tmp_path / "ran").exists()
