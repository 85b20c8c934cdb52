"""Fine-tune a pretrained GPT to classify texts: from a model directory and labelled examples to a classifier.

    accelerate launch training/classify.py
    accelerate launch training/classify.py --dataset sms.tsv --base_model outputs/pretrain --output_dir outputs/spam
    accelerate launch training/classify.py --dataset sms.tsv --train_last_n_layers 1 --output_dir outputs/last-block
    accelerate launch training/classify.py --dataset sms.tsv --lora_r 16 --output_dir outputs/lora

By default it reads training/configs/classify.yaml, and fine-tunes the model of `training/pretrain.py` to predict which library
a docstring comes from. training/predict.py labels texts with the result.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from tokenizers import normalizers
from torch import nn
from torch.utils.data import DataLoader

from modeling_scratchgpt import ScratchGPTForSequenceClassification
from training.cli import option, run_main
from training.data.augmentation import AugmentedTexts
from training.data.datasets import PaddedExamples, TokenizedExamples, padded_dataloader, sort_by_length
from training.data.examples import (
    MULTI,
    REGRESSION,
    SINGLE,
    ExampleArguments,
    as_numbers,
    check_examples,
    class_weights,
    read_examples,
)
from training.data.samplers import LengthGroupedBatchSampler
from training.data.splits import SPLITS
from training.data.tokens import tokenize_texts
from training.engine.arguments import EpochArguments, resolve_epochs
from training.engine.flops import flops_per_token
from training.engine.pretrained import (
    TuningArguments,
    check_tuning,
    dropout_fields,
    ensure_padding,
    freeze,
    load_config_and_tokenizer,
    load_pretrained,
    lora_config,
)
from training.engine.run_folder import MISTAKES, PREDICTIONS, SCORES
from training.engine.train import TrainResult
from training.errors import UserError
from training.recipe import Recipe, run_recipe
from training.results.cards import BASE_PLACEHOLDER, MODEL_PLACEHOLDER, CardContent, dataset_name, describe_base
from training.results.classification_report import (
    UNITS,
    describe_labels,
    draw_predictions,
    mistakes_table,
    preview_predictions,
    results_table,
)
from training.results.markdown import code
from training.results.scores import Predictions, predict

USAGE = f"""from transformers import pipeline

classify = pipeline("text-classification", model="{MODEL_PLACEHOLDER}", trust_remote_code=True, top_k=None)
print(classify({{text}}, truncation=True))"""

ADAPTER_USAGE = f"""from peft import PeftModel
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained(
    "{BASE_PLACEHOLDER}", num_labels={{num_labels}}, classifier_pooling={{pooling}}, trust_remote_code=True
)
model = PeftModel.from_pretrained(model, "{MODEL_PLACEHOLDER}")"""

EXAMPLES = f"""![{{split}} split]({PREDICTIONS})

