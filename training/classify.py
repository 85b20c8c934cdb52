"""Fine-tune a pretrained GPT to classify texts: from a model folder and labelled examples to a classifier folder.

    accelerate launch training/classify.py
    accelerate launch training/classify.py --dataset sms.tsv --base_model outputs/pretrain --output_dir outputs/spam
    accelerate launch training/classify.py --dataset sms.tsv --train_last_n_layers 1 --output_dir outputs/last-block
    accelerate launch training/classify.py --dataset sms.tsv --lora_r 16 --output_dir outputs/lora
    python training/classify.py --predict outputs/spam --input texts.txt

With nothing given it reads training/configs/classify.yaml and teaches the model of `training/pretrain.py` which library a
docstring comes from. `--predict` labels the lines of a file, the rows of a table, or what comes by standard input: JSON lines
out.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import set_seed
from tokenizers import normalizers
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, TextClassificationPipeline

from modeling_scratchgpt import ScratchGPTForSequenceClassification
from training.cli import option, parse_arguments, run_main
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
from training.data.files import TABLE_ENDINGS, find_files, get_text, read_lines, read_rows
from training.data.padding import (
    AugmentedTexts,
    EncodedTexts,
    LengthGroupedBatchSampler,
    encode,
    in_order_of_length,
    padded_loader,
)
from training.data.splits import SPLITS
from training.engine.checkpoints import atomic_directory, full_state_dict
from training.engine.flops import flops_per_token
from training.engine.loop import start_accelerator
from training.engine.pretrained import (
    TuningArguments,
    check_model,
    check_tuning,
    dropout_fields,
    freeze,
    load_config_and_tokenizer,
    load_model,
    load_pretrained,
    load_tokenizer,
    lora_config,
    save_trained,
)
from training.engine.report import CURVE, draw_loss
from training.engine.train import EpochArguments, check_epochs, resolve_epochs, start, train
from training.errors import UserError
from training.results.cards import BASE, HERE, SCORES, dataset_name, hardware, origin, write_card
from training.results.classification_report import (
    MISTAKES,
    PICTURE,
    UNITS,
    described,
    draw_predictions,
    mistakes_table,
    results_table,
    shown,
)
from training.results.markdown import code
from training.results.scores import Predictions, predict

CHUNK = 1024  # texts that are labelled before the first of them is written

USAGE = f"""from transformers import pipeline

classify = pipeline("text-classification", model="{HERE}", trust_remote_code=True, top_k=None)
print(classify({{text}}, truncation=True))"""

ADAPTER_USAGE = f"""from peft import PeftModel
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained(
    "{BASE}", num_labels={{num_labels}}, classifier_pooling={{pooling}}, trust_remote_code=True
)
model = PeftModel.from_pretrained(model, "{HERE}")"""

EXAMPLES = f"""![{{split}} split]({PICTURE})

