"""Texts, from wherever they come, as a `datasets.Dataset` with one document a row.

Notable:
- `docs` needs no network and no file: it is the docstrings of the standard library and of the libraries that ScratchGPT
  stands on. They are read with `ast`, so nothing of what is read is ever run or imported.
- Everything is memory-mapped by `datasets` and kept in its cache; a second run on the same sources starts at once.
- Documents are split before anything else happens to them, so no token of the validation text is seen in training.
"""

import ast
import hashlib
import importlib.util
import inspect
import os
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from training.arguments import UserError

DOCS_LIBRARIES = ("torch", "transformers", "numpy", "pandas")
# Tests say little in their docstrings, and other people's code inside a library says it twice.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "testing", "_vendor", "__pycache__"}
LONGEST_SIGNATURE = 300  # characters; longer ones are machine-made and say nothing a reader would read
TEXT_FILES = (".txt", ".md")
TEXT = Features({"text": Value("string")})
DOCSTRINGS = Features({name: Value("string") for name in ("library", "module", "signature", "docstring")})


def read_corpus(sources: list[str], text_column: str = "text") -> Dataset:
    """All documents of `sources`, in order, without exact duplicates.

    Args:
        sources: `docs`, paths of text files or of folders of them, or ids of datasets on the Hub.
        text_column: the column that holds the text in datasets from the Hub.

    Returns:
        A dataset with one column, `text`.

    Raises:
        UserError: a source that does not exist or cannot be read, or no text in all of them.
    """
    parts = [_read_source(source, text_column) for source in sources]
    corpus = _without_duplicates(concatenate_datasets(parts))
    if len(corpus) == 0:
        raise UserError(f"--dataset {' '.join(sources)}: there is no text in it.")
    return corpus


def check_sources(sources: list[str]) -> None:
    """Refuse at once what cannot be read, before any long work.

    Raises:
        UserError: no source, a path that is not there or not readable, a folder without text files, a file that is not
            UTF-8 text.
    """
    if not sources:
        raise UserError("--dataset is empty: give `docs`, text files, folders or the id of a dataset on the Hub.")
    for source in sources:
        if source != "docs" and not _is_hub_id(source):
            for path in _text_files(source):
                _read_text(path)


