"""Metrics of a classifier: its predictions for all texts, a few metrics for every evaluation, a full report at the end.

Notable:
- All predictions are made before anything is scored, so no metric is a mean over batches or processes.
- A metric that is undefined for the labels (ROC-AUC if a class is missing) is left out.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from sklearn import metrics
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from training.data.examples import MULTI, REGRESSION, SINGLE
from training.progress import bar_options

NUM_BINS = 15  # of the calibration error, as in Guo et al., 2017


@dataclass(frozen=True)
class ClassificationScores:
    """Metrics of a classifier at an evaluation."""

    loss: float  # nats per text, or per label if a text has several
    accuracy: float  # share of the texts with all labels right
    macro_f1: float  # mean over the labels; with one per text, over those that occur or are predicted

    def __str__(self) -> str:
        return f"loss {self.loss:.3f}, accuracy {self.accuracy:.2%}, macro-F1 {self.macro_f1:.3f}"


@dataclass(frozen=True)
class RegressionScores:
    """Metrics of a regression at an evaluation."""

    loss: float  # mean squared error
    mean_absolute_error: float
    r2: float  # share of the variance explained

    def __str__(self) -> str:
        return f"squared error {self.loss:.4f}, absolute error {self.mean_absolute_error:.4f}, R² {self.r2:.3f}"


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model for N texts."""

    logits: np.ndarray  # (N, C), the output of the model
    names: list[str]  # C, of the labels or of the numbers
    problem_type: str  # as in transformers

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Probabilities of the labels (N, C): softmax for one label per text, sigmoid for several."""
        logits = torch.from_numpy(self.logits).double()
        return (logits.softmax(-1) if self.problem_type == SINGLE else logits.sigmoid()).numpy()

    @cached_property
    def decisions(self) -> np.ndarray:
        """0 or 1 for each label (N, C): 1 for the most probable one, or for all above one half."""
        if self.problem_type == SINGLE:
            return np.eye(len(self.names), dtype=int)[self.logits.argmax(-1)]
        return (self.logits > 0).astype(int)

    def score(self, labels: np.ndarray) -> ClassificationScores | RegressionScores:
        """Metrics against the true labels (N, C), 0 or 1, or numbers."""
        functions: Any = {SINGLE: cross_entropy, MULTI: binary_cross_entropy_with_logits, REGRESSION: mse_loss}
        logits, truth = (torch.from_numpy(numbers).double() for numbers in (self.logits, labels))
        loss = functions[self.problem_type](logits, truth).item()  # without class weights and label smoothing
        if self.problem_type == REGRESSION:
            error = np.abs(self.logits - labels).mean()
            return RegressionScores(loss, float(error), float(metrics.r2_score(labels, self.logits)))
        accuracy = (self.decisions == labels).all(-1).mean()
        f1 = self.f1_scores(labels)[2]
        if self.problem_type == SINGLE:
            f1 = f1[(labels + self.decisions).any(0)]  # as scikit-learn: labels that this split lacks have no F1
        return ClassificationScores(loss, float(accuracy), float(f1.mean()))

    def full_report(self, labels: np.ndarray) -> dict[str, Any]:
        """All metrics, for `metrics.json` and the card."""
        report: dict[str, Any] = {"examples": len(labels), **asdict(self.score(labels))}
        if self.problem_type == REGRESSION:
            if np.ptp(labels, axis=0).all() and np.ptp(self.logits, axis=0).all():
                pairs = zip(self.logits.T, labels.T, strict=True)
                report["pearson_correlation"] = float(np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs]))
            return report
        right = self.decisions == labels
        if self.problem_type == SINGLE:
            confidences, right = self.probabilities.max(-1), right.all(-1)
            report["confusion_matrix"] = self.confusion_matrix(labels).tolist()
        else:
            confidences = np.maximum(self.probabilities, 1 - self.probabilities)
            report["micro_f1"] = float(self.f1_scores(labels, average="micro")[2])
        report["expected_calibration_error"] = calibration_error(confidences.ravel(), right.ravel())
        if all(0 < count < len(labels) for count in labels.sum(0)):
            report["roc_auc"] = float(metrics.roc_auc_score(labels, self.probabilities, average="macro"))
        keys, examples = ("precision", "recall", "f1", "examples"), labels.sum(0).astype(int)
        rows = zip(*(column.tolist() for column in (*self.f1_scores(labels), examples)), strict=True)
        report["labels"] = {name: dict(zip(keys, row, strict=True)) for name, row in zip(self.names, rows, strict=True)}
        return report

    def confusion_matrix(self, labels: np.ndarray) -> np.ndarray:
        """Counts (C, C): true labels in rows, predicted ones in columns."""
        return metrics.confusion_matrix(labels.argmax(-1), self.decisions.argmax(-1), labels=range(len(self.names)))

    def f1_scores(self, labels: np.ndarray, average: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall and F1 of each label, (C,) each."""
        single = [1] if len(self.names) == 1 else None  # scikit-learn would also score the absence of a single label
        scores = metrics.precision_recall_fscore_support
        return scores(labels, self.decisions, labels=single, average=average, zero_division=0)[:3]


def calibration_error(confidences: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error of N decisions: the mean gap between confidence (N,) and accuracy, over 15 bins of equal width
    (Guo et al., 2017)."""
    bins = np.minimum((confidences * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=confidences - right, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(confidences))


@torch.no_grad()
def predict(accelerator: Accelerator, model: nn.Module, dataloader: DataLoader, order: list[int]) -> np.ndarray:
    """The logits of the model (N, C), in the order of the texts; `order` has their indices in the order of the dataloader.

    Model and dataloader are prepared by Accelerate.
    """
    model.eval()
    parts = []
    options = bar_options(hidden=not accelerator.is_main_process)
    for batch in tqdm(dataloader, desc="Evaluating", unit=" batches", leave=False, **options):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        parts.append(accelerator.gather_for_metrics(logits.float()).cpu())
    return torch.cat(parts).numpy()[np.argsort(order)]