The mistakes on that split are in [{MISTAKES}]({MISTAKES}), all metrics in [{SCORES}]({SCORES})."""

PREDICTS = {
    SINGLE: "the probability of each class of a text",
    MULTI: "the probability of each of several labels of a text",
    REGRESSION: "numbers for a text",
}


@dataclass
class ClassifyArguments(TuningArguments, EpochArguments, ExampleArguments):
    config: str = option("training/configs/classify.yaml", "YAML file with values for any of these arguments")
    classifier_pooling: str = option(
        "last", "hidden state that the head reads: of the last token, or the mean of all", choices=["last", "mean"]
    )
    lowercase: bool = option(False, "lowercase all texts, in the tokenizer")
    subword_dropout: float = option(
        0.0, "subword regularization: probability of a forced token boundary between two characters", minimum=0, below=1
    )
    token_dropout: float = option(
        0.0, "fraction of the tokens of a training text to drop, others each epoch", minimum=0, below=1
    )
    label_smoothing: float = option(0.0, "label smoothing, for one label per text", minimum=0, below=1)
    context_length: int = option(0, "maximum tokens per text, longer ones are truncated; 0: the model's maximum", minimum=0)
    output_dir: str = option("outputs/classify", "new directory for the model")


class ClassifyRecipe(Recipe[Any]):
    """Sequence classification: one label per text, several, or numbers."""

    arguments_class = ClassifyArguments
    usage = "pipeline('text-classification', {path}, trust_remote_code=True, top_k=None, truncation=True)"

    def __init__(self, arguments: ClassifyArguments, accelerator: Accelerator):
        super().__init__(arguments, accelerator)
        self.loss_unit = UNITS[arguments.problem_type]
        config, self.tokenizer = load_config_and_tokenizer(
            arguments.base_model, max(arguments.context_length, 4), arguments.train_last_n_layers
        )
        self.max_length = arguments.context_length or config.max_position_embeddings
        prepare_tokenizer(self.tokenizer, arguments.base_model, self.max_length, arguments.lowercase)
        accelerator.print(f"Reading {dataset_name(arguments.dataset)}")
        with accelerator.local_main_process_first():  # the first process of each machine fills the cache
            self.examples = read_examples(arguments, arguments.seed)
        self.names = self.examples.names
        self._tokenize()
        self._report_data()
        self.arguments = resolve_epochs(arguments, len(self.train_examples))
        self._prepare_evaluation()
        self.data_digest = self.examples.digest()
        self.flops_per_token = flops_per_token(
            config,
            int(self.train_examples.lengths.mean()),
            frozen=bool(arguments.lora_r),
            has_head=False,
            trained_blocks=arguments.train_last_n_layers if arguments.train_last_n_layers >= 0 else None,
        )

    @staticmethod
    def check(arguments: ClassifyArguments) -> None:
        if arguments.label_smoothing and arguments.problem_type != SINGLE:
            raise UserError(f"--label_smoothing is for one label per text: omit it with {arguments.problem_type}.")
        if 0 < arguments.context_length < 4:
            raise UserError(f"--context_length must be at least 4, got {arguments.context_length}.")
        check_tuning(arguments)
        check_examples(arguments)

    def _tokenize(self) -> None:
        """Labels and token ids of each split that is not empty."""
        arguments = self.arguments
        splits = {name: split for name, split in self.examples.splits.items() if split}
        self.labels = {name: as_numbers(split, self.names, arguments.problem_type) for name, split in splits.items()}
        self.tokenized: dict[str, TokenizedExamples] = {}
        self.num_truncated: dict[str, int] = {}
        for name, split in splits.items():
            labels = training_labels(arguments, self.labels[name]) if name == "train" else self.labels[name]
            texts = [example.text for example in split]
            self.tokenized[name], self.num_truncated[name] = tokenize_texts(texts, self.tokenizer, self.max_length, labels)
        self.train_examples = self.tokenized["train"]
        self.train_dataset: Any = PaddedExamples(self.train_examples)
        if arguments.subword_dropout or arguments.token_dropout:
            self.train_dataset = AugmentedTexts(
                [example.text for example in splits["train"]],
                self.train_examples,
                self.tokenizer,
                self.max_length,
                arguments.subword_dropout,
                arguments.token_dropout,
                arguments.seed,
            )

    def _report_data(self) -> None:
        """Print sizes, labels and lengths; refuse a batch larger than the data, and data that is all truncated."""
        arguments, print_, examples, train = self.arguments, self.accelerator.print, self.examples, self.train_examples
        for name, labels in self.labels.items():
            counts = describe_labels(examples.splits[name], labels, self.names, arguments.problem_type)
            print_(f"{'Training' if name == 'train' else name.capitalize()} examples: {counts}")
        duplicates = " and ".join(f"{examples.duplicates[name]:,} of {name}" for name in SPLITS[:2])
        print_(f"Dropped as duplicates of texts in a later split: {duplicates}")
        if arguments.balance == "undersample":
            print_(f"Dropped by undersampling: {examples.undersampled:,}")
        if arguments.batch_size > len(train):
            raise UserError(f"--batch_size {arguments.batch_size} is more than the {len(train)} training examples: lower it.")
        if self.num_truncated["train"] == len(train):
            raise UserError(
                f"all training texts are longer than the limit of {self.max_length:,} tokens: use shorter texts, or a larger "
                "--context_length if the model has the positions for it."
            )
        truncated = ", ".join(f"{number:,} of {name}" for name, number in self.num_truncated.items())
        print_(
            f"Tokens per text: mean {train.lengths.mean():,.0f}, maximum {train.lengths.max():,}; truncated to "
            f"{self.max_length:,}: {truncated}"
        )

    def _prepare_evaluation(self) -> None:
        self.dataloaders, self.orders = {}, {}
        self.predictions: dict[str, Predictions] = {}  # of the latest evaluation of each split
        for name in self.tokenized.keys() - {"train"}:
            order = self.orders[name] = sort_by_length(self.tokenized[name].lengths)
            options: dict[str, Any] = {"batch_size": 4 * self.arguments.batch_size, "sampler": order}
            dataloader = padded_dataloader(PaddedExamples(self.tokenized[name]), self.tokenizer.pad_token_id, **options)
            self.dataloaders[name] = self.accelerator.prepare(dataloader)

    def build_model(self) -> ScratchGPTForSequenceClassification:
        """The base model with a new head, or the base's own if it is a classifier with as many labels."""
        arguments = self.arguments
        set_seed(arguments.seed)
        model: ScratchGPTForSequenceClassification = load_pretrained(
            ScratchGPTForSequenceClassification,
            arguments.base_model,
            lora_config(arguments, ["score"]),
            frozenset({"score.weight"}),
            id2label=dict(enumerate(self.names)),
            label2id={name: index for index, name in enumerate(self.names)},
            problem_type=arguments.problem_type,
            classifier_pooling=arguments.classifier_pooling,
            pad_token_id=self.tokenizer.pad_token_id,
            **dropout_fields(arguments.dropout),
        )
        if arguments.train_last_n_layers >= 0:
            freeze(model, arguments.train_last_n_layers, model.score)
        return model

    def train_dataloader(self) -> DataLoader:
        arguments = self.arguments
        num_batches = arguments.max_steps * arguments.gradient_accumulation_steps
        lengths = self.train_examples.lengths
        sampler = LengthGroupedBatchSampler(lengths, arguments.batch_size, num_batches, arguments.seed)
        return padded_dataloader(self.train_dataset, self.tokenizer.pad_token_id, batch_sampler=sampler)

    def evaluate(self, model: nn.Module, split: str = "validation") -> Any:
        logits = predict(self.accelerator, model, self.dataloaders[split], self.orders[split])
        self.predictions[split] = Predictions(logits, self.names, self.arguments.problem_type)
        return self.predictions[split].score(self.labels[split])

    def preview(self, model: Any) -> list[str]:
        return preview_predictions(self.examples.splits["validation"], self.predictions["validation"])

    def evaluate_test(self, model: Any) -> None:
        if "test" in self.dataloaders:
            self.accelerator.print(f"Test split, evaluated once, at the end: {self.evaluate(model, 'test')}\n")

    def write_results(self, directory: Path, result: TrainResult) -> None:
        last = self._last_split()
        labels, predictions = self.labels[last], self.predictions[last]
        scores = {"before": vars(result.before), **self._reports()}
        (directory / SCORES).write_text(json.dumps(scores, indent=2, ensure_ascii=False), encoding="utf-8")
        draw_predictions(labels, predictions, directory / PREDICTIONS)
        mistakes = mistakes_table(self.examples.splits[last], labels, predictions)
        (directory / MISTAKES).write_text(mistakes, encoding="utf-8")

    def card(self, result: TrainResult) -> CardContent:
        arguments, last, reports = self.arguments, self._last_split(), self._reports()
        dataset = dataset_name(arguments.dataset)
        names = ", ".join(map(code, self.names[:20]))
        names += f" and {len(self.names) - 20} more" if len(self.names) > 20 else ""
        return CardContent(
            introduction=f"A small GPT, {describe_base(arguments.base_model)} on {dataset}. It predicts "
            f"{PREDICTS[arguments.problem_type]}: {names}. It was evaluated on texts like those it was trained on; its "
            "predictions for other texts are not reliable.",
            usage=USAGE.format(text=repr(self.examples.splits[last][0].text[:80])),
            adapter_usage=ADAPTER_USAGE.format(num_labels=len(self.names), pooling=repr(arguments.classifier_pooling)),
            results=results_table(result.before, reports, arguments.problem_type),
            examples=EXAMPLES.format(split=last),
            task="text-classification",
            metrics={name: value for name, value in reports[last].items() if isinstance(value, float)},
            data={"Examples": f"{dataset}: " + ", ".join(f"{name} {len(split):,}" for name, split in self.tokenized.items())},
        )

    def _last_split(self) -> str:
        return "test" if "test" in self.predictions else "validation"

    def _reports(self) -> dict[str, dict[str, Any]]:
        """All metrics of the final model, by split."""
        return {split: predictions.full_report(self.labels[split]) for split, predictions in self.predictions.items()}


