"""Label texts with a classifier: the lines of a file, the rows of a table, or standard input; JSON lines out.

    echo "You have won a prize!" | python training/predict.py outputs/spam
    python training/predict.py outputs/spam --input texts.txt > labels.jsonl
    python training/predict.py USER/NAME --input texts.csv --text_column body

MODEL is the directory or the Hub id of any text classifier that transformers loads.
"""

import json
import select
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextClassificationPipeline,
)

from training.cli import option, parse_arguments, run_main
from training.data.encoding import encoding_errors_option, encoding_of, encoding_option
from training.data.files import TABLE_ENDINGS, ending, find_files, join_texts, read_lines, read_rows
from training.engine.launch import start_accelerator
from training.engine.pretrained import ensure_padding, load_model_and_tokenizer
from training.errors import UserError, explain_out_of_memory
from training.progress import bar_options

UNLIMITED = 10**9  # tokens; a tokenizer without a limit says 10**30
CHUNK = 1024  # texts at most that are labelled before the first of them is written


@dataclass
class PredictArguments:
    model: str = option("", "directory or Hub id of a text classifier; also the first word of the command line")
    input: str = option("-", "a file of lines, a table with --text_column, or - for standard input")
    text_column: list[str] = option(["text"], "column of the text in a table; several columns are joined by line ends")
    columns: list[str] = option([], "names of the columns, left to right, of .csv and .tsv files without a header")
    encoding: str = encoding_option()
    encoding_errors: str = encoding_errors_option()
    batch_size: int = option(16, "texts per batch", minimum=1)
    trust_remote_code: bool = option(False, "run code that comes with the model")


def label_texts(arguments: PredictArguments) -> None:
    """Print a JSON line for each text: the text, its label, and the probability of every label; an empty text has no label."""
    sources = find_sources(arguments)
    device = start_accelerator().device
    head = AutoModelForSequenceClassification
    model, tokenizer = load_model_and_tokenizer(arguments.model, arguments.trust_remote_code, device, head)
    ensure_padding(tokenizer, arguments.model)
    model.config.pad_token_id = tokenizer.pad_token_id  # required by other classifiers of transformers
    limit = maximum_length(model, tokenizer)
    classify = TextClassificationPipeline(model=model, tokenizer=tokenizer, device=device, top_k=None)
    options: Any = {"batch_size": arguments.batch_size, "truncation": limit is not None, "max_length": limit}
    texts = chain.from_iterable(read_texts(path, arguments) for path in sources)
    with explain_out_of_memory("lower --batch_size"), tqdm(desc="Labelling", unit=" texts", **bar_options()) as bar:
        while chunk := read_chunk(texts, is_live=sources == [None]):
            order = [index for index, text in enumerate(chunk) if text.strip()]
            order.sort(key=lambda index: len(chunk[index]))  # batches of similar lengths
            found: Any = classify([chunk[index] for index in order], **options) if order else []
            scores = dict(zip(order, found, strict=True))
            for index, text in enumerate(chunk):
                row = {"text": text, **as_row(scores.get(index, []), model.config.problem_type)}
                print(json.dumps(row, ensure_ascii=(sys.stdout.encoding or "utf-8").lower() != "utf-8"))
            sys.stdout.flush()
            bar.update(len(chunk))


def maximum_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The longest text that the model reads, in tokens; None if there is no limit."""
    embeddings = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    # RoBERTa's positions begin after that of padding.
    used = sum(module.padding_idx + 1 for module in embeddings if getattr(module, "padding_idx", None) is not None)
    positions = getattr(model.config, "max_position_embeddings", None) or 0  # XLNet's are -1
    limits = (tokenizer.model_max_length, positions - used)
    return min((limit for limit in limits if 0 < limit < UNLIMITED), default=None)


def find_sources(arguments: PredictArguments) -> list[Path | None]:
    """The files of the input, checked as far as their first texts show; None is standard input."""
    if arguments.input == "-":
        if arguments.columns:
            raise UserError("--columns is for files: standard input is read line by line.")
        return [None]
    if not arguments.input:
        raise UserError("--input is empty: pass a file, or - for standard input.")
    paths = find_files(arguments.input)
    for path in paths:
        next(read_texts(path, arguments), None)
    return [*paths]


def read_texts(path: Path | None, arguments: PredictArguments) -> Iterator[str]:
    """The texts of a file, or of standard input."""
    encoding = encoding_of(arguments)
    if path and (ending(path) in TABLE_ENDINGS or arguments.columns):
        columns = dict.fromkeys(arguments.text_column, "text_column")
        for location, row in read_rows(path, columns, encoding, arguments.columns):
            yield join_texts(row, arguments.text_column, location, encoding.errors)
    else:
        yield from (line.rstrip("\r\n") for _, line in read_lines(path or "-", encoding))


def read_chunk(texts: Iterator[str], is_live: bool) -> list[str]:
    """The next texts; if they are live, from standard input, only those that have arrived, so that each is answered at once."""
    chunk = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == CHUNK or (is_live and not has_input()):
            break
    return chunk


def has_input() -> bool:
    """False if standard input is a pipe or a terminal where nothing waits to be read."""
    try:
        return bool(select.select([sys.stdin], [], [], 0)[0])
    except (OSError, ValueError):  # a file that select does not know
        return True


def as_row(scores: list[dict[str, Any]], problem_type: str | None) -> dict[str, Any]:
    """The output of the pipeline for one text, the highest score first, as columns; without scores, no label."""
    values = {item["label"]: round(item["score"], 6) for item in scores}
    if problem_type == "regression":
        return {"numbers": values}
    if problem_type == "multi_label_classification":
        return {"labels": [label for label, score in values.items() if score > 0.5], "scores": values}
    return {"label": next(iter(values), None), "scores": values}


def main(argv: Sequence[str] | None = None) -> None:
    label_texts(parse_arguments(PredictArguments, __doc__, argv, positional="model"))


if __name__ == "__main__":
    run_main(main)