What it got wrong there stands in [{MISTAKES}]({MISTAKES}), all scores in [{SCORES}]({SCORES})."""

PURPOSES = {"train": "Training examples", "validation": "Validation examples", "test": "Test examples"}


@dataclass
class ClassifyArguments(EpochArguments, ExampleArguments, TuningArguments):
    config: str = option("training/configs/classify.yaml", "YAML file with values for any of these arguments.")
    classifier_pooling: str = option(
        "last", "What the head reads: the last token of the text, or the mean of all.", choices=["last", "mean"]
    )
    lowercase: bool = option(False, "Make the tokenizer turn all letters into small ones.")
    subword_dropout: float = option(
        0.0, "Chance, between any two characters of a training text, that a token has to end there: other tokens each epoch."
    )
    token_dropout: float = option(0.0, "Share of the tokens of a training text that is left out: others each epoch.")
    label_smoothing: float = option(0.0, "Share of the certainty of a label that is spread over all labels.")
    context_length: int = option(0, "Most tokens of a text, a longer one loses its end; 0: as many as the model takes.")
    output_dir: str = option("outputs/classify", "New folder for the model.")
    predict: str = option("", "Folder or Hub id of a classifier: only label what --input holds.")
    input: str = option("-", "For --predict: a file of lines, a table with --text_column, or - for standard input.")


def check(arguments: ClassifyArguments, num_processes: int) -> None:
    """Refuse nonsense before any long work."""
    check_epochs(arguments, num_processes)
    if arguments.input != "-":
        raise UserError(f"--input {arguments.input} is for --predict: say which model is to label it.")
    for name in ("subword_dropout", "token_dropout", "label_smoothing"):
        if not 0 <= getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 0 and below 1, got {getattr(arguments, name)}.")
    if arguments.label_smoothing and arguments.problem_type != SINGLE:
        raise UserError(f"--label_smoothing is for one label a text: leave it out with {arguments.problem_type}.")
    check_tuning(arguments)
    if arguments.context_length and arguments.context_length < 4:
        raise UserError(f"--context_length must be at least 4, got {arguments.context_length}.")
    check_examples(arguments)


def first_model(arguments: ClassifyArguments, names: list[str], pad_token_id: int) -> ScratchGPTForSequenceClassification:
    """The model as it is before the first step, the same whenever it is asked for. Its head is new, unless the model is a
    classifier of as many labels already."""
    set_seed(arguments.seed)
    model: ScratchGPTForSequenceClassification = load_pretrained(
        ScratchGPTForSequenceClassification,
        arguments.base_model,
        lora_config(arguments, ["score"]),
        frozenset({"score.weight"}),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type=arguments.problem_type,
        classifier_pooling=arguments.classifier_pooling,
        pad_token_id=pad_token_id,
        **dropout_fields(arguments.dropout),
    )
    if arguments.train_last_n_layers >= 0:
        freeze(model, arguments.train_last_n_layers, model.score)
    return model


def for_classification(tokenizer: Any, name: str, max_length: int, lowercase: bool = False) -> None:
    """Have the model's tokenizer mark the beginning and the end of every text from now on: there the head reads."""
    if lowercase:
        backend = tokenizer.backend_tokenizer
        steps = [normalizers.Lowercase(), backend.normalizer]
        backend.normalizer = normalizers.Sequence([step for step in steps if step])
    tokenizer.add_bos_token = tokenizer.bos_token is not None
    tokenizer.add_eos_token = tokenizer.eos_token is not None
    with_padding(tokenizer, name)
    tokenizer.model_max_length = max_length
    tokenizer.padding_side = "right"


