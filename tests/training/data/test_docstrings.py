"""Docstrings and signatures of source files."""

import ast
import inspect
import json

from training.data import docstrings


def test_docstrings_are_those_of_inspect():
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


def test_modules_are_not_run(tmp_path):
    path = tmp_path / "trap.py"
    path.write_text(f'"""A docstring."""\nopen({str(tmp_path / "ran")!r}, "w")\n')
    rows = list(docstrings._docstrings([("library", str(path), "trap.py", 0)]))
    assert rows == [{"library": "library", "module": "library.trap", "signature": "", "docstring": "A docstring."}]
    assert not (tmp_path / "ran").exists()
