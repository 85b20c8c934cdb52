"""Fine-tune a pretrained GPT to classify texts: from a model directory and labelled examples to a classifier.

    accelerate launch training/classify.py
    accelerate launch training/classify.py --dataset sms.tsv --base_model outputs/pretrain --output_dir outputs/spam
    accelerate launch training/classify.py --dataset sms.tsv --train_last_n_layers 1 --output_dir outputs/last-block
    accelerate launch training/classify.py --dataset sms.tsv --lora_r 16 --output_dir outputs/lora

By default it reads training/configs/classify.yaml, and fine-tunes the model of `training/pretrain.py` to predict which library
a docstring comes from. training/predict.py labels texts with the result.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tokenizers import normalizers
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig

from modeling_scratchgpt import ScratchGPTForSequenceClassification, ScratchGPTTokenizer
from modeling_scratchgpt.convert.reading import tokenizer_as
from training.cli import option, run_main
from training.data import examples
from training.data.augmentation import AugmentedTexts
from training.data.datasets import PaddedExamples, padded_dataloader, sort_by_length
from training.data.examples import MULTI, REGRESSION, SINGLE
from training.data.samplers import LengthGroupedBatchSampler
from training.data.splits import SPLITS
from training.data.tokens import tokenize_texts
from training.engine import pretrained
from training.engine.arguments import EpochArguments, resolve_epochs
from training.engine.flops import flops_per_token
from training.engine.run_folder import MISTAKES, PREDICTIONS, SCORES
from training.engine.train import TrainResult
from training.errors import UserError
from training.recipe import Recipe, run_recipe
from training.results import cards
from training.results import classification_report as report
from training.results.markdown import code, plain
from training.results.scores import Predictions, predict

USAGE = f"""from transformers import pipeline

classify = pipeline("text-classification", model="{cards.MODEL_PLACEHOLDER}", trust_remote_code=True, top_k=None)
print(classify({{text}}, truncation=True))"""

ADAPTER_USAGE = f"""from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