def split_documents(corpus: Dataset, validation_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training and validation documents; they share no text.

    Whole documents are held out. A corpus of too few documents for that (one book, say) gives the end of each instead.

    Args:
        validation_fraction: share to hold out, between 0 and 1.
        seed: decides which documents are held out.

    Raises:
        UserError: a side would be empty.
    """
    if len(corpus) * validation_fraction >= 1:
        parts = corpus.train_test_split(test_size=validation_fraction, seed=seed)
        return parts["train"], parts["test"]

    def cut(row: dict[str, Any], head: bool) -> dict[str, str]:
        text = row["text"]
        place = round(len(text) * (1 - validation_fraction))
        place = 1 + max(text.rfind("\n", 0, place), text.rfind(" ", 0, place), -1) or place  # between words
        return {"text": text[:place] if head else text[place:]}

    train, validation = (corpus.map(cut, fn_kwargs={"head": head}) for head in (True, False))
    if not any(validation["text"]) or not any(train["text"]):
        raise UserError(f"--validation_fraction {validation_fraction} of this corpus is no text at all: it is too small.")
    return train, validation


def _read_source(source: str, text_column: str) -> Dataset:
    if source == "docs":
        return read_docs()
    if _is_hub_id(source):
        return _read_hub(source, text_column)
    digests = [(str(path), hashlib.sha256(path.read_bytes()).hexdigest()) for path in _text_files(source)]
    return _generate(_text_documents, TEXT, {"files": digests})


def _is_hub_id(source: str) -> bool:
    """Whether it is shaped like an id, with nothing of that name here."""
    return (
        not os.path.exists(source)
        and not source.endswith(TEXT_FILES)
        and source.count("/") <= 1
        and not source.startswith((".", "/", "~"))
    )


def _read_hub(source: str, text_column: str) -> Dataset:
    try:
        dataset = load_dataset(source, split="train")
    except (OSError, DatasetNotFoundError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise UserError(
            f"--dataset {source}: no such file or folder here, and the Hub did not give it "
            f"({' '.join(str(error).split())[:200]})."
        ) from error
    if text_column not in dataset.column_names:
        raise UserError(
            f"--dataset {source}: no column {text_column!r}; it has {', '.join(dataset.column_names)}. Set --text_column."
        )
    return dataset.select_columns(text_column).rename_column(text_column, "text").cast(TEXT)


def _text_files(source: str) -> list[Path]:
    """The file itself, or all text files below the folder, sorted."""

    def fail(error: OSError) -> None:
        raise error

    try:
        path = Path(os.path.expanduser(source))
        str(path).encode()
        if path.is_dir():
            names = (Path(folder) / file for folder, _, files in os.walk(path, onerror=fail) for file in files)
            files = sorted(name for name in names if name.suffix.lower() in TEXT_FILES and name.is_file())
            if not files:
                raise UserError(f"--dataset {source}: there is no {' or '.join(TEXT_FILES)} file in this folder.")
            return files
        if not path.is_file():
            raise UserError(f"--dataset {source}: no such file or folder.")
        return [path]
    except OSError as error:
        raise UserError(f"--dataset {source}: {error.strerror}: {error.filename}.") from error
    except ValueError as error:
        raise UserError(f"--dataset {source!r}: this is no name of a file ({error}).") from error


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if b"\0" in data:
            raise UserError(f"--dataset {path}: this is a binary file; ScratchGPT reads UTF-8 text.")
        return data.decode("utf-8")
    except OSError as error:
        raise UserError(f"--dataset {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"--dataset {path}: not UTF-8 text (byte {error.start} is {byte:#x}).") from error


def _text_documents(files: list[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """One document a file. The second of each pair, the digest of its content, keeps `datasets`' cache honest."""
    for path, _ in files:
        yield {"text": _read_text(Path(path))}


def _generate(rows: Any, features: Features, arguments: dict[str, Any], num_proc: int | None = None) -> Dataset:
    """`Dataset.from_generator`, with the user's mistakes let through as they are."""
    try:
        return Dataset.from_generator(rows, features=features, gen_kwargs=arguments, num_proc=num_proc)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _without_duplicates(corpus: Dataset) -> Dataset:
    """The first of each text that is not blank."""
    first: dict[bytes, int] = {}
    for index, text in enumerate(corpus["text"]):
        if text and not text.isspace():
            first.setdefault(hashlib.sha256(text.encode()).digest(), index)
    return corpus.select(first.values())


# The embedded corpus ------------------------------------------------------------------------------------------------


def read_docs() -> Dataset:
    """The docstrings of the standard library, torch, transformers, numpy and pandas: one document a module."""
    return _generate(_docs_documents, TEXT, {"entries": read_docstrings()})


def read_docstrings() -> Dataset:
    """Every docstring of the embedded corpus, by module, in the order of the source.

    Returns:
        A dataset with the columns `library`, `module`, `signature` (empty for the module's own docstring) and `docstring`.
    """
    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    for library in DOCS_LIBRARIES:
        spec = importlib.util.find_spec(library)  # finds the folder of a top-level package without importing it
        if spec is not None and spec.submodule_search_locations:
            roots[library] = Path(spec.submodule_search_locations[0])
    files = [
        (library, str(path), str(path.relative_to(root)), path.stat().st_mtime_ns)
        for library, root in roots.items()
        for path in sorted(root.rglob("*.py"))
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    ]
    return _generate(_docstrings, DOCSTRINGS, {"files": files}, num_proc=os.cpu_count())


def _docstrings(files: list[tuple[str, str, str, int]]) -> Iterator[dict[str, str]]:
    for library, path, relative, _ in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other people's invalid escapes
                tree = ast.parse(Path(path).read_bytes())
        except (SyntaxError, ValueError):  # templates and files for other Pythons: not ours to mend
            continue
        parts = Path(relative).with_suffix("").parts
        module = ".".join(part for part in (*(() if library == "python" else (library,)), *parts) if part != "__init__")
        for signature, docstring in _entries(tree):
            yield {"library": library, "module": module, "signature": signature, "docstring": docstring}


def _entries(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(signature, docstring) of the module itself and of every class and function in it, top to bottom."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, documented):
            docstring = ast.get_docstring(node, clean=False)
            if docstring and docstring.strip():
                # A file may hold half a character written as an escape; text cannot.
                yield _signature(node), inspect.cleandoc(docstring).encode("utf-8", "replace").decode("utf-8")
        stack.extend(reversed([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]))


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        signature = f"class {node.name}({bases})" if bases else f"class {node.name}"
        return signature if len(signature) <= LONGEST_SIGNATURE else f"class {node.name}(...)"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = f"def {node.name}({ast.unparse(node.args)}){returns}"
        return signature if len(signature) <= LONGEST_SIGNATURE else f"def {node.name}(...)"
    return ""


def _docs_documents(entries: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Join each module's docstrings, leaving out the ones that stood before: copies are many in such libraries."""
    seen: set[str] = set()
    module, paragraphs = "", [""]

    def document() -> Iterator[dict[str, str]]:
        if len(paragraphs) > 1:
            yield {"text": "\n\n".join(paragraphs) + "\n"}

    for entry in entries:
        if entry["module"] != module:
            yield from document()
            module = entry["module"]
            paragraphs = [f"module {module}"]
        if entry["docstring"] in seen:
            continue
        seen.add(entry["docstring"])
        if entry["signature"]:
            paragraphs.append(f"{entry['signature']}:\n{textwrap.indent(entry['docstring'], '    ')}")
        else:
            paragraphs.append(entry["docstring"])
    yield from document()
