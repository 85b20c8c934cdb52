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

import copy
import inspect
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import modeling_scratchgpt  # noqa: F401  (teaches the Auto classes our model)
from training.arguments import UserError, option, parse_arguments, run
from training.corpora import check_sources, read_corpora, split_documents
from training.loop import start_accelerator
from training.windows import IGNORED

SPLITS = ("all", "train", "validation", "test")
Window = tuple[int, int, int]


@dataclass
class EvaluateArguments:
    config: str = option(os.devnull, "YAML file with values for any of these arguments.")
    model: str = option("", "Folder or Hub id of a causal language model; the first word means the same.")
    dataset: list[str] = option([], "The text: what training/pretrain.py takes as --dataset.")
    text_column: str = option("text", "Column of the text in datasets from the Hub.")
    split: str = option("all", "Part of a corpus that was used in training, cut as training/pretrain.py does.", choices=SPLITS)
    validation_fraction: float = option(0.02, "What the training run was given; only read with --split.")
    test_fraction: float = option(0.0, "What the training run was given; only read with --split.")
    seed: int = option(0, "What the training run was given; only read with --split.")
    context_length: int = option(0, "Tokens in a window; 0: as many as the model takes.")
    stride: int = option(0, "Tokens from one window to the next; 0: windows that do not overlap.")
    batch_size: int = option(4, "Windows that a process scores at once.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    json: bool = option(False, "Print one JSON object instead of a line.")


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    loss: float  # nats a token
    perplexity: float
    bits_per_byte: float  # of the text in UTF-8: comparable between tokenizers
    tokens: int  # scored
    bytes: int  # in the text, in UTF-8

    def __str__(self) -> str:
        figures = f"loss {self.loss:.4f}, perplexity {self.perplexity:,.2f}, {self.bits_per_byte:.4f} bits per byte"
        return f"{figures} ({self.tokens:,} tokens, {self.bytes:,} bytes)"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_tokenizer(name: str, trust_remote_code: bool) -> Tokenizer:
    """The model's own tokenizer.

    Raises:
        UserError: there is none, or none that `tokenizers` runs.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers, tokenizers and the Hub each have their own
        raise UserError(f"{name}: its tokenizer cannot be loaded ({_one_line(error)}).") from error
    # Where a folder holds no vocabulary, transformers may make a tokenizer without one.
    if not tokenizer.is_fast or len(tokenizer) - len(tokenizer.added_tokens_decoder) <= 0:
        raise UserError(f"{name} holds no tokenizer.json: save the model's tokenizer beside it, with `save_pretrained`.")
    return tokenizer


def load_model(name: str, trust_remote_code: bool, device: torch.device) -> PreTrainedModel:
    """The model on the device, in float32 on a CPU and in the precision it was saved in elsewhere.

    Raises:
        UserError: it is not there, is no causal language model, brings code that is not trusted, or lacks weights.
    """
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except Exception as error:  # transformers, safetensors, torch and the Hub each have their own
        raise UserError(f"{name} cannot be loaded as a causal language model ({_one_line(error)}).") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name} is no causal language model, or not a whole one: it lacks {', '.join(missing[:3])}.")
    return model.to(device).eval()


def check_model(name: str, trust_remote_code: bool) -> bool:
    """Whether the code that comes with the model may run: never where this package has the model itself.

    Raises:
        UserError: there is no such model, or its code was not trusted.
    """
    folder = Path(name)
    if not name or (not folder.is_dir() and (name.startswith((".", "/")) or name.count("/") > 1)):
        raise UserError(f"{name or 'no model'}: give the folder or the Hub id of a model as the first argument.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{name} holds no config.json: it is no model folder.")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no such folder here, and the Hub did not give it ({_one_line(error)}).") from error
    if config.get("model_type") == "scratchgpt":
        return False
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        raise UserError(f"{name} brings code of its own: read it, and pass --trust_remote_code if you trust it.")
    return trust_remote_code


def read_texts(arguments: EvaluateArguments) -> list[str]:
    """The documents to score, source by source."""
    parts = [corpus.documents for corpus in read_corpora(arguments.dataset, arguments.text_column)]
    if arguments.split != "all":
        fractions = (arguments.validation_fraction, arguments.test_fraction, arguments.seed)
        parts = [getattr(split_documents(part, *fractions), arguments.split) for part in parts]
    return [text for part in parts for text in part["text"]]


def encode(texts: list[str], tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """All texts as one row of ids, and their length in UTF-8 bytes.

    Where a tokenizer has one token for beginning and end, or only one of them, a single one stands between two documents, and
    one at each end. So the first token that is scored is the first of the text, as in lm_eval, unless there is neither.

    Raises:
        UserError: there is nothing to predict.
    """
    marks = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True  # one spelled out in a text is text
    backend.no_truncation()
    backend.no_padding()
    parts: list[np.ndarray] = []
    num_bytes = sum(len(text.encode()) for text in texts)
    for start in range(0, len(texts), 100):
        for encoding in backend.encode_batch_fast(texts[start : start + 100], add_special_tokens=False):
            before = marks[:1] if len(set(marks)) == 2 or not parts else []
            parts.append(np.array([*before, *encoding.ids, *marks[-1:]], dtype=np.int64))
    ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    if len(ids) < 2 or num_bytes == 0:
        raise UserError("the text is empty: there is nothing to predict.")
    return ids, num_bytes


def windows(num_ids: int, context_length: int, stride: int) -> list[Window]:
    """What the model reads at once, and what of it is scored.

    Args:
        num_ids: tokens in the text.
        context_length: most tokens in a window.
        stride: tokens from one window to the next, at most `context_length`.

    Returns:
        Triples (start, first, end): tokens `first` to `end` are predicted, each from those that stand before it since `start`,
        which are more than `context_length - stride` in all windows but the first.
    """
    starts = range(0, max(num_ids - 1 - context_length, 0) + stride, stride)
    ends = [min(start + context_length + 1, num_ids) for start in starts]
    return list(zip(starts, [1, *ends[:-1]], ends, strict=True))


def to_batch(ids: np.ndarray, rows: list[Window]) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows as ids and labels, (rows, width) each. Rows are filled up at the end, where causal attention does not look."""
    shape = (len(rows), max(end - start - 1 for start, _, end in rows))
    inputs, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for row, (start, first, end) in enumerate(rows):
        inputs[row, : end - start - 1] = torch.from_numpy(ids[start : end - 1])
        labels[row, first - start - 1 : end - start - 1] = torch.from_numpy(ids[first:end])
    return inputs, labels


@torch.no_grad()
def sum_of_nats(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, keeps: bool) -> float:
    """Minus the log-probability of all labels (rows, width) that count.

    Args:
        keeps: whether the model takes `logits_to_keep`; what comes before the first label of all rows then costs no logits.
    """
    counted = (labels != IGNORED).any(0).nonzero()
    kept = labels.shape[1] - int(counted[0])
    logits = model(inputs, use_cache=False, **({"logits_to_keep": kept} if keeps else {})).logits[:, -kept:]
    nats = 0.0
    for row, targets in zip(logits, labels[:, -kept:], strict=True):  # float32 copies of all logits would fill the memory
        nats += functional.cross_entropy(row.float(), targets, ignore_index=IGNORED, reduction="sum").item()
    return nats


def score(
    accelerator: Accelerator, model: PreTrainedModel, ids: np.ndarray, num_bytes: int, chosen: list[Window], batch_size: int
) -> Score:
    """Score what `windows` has chosen; each process takes every so many-th batch of it.

    Args:
        ids, num_bytes: the text, from `encode`.
        batch_size: windows that the model reads at once.

    Raises:
        UserError: the loss is not a finite number.
    """
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    model = accelerator.prepare_model(model, evaluation_mode=True)  # mixed precision, if the launcher was told so
    batches = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    own = batches[accelerator.process_index :: accelerator.num_processes]
    nats, total = 0.0, sum(end - first for rows in own for _, first, end in rows)
    with tqdm(total=total, desc="Evaluating", unit=" tokens", unit_scale=True, disable=not accelerator.is_main_process) as bar:
        for rows in own:
            inputs, labels = (tensor.to(accelerator.device) for tensor in to_batch(ids, rows))
            nats += sum_of_nats(model, inputs, labels, keeps)
            bar.update(sum(end - first for _, first, end in rows))
    nats, tokens = sum(gather_object([nats])), len(ids) - 1
    if not math.isfinite(nats):
        raise UserError(f"the loss is {nats}: the model's weights are not all finite numbers.")
    return Score(nats / tokens, math.exp(min(nats / tokens, 700)), nats / math.log(2) / num_bytes, tokens, num_bytes)


def check(arguments: EvaluateArguments) -> None:
    """Refuse nonsense before any long work."""
    for name, least in (("context_length", 0), ("stride", 0), ("batch_size", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(arguments, name)}.")
    held_out = (arguments.validation_fraction, arguments.test_fraction)
    if held_out[0] <= 0 or held_out[1] < 0 or sum(held_out) >= 1:
        raise UserError(f"--validation_fraction and --test_fraction must be positive and below 1 in all, got {held_out}.")
    if arguments.split == "test" and not arguments.test_fraction:
        raise UserError("--split test: say what part of the corpus the training run held out, with --test_fraction.")
    check_sources(arguments.dataset, arguments.text_column)


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
        ids, num_bytes = encode(read_texts(arguments), tokenizer)
    embedding: Any = model.get_input_embeddings()
    if ids.max() >= (size := embedding.weight.shape[0]):
        raise UserError(f"{name}: the tokenizer gives id {ids.max()}, but the model knows {size}: they do not belong together.")
    chosen = windows(len(ids), context_length, stride)
    result = score(accelerator, model, ids, num_bytes, chosen, arguments.batch_size)
    asked = {name: getattr(arguments, name) for name in ("model", "dataset", "split")}
    facts = {**asked, "context_length": context_length, "stride": stride, **asdict(result)}
    accelerator.print(json.dumps(facts) if arguments.json else result)
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
