"""Evaluate a language model on a text: loss, perplexity, and bits per byte, which is comparable across tokenizers.

    python training/evaluate.py outputs/pretrain --dataset book.txt
    python training/evaluate.py outputs/pretrain --dataset docs --split validation
    accelerate launch training/evaluate.py gpt2 --dataset book.txt --stride 512 --json

MODEL is the directory or the Hub id of any causal language model that transformers loads, with its own tokenizer.

Notable:
- Every token but the first is scored exactly once; the loss is the mean over all of them, not over batches or documents.
- With `--windows ordered`, windows run across documents: `<bos> document <eos> <bos> document <eos> ...` With `packed`, each
  document is scored by itself, in pieces if it is longer than the context. The default is how the model was trained.
- It computes in the dtype in which the model was saved: `accelerate launch --mixed_precision bf16` chooses bfloat16.
- With --stride, windows overlap, and each scores only its new tokens, which have more context: slower, and closer to what the
  model can do. `--stride 1` gives every token the longest possible context.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import concatenate_datasets
from transformers import PreTrainedModel

from modeling_scratchgpt import ScratchGPTForCausalLM
from training.cli import option, parse_arguments, run_main
from training.data.corpora import CorpusArguments, check_corpora, read_corpora, split_documents
from training.data.datasets import evaluation_dataloader, evaluation_rows
from training.data.splits import SPLITS
from training.data.tokens import tokenize_documents
from training.engine.checkpoints import STATE
from training.engine.launch import start_accelerator
from training.engine.machine import float32_name
from training.engine.metrics import evaluate, keeps_documents_apart
from training.engine.pretrained import load_model_and_tokenizer
from training.engine.run_folder import CARD
from training.errors import UserError, explain_out_of_memory

LONG = 2048  # tokens, with which the logits of a large vocabulary still fit into memory; a ScratchGPT materializes none


@dataclass
class EvaluateArguments(CorpusArguments):
    config: str = option("", "YAML file with values for any of these arguments")
    model: str = option("", "directory or Hub id of a causal language model; also the first word of the command line")
    split: str = option("all", "part of the corpus, split as training/pretrain.py does", choices=["all", *SPLITS])
    context_length: int = option(
        0, f"tokens per window; 0: the model's maximum, but at most {LONG:,} if it is no ScratchGPT", minimum=0
    )
    windows: str = option(
        "auto",
        "ordered: windows across documents; packed: each document by itself; auto: as the model of this directory was trained",
        choices=["auto", "ordered", "packed"],
    )
    stride: int = option(0, "stride of ordered windows; 0: --context_length, no overlap", minimum=0)
    batch_size: int = option(4, "windows per batch and process", minimum=1)
    trust_remote_code: bool = option(False, "run code that comes with the model")
    json: bool = option(False, "print one JSON object instead of a line")


def _choose_windows(arguments: EvaluateArguments, name: str, model: PreTrainedModel) -> str:
    """`--windows`, or those of the run whose card or checkpoint is in the model's directory; ordered if there is neither."""
    windows, card, state = arguments.windows, Path(name, CARD), Path(name, STATE)
    if windows == "auto":
        settings = card.read_text("utf-8", "replace").rpartition("<summary>All settings")[2] if card.is_file() else ""
        settings += state.read_text("utf-8", "replace") if state.is_file() else ""
        windows = "packed" if re.search('^windows: packed$|"windows": "packed"', settings, re.MULTILINE) else "ordered"
    if windows == "packed" and arguments.stride:
        stride = f"--stride {arguments.stride}"
        raise UserError(f"{stride} is for --windows ordered, and this model is scored with packed: pass one.")
    if windows == "packed" and not keeps_documents_apart(model):
        raise UserError(f"{name} does not keep documents in a row apart: pass --windows ordered.")
    return windows


def _window_sizes(arguments: EvaluateArguments, model: PreTrainedModel) -> tuple[int, int]:
    """Context length and stride, with the default filled in."""
    limit = max(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0, 0)  # XLNet's is -1
    longest = limit or LONG if isinstance(model, ScratchGPTForCausalLM) else min(limit or LONG, LONG)
    context_length = arguments.context_length or longest
    if limit and context_length > limit:
        raise UserError(f"--context_length {context_length} is longer than the model's {limit} positions: lower it.")
    if arguments.stride > context_length:
        raise UserError(f"--stride {arguments.stride} would skip tokens: it must be at most {context_length}.")
    return context_length, arguments.stride or context_length


def describe_precision(accelerator: Accelerator, model: PreTrainedModel) -> str:
    """The dtype of the matrix products: that of the weights, unless Accelerate's launcher has chosen another."""
    launched = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision)
    dtype = launched or str(model.dtype).removeprefix("torch.")
    return float32_name(accelerator.device.type) if dtype == "float32" else dtype


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(EvaluateArguments, __doc__, argv, positional="model")
    accelerator = start_accelerator()
    if arguments.split == "test" and not arguments.test_fraction:
        raise UserError("--split test: pass the --test_fraction of the training run.")
    check_corpora(arguments)
    name = os.path.expanduser(arguments.model)
    with accelerator.local_main_process_first():
        model, tokenizer = load_model_and_tokenizer(name, arguments.trust_remote_code, accelerator.device)
        context_length, stride = _window_sizes(arguments, model)
        windows = _choose_windows(arguments, name, model)
        corpora = read_corpora(arguments)
        documents = [corpus.documents for corpus in corpora]
        if arguments.split != "all":
            documents = [split_documents(corpus.documents, arguments)[arguments.split] for corpus in corpora]
        tokens = tokenize_documents(concatenate_datasets(documents), tokenizer, "the text")
    rows = evaluation_rows(tokens, windows, context_length, 0, stride)
    embedding: Any = model.get_input_embeddings()
    if (largest := tokens.ids.max()) >= (size := embedding.weight.shape[0]):
        raise UserError(f"{name}: its tokenizer has an id {largest}, but the model has {size} embeddings: they do not match.")
    dataloader = evaluation_dataloader(rows, arguments.batch_size * accelerator.num_processes, accelerator.num_processes)
    prepared_model = accelerator.prepare_model(model, evaluation_mode=True)  # for mixed precision
    with explain_out_of_memory("lower --batch_size or --context_length"):
        metrics = evaluate(accelerator, prepared_model, accelerator.prepare(dataloader), rows.num_bytes)
    settings = {key: getattr(arguments, key) for key in ("model", "dataset", "split")}
    sizes = {"windows": windows, "context_length": rows.context_length, "stride": getattr(rows, "stride", None)}
    sizes["precision"] = describe_precision(accelerator, model)
    report = {**settings, **sizes, **asdict(metrics), "tokens": rows.num_labels, "bytes": rows.num_bytes}
    size = "" if rows.num_bytes is None else f", {rows.num_bytes:,} bytes"
    line = f"{metrics} ({rows.num_labels:,} tokens{size}; {rows.scores}; {sizes['precision']})"
    accelerator.print(json.dumps(report) if arguments.json else line)
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
