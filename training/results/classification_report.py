"""Reports on a classifier: examples, mistakes, tables, a picture."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

from training.data.examples import MULTI, REGRESSION, SINGLE, Example
from training.results.markdown import cell, plain, table
from training.results.scores import Predictions

MAX_MISTAKES = 500
MAX_LABELS = 40  # in a picture with readable names and counts
NUM_PREVIEWS = 4
LABEL_CHARACTERS, LINE_CHARACTERS = 40, 100
UNITS = {SINGLE: "nats per text", MULTI: "nats per label", REGRESSION: "squared error"}


def describe_labels(examples: list[Example], labels: np.ndarray, names: list[str], problem_type: str) -> str:
    """The number of examples, and of each of the most frequent labels."""
    if problem_type == REGRESSION:
        return f"{len(examples):,}"
    counts = Counter(dict(zip(names, labels.sum(0).astype(int).tolist(), strict=True)))
    frequent = ", ".join(f"{plain(name, LABEL_CHARACTERS)} {count:,}" for name, count in counts.most_common(8))
    return f"{len(examples):,} ({frequent}{', ...' if len(names) > 8 else ''})"


def preview_predictions(examples: list[Example], predictions: Predictions) -> list[str]:
    """A few texts with their predicted and true labels, as many different labels as possible."""
    firsts = {str(example.label): index for index, example in reversed(list(enumerate(examples)))}
    lines = []
    for index in list(dict.fromkeys([*firsts.values(), *range(len(examples))]))[:NUM_PREVIEWS]:
        labels = f"{format_prediction(predictions, index)}; true: {format_label(examples[index])}"
        lines.append(f"[{plain(labels, LINE_CHARACTERS)}] {plain(examples[index].text, LINE_CHARACTERS)}")
    return lines


def format_prediction(predictions: Predictions, index: int) -> str:
    """The predicted labels of a text with their probabilities, or the predicted numbers."""
    if predictions.problem_type == REGRESSION:
        return ", ".join(f"{number:.3f}" for number in predictions.logits[index])
    chosen = np.flatnonzero(predictions.decisions[index])
    return ", ".join(f"{predictions.names[label]} {predictions.probabilities[index, label]:.1%}" for label in chosen) or "none"


def format_label(example: Example) -> str:
    """The true labels or numbers of a text."""
    return example.label if isinstance(example.label, str) else ", ".join(map(str, example.label)) or "none"


def mistakes_table(examples: list[Example], labels: np.ndarray, predictions: Predictions) -> str:
    """The wrong predictions, the worst first, as Markdown; of a regression all, the largest errors first."""
    if predictions.problem_type == REGRESSION:
        errors, wrong = np.abs(predictions.logits - labels).max(-1), np.arange(len(examples))
    else:
        errors = np.abs(predictions.probabilities - labels).max(-1)
        wrong = np.flatnonzero((predictions.decisions != labels).any(-1))
    summary = f"{len(wrong):,} of {len(examples):,} texts, the worst first" if len(wrong) else "none"
    worst = wrong[np.argsort(-errors[wrong], kind="stable")][:MAX_MISTAKES]
    rows = ((format_prediction(predictions, index), format_label(examples[index]), examples[index].text) for index in worst)
    return f"Mistakes: {summary}.\n\n{table('| predicted | true | text |', (map(cell, row) for row in rows))}\n"


def draw_predictions(labels: np.ndarray, predictions: Predictions, path: Path) -> None:
    """As a PNG: the confusion matrix, precision and recall of each of several labels, or predicted over true numbers."""
    names = [plain(name, LABEL_CHARACTERS).replace("$", r"\$") for name in predictions.names]  # $ begins a formula
    is_readable = len(names) <= MAX_LABELS
    side = 3 + 0.45 * min(len(names), MAX_LABELS)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes: Any = figure.subplots()
    if predictions.problem_type == REGRESSION:
        dots = [axes.scatter(*pair, s=8, alpha=0.6) for pair in zip(labels.T, predictions.logits.T, strict=True)]
        ends = [float(labels.min()), float(labels.max())]
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        axes.set(xlabel="true", ylabel="predicted")
        axes.legend(dots, names)
    elif predictions.problem_type == SINGLE:
        display = ConfusionMatrixDisplay(predictions.confusion_matrix(labels), display_labels=names if is_readable else None)
        options: Any = {"include_values": is_readable, "xticks_rotation": 45 if max(map(len, names)) > 5 else 0}
        display.plot(ax=axes, cmap="Blues", colorbar=False, values_format=",d", **options)
        if not is_readable:
            axes.set(xticks=[], yticks=[])
        axes.set(xlabel="predicted", ylabel="true")
    else:
        positions, height = np.arange(len(names)), 0.4
        for shift, (score, values) in enumerate(zip(("precision", "recall"), predictions.f1_scores(labels)[:2], strict=True)):
            axes.barh(positions + (shift - 0.5) * height, values, height, label=score)
        if is_readable:
            axes.set_yticks(positions, names)
        axes.set(xlim=(0, 1))
        axes.invert_yaxis()
        axes.legend()
    with warnings.catch_warnings(action="ignore"):  # about characters that the font lacks
        figure.savefig(path, dpi=120)


def results_table(results: dict[str, dict[str, Any]], problem_type: str) -> str:
    """The content of metrics.json as Markdown: the metrics of all splits side by side, then those of each label of the last."""
    last_split, last = list(results.items())[-1]
    columns = {"validation, before" if name == "before" else name: metrics for name, metrics in results.items()}
    names = [name for name, value in last.items() if isinstance(value, float)]
    rows = ([name.replace("_", " "), *(f"{it[name]:.4f}" if name in it else "" for it in columns.values())] for name in names)
    test = "; the test split once, at the end." if "test" in results else "."
    remark = f"The loss is in {UNITS[problem_type]}. The validation split was used to follow training{test}"
    parts = [table(f"| | {' | '.join(columns)} |", rows), remark]
    if labels := last.get("labels"):
        keys = ("precision", "recall", "f1")
        rows = ([cell(name), *(f"{it[key]:.4f}" for key in keys), f"{it['examples']:,}"] for name, it in labels.items())
        parts.append(table(f"| {last_split} | precision | recall | F1 | examples |", rows))
    return "\n\n".join(parts)
