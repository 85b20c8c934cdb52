"""The built-in data: docstrings of the standard library and of the installed dependencies, without network or files.

The modules are parsed with `ast`, and never run or imported.
"""

import ast
import gc
import importlib.util
import inspect
import os
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetsError

from training.errors import UserError, one_line

DOCS_LIBRARIES = ("torch", "transformers", "numpy", "pandas")
# Tests have poor docstrings, and vendored code has those of other libraries.
SKIPPED_DIRECTORIES = {"site-packages", "test", "tests", "testing", "_vendor", "__pycache__"}
LONGEST_SIGNATURE = 300  # characters; longer ones are mostly generated
DOCSTRINGS_PER_LIBRARY = 1000  # labelled texts and conversations
TEXT = Features({"text": Value("string")})
DOCSTRINGS = Features({name: Value("string") for name in ("library", "module", "signature", "docstring")})
MAX_PROCESSES = 32  # Windows cannot wait for more than 61


@contextmanager
def _errors() -> Iterator[None]:
    """Turn the errors of `datasets` into a `UserError` with their cause."""
    try:
        yield
    except DatasetsError as error:
        cause: Any = error.__cause__ if isinstance(error.__cause__, OSError) else error
        remedy = "if the disk of the cache is full, free some space, or set HF_HOME"
        raise UserError(f"the built-in docstrings cannot be prepared ({one_line(cause)}): {remedy}.") from error


@_errors()
def read_docs() -> Dataset:
    """Docstrings of the standard library, torch, transformers, numpy and pandas, as one document per module."""
    return Dataset.from_generator(_docs_documents, features=TEXT, gen_kwargs={"entries": read_docstrings()})


@_errors()
def read_docstrings() -> Dataset:
    """All docstrings, grouped by module, in the order of the source code. The `signature` of a module is empty."""
    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    for library in DOCS_LIBRARIES:
        spec = importlib.util.find_spec(library)  # does not import a top-level package
        if spec is not None and spec.submodule_search_locations:
            roots[library] = Path(spec.submodule_search_locations[0])
    files = [
        (library, str(path), str(path.relative_to(root)), path.stat().st_mtime_ns)
        for library, root in roots.items()
        for path in sorted(root.rglob("*.py"))
        if SKIPPED_DIRECTORIES.isdisjoint(path.relative_to(root).parts)
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # The collector would traverse all imported modules for the many objects that `ast` makes, which doubles the time.
    gc.freeze()
    try:
        return Dataset.from_generator(
            _docstrings, features=DOCSTRINGS, gen_kwargs={"files": files}, num_proc=min(cores, MAX_PROCESSES)
        )
    finally:
        gc.unfreeze()


def _docstrings(files: list[tuple[str, str, str, int]]) -> Iterator[dict[str, str]]:
    for library, path, relative, _ in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about invalid escapes
                tree = ast.parse(Path(path).read_bytes())
        except (SyntaxError, ValueError):  # templates, and files for other versions of Python
            continue
        parts = Path(relative).with_suffix("").parts
        module = ".".join(part for part in (*(() if library == "python" else (library,)), *parts) if part != "__init__")
        for signature, docstring in _entries(tree):
            yield {"library": library, "module": module, "signature": signature, "docstring": docstring}


def _entries(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (signature, docstring) of the module, whose signature is empty, and of its classes and functions in order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, documented):
            docstring = ast.get_docstring(node, clean=False)
            if docstring and docstring.strip():
                # An escape in the source can be half of a surrogate pair, which UTF-8 cannot represent.
                yield _signature(node), inspect.cleandoc(docstring).encode("utf-8", "replace").decode("utf-8")
        stack.extend(reversed([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]))


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        head, bases = f"class {node.name}", ", ".join(map(ast.unparse, node.bases))
        tail = f"({bases})" if bases else ""
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        head, returns = f"def {node.name}", f" -> {ast.unparse(node.returns)}" if node.returns else ""
        tail = f"({ast.unparse(node.args)}){returns}"
    else:
        return ""
    return head + tail if len(head + tail) <= LONGEST_SIGNATURE else f"{head}(...)"


def _docs_documents(entries: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Join the docstrings of each module, without the many that are duplicates of earlier ones."""
    seen: set[str] = set()
    for module, group in groupby(entries, key=itemgetter("module")):
        paragraphs = [f"module {module}"]
        for entry in group:
            signature, docstring = entry["signature"], entry["docstring"]
            if docstring not in seen:
                paragraphs.append(f"{signature}:\n{textwrap.indent(docstring, '    ')}" if signature else docstring)
            seen.add(docstring)
        if len(paragraphs) > 1:
            yield {"text": "\n\n".join(paragraphs) + "\n"}
