"""Plain technical English in `--help`, docstrings, comments, string literals and documents.

A finding is reported as `file:line: text: alternative`. Rephrase the sentence; extend `RULES` when a new idiom creeps in.
"""

import ast
import importlib
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator

import pytest

from tests.conftest import ROOT

FOLDERS = ("benchmarks", "examples", "modeling_scratchgpt", "space", "training")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))])
PROGRAMS = [path for path in SOURCES if "benchmarks" not in path.parts and "\ndef main(" in path.read_text("utf-8")]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("training/configs/**/*.yaml")])

# Pattern (a space stands for any white space, also a line break), plain alternative, a sentence that it must find.
RULES = [
    (r"refuse nonsense", "validate arguments before any data is read", "Refuse nonsense before any long work."),
    (r"\bso many\b", "N tokens, the number of tokens", "Stops after so many tokens."),
    (r"\b(of|than) ours\b|\bto ours\b", "the project's, ScratchGPT's", "files that import no other file of ours"),
    (r"\b(evaluations?|times?|is|are|kept|stands?) apart\b", "excluding, separate", "5.4 minutes (evaluations apart)"),
    (r"\b(is|are|was|were|be) told\b", "is passed, is reported", "A model that is told its labels."),
    (r"\b(what|whatever) is (typed|said|told)\b", "command-line flags", "Whatever is typed overrides the file"),
    (r"\bwhat is there\b|\b(is|are) there already|\balready there\b", "exists", "Models that are there already"),
    (r"\ball one\b", "equivalent", "Upper or lower case is all one."),
    (r"counts? for nothing", "is ignored (`ignore_index`)", "A label that counts for nothing."),
    (r"\blook(s|ed|ing)? at\b", "evaluate, read, inspect", "Steps between looks at the held-out data"),
    (r"\bgo(es|ing)? on (from|after|when|where)\b|\b(run|training) goes on\b", "resume, continue", "Going on after step 40"),
    (r"\b(whole|complete) or not\b", "atomic; complete or absent", "a model folder that is whole or not there"),
    (r"(?<!there\s)\b(is|are) no (director|file|folder|model|number|reason|text|token)", "is not a", "x is no folder: give"),
    (r"[:;.] give\b(?! (up|each)\b)", "pass", "It is not a directory: give another."),
    (r"\bholds? no\b", "is empty, contains no", "The folder holds no weights."),
    (r"\blean\b", "memory-efficient", "The lean loss."),
    (r"\ball there at once\b", "without materializing the logits", "so that the logits are never all there at once"),
    (r"beyond all measure", "sanity limit", "Sizes beyond all measure."),
    (r"\bmakes? no sense\b", "invalid combination of options", "With LoRA it makes no sense."),
    (r"\bfor nobody else\b", "private", "if it is made: for nobody else to see"),
    (r"\bthe same of\b", "the same for", "and the same of the head"),
    (r"\bbears?\b", "has, uses", "Fields that bear our names."),
    (r"\bstands? (there|here|beside|once|above|below|at|in)\b", "is, appears", "a token that stands there already"),
    (r"\blies? (there|here|beside|in|at|next)\b", "is", "The file lies beside the weights."),
    (r"\b(exact|drops?|dropped|dropping|without|as) copies\b|\bcopies (are )?dropped\b", "duplicates", "copies dropped: 0"),
    (r"\bused only now\b", "evaluated once, at the end", "On the test split, used only now"),
    (r"\b(letters|characters) into small\b|\binto small ones\b", "lowercase", "turn all letters into small ones"),
    (r"\bhas to end there\b", "probability of a forced token boundary", "Chance that a token has to end there"),
    (r"\blearns? to say\b", "compute the loss on", "Learn to say the prompts too"),
    (r"\bwiden, bend\b", "position-wise feed-forward network", "widen, bend, narrow"),
    (r"\blongest gradient\b", "maximum gradient norm", "Longest gradient"),
    (r"\bdecay of the matrices\b", "weight decay (matrices only)", "Decay of the matrices"),
    (r"\bhow the learning rate falls\b", "LR schedule", "How the learning rate falls"),
    (r"\b(be|is|are|was) asked\b(?! for a)", "accepts, is requested", "What every recipe can be asked"),
    (r"\b(adapter|checkpoint|file|model)s?( that)? says?\b", "contains, predicts", "a model that says"),
    (r"\bthe very (?!first|last)\w+", "the same", "with the very optimizer and loop"),
    (r"\bas ever\b", "as usual", "train as ever"),
    (r"\b(bits|bytes|nats|tokens|words) an? (byte|character|text|token|word)\b", "bytes per token", "3.49 bytes a token"),
]
COMPILED = [(re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE), instead) for pattern, instead, _ in RULES]
QUESTION = re.compile(r"(What|Whether|How|Which|Where)\b")
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def check_text(where: str, text: str, first_line: int = 1) -> Iterator[str]:
    """`file:line: text: alternative` for each rule that the text breaks, with a few characters of context."""
    for pattern, instead in COMPILED:
        for match in pattern.finditer(text):
            line = first_line + text.count("\n", 0, match.start())
            context = text[max(match.start() - 20, 0) : match.end() + 20]
            yield f"{where}:{line}: {' '.join(context.split())}: {instead}"


def check_source(where: str, source: str) -> Iterator[str]:
    """The same for the comments, string literals and docstrings of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield from check_text(where, token.string, token.start[0])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from check_text(where, node.value, node.lineno)
        elif isinstance(node, DOCUMENTED) and QUESTION.match(docstring := ast.get_docstring(node) or ""):
            summary = docstring.splitlines()[0]
            yield f"{where}:{node.body[0].lineno}: {summary}: begin with an imperative or a noun phrase"


def report(findings: Iterable[str]) -> None:
    if lines := sorted(set(findings)):
        pytest.fail(f"{len(lines)} unidiomatic phrases:\n" + "\n".join(lines), pytrace=False)


@pytest.mark.parametrize(("pattern", "instead", "sentence"), RULES)
def test_each_rule_finds_its_sentence_and_accepts_its_alternative(pattern, instead, sentence):
    assert any(finding.endswith(f": {instead}") for finding in check_text("a.py", sentence))
    assert not list(check_text("a.py", instead))


def test_a_source_is_searched_in_comments_literals_and_docstrings():
    source = 'def f(n):\n    """How it ends."""\n    # lean\n    return f"no {n}", "so" " many", """\n\nof\nours"""\n'
    assert {finding.split(":")[1] for finding in check_source("a.py", source)} == {"2", "3", "4", "6"}


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files(path):
    check = check_source if path.suffix == ".py" else check_text
    report(check(str(path.relative_to(ROOT)), path.read_text("utf-8")))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_help(path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    monkeypatch.syspath_prepend(path.parent)  # as Python does; the page imports its neighbour
    program = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    with pytest.raises(SystemExit, match="^0$"):
        program.main()
    report(check_text(f"{path.relative_to(ROOT)} --help", capsys.readouterr().out))
