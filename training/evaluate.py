"""How well a language model predicts a text: loss, perplexity, and bits per byte, the same measure for all tokenizers.

    python training/evaluate.py outputs/pretrain --dataset book.txt
    python training/evaluate.py outputs/pretrain --dataset docs --split validation
    accelerate launch training/evaluate.py gpt2 --dataset book.txt --stride 512 --json

MODEL is the folder or the Hub id of any causal language model that transformers loads, with its own tokenizer.

Notable:
- Every token but the first is scored exactly once, and the loss is the mean over all of them, not over batches or documents.
- Documents stand one after another, as in training: `<bos> document <eos> <bos> document <eos> ...`
- Plain windows start from nothing again and again. With --stride they overlap, and each scores only what is new in it: slower,
  and nearer to what the model can do. `--stride 1` gives every token all the context there is.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel

import modeling_scratchgpt  # noqa: F401  (teaches the Auto classes our model)
from training.cli import option, parse_arguments, run_main
from training.data.corpora import CorpusArguments, check_corpora, read_corpora, splits_of
from training.data.splits import SPLITS
from training.data.tokens import tokenize
from training.data.windows import Windows, evaluation_loader
from training.engine.loop import start_accelerator
from training.engine.metrics import evaluate
from training.engine.pretrained import check_model, load_model, load_tokenizer
from training.errors import UserError


@dataclass
class EvaluateArguments(CorpusArguments):
    config: str = option("", "YAML file with values for any of these arguments.")
    model: str = option("", "Folder or Hub id of a causal language model; the first word means the same.")
    split: str = option("all", "Part of a corpus, cut as training/pretrain.py cuts it.", choices=["all", *SPLITS])
    seed: int = option(0, "What the training run was given; only read with --split.")
    context_length: int = option(0, "Tokens in a window; 0: as many as the model takes.")
    stride: int = option(0, "Tokens from one window to the next; 0: windows that do not overlap.")
    batch_size: int = option(4, "Windows that a process scores at once.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    json: bool = option(False, "Print one JSON object instead of a line.")


def read_documents(arguments: EvaluateArguments) -> Dataset:
    """The documents to score, source by source."""
    corpora = read_corpora(arguments)
    if arguments.split == "all":
        return concatenate_datasets([corpus.documents for corpus in corpora])
    return concatenate_datasets([getattr(split, arguments.split) for split in splits_of(arguments, corpora, arguments.seed)])


def check(arguments: EvaluateArguments) -> None:
    """Refuse nonsense before any long work."""
    for name, least in (("context_length", 0), ("stride", 0), ("batch_size", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(arguments, name)}.")
    if arguments.split == "test" and not arguments.test_fraction:
        raise UserError("--split test: say what part of the corpus the training run held out, with --test_fraction.")
    check_corpora(arguments)


def window_sizes(arguments: EvaluateArguments, model: PreTrainedModel) -> tuple[int, int]:
    """Context length and stride, with the model's limit filled in.

    Raises:
        UserError: the model has fewer positions, or none are known; the stride would leave tokens out.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context_length = arguments.context_length or limit
    if context_length is None:
        raise UserError("this model's config does not say how many tokens it takes: give --context_length.")
    if limit and context_length > limit:
        raise UserError(f"--context_length {context_length} is longer than the model's {limit} positions: shorten it.")
    if arguments.stride > context_length:
        raise UserError(f"--stride {arguments.stride} would leave tokens out: it must be at most {context_length}.")
    return context_length, arguments.stride or context_length


def main() -> None:
    names_model = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    arguments = parse_arguments(EvaluateArguments, __doc__, [*["--model"] * names_model, *sys.argv[1:]])
    accelerator = start_accelerator()
    check(arguments)
    name = os.path.expanduser(arguments.model)
    with accelerator.local_main_process_first():
        trusted = check_model(name, arguments.trust_remote_code)
        tokenizer = load_tokenizer(name, trusted)
        model = load_model(name, trusted, accelerator.device)
        context_length, stride = window_sizes(arguments, model)
        tokens = tokenize(read_documents(arguments), tokenizer, "the text")
    if len(tokens.ids) < 2:
        raise UserError("the text is empty: there is nothing to predict.")
    embedding: Any = model.get_input_embeddings()
    if (largest := tokens.ids.max()) >= (size := embedding.weight.shape[0]):
        raise UserError(f"{name}: the tokenizer gives id {largest}, but the model knows {size}: they do not belong together.")
    context_length = min(context_length, len(tokens.ids) - 1)
    windows = Windows(tokens, context_length, 0, "given", min(stride, context_length), once=True)
    loader = evaluation_loader(windows, arguments.batch_size * accelerator.num_processes, accelerator.num_processes)
    prepared_model = accelerator.prepare_model(model, evaluation_mode=True)  # mixed precision, if the launcher was told so
    evaluation = evaluate(accelerator, prepared_model, accelerator.prepare(loader), tokens.num_bytes)
    counts = {"tokens": len(tokens.ids) - 1, "bytes": tokens.num_bytes}
    asked = {key: getattr(arguments, key) for key in ("model", "dataset", "split")}
    facts = {**asked, "context_length": context_length, "stride": windows.stride, **asdict(evaluation), **counts}
    line = f"{evaluation} ({counts['tokens']:,} tokens, {counts['bytes']:,} bytes)"
    accelerator.print(json.dumps(facts) if arguments.json else line)
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