labels = {{labels}}
model = AutoModelForSequenceClassification.from_pretrained(
    "{cards.BASE_PLACEHOLDER}",
    id2label=dict(enumerate(labels)),
    label2id=dict(zip(labels, range(len(labels)))),
    problem_type={{problem_type!r}},
    classifier_pooling={{pooling!r}},
    ignore_mismatched_sizes=True,
    trust_remote_code=True,
)
model = PeftModel.from_pretrained(model, "{cards.MODEL_PLACEHOLDER}").merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained("{cards.MODEL_PLACEHOLDER}", trust_remote_code=True)
classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
print(classify({{text}}, truncation=True))"""

PREDICTS = {
    SINGLE: "the probability of each class of a text",
    MULTI: "the probability of each of several labels of a text",
    REGRESSION: "numbers for a text",
}
MIN_LENGTH = 4  # tokens, with BOS and EOS


@dataclass
class ClassifyArguments(pretrained.TuningArguments, EpochArguments, examples.ExampleArguments):
    config: str = option("training/configs/classify.yaml", "YAML file with values for any of these arguments")
    classifier_pooling: str = option("last", "hidden state that the head reads: last token or mean", choices=["last", "mean"])
    lowercase: bool = option(False, "lowercase all texts, in the tokenizer")
    subword_dropout: float = option(
        0.0, "subword regularization: probability of a forced token boundary between two characters", minimum=0, below=1
    )
    token_dropout: float = option(0.0, "fraction of a training text's tokens to drop, others each epoch", minimum=0, below=1)
    label_smoothing: float = option(0.0, "label smoothing, for one label per text", minimum=0, below=1)
    context_length: int = option(0, "maximum tokens per text, longer ones are truncated; 0: the model's maximum", minimum=0)
    output_dir: str = option("outputs/classify", "new directory for the model")


class ClassifyRecipe(Recipe[Any]):
    """Sequence classification: one label per text, several, or numbers."""

    arguments_class = ClassifyArguments
    usage = "pipeline('text-classification', {path}, trust_remote_code=True, top_k=None, truncation=True)"

    def __init__(self, arguments: ClassifyArguments, accelerator: Accelerator):
        super().__init__(arguments, accelerator)
        self.loss_unit = report.UNITS[arguments.problem_type]
        length, num_layers = max(arguments.context_length, MIN_LENGTH), arguments.train_last_n_layers
        config, self.tokenizer = pretrained.load_config_and_tokenizer(arguments.base_model, length, num_layers)
        self.max_length = arguments.context_length or config.max_position_embeddings
        self._prepare_tokenizer()
        accelerator.print(f"Reading {cards.dataset_name(arguments.dataset)}")
        with accelerator.local_main_process_first():  # the first process of each machine fills the cache
            self.examples = examples.read_examples(arguments)
        self.names = self.examples.names
        fields, _ = PreTrainedConfig.get_config_dict(arguments.base_model)
        is_classifier = any("ForSequenceClassification" in name for name in fields.get("architectures") or [])
        self.base_names = [*(config.id2label or {}).values()] if is_classifier else []  # of the rows of the base's head
        self.last_split = "test" if self.examples.splits["test"] else "validation"
        self._tokenize()
        self._report_data()
        train = self.tokenized["train"]
        self.arguments = resolve_epochs(arguments, len(train))
        self.orders = {name: sort_by_length(split.lengths) for name, split in self.tokenized.items() if name != "train"}
        self.dataloaders = {split: self._evaluation_dataloader(split) for split in self.orders}
        self.predictions: dict[str, Predictions] = {}  # of the latest evaluation of each split
        content = hashlib.sha256(self.examples.digest().encode())
        for split in self.tokenized.values():
            content.update(split.ids.tobytes())
        self.data_digest = content.hexdigest()
        length = int(train.lengths.mean())
        blocks = None if num_layers < 0 else num_layers
        self.flops_per_token = flops_per_token(config, length, bool(arguments.lora_r), has_head=False, trained_blocks=blocks)

    @staticmethod
    def check(arguments: ClassifyArguments) -> None:
        if arguments.label_smoothing and arguments.problem_type != SINGLE:
            raise UserError(f"--label_smoothing is for one label per text: omit it with {arguments.problem_type}.")
        if 0 < arguments.context_length < MIN_LENGTH:
            raise UserError(f"--context_length must be at least {MIN_LENGTH}, got {arguments.context_length}.")
        pretrained.check_tuning(arguments)
        examples.check_examples(arguments)

    def _prepare_tokenizer(self) -> None:
        """Set the tokenizer to add BOS and EOS to every text, since the head reads the last token, and to pad and truncate."""
        tokenizer: Any = self.tokenizer
        if self.arguments.lowercase:
            # The classes of GPT-2 and Qwen3 would drop the normalizer when they are loaded.
            self.tokenizer = tokenizer = tokenizer_as(ScratchGPTTokenizer, tokenizer)
            backend = tokenizer.backend_tokenizer
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *filter(None, [backend.normalizer])])
        tokenizer.add_bos_token = tokenizer.bos_token is not None
        tokenizer.add_eos_token = tokenizer.eos_token is not None
        pretrained.ensure_padding(tokenizer, self.arguments.base_model)
        tokenizer.model_max_length = self.max_length
        tokenizer.padding_side = "right"

    def _tokenize(self) -> None:
        """Labels and token ids of each split that is not empty."""
        self.labels, self.tokenized, self.num_truncated = {}, {}, {}
        for name, split in self.examples.splits.items():
            if split:
                labels = self.labels[name] = examples.as_numbers(split, self.names, self.arguments.problem_type)
                if name == "train":
                    labels = training_labels(self.arguments, labels)
                texts = [example.text for example in split]
                self.tokenized[name], self.num_truncated[name] = tokenize_texts(texts, self.tokenizer, self.max_length, labels)

    def _report_data(self) -> None:
        """Print sizes, labels and lengths; refuse a batch larger than the data, and data that is all truncated."""
        arguments, print_, train = self.arguments, self.accelerator.print, self.tokenized["train"]
        for name, labels in self.labels.items():
            counts = report.describe_labels(self.examples.splits[name], labels, self.names, arguments.problem_type)
            print_(f"{'Training' if name == 'train' else name.capitalize()} examples: {counts}")
        if self.base_names:
            kept, new = ([name for name in self.names if (name in self.base_names) == is_kept] for is_kept in (True, False))
            shown = (", ".join(plain(name, 40) for name in names) or "none" for names in (kept, new))
            print_("Head: rows of the base, by the names of its labels: {}; new rows: {}".format(*shown))
        duplicates = " and ".join(f"{self.examples.duplicates[name]:,} of {name}" for name in SPLITS[:2])
        print_(f"Dropped as duplicates of texts in a later split: {duplicates}")
        if arguments.balance == "undersample":
            print_(f"Dropped by undersampling: {self.examples.undersampled:,}")
        if arguments.batch_size > len(train):
            raise UserError(f"--batch_size {arguments.batch_size} is more than the {len(train)} training examples: lower it.")
        if self.num_truncated["train"] == len(train):
            remedy = "use shorter texts, or a larger --context_length if the model has the positions for it"
            raise UserError(f"all training texts are longer than the limit of {self.max_length:,} tokens: {remedy}.")
        truncated = ", ".join(f"{number:,} of {name}" for name, number in self.num_truncated.items())
        lengths = f"mean {train.lengths.mean():,.0f}, maximum {train.lengths.max():,}"
        print_(f"Tokens per text: {lengths}; truncated to {self.max_length:,}: {truncated}")

    def _evaluation_dataloader(self, split: str) -> DataLoader:
        rows, batch_size = PaddedExamples(self.tokenized[split]), 4 * self.arguments.batch_size
        batch_size += -batch_size % self.accelerator.num_processes
        dataloader = padded_dataloader(rows, self.tokenizer.pad_token_id, batch_size=batch_size, sampler=self.orders[split])
        return self.accelerator.prepare(dataloader)

    def build_model(self) -> ScratchGPTForSequenceClassification:
        """The base model with a new head; if it is a classifier, with its rows for the labels that it knows."""
        arguments = self.arguments
        set_seed(arguments.seed)
        model: ScratchGPTForSequenceClassification = pretrained.load_pretrained(
            ScratchGPTForSequenceClassification,
            arguments.base_model,
            pretrained.lora_config(arguments, ["score"]),
            frozenset({"score.weight"}),
            id2label=dict(enumerate(self.names)),
            label2id={name: index for index, name in enumerate(self.names)},
            problem_type=arguments.problem_type,
            classifier_pooling=arguments.classifier_pooling,
            pad_token_id=self.tokenizer.pad_token_id,
            **pretrained.dropout_fields(arguments.dropout),
        )
        if self.base_names not in ([], self.names):
            self._match_head(model)
        if arguments.train_last_n_layers >= 0:
            pretrained.freeze(model, arguments.train_last_n_layers, model.score)
        return model

    @torch.no_grad()
    def _match_head(self, model: ScratchGPTForSequenceClassification) -> None:
        """Replace the head by rows of the base's head, for the labels that both have, and new rows."""
        base = pretrained.load_pretrained(ScratchGPTForSequenceClassification, self.arguments.base_model, None)
        model.score.weight.normal_(std=model.config.initializer_range)
        for index, name in enumerate(self.names):
            if name in self.base_names:
                model.score.weight[index] = base.score.weight[self.base_names.index(name)]

    def train_dataloader(self) -> DataLoader:
        arguments, tokenizer, train = self.arguments, self.tokenizer, self.tokenized["train"]
        rows: Any = PaddedExamples(train)
        if arguments.subword_dropout or arguments.token_dropout:
            texts = [example.text for example in self.examples.splits["train"]]
            dropouts = arguments.subword_dropout, arguments.token_dropout
            rows = AugmentedTexts(texts, train, tokenizer, self.max_length, *dropouts, arguments.seed)
        accumulation = arguments.gradient_accumulation_steps
        num_batches = arguments.max_steps * accumulation
        sampler = LengthGroupedBatchSampler(train.lengths, arguments.batch_size, num_batches, arguments.seed, accumulation)
        return padded_dataloader(rows, tokenizer.pad_token_id, batch_sampler=sampler)

    def evaluate(self, model: nn.Module, split: str = "validation") -> Any:
        logits = predict(self.accelerator, model, self.dataloaders[split], self.orders[split])
        self.predictions[split] = Predictions(logits, self.names, self.arguments.problem_type)
        return self.predictions[split].score(self.labels[split])

    def preview(self, model: Any) -> list[str]:
        return report.preview_predictions(self.examples.splits["validation"], self.predictions["validation"])

    def evaluate_test(self, model: Any) -> None:
        if "test" in self.dataloaders:
            self.accelerator.print(f"Test split, evaluated once, at the end: {self.evaluate(model, 'test')}\n")

    def held_out_rows(self) -> Iterable[dict[str, Any]]:
        return ({"text": example.text, "label": example.label} for example in self.examples.splits["validation"])

    def write_results(self, directory: Path, result: TrainResult) -> None:
        scores = json.dumps(self._results(result), indent=2, ensure_ascii=False)
        (directory / SCORES).write_text(scores, encoding="utf-8")
        labels, predictions = self.labels[self.last_split], self.predictions[self.last_split]
        report.draw_predictions(labels, predictions, directory / PREDICTIONS)
        mistakes = report.mistakes_table(self.examples.splits[self.last_split], labels, predictions)
        (directory / MISTAKES).write_text(mistakes, encoding="utf-8")

    def card(self, result: TrainResult) -> cards.CardContent:
        arguments, last, results = self.arguments, self.last_split, self._results(result)
        dataset = cards.dataset_name(arguments.dataset)
        names = ", ".join(map(code, self.names[:20]))
        names += f" and {len(self.names) - 20} more" if len(self.names) > 20 else ""
        text = repr(self.examples.splits[last][0].text[:80])
        kind, pooling = arguments.problem_type, arguments.classifier_pooling
        return cards.CardContent(
            introduction=f"A small GPT, {cards.describe_base(arguments.base_model)} on {dataset}. It predicts "
            f"{PREDICTS[kind]}: {names}. It was evaluated on texts like those it was trained on; its predictions for other "
            "texts are not reliable.",
            usage=USAGE.format(text=text),
            adapter_usage=ADAPTER_USAGE.format(labels=self.names, problem_type=kind, pooling=pooling, text=text),
            results=report.results_table(results, kind),
            examples=f"![{last} split]({PREDICTIONS})\n\nThe mistakes on that split are in [{MISTAKES}]({MISTAKES}), "
            f"all metrics in [{SCORES}]({SCORES}).",
            task="text-classification",
            metrics={name: value for name, value in results[last].items() if isinstance(value, float)},
            data={"Examples": f"{dataset}: " + ", ".join(f"{name} {len(split):,}" for name, split in self.tokenized.items())},
        )

    def _results(self, result: TrainResult) -> dict[str, dict[str, Any]]:
        """The content of metrics.json."""
        reports = {split: predictions.full_report(self.labels[split]) for split, predictions in self.predictions.items()}
        return {"before": vars(result.before), **reports}


def training_labels(arguments: ClassifyArguments, labels: np.ndarray) -> np.ndarray:
    """The labels of the loss (N, C): with label smoothing, and scaled by class weights, if the arguments say so."""
    if arguments.problem_type != SINGLE:
        return labels
    smooth = (1 - arguments.label_smoothing) * labels + arguments.label_smoothing / labels.shape[1]
    if arguments.balance == "weights":
        smooth *= (labels @ examples.class_weights(labels))[:, None]
    return smooth.astype(np.float32)


def main(argv: list[str] | None = None) -> None:
    run_recipe(ClassifyRecipe, __doc__, argv)


if __name__ == "__main__":
    run_main(main)
