"""The documents: links, programs, commands, the generated page of options, and the length of lines."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCUMENTS = sorted(
    path for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")] if not any(part.startswith(".") for part in path.parts[-2:])
)


def anchors(document: Path) -> set[str]:
    """Of its headings, as they are made on the Hub and on GitHub."""
    text = re.sub(r"^(```+).*?^\1", "", document.read_text(), flags=re.M | re.S)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.M)
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_programs_are_python_and_commands_name_files_that_are_there(document):
    text = document.read_text()
    for program in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        ast.parse(program)
    commands = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))
    for path in re.findall(r"\b(?:training|space|benchmarks|examples|tests)/[\w/]+\.\w+|\bhub_upload\.py", commands):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"python -m (modeling_scratchgpt[\w.]*)", commands):
        assert (ROOT / module.replace(".", "/") / "__main__.py").is_file(), module


def test_the_page_of_options_is_generated_from_the_options():
    spec = importlib.util.spec_from_file_location("options", ROOT / "docs" / "options.py")
    options = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(options)
    assert (ROOT / "docs" / "options.md").read_text() == options.render(), "run: python docs/options.py > docs/options.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_short(document):
    """But for tables and code, which cannot be wrapped."""
    text = re.sub(r"^(````?)\w*\n.*?^\1", "", document.read_text(), flags=re.M | re.S)
    long = [line for line in text.splitlines() if len(line) >= 120 and not line.startswith(("|", "!["))]
    assert not long


def test_the_picture_of_the_modules_is_complete():
    shown = re.findall(r">([\w/]+\.py)</text>", (ROOT / "docs" / "architecture.svg").read_text())
    paths = [*(ROOT / "training").rglob("*.py"), *(ROOT / "modeling_scratchgpt").glob("*.py"), ROOT / "hub_upload.py"]
    names = [*(path.name for path in paths), *(f"space/{path.name}" for path in (ROOT / "space").glob("*.py"))]
    assert sorted(shown) == sorted(name for name in names if not name.endswith("__init__.py"))
