"""Directories, clones of datasets on the Hub, saved datasets and standard input as sources, compared with `datasets`."""

import io
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from tests.conftest import ROOT
from tests.training.conftest import write_rows
from training.data import sources
from training.data.corpora import CorpusArguments, check_corpora, read_corpora
from training.data.examples import ExampleArguments, read_examples
from training.data.files import LFS_POINTER
from training.data.sources import check_sources, is_dataset_id, short_name
from training.errors import UserError

CONFIGS = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: parts/a*
  - split: test
    path: parts/b*
- config_name: other
  data_files: parts/c*
---
"""
TWO_CONFIGS = CONFIGS.replace("default", "first")


def texts(source: object, **options: object) -> list[str]:
    check_corpora(CorpusArguments([str(source)], **options))
    (corpus,) = read_corpora(CorpusArguments([str(source)], **options))
    return corpus.documents["text"][:]


def make_clone(directory: Path, card: str, names: list[str]) -> Path:
    """Tables of two rows with different texts, and a README.md."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, [{"text": f"{name} {number}", "label": str(number)} for number in range(2)])
    (directory / "README.md").write_text(card)
    return directory


SHARDS = [f"data/{split}-{number:05}-of-00002.parquet" for split in ("test", "train") for number in range(2)]


@pytest.mark.parametrize(
    ("card", "names", "configuration"),
    [
        ("The card.", SHARDS, None),
        ("The card.", [*SHARDS, "CONTRIBUTING.md"], None),
        ("---\nlicense: mit\n---\nThe card.", SHARDS, None),
        ("---\nlicense: mit\n---\nThe card.", ["rows.jsonl"], None),
        ("The card.", ["train.csv", "validation.csv", "test.csv"], None),
        ("The card.", ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], None),
        (CONFIGS, ["parts/a1.jsonl", "parts/a2.jsonl", "parts/b.jsonl", "parts/c.jsonl", "more.jsonl"], None),
        (TWO_CONFIGS, ["parts/a.jsonl", "parts/b.jsonl", "parts/c.jsonl"], "other"),
    ],
)
def test_a_clone_is_read_as_load_dataset_reads_it(tmp_path, card, names, configuration):
    folder = make_clone(tmp_path / "clone", card, names)
    expected = load_dataset(str(folder), configuration, split="train")["text"][:]
    assert 0 < len(expected) <= 2 * len(names)
    assert texts(f"{folder}:{configuration}" if configuration else folder) == expected


def test_the_splits_of_a_clone_are_those_of_a_classifier(tmp_path):
    folder = make_clone(tmp_path, "", SHARDS)
    splits = read_examples(ExampleArguments([str(folder)], validation_fraction=0.5)).splits
    assert [example.text for example in splits["test"]] == load_dataset(str(folder), split="test")["text"][:]
    assert len(splits["train"]) + len(splits["validation"]) == 4


