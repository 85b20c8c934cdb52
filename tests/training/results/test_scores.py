import json
import math
import struct

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch.nn import functional

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForSequenceClassification, ScratchGPTTokenizer
from tests.conftest import TINY, on_two_processes
from training.data.datasets import PaddedExamples, padded_dataloader, sort_by_length
from training.data.examples import MULTI, REGRESSION, SINGLE, Example
from training.data.tokens import tokenize_texts
from training.engine.launch import start_accelerator
from training.results.classification_report import draw_predictions, mistakes_table
from training.results.scores import Predictions, calibration_error, predict

NAMES = ["a", "b", "c"]
# Four texts: right, right, b taken for a, c taken for b.
LOGITS = np.log([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.1, 0.5, 0.4]]).astype(np.float32)
LABELS = np.eye(3, dtype=np.float32)[[0, 1, 1, 2]]


def test_metrics_of_one_label_per_text_by_hand():
    predictions = Predictions(LOGITS, NAMES, SINGLE)
    found = predictions.full_report(LABELS)
    assert found["loss"] == pytest.approx(-np.log([0.8, 0.7, 0.3, 0.4]).mean(), rel=1e-6)
    assert found["accuracy"] == 0.5
    assert found["confusion_matrix"] == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    # a: 1 of the 2 found are right, 1 of 1 is found. b: 1 of 2, 1 of 2. c: none is found.
    assert [found["labels"][name]["precision"] for name in NAMES] == [0.5, 0.5, 0.0]
    assert [found["labels"][name]["recall"] for name in NAMES] == [1.0, 0.5, 0.0]
    assert [found["labels"][name]["f1"] for name in NAMES] == pytest.approx([2 / 3, 1 / 2, 0])
    assert [found["labels"][name]["examples"] for name in NAMES] == [1, 2, 1]
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 3)
    # Pairs in which the one with the label is the likelier, by label: 3 of 3, (0.7 and 0.3 against 0.1 and 0.5) 3 of 4, 3 of 3.
    assert found["roc_auc"] == pytest.approx((1 + 3 / 4 + 1) / 3)
    assert str(predictions.score(LABELS)) == "loss 0.675, accuracy 50.00%, macro-F1 0.389"
    json.dumps(found)


def test_an_undefined_metric_is_left_out():
    assert "roc_auc" not in Predictions(LOGITS[:3], NAMES, SINGLE).full_report(LABELS[:3])
    assert "pearson_correlation" not in Predictions(np.ones((3, 1)), ["x"], REGRESSION).full_report(np.array([[1.0], [2], [3]]))


@pytest.mark.parametrize("present", [3, 49])
def test_macro_f1_is_that_of_scikit_learn(present):
    """Also if the split lacks labels: of 77, those that occur or are predicted count."""
    labels = np.eye(77)[np.arange(90) % present]
    logits = np.random.default_rng(0).normal(size=(90, 77)).astype(np.float32) + 3 * labels.astype(np.float32)
    expected = metrics.f1_score(labels.argmax(-1), logits.argmax(-1), average="macro")
    assert Predictions(logits, list(map(str, range(77))), SINGLE).score(labels).macro_f1 == pytest.approx(expected)


def test_calibration_error_by_hand():
    """Two bins: three decisions at 0.9 of which two are right, one at 0.6 that is wrong."""
    confidences, right = np.array([0.9, 0.9, 0.9, 0.6]), np.array([True, True, False, False])
    assert calibration_error(confidences, right) == pytest.approx((3 * (0.9 - 2 / 3) + 0.6) / 4)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0


