"""Classification of SMS as spam or ham, compared with scikit-learn's classifiers on the same splits.

    python benchmarks/spam.py --data ../shared/data              # the SMS Spam Collection, in the directory sms-spam
    python benchmarks/spam.py --data ../shared/data --seeds 0    # one split

The task of chapter 6 of "Build a Large Language Model From Scratch": balanced classes, split 70/10/20. The seed determines the
undersampling, the split and the training. For each seed training/pretrain.py trains a base model on the ham that undersampling
drops, in lowercase, without any text (or duplicate of one) in a split. training/classify.py then fine-tunes all of the model,
its last block, or LoRA. Minutes are those of a whole command.
"""

import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from measuring import make_parser, run_recipe
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import LinearSVC

from training.data.examples import ExampleArguments, Examples, read_examples
from training.data.files import Encoding, read_rows
from training.data.splits import SPLITS

COLUMNS = ["label", "text"]
BASE = "the base, pretrained"
PRETRAIN = "--vocab_size 4000 --model num_hidden_layers=1 hidden_size=256 --max_steps 120 --batch_size 8 --windows packed"
CLASSIFY = (
    "--columns label text --balance undersample --classifier_pooling mean --lowercase --subword_dropout 0.1 "
    "--token_dropout 0.2 --label_smoothing 0.05 --learning_rate 0.001 --num_train_epochs 14"
)
METHODS = {
    "everything trained": "",
    "LoRA of rank 16": "--lora_r 16 --learning_rate 0.003",
    "the last block trained": "--train_last_n_layers 1 --learning_rate 0.002",
}
IN_WORDS = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
CHARACTERS = TfidfVectorizer(analyzer="char", ngram_range=(1, 5), lowercase=False, sublinear_tf=True)
BASELINES = {
    "characters 2 to 5 within words, SVM": make_pipeline(IN_WORDS, LinearSVC()),
    "characters 1 to 5, SVM": make_pipeline(CHARACTERS, LinearSVC()),
    "words, logistic regression": make_pipeline(TfidfVectorizer(), LogisticRegression(C=10)),
}


def read_splits(path: Path, seed: int) -> Examples:
    """The splits of a seed, as training/classify.py reads them."""
    return read_examples(ExampleArguments(dataset=[str(path)], columns=COLUMNS, balance="undersample", split_seed=seed))


def write_unused_texts(path: Path, splits: Examples, output: Path) -> None:
    """Write the texts that are not in any split, in lowercase."""
    used = {example.text.strip() for name in SPLITS for example in splits.splits[name]}
    rows = read_rows(path, {"text": "text_column"}, Encoding(), COLUMNS)
    unused = (row["text"].lower() for _, row in rows if row["text"].strip() not in used)
    output.write_text("".join(json.dumps({"text": text}) + "\n" for text in unused), encoding="utf-8")


def baseline_accuracy(classifier: Pipeline, splits: Examples) -> float:
    """Test accuracy of a classifier trained on the training split."""
    (texts, labels), (test_texts, test_labels) = (
        zip(*((example.text, example.label) for example in splits.splits[name]), strict=True) for name in ("train", "test")
    )
    return classifier.fit(texts, labels).score(test_texts, test_labels)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory with sms-spam/SMSSpamCollection")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    path = (arguments.data / "sms-spam" / "SMSSpamCollection").resolve()
    accuracies, minutes = defaultdict(list), defaultdict(list)
    for seed in arguments.seeds:
        splits = read_splits(path, seed)
        for title, classifier in BASELINES.items():
            accuracies[title].append(baseline_accuracy(classifier, splits))
        with tempfile.TemporaryDirectory() as name:
            directory, shared = Path(name), ["--seed", str(seed), "--split_seed", str(seed)]
            write_unused_texts(path, splits, directory / "ham.jsonl")
            argv = ["--dataset", f"{directory}/ham.jsonl", "--output_dir", f"{directory}/base", *shared]
            minutes[BASE].append(run_recipe("pretrain", *argv, *PRETRAIN.split())[0])
            for title, options in METHODS.items():
                output = directory / title.replace(" ", "-")
                argv = ["--dataset", str(path), "--base_model", f"{directory}/base", "--output_dir", str(output), *shared]
                minutes[title].append(run_recipe("classify", *argv, *CLASSIFY.split(), *options.split())[0])
                scores = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
                accuracies[title].append(scores["test"]["accuracy"])
        print(f"Seed {seed}: " + ", ".join(f"{title} {values[-1]:.2%}" for title, values in accuracies.items()), flush=True)
    print("\n| | test accuracy | lowest to highest | minutes |\n|---|---|---|---|")
    print(f"| {BASE} | | | {np.mean(minutes[BASE]):.1f} |")
    for title in (*METHODS, *BASELINES):
        values, duration = accuracies[title], f"{np.mean(minutes[title]):.1f}" if title in minutes else ""
        print(f"| {title} | {np.mean(values):.2%} | {min(values):.2%} to {max(values):.2%} | {duration} |")


if __name__ == "__main__":
    main()