@pytest.mark.parametrize("card", ["# About these texts", "---\nA rule above, not metadata."])
def test_all_files_of_a_directory_of_texts_are_read(tmp_path, card):
    """Although the names of two of them have words of splits."""
    for name in ("the-train-to-paris.txt", "a.test.of.courage.txt", "essay.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "README.md").write_text(card)
    assert texts(tmp_path) == [card, "a.test.of.courage.txt", "essay.md", "the-train-to-paris.txt"]


def test_errors_of_clones(tmp_path):
    folder = make_clone(tmp_path, TWO_CONFIGS, ["parts/a.jsonl", "parts/b.jsonl", "parts/c.jsonl"])
    with pytest.raises(UserError, match=r"\['first', 'other'\].*: pass .*:CONFIGURATION"):
        texts(folder)
    with pytest.raises(UserError, match=":third: cannot be loaded .*'third' not found"):
        texts(f"{folder}:third")
    (folder / "README.md").write_text(CONFIGS.replace("split: train", "split: training"))
    with pytest.raises(UserError, match="has no split `train`; it has training, test"):
        texts(folder)


def test_errors_of_datasets_are_one_line(tmp_path, monkeypatch):
    clone = make_clone(tmp_path / "clone", "---\nconfigs: []\n---\n", ["rows.jsonl"])
    (clone / "clone.py").write_text("raise SystemExit('this script was run')")
    with pytest.raises(UserError, match=r"clone: cannot be loaded \(Dataset scripts are no longer supported"):
        texts(clone)
    for name, content in (("a.jsonl", '{"text": "a"}'), ("b.jsonl", '{"other": 1}')):
        (tmp_path / name).write_text(content)
    other = {"data_files": [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")], "split": "train"}
    monkeypatch.setattr(sources, "load_dataset", lambda *_: load_dataset("json", **other))
    with pytest.raises(UserError, match="owner/name: no such local file .* failed .*column"):
        texts("owner/name")

    def fill_disk(*_, **options):
        raise DatasetGenerationError("An error occurred while generating the dataset") from OSError(28, "No space left")

    monkeypatch.setattr(sources, "load_dataset", fill_disk)
    with pytest.raises(UserError, match="owner/name: .*No space left"):
        texts("owner/name")
    monkeypatch.setattr(Dataset, "from_generator", fill_disk)
    with pytest.raises(UserError, match="the built-in docstrings cannot be prepared .*No space left.*: if the disk of"):
        texts("docs")


@pytest.mark.parametrize("name", ["train-00000-of-00001.parquet", "a.jsonl", "a.txt", "a.csv.gz", "a.parquet.gz"])
def test_a_pointer_of_git_lfs_is_no_data(tmp_path, name):
    (tmp_path / name).write_bytes(LFS_POINTER + b"\noid sha256:4d7a\nsize 12345\n")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=f"{name} is a pointer of git-LFS, not the data: run `git lfs pull`"):
            check_corpora(CorpusArguments([str(source)]))


def test_saved_datasets(tmp_path):
    rows, others = ({"text": [f"{name} {number}" for number in range(3)]} for name in ("row", "other"))
    Dataset.from_dict(rows).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_dict(rows), test=Dataset.from_dict(others)).save_to_disk(tmp_path / "splits")
    DatasetDict(test=Dataset.from_dict(others)).save_to_disk(tmp_path / "test_only")
    assert texts(tmp_path / "one") == texts(tmp_path / "splits") == texts(tmp_path / "splits", streaming=True) == rows["text"]
    assert texts(tmp_path / "splits", max_documents=2) == rows["text"][:2]
    with pytest.raises(UserError, match="test_only has no split `train`; it has test"):
        texts(tmp_path / "test_only")
    with pytest.raises(UserError, match="one has no 'body'; it has text. Set --text_column"):
        texts(tmp_path / "one", text_column="body")


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (b"A text\nof two lines.\n", {}, ["A text\nof two lines.\n"]),
        ("{A text}".encode("utf-16"), {}, ["{A text}"]),
        (b"caf\xe9", {"encoding": "latin-1"}, ["café"]),
        (b'{"body": "one"}\n{"body": "two"}\n', {"text_column": "body"}, ["one", "two"]),
    ],
)
def test_standard_input(content, options, expected, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert texts("-", **options) == expected


def test_standard_input_is_read_once_by_one_process(monkeypatch):
    with pytest.raises(UserError, match="--dataset -: standard input can be read only once, by one process: save it"):
        check_sources(["-", "-"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="by one process"):
        check_sources(["-"])
    assert (is_dataset_id("-"), short_name("-")) == (False, "standard input")


def test_the_name_docs_is_not_the_directory(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("own")
    monkeypatch.chdir(tmp_path)
    assert check_sources(["docs"]) == []
    assert capsys.readouterr().err == "--dataset docs is the built-in data: pass ./docs for the directory of that name\n"
    assert texts("./docs") == ["own"]
    monkeypatch.chdir(ROOT)  # whose own directory nobody means
    assert check_sources(["docs"]) == []
    assert capsys.readouterr() == ("", "")