def with_padding(tokenizer: Any, name: str) -> None:
    """See to it that the tokenizer can pad: GPT-2's cannot. Which token it takes is all one, the attention mask says where."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(f"{name}: its tokenizer has no special token to pad with: give it one, and save it again.")


def training_labels(arguments: ClassifyArguments, numbers: np.ndarray) -> np.ndarray:
    """What the loss is told (N, C): with smoothing a share goes to all labels, and rare ones weigh more if so asked."""
    if arguments.problem_type != SINGLE:
        return numbers
    smooth = (1 - arguments.label_smoothing) * numbers + arguments.label_smoothing / numbers.shape[1]
    if arguments.balance == "weights":
        smooth *= (numbers @ class_weights(numbers))[:, None]
    return smooth.astype(np.float32)


def tokens_report(texts: dict[str, EncodedTexts], limit: int) -> str:
    """How long the texts are, and how many were cut.

    Raises:
        UserError: all of them were.
    """
    train = texts["train"]
    if train.num_truncated == len(train):
        raise UserError(
            f"every text of the training split is longer than the {limit:,} tokens that are read of it: give shorter texts, or "
            "a longer --context_length if the model has the positions for it."
        )
    cut = ", ".join(f"{part.num_truncated:,} of {name}" for name, part in texts.items())
    return f"Tokens a text: {train.lengths.mean():,.0f} on average, {train.lengths.max():,} at most; cut to {limit:,}: {cut}"


def introduction(arguments: ClassifyArguments, names: list[str], dataset: str) -> str:
    """What the card says first."""
    most = ", ".join(map(code, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    what = {
        SINGLE: "the probability of each category of a text",
        MULTI: "the probability of each of several labels of a text",
        REGRESSION: "numbers about a text",
    }[arguments.problem_type]
    return (
        f"A small GPT, {origin(arguments.base_model)} on {dataset}. It gives {what}: {most}. It was measured on texts like "
        "those it learned from; of others it says little."
    )


def label_texts(arguments: ClassifyArguments) -> None:
    """Write a JSON line for each text of the input: the text, its label, and the probability of every label. An empty text has
    none."""
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, got {arguments.batch_size}.")
    if arguments.input == "-" and arguments.columns:
        raise UserError("--columns is for files: standard input is read line by line.")
    if not arguments.input:
        raise UserError("--input is empty: give a file, or - for standard input.")
    sources = [None] if arguments.input == "-" else find_files(arguments.input)
    for path in filter(None, sources):
        next(texts_of(path, arguments), None)  # what is wrong with its beginning is said before any long work
    device = start_accelerator().device
    trusted = check_model(arguments.predict, trust_remote_code=False)
    tokenizer = load_tokenizer(arguments.predict, trusted)
    model = load_model(arguments.predict, trusted, device, AutoModelForSequenceClassification)
    with_padding(tokenizer, arguments.predict)
    model.config.pad_token_id = tokenizer.pad_token_id  # others' classifiers ask for it
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", tokenizer.model_max_length))
    classify = TextClassificationPipeline(
        model=model, tokenizer=tokenizer, device=device, top_k=None, batch_size=arguments.batch_size
    )
    source = chain.from_iterable(texts_of(path, arguments) for path in sources)
    with tqdm(desc="Labelling", unit=" texts", disable=None) as bar:
        while chunk := list(islice(source, CHUNK)):
            order = [index for index, text in enumerate(chunk) if text.strip()]
            order.sort(key=lambda index: len(chunk[index]))  # texts of a batch about as long
            found: Any = classify([chunk[index] for index in order], truncation=True, max_length=limit) if order else []
            scores = dict(zip(order, found, strict=True))
            for index, text in enumerate(chunk):  # a line for an empty text too: the fifth line is about the fifth text
                row = {"text": text, **answer(scores.get(index, []), model.config.problem_type)}
                print(json.dumps(row, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))
            sys.stdout.flush()
            bar.update(len(chunk))


def answer(scores: list[dict[str, Any]], problem_type: str | None) -> dict[str, Any]:
    """What a pipeline says of one text, the likeliest first, as it is written; of an empty text it says nothing."""
    values = {it["label"]: round(it["score"], 6) for it in scores}
    match problem_type:
        case "regression":
            return {"numbers": values}
        case "multi_label_classification":
            return {"labels": [label for label, score in values.items() if score > 0.5], "scores": values}
        case _:
            return {"label": next(iter(values), None), "scores": values}


def texts_of(path: Path | None, arguments: ClassifyArguments) -> Iterator[str]:
    """The texts to label, one by one, of a file or, without one, of standard input."""
    if path and (path.suffix.lower() in TABLE_ENDINGS or arguments.columns):
        columns = {arguments.text_column: "text_column"}
        for place, row in read_rows(path, columns, arguments.encoding_errors, arguments.columns):
            yield get_text(row, arguments.text_column, place, arguments.encoding_errors)
    else:
        yield from (line.rstrip("\r\n") for _, line in read_lines(path or "-", arguments.encoding_errors))


def main() -> None:
    arguments = parse_arguments(ClassifyArguments, __doc__)
    if arguments.predict:
        label_texts(arguments)
        return
    accelerator, output_dir = start(arguments, check)
    config, tokenizer = load_config_and_tokenizer(
        arguments.base_model, max(arguments.context_length, 4), arguments.train_last_n_layers
    )
    max_length = arguments.context_length or config.max_position_embeddings
    for_classification(tokenizer, arguments.base_model, max_length, arguments.lowercase)

    # Examples -> ids -> batches. The first process of a machine fills the caches, the others read them.
    dataset = dataset_name(arguments.dataset)
    accelerator.print(f"Reading {dataset}")
    with accelerator.local_main_process_first():
        examples = read_examples(arguments, arguments.seed)
    names, kind = examples.names, arguments.problem_type
    labels = {name: as_numbers(split, names, kind) for name, split in examples.splits.items()}
    for name in SPLITS:
        accelerator.print(f"{PURPOSES[name]}: {described(examples.splits[name], labels[name], names, kind)}")
    copies = " and ".join(f"{examples.copies[name]:,} of {name}" for name in SPLITS[:2])
    accelerator.print(f"Dropped as copies of texts in a later split: {copies}")
    if arguments.balance == "undersample":
        accelerator.print(f"Left out to balance: {examples.left_out:,}")
    texts = {
        name: encode([example.text for example in split], tokenizer, max_length, labels[name])
        for name, split in examples.splits.items()
        if split
    }
    if arguments.batch_size > len(texts["train"]):
        raise UserError(f"--batch_size {arguments.batch_size} is more than the {len(texts['train'])} examples: lower it.")
    texts["train"] = replace(texts["train"], labels=training_labels(arguments, labels["train"]))
    accelerator.print(tokens_report(texts, max_length))
    training_texts: Any = texts["train"]
    if arguments.subword_dropout or arguments.token_dropout:
        written = [example.text for example in examples.splits["train"]]
        dropouts = arguments.subword_dropout, arguments.token_dropout
        training_texts = AugmentedTexts(written, texts["train"], tokenizer, max_length, *dropouts, arguments.seed)
    arguments = resolve_epochs(arguments, len(texts["train"]))

    first = partial(first_model, arguments, names, tokenizer.pad_token_id)
    model = first()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    accelerator.print(
        f"A GPT of {model.num_parameters():,} parameters, {trained:,} of them trained, on {hardware(accelerator.num_processes)}"
    )
    loaders, orders = {}, {}
    for name in ("validation", "test"):
        if name in texts:
            orders[name] = in_order_of_length(texts[name].lengths)
            batch_size = 4 * arguments.batch_size
            loaders[name] = accelerator.prepare(
                padded_loader(texts[name], tokenizer, batch_size=batch_size, sampler=orders[name])
            )
    seen: dict[str, Predictions] = {}  # at the last look at each split

    def look(prepared_model: nn.Module, split: str = "validation") -> Any:
        logits = predict(accelerator, prepared_model, loaders[split], orders[split])
        seen[split] = Predictions(logits, names, kind)
        return seen[split].score(labels[split])

    def show() -> str:
        return shown(examples.splits["validation"], seen["validation"])

    def batches_from(start: int) -> DataLoader:
        num_batches = arguments.max_steps * arguments.gradient_accumulation_steps
        batches = LengthGroupedBatchSampler(texts["train"].lengths, arguments.batch_size, num_batches, arguments.seed, start)
        return padded_loader(training_texts, tokenizer, batch_sampler=batches)

    flops = flops_per_token(
        config,
        int(texts["train"].lengths.mean()),
        frozen=bool(arguments.lora_r),
        has_head=False,
        trained_blocks=arguments.train_last_n_layers if arguments.train_last_n_layers >= 0 else None,
    )
    outcome = train(accelerator, arguments, model, batches_from, examples.digest(), look, show, flops)
    if "test" in loaders:
        accelerator.print(f"\nOn the test split, used only now: {look(model, 'test')}\n")
    results = {split: predictions.full_report(labels[split]) for split, predictions in seen.items()}
    last = list(seen)[-1]

    weights = full_state_dict(model)
    if accelerator.is_main_process:
        with atomic_directory(output_dir) as folder:
            save_trained(folder, model, weights, tokenizer, first)
            before = {"before": vars(outcome.before)}
            (folder / SCORES).write_text(json.dumps({**before, **results}, indent=2, ensure_ascii=False), encoding="utf-8")
            draw_loss(outcome.metrics.rows, folder / CURVE, UNITS[kind])
            draw_predictions(labels[last], seen[last], folder / PICTURE)
            mistakes = mistakes_table(examples.splits[last], labels[last], seen[last])
            (folder / MISTAKES).write_text(mistakes, encoding="utf-8")
            write_card(
                folder,
                arguments,
                accelerator,
                model,
                outcome,
                introduction=introduction(arguments, names, dataset),
                usage=USAGE.format(text=repr(examples.splits[last][0].text[:80])),
                adapter_usage=ADAPTER_USAGE.format(num_labels=len(names), pooling=repr(arguments.classifier_pooling)),
                results=results_table(outcome.before, results, kind),
                examples=EXAMPLES.format(split=last),
                task="text-classification",
                metrics={key: value for key, value in results[last].items() if isinstance(value, float)},
                data={"Examples": f"{dataset}: " + ", ".join(f"{name} {len(texts[name]):,}" for name in texts)},
                settings={},
            )
    accelerator.print(
        f"Trained for {outcome}. The classifier, its card, its scores and its mistakes are in {output_dir}/:\n"
        f"    pipeline('text-classification', {str(output_dir)!r}, trust_remote_code=True, top_k=None, truncation=True)"
    )
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
