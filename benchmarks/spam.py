"""SMS spam or ham: ScratchGPT, pretrained and fine-tuned here, beside scikit-learn's classifiers on the same splits.

    python benchmarks/spam.py --data ../shared/data              # the SMS Spam Collection in its folder sms-spam
    python benchmarks/spam.py --data ../shared/data --seeds 0    # one split

Chapter 6 of "Build a Large Language Model From Scratch" asks the same: as many ham as spam, 70/10/20. Each seed balances,
and trains anew. The model is pretrained once, by training/pretrain.py, on the docstrings of Python and on ham that balancing
leaves over for every seed: no text that any seed trains, chooses or tests with is among it. Then training/classify.py trains all
of it, its last block, or LoRA. The table tells the mean accuracy on the test splits, and the minutes of a run as a user waits.
"""

from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

ROOT = Path(__file__).parents[1]
WAYS = {
    "everything": [],
    "LoRA, rank 16": ["--lora_r", "16", "--learning_rate", "0.003"],
    "the last block": ["--train_blocks", "1", "--learning_rate", "0.002"],
}
PEERS = {
    "TF-IDF of words, logistic regression": lambda: make_pipeline(TfidfVectorizer(), LogisticRegression(C=10)),
    "TF-IDF of 1 to 5 characters, SVM": lambda: make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(1, 5), lowercase=False, sublinear_tf=True), LinearSVC()
    ),
    "TF-IDF of 2 to 5 characters of words, SVM": lambda: make_pipeline(
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True), LinearSVC()
    ),
}
