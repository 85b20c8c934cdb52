"""The embedded corpus: the documentation that every Python already carries.

Notable:
- It needs no network and no file: it is the docstrings of the standard library and of the libraries that ScratchGPT stands on.
- They are read with `ast`, so nothing of what is read is ever run or imported.
- All recipes have real data from it: texts by module for pretraining, single docstrings with their library and signature
  for the others.
"""

import ast
import importlib.util
import inspect
import os
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset, Features, Value

DOCS_LIBRARIES = ("torch", "transformers", "numpy", "pandas")
# Tests say little in their docstrings, and other people's code inside a library says it twice.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "testing", "_vendor", "__pycache__"}
LONGEST_SIGNATURE = 300  # characters; longer ones are machine-made and say nothing a reader would read
TEXT = Features({"text": Value("string")})
DOCSTRINGS = Features({name: Value("string") for name in ("library", "module", "signature", "docstring")})


def read_docs() -> Dataset:
    """The docstrings of the standard library, torch, transformers, numpy and pandas: one document a module."""
    return Dataset.from_generator(_docs_documents, features=TEXT, gen_kwargs={"entries": read_docstrings()})


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
    return Dataset.from_generator(_docstrings, features=DOCSTRINGS, gen_kwargs={"files": files}, num_proc=os.cpu_count())


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
