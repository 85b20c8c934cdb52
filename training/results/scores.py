"""How good a classifier is: what it predicts for all texts, a few scores for every look at it, and all of them for the last.

Notable:
- Predictions are made in full before anything is scored, so no score is a mean over batches or processes.
- A score that is not defined for the labels at hand (ROC-AUC where a class is missing) is left out, not guessed.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from sklearn import metrics
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from training.data.examples import MULTI, REGRESSION, SINGLE

NUM_BINS = 15  # of the calibration error, as in Guo et al., 2017


@dataclass(frozen=True)
class ClassificationScores:
    """What is told of a classifier while it learns."""

    loss: float  # nats a text, or a label where there are several a text
    accuracy: float  # share of the texts with everything right
    macro_f1: float  # mean over the labels

    def __str__(self) -> str:
        return f"loss {self.loss:.3f}, accuracy {self.accuracy:.2%}, macro-F1 {self.macro_f1:.3f}"


@dataclass(frozen=True)
class RegressionScores:
    """The same where numbers are told of a text."""

    loss: float  # mean squared error
    mean_absolute_error: float
    r2: float  # share of the variance that is explained

    def __str__(self) -> str:
        return f"squared error {self.loss:.4f}, absolute error {self.mean_absolute_error:.4f}, R² {self.r2:.3f}"


@dataclass(frozen=True)
class Predictions:
    """
    What a model says of texts.

    Attributes:
        logits: (N, C), as the model gives them.
        names: C, of the labels or of the numbers.
        problem_type: as transformers calls it.
    """

    logits: np.ndarray
    names: list[str]
    problem_type: str

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Of each label (N, C): they sum to 1 where a text has one, and stand for themselves where it may have several."""
        logits = torch.from_numpy(self.logits).double()
        return (logits.softmax(-1) if self.problem_type == SINGLE else logits.sigmoid()).numpy()

    @cached_property
    def decisions(self) -> np.ndarray:
        """0 or 1 for each label (N, C): the likeliest, or all that are likelier than not."""
        if self.problem_type == SINGLE:
            return np.eye(len(self.names), dtype=int)[self.logits.argmax(-1)]
        return (self.logits > 0).astype(int)

    def score(self, labels: np.ndarray) -> ClassificationScores | RegressionScores:
        """Against the true labels (N, C), 0 or 1, or numbers."""
        functions: dict[str, Any] = {
            SINGLE: functional.cross_entropy,
            MULTI: functional.binary_cross_entropy_with_logits,
            REGRESSION: functional.mse_loss,
        }
        logits, truth = (torch.from_numpy(numbers).double() for numbers in (self.logits, labels))
        loss = functions[self.problem_type](logits, truth).item()  # without the weights and the smoothing of training
        if self.problem_type == REGRESSION:
            return RegressionScores(
                loss, float(np.abs(self.logits - labels).mean()), float(metrics.r2_score(labels, self.logits))
            )
        return ClassificationScores(loss, float((self.decisions == labels).all(-1).mean()), float(self._f1(labels)[2].mean()))

    def full_report(self, labels: np.ndarray) -> dict[str, Any]:
        """Everything that can be said of them, for `metrics.json` and the card."""
        found: dict[str, Any] = {"examples": len(labels), **asdict(self.score(labels))}
        if self.problem_type == REGRESSION:
            if np.ptp(labels, axis=0).all() and np.ptp(self.logits, axis=0).all():
                pairs = zip(self.logits.T, labels.T, strict=True)
                found["pearson_correlation"] = float(np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs]))
            return found
        right = self.decisions == labels
        if self.problem_type == SINGLE:
            confidences, right = self.probabilities.max(-1), right.all(-1)
            found["confusion_matrix"] = self.confusion_matrix(labels).tolist()
        else:
            confidences = np.maximum(self.probabilities, 1 - self.probabilities)
            found["micro_f1"] = float(metrics.f1_score(labels, self.decisions, average="micro", zero_division=0))
        found["expected_calibration_error"] = calibration_error(confidences.ravel(), right.ravel())
        varying = [column for column in range(len(self.names)) if 0 < labels[:, column].sum() < len(labels)]
        if len(varying) == len(self.names):
            found["roc_auc"] = float(metrics.roc_auc_score(labels, self.probabilities, average="macro"))
        columns = dict(zip(("precision", "recall", "f1"), self._f1(labels), strict=True))
        found["labels"] = {
            name: {key: float(column[index]) for key, column in columns.items()} | {"examples": int(labels[:, index].sum())}
            for index, name in enumerate(self.names)
        }
        return found

    def confusion_matrix(self, labels: np.ndarray) -> np.ndarray:
        """How many texts of each label (rows) are taken for each (columns)."""
        return metrics.confusion_matrix(labels.argmax(-1), self.decisions.argmax(-1), labels=range(len(self.names)))

    def _f1(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall and F1 of each label."""
        return metrics.precision_recall_fscore_support(labels, self.decisions, average=None, zero_division=0)[:3]


def calibration_error(confidences: np.ndarray, right: np.ndarray) -> float:
    """How far, on average, the confidence in a decision is from the share of such decisions that are right (N,).

    Decisions are put into 15 bins of equal width by their confidence (Guo et al., 2017).
    """
    bins = np.minimum((confidences * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=confidences - right, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(confidences))


@torch.no_grad()
def predict(accelerator: Accelerator, model: nn.Module, loader: DataLoader, order: list[int]) -> np.ndarray:
    """The model's logits (N, C), in the order of the texts.

    Args:
        accelerator, model, loader: prepared by Accelerate.
        order: which text the loader gives first, which next, and so on.
    """
    model.eval()
    parts = []
    for batch in tqdm(loader, desc="Evaluating", unit=" batches", leave=False, disable=not accelerator.is_main_process):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        parts.append(accelerator.gather_for_metrics(logits.float()).cpu())
    gathered = torch.cat(parts).numpy()
    result = np.empty_like(gathered)
    result[order] = gathered
    return result