def test_metrics_of_several_labels_per_text_by_hand():
    logits = np.array([[2.0, -1], [0.5, 3], [-1, -2]], dtype=np.float32)
    labels = np.array([[1.0, 0], [0, 1], [0, 1]], dtype=np.float32)
    found = Predictions(logits, ["x", "y"], MULTI).full_report(labels)
    expected = functional.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx(1 / 3)  # texts with both right
    assert found["labels"]["x"]["precision"] == 0.5
    assert found["labels"]["y"]["recall"] == 0.5
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["roc_auc"] == pytest.approx((1 + 1 / 2) / 2)
    alone = Predictions(logits[:, :1], ["x"], MULTI).full_report(labels[:, :1])
    assert alone["labels"] == {"x": found["labels"]["x"]}
    assert alone["micro_f1"] == alone["macro_f1"] == found["labels"]["x"]["f1"]


def test_metrics_of_a_regression_by_hand():
    logits, labels = np.array([[1.0], [2], [4]]), np.array([[1.0], [3], [5]])
    found = Predictions(logits, ["stars"], REGRESSION).full_report(labels)
    assert found["loss"] == pytest.approx(2 / 3)
    assert found["mean_absolute_error"] == pytest.approx(2 / 3)
    assert found["r2"] == pytest.approx(1 - 2 / 8)
    assert found["pearson_correlation"] == pytest.approx(6 / math.sqrt(14 / 3 * 8))


def test_probabilities_equal_those_of_torch():
    torch.testing.assert_close(
        torch.from_numpy(Predictions(LOGITS, NAMES, SINGLE).probabilities), torch.from_numpy(LOGITS).double().softmax(-1)
    )
    torch.testing.assert_close(
        torch.from_numpy(Predictions(LOGITS, NAMES, MULTI).probabilities), torch.from_numpy(LOGITS).double().sigmoid()
    )


def predict_together_and_alone() -> None:
    accelerator = start_accelerator()
    assert accelerator.num_processes == 2
    torch.manual_seed(0)
    model = ScratchGPTForSequenceClassification(ScratchGPTConfig(**TINY, num_labels=3, initializer_range=0.5)).eval()
    tokenizer = ScratchGPTTokenizer.train(["to be or not to be, that is the question"] * 9, 290)
    examples, _ = tokenize_texts(["be " * n + "or not" for n in range(1, 12)], tokenizer, 64)
    order, rows = sort_by_length(examples.lengths), PaddedExamples(examples)
    dataloader = accelerator.prepare(padded_dataloader(rows, tokenizer.pad_token_id, batch_size=4, sampler=order))
    together = predict(accelerator, accelerator.prepare(model), dataloader, order)
    with torch.no_grad():
        alone = torch.cat([model(rows[n]["input_ids"][None]).logits for n in range(11)])
    torch.testing.assert_close(torch.from_numpy(together), alone, atol=1e-4, rtol=1e-4)


def test_two_processes_predict_the_same(tmp_path):
    """The number of texts is not a multiple of the batch size, and the lengths of batches differ by process."""
    on_two_processes(predict_together_and_alone, tmp_path, (), ACCELERATE_USE_CPU="true")


def test_the_worst_mistakes_come_first():
    examples = [Example(text, label, text) for text, label in (("one", "a"), ("two", "b"), ("a|b <i>", "b"), ("four\n4", "c"))]
    lines = mistakes_table(examples, LABELS, Predictions(LOGITS, NAMES, SINGLE)).splitlines()
    assert lines[0] == "Mistakes: 2 of 4 texts, the worst first."
    assert lines[4:] == [r"| `a 60.0%` | `b` | `a\|b <i>` |", "| `b 50.0%` | `c` | `four 4` |"]


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
def test_a_picture_with_unusual_names(tmp_path, kind):
    """Names that matplotlib would take for formulas or leave out of a legend, or that would fill the picture."""
    names = ["$10_$20", r"$\bad$", "_" + "x" * 5000 + "\r🙂"]
    draw_predictions(LABELS, Predictions(LOGITS, names, kind), tmp_path / "picture.png")
    width, height = struct.unpack(">II", (tmp_path / "picture.png").read_bytes()[16:24])
    assert 300 < width < 1500
    assert 300 < height < 1500
