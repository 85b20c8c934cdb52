"""The notebook runs from its first cell to its last, and is committed with the outputs of such a run."""

import json
import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

WALKTHROUGH = ROOT / "examples" / "walkthrough.ipynb"

SHORT = """
docstrings.DOCS_LIBRARIES = ("numpy",)
standard_library = Path(docstrings.sysconfig.get_paths()["stdlib"])
docstrings.SKIPPED_DIRECTORIES |= {path.name for path in standard_library.iterdir() if path.is_dir()}
VOCAB_SIZE, CONTEXT_LENGTH, BATCH_SIZE = 512, 64, 8
PRETRAINING_STEPS, LORA_STEPS, CLASSIFIER_STEPS, INSTRUCTION_STEPS = 16, 8, 4, 12
"""
RESULTS = """
import json
print(json.dumps({
    "bpe": bpe_is_equal,
    "attention": attention_is_equal,
    "gpt2": difference < 1e-5,
    "pretraining": [loss_before, loss_after],
    "lora": [lora_loss_before, lora_loss_after],
    "merged": lora_is_equal,
    "accuracy": [1 / len(libraries), accuracy],
    "instructions": [instruction_losses[0], instruction_losses[-1]],
}))
"""


def run(parameters: str | None, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Execute the notebook, with another parameters cell if one is given, and return its results; a cell that fails raises."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(WALKTHROUGH, as_version=4)
    if parameters:
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        cell.source = parameters
    notebook.cells.append(nbformat.v4.new_code_cell(RESULTS))
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(WALKTHROUGH.parent)}}).execute()
    # One print may arrive as several outputs.
    return json.loads("".join(output.text for output in notebook.cells[-1].outputs if output.get("name") == "stdout"))


def test_every_cell_runs(monkeypatch):
    results = run(SHORT, monkeypatch)
    assert all(results[name] for name in ("bpe", "attention", "gpt2", "merged"))
    for name in ("pretraining", "lora", "instructions"):
        before, after = results[name]
        assert after < before, name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_results_at_full_length(monkeypatch):
    results = run(None, monkeypatch)
    (_, pretrained), (_, instructed) = results["pretraining"], results["instructions"]
    by_guessing, accuracy = results["accuracy"]
    assert pretrained < 4.5
    assert instructed < 0.1
    assert accuracy > by_guessing + 0.2


def test_committed_outputs_are_complete_and_name_no_place_of_a_machine():
    text = WALKTHROUGH.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert not re.search(r"/(work|root|tmp|home|Users)\b", re.sub(r'"image/png": ".*?"', "", text))
    assert len(text) < 400_000


def test_links_of_the_notebook_lead_somewhere():
    for cell in nbformat.read(WALKTHROUGH, as_version=4).cells:
        for link in re.findall(r"\]\(([^)\s]+)\)", cell.source if cell.cell_type == "markdown" else ""):
            assert "://" in link or (WALKTHROUGH.parent / link).exists(), link