def prepare_tokenizer(tokenizer: Any, base_model: str, max_length: int, lowercase: bool = False) -> None:
    """Set the tokenizer to add BOS and EOS to every text, since the head reads the last token, and to pad and truncate."""
    if lowercase:
        backend = tokenizer.backend_tokenizer
        steps = [normalizers.Lowercase(), backend.normalizer]
        backend.normalizer = normalizers.Sequence([step for step in steps if step])
    tokenizer.add_bos_token = tokenizer.bos_token is not None
    tokenizer.add_eos_token = tokenizer.eos_token is not None
    ensure_padding(tokenizer, base_model)
    tokenizer.model_max_length = max_length
    tokenizer.padding_side = "right"


def training_labels(arguments: ClassifyArguments, labels: np.ndarray) -> np.ndarray:
    """The labels of the loss (N, C): with label smoothing, and scaled by class weights, if the arguments say so."""
    if arguments.problem_type != SINGLE:
        return labels
    smooth = (1 - arguments.label_smoothing) * labels + arguments.label_smoothing / labels.shape[1]
    if arguments.balance == "weights":
        smooth *= (labels @ class_weights(labels))[:, None]
    return smooth.astype(np.float32)


def main(argv: Sequence[str] | None = None) -> None:
    run_recipe(ClassifyRecipe, __doc__, argv)


if __name__ == "__main__":
    run_main(main)
