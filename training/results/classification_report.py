"""What a classifier says, for people: examples, mistakes, tables and a picture."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.data.examples import MULTI, REGRESSION, SINGLE, Example
from training.results.markdown import cell, plain
from training.results.scores import Predictions

PICTURE, MISTAKES = "predictions.png", "mistakes.md"
MOST_MISTAKES = 500
MOST_IN_PICTURE = 40  # labels whose names and counts can be read
SHOWN = 4
NAME, LINE = 40, 100  # characters of a label in a picture, of a text on the terminal
UNITS = {SINGLE: "nats per text", MULTI: "nats per label", REGRESSION: "squared error"}


def described(examples: list[Example], labels: np.ndarray, names: list[str], problem_type: str) -> str:
    """How many examples there are, and of which labels."""
    if problem_type == REGRESSION:
        return f"{len(examples):,}"
    counts = Counter(dict(zip(names, labels.sum(0).astype(int).tolist(), strict=True)))
    most = ", ".join(f"{plain(name, NAME)} {count:,}" for name, count in counts.most_common(8))
    return f"{len(examples):,} ({most}{', ...' if len(names) > 8 else ''})"


def shown(examples: list[Example], predictions: Predictions) -> str:
    """Some texts, different labels first, with what the model says of them and what is true."""
    firsts = {str(example.label): index for index, example in reversed(list(enumerate(examples)))}
    lines = []
    for index in list(dict.fromkeys([*firsts.values(), *range(len(examples))]))[:SHOWN]:
        answers = f"{told(predictions, index)}; true: {truth(examples[index])}"
        lines.append(f"[{plain(answers, LINE)}] {plain(examples[index].text, LINE)}\n")
    return "\n".join(lines)


def told(predictions: Predictions, index: int) -> str:
    """What the model says of one text, for people."""
    if predictions.problem_type == REGRESSION:
        return ", ".join(f"{number:.3f}" for number in predictions.logits[index])
    chosen = np.flatnonzero(predictions.decisions[index])
    return ", ".join(f"{predictions.names[label]} {predictions.probabilities[index, label]:.1%}" for label in chosen) or "none"


def truth(example: Example) -> str:
    """The label of an example, for people."""
    return example.label if isinstance(example.label, str) else ", ".join(map(str, example.label)) or "none"


def mistakes_table(examples: list[Example], labels: np.ndarray, predictions: Predictions) -> str:
    """What was predicted wrongly, the worst first, as Markdown; where numbers are predicted, what is furthest off."""
    if predictions.problem_type == REGRESSION:
        badness, wrong = np.abs(predictions.logits - labels).max(-1), np.arange(len(examples))
    else:
        badness = np.abs(predictions.probabilities - labels).max(-1)
        wrong = np.flatnonzero((predictions.decisions != labels).any(-1))
    what = f"{len(wrong):,} of {len(examples):,} texts, the worst first" if len(wrong) else "none"
    lines = [f"Mistakes: {what}.", "", "| predicted | true | text |", "|---|---|---|"]
    for index in wrong[np.argsort(-badness[wrong], kind="stable")][:MOST_MISTAKES]:
        cells = told(predictions, index), truth(examples[index]), examples[index].text
        lines.append(f"| {' | '.join(cell(text) for text in cells)} |")
    return "\n".join(lines) + "\n"


def draw_predictions(labels: np.ndarray, predictions: Predictions, path: Path) -> None:
    """As a PNG: which labels are taken for which, what is found of each label, or predicted beside true numbers."""
    names = [plain(name, NAME).replace("$", r"\$") for name in predictions.names]  # which would begin a formula
    side = 3 + 0.45 * min(len(names), MOST_IN_PICTURE)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    match predictions.problem_type:
        case "regression":
            dots = [axes.scatter(*pair, s=8, alpha=0.6) for pair in zip(labels.T, predictions.logits.T, strict=True)]
            ends = [float(labels.min()), float(labels.max())]
            axes.plot(ends, ends, color="grey", linewidth=0.8)
            axes.set(xlabel="true", ylabel="predicted")
            axes.legend(dots, names)
        case "single_label_classification":
            _draw_counts(axes, predictions.confusion_matrix(labels), names, names)
            axes.set(xlabel="predicted", ylabel="true")
        case _:
            found = [(a * b).sum(0) for a, b in ((labels, predictions.decisions), (labels, 1 - predictions.decisions))]
            wrong = ((1 - labels) * predictions.decisions).sum(0)
            _draw_counts(axes, np.stack((*found, wrong), 1).astype(int), names, ["found", "missed", "wrongly told"])
    with warnings.catch_warnings(action="ignore"):  # of characters that the font has not
        figure.savefig(path, dpi=120)


def _draw_counts(axes: Any, counts: np.ndarray, rows: list[str], columns: list[str]) -> None:
    """Counts as numbers, the share of each in its row as a colour."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if len(rows) <= MOST_IN_PICTURE:
        is_long = max(map(len, columns)) > 5
        axes.set_xticks(range(len(columns)), columns, rotation=45 if is_long else 0, ha="right" if is_long else "center")
        axes.set_yticks(range(len(rows)), rows)
        for row, column in np.ndindex(counts.shape):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=color)


def results_table(before: Any, results: dict[str, dict[str, Any]], problem_type: str) -> str:
    """The scores of each split side by side, then those of each label, as Markdown."""
    columns = {"validation, before": vars(before), **results}
    rows = [key for key, value in list(results.values())[-1].items() if isinstance(value, float)]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = (f"{column[row]:.4f}" if row in column else "" for column in columns.values())
        lines.append(f"| {row.replace('_', ' ')} | {' | '.join(cells)} |")
    looked = "The validation split was used to follow training" + (
        "; the test split once, at the end." if "test" in results else "."
    )
    lines += ["", f"The loss is in {UNITS[problem_type]}. {looked}"]
    if labels := list(results.values())[-1].get("labels"):
        lines += ["", f"| {list(results)[-1]} | precision | recall | F1 | examples |", "|---|---|---|---|---|"]
        for name, it in labels.items():
            lines.append(f"| {cell(name)} | {it['precision']:.4f} | {it['recall']:.4f} | {it['f1']:.4f} | {it['examples']:,} |")
    return "\n".join(lines)
