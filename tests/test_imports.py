"""Imports point one way, from the programs down to the model's files, and never form a cycle; the sdist has what they need."""

import ast
import os
import re
import shutil
import tarfile
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.conftest import ROOT, Processes

MODEL_FILES = r"(configuration|modeling|tokenization)_scratchgpt|attention|cross_entropy|packed_linear|interchange"
LAYERS = {  # lowest first; the first pattern that matches decides. A module may import from its own layer and from lower ones.
    "files saved with a model": rf"modeling_scratchgpt\.({MODEL_FILES})",
    "modeling_scratchgpt": r"modeling_scratchgpt(\..*)?",
    "cli and errors": r"training(\.(cli|errors|progress))?",
    "data": r"training\.data(\..*)?",
    "engine": r"training\.engine(\..*)?",
    "results": r"training\.results(\..*)?",
    "sharing": r"training\.sharing(\..*)?",
    "recipes": r"training\.\w+",
    "programs": r"hub_upload|space(\.\w+)?",
}


def read_project() -> dict[str, str]:
    """The source of each module, by its dotted name; a package's name ends in `.__init__`."""
    paths = [path for folder in ("modeling_scratchgpt", "training", "space") for path in (ROOT / folder).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text("utf-8") for p in [*paths, ROOT / "hub_upload.py"]}


def build_import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """The project's modules that each module imports, at its top, inside a function or for type checking."""
    names = {name.removesuffix(".__init__") for name in sources}
    graph: dict[str, set[str]] = {name: set() for name in sorted(names)}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            imported: list[str] = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = name.split(".")[: -node.level] if node.level else []
                origin = ".".join([*package, *filter(None, [node.module])])
                members = [f"{origin}.{alias.name}" for alias in node.names]
                imported = [member if member in names else origin for member in members]
            graph[name.removesuffix(".__init__")].update(names.intersection(imported))
    return graph


def layer_of(module: str) -> int:
    """Index into `LAYERS`."""
    for index, pattern in enumerate(LAYERS.values()):
        if re.fullmatch(pattern, module):
            return index
    raise ValueError(f"{module} belongs to no layer: add it to LAYERS")


def find_violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a higher layer, and the first cycle."""
    titles = list(LAYERS)
    found = [
        f"{module} ({titles[layer_of(module)]}) imports {imported} ({titles[layer_of(imported)]})"
        for module, targets in sorted(graph.items())
        for imported in sorted(targets)
        if layer_of(imported) > layer_of(module)
    ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"import cycle: {' <- '.join(error.args[1])}")
    return found


def test_imports_point_one_way():
    assert find_violations(build_import_graph(read_project())) == []


@pytest.mark.parametrize(
    ("module", "statement", "violation"),
    [
        ("training.data.splits", "import training.engine.train", "data) imports training.engine.train (engine)"),
        ("training.engine.loop", "from training import pretrain", "engine) imports training.pretrain (recipes)"),
        ("training.errors", "def f():\n    from .data.splits import x", "cli and errors) imports training.data.splits (data)"),
        ("modeling_scratchgpt.lora.layer", "from training.errors import UserError", "imports training.errors (cli and errors)"),
        ("modeling_scratchgpt.interchange", "from .lora import layer", "imports modeling_scratchgpt.lora.layer"),
        ("training.pretrain", "from training.engine import loop", None),
        ("modeling_scratchgpt.lora.__init__", "from .layer import LoraLinear", None),
        ("training.data.splits", "from training.data import tokens", "import cycle: training.data."),
    ],
)
def test_a_planted_import_is_found(module, statement, violation):
    modules = ["hub_upload", "training.errors", "training.pretrain", "training.engine.loop", "training.engine.train"]
    modules += ["training.data.splits", "modeling_scratchgpt.lora.__init__", "modeling_scratchgpt.lora.layer"]
    sources = dict.fromkeys([*modules, "modeling_scratchgpt.interchange"], "import ast")
    sources["training.data.tokens"] = "from .splits import x"
    violations = find_violations(build_import_graph(sources | {module: statement}))
    assert len(violations) == (violation is not None)
    assert all(violation in found for found in violations)


def build_sdist(folder: str) -> None:
    from setuptools import build_meta

    os.chdir(folder)
    build_meta.build_sdist(folder)


def test_the_sdist_has_all_modules_and_settings_and_no_tests(tmp_path):
    """Some of the tests, as setuptools adds them, would not run."""
    packages = ("modeling_scratchgpt", "training")
    for name in (*packages, "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    expected = {str(path.relative_to(ROOT)) for name in packages for path in (ROOT / name).rglob("*.*")}
    Processes(build_sdist, tmp_path / "log", [str(tmp_path)]).wait()
    with tarfile.open(*tmp_path.glob("*.tar.gz")) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {name for name in expected if not name.endswith((".pyc", ".md"))} == {n for n in found if n.startswith(packages)}
    assert not [name for name in found if name.startswith("tests")]


def test_a_module_without_a_layer_is_an_error():
    with pytest.raises(ValueError, match="elsewhere belongs to no layer"):
        find_violations(build_import_graph({"elsewhere": "import hub_upload", "hub_upload": "import elsewhere"}))
