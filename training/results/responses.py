"""Answers of a model: generated in batches, scored against references, and written side by side.

Notable:
- Prompts of a batch are padded on the left, so that all answers begin at the same position; the longest come first, so that a
  batch that does not fit into memory fails at once.
- A batch runs until its longest answer ends. Answers are therefore generated in stages, each twice as long as the one before;
  those that have not ended fill the batches of the next stage.
- Nothing is sampled: the metrics are reproducible, and are those of the answers that users get.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from sacrebleu.metrics import CHRF
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from modeling_scratchgpt.atomic import atomic_file
from training.data.conversations import Conversation, Message
from training.engine.launch import sdpa_attention
from training.engine.run_folder import RESPONSES, RESPONSES_PAGE
from training.errors import printable
from training.progress import bar_options
from training.results.cards import losses_table
from training.results.markdown import MAX_TEXT, block, code, table

MAX_ON_PAGE = 100
FIRST_STAGE = 16  # tokens
KEYS = {"prompt", "expected", "base", "base_finished", "response", "finished", "chrf"}
TRUNCATED = " *(truncated)*"


@dataclass(frozen=True)
class Response:
    """An answer of a model."""

    text: str
    finished: bool  # by the model's stop token, not by the maximum length

    def __str__(self) -> str:
        return self.text if self.finished else f"{self.text} ..."


@dataclass(frozen=True)
class ResponseScores:
    """Metrics of answers against references."""

    finished: float  # share that ends with the stop token
    exact_match: float  # share that equals the reference, except for white space around it
    chrf: float  # character n-gram F-score over all answers, 0 to 100 (Popović, 2015)

    def __str__(self) -> str:
        return f"{self.finished:.1%} finished, {self.exact_match:.1%} exact match, chrF {self.chrf:.1f}"


@dataclass(frozen=True)
class Verdicts:
    """Grades of a judge."""

    mean: float | None  # 0 to 100
    graded: int
    malformed: int  # replies that are not a grade

    def __str__(self) -> str:
        mean = "none" if self.mean is None else f"{self.mean:.1f} of 100"
        return f"mean grade {mean} over {self.graded:,} answers, {self.malformed:,} malformed replies"


@torch.no_grad()
def respond(
    model: Any, tokenizer: Any, prompts: Sequence[list[Message]], batch_size: int, max_new_tokens: int, progress: str = ""
) -> list[Response]:
    """The model's answers, in the order of the prompts, each of which ends with a message of the user.

    Args:
        model: a causal one of transformers; the `eos_token_id` of its generation config ends an answer.
        tokenizer: of transformers, with a chat template and a padding token.
        max_new_tokens: longer answers are truncated, as are those that reach the model's last position.
        progress: description of a progress bar; no bar if empty.
    """
    model.eval()
    stop_token_id = model.generation_config.eos_token_id
    encoded = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)
    rows: list[list[int]] = encoded["input_ids"]
    starts = [len(ids) for ids in rows]
    limits = [min(start + max_new_tokens, model.config.max_position_embeddings) for start in starts]
    unfinished, stage = list(range(len(rows))), FIRST_STAGE
    total, options = sum(limits) - sum(starts), bar_options(hidden=not progress)
    with tqdm(total=total, desc=progress, unit=" tokens at most", leave=False, **options) as bar:
        while unfinished:
            unfinished.sort(key=lambda index: -len(rows[index]))
            for first in range(0, len(unfinished), batch_size):
                batch = unfinished[first : first + batch_size]
                new_ids = _generate(model, tokenizer, [rows[index] for index in batch], stage)
                for index, ids in zip(batch, new_ids, strict=True):
                    before = len(rows[index])
                    rows[index] = (rows[index] + ids)[: limits[index]]
                    has_ended = rows[index][-1] == stop_token_id
                    bar.update((limits[index] if has_ended else len(rows[index])) - before)
            unfinished = [it for it in unfinished if rows[it][-1] != stop_token_id and len(rows[it]) < limits[it]]
            stage *= 2
    answers = [ids[start:] for start, ids in zip(starts, rows, strict=True)]
    return [Response(tokenizer.decode(ids, skip_special_tokens=True), stop_token_id in ids) for ids in answers]


def _generate(model: Any, tokenizer: Any, rows: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The new ids of each row, up to and with its stop token."""
    padded = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    width = padded["input_ids"].shape[1]
    room = min(max_new_tokens, model.config.max_position_embeddings - width)
    with sdpa_attention(model):
        output = model.generate(**padded.to(model.device), max_new_tokens=room)[:, width:].tolist()
    stop = model.generation_config.eos_token_id
    return [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in output]


def respond_distributed(
    accelerator: Accelerator, model: Any, tokenizer: Any, prompts: list[list[Message]], progress: str, **options: Any
) -> list[Response]:
    """`respond`, with the prompts divided over the processes; all of them return all answers."""
    if isinstance(model, FSDPModule):  # its processes compute each step together, so all of them answer all prompts
        return respond(model, tokenizer, prompts, progress=progress if accelerator.is_main_process else "", **options)
    with accelerator.split_between_processes(list(range(len(prompts))), apply_padding=True) as indices:
        shown = progress if accelerator.is_main_process else ""
        answers = respond(model, tokenizer, [prompts[index] for index in indices], progress=shown, **options)
        found = dict(gather_object(list(zip(indices, answers, strict=True))))
    return [found[index] for index in range(len(prompts))]


def score_responses(responses: Sequence[Response], conversations: Sequence[Conversation]) -> ResponseScores:
    """Metrics against the answers of the conversations."""
    expected = [conversation.answer for conversation in conversations]
    matches = [response.text.strip() == answer.strip() for response, answer in zip(responses, expected, strict=True)]
    return ResponseScores(
        finished=sum(response.finished for response in responses) / len(responses),
        exact_match=sum(matches) / len(responses),
        chrf=CHRF().corpus_score([response.text for response in responses], [expected]).score,
    )


def response_rows(conversations: list[Conversation], base: list[Response], tuned: list[Response]) -> list[dict[str, Any]]:
    """The rows of responses.jsonl: the prompt, the reference, and the answers of both models."""
    chrf = CHRF()
    return [
        {
            "prompt": conversation.prompt,
            "expected": conversation.answer,
            "base": before.text,
            "base_finished": before.finished,
            "response": after.text,
            "finished": after.finished,
            "chrf": round(chrf.sentence_score(after.text, [conversation.answer]).score, 2),
        }
        for conversation, before, after in zip(conversations, base, tuned, strict=True)
    ]


def read_responses(directory: Path) -> list[dict[str, Any]]:
    """The rows that `write_responses` wrote.

    Raises:
        OSError, ValueError: the file is missing or incomplete.
    """
    rows = [json.loads(line) for line in (directory / RESPONSES).read_text(encoding="utf-8").split("\n")[:-1]]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.keys() >= KEYS:
            raise ValueError(f"row {number} of {RESPONSES} lacks some of {', '.join(sorted(KEYS))}")
    if not rows:
        raise ValueError(f"{RESPONSES} is empty")
    return rows


def write_responses(directory: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write all answers as JSON lines, and a page with the first of them."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, text in ((RESPONSES, lines), (RESPONSES_PAGE, responses_page(rows))):
        with atomic_file(directory / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def responses_page(rows: Sequence[dict[str, Any]]) -> str:
    """The first answers side by side, as Markdown."""
    first = f"the first {MAX_ON_PAGE:,} of " if len(rows) > MAX_ON_PAGE else ""
    parts = [f"# Answers\n\nTo {first}{len(rows):,} held-out prompts; all of them are in [{RESPONSES}]({RESPONSES})."]
    for row in rows[:MAX_ON_PAGE]:
        scores = [f"chrF {row['chrf']:.0f}", *([f"judge {row['judge']}"] if row.get("judge") is not None else [])]
        items = [_list_item(message["role"], message["content"]) for message in row["prompt"]]
        items += [
            _list_item("expected", row["expected"]),
            _list_item("base", row["base"], "" if row["base_finished"] else TRUNCATED),
            _list_item(f"tuned ({', '.join(scores)})", row["response"], "" if row["finished"] else TRUNCATED),
        ]
        parts.append("\n".join(items))
    return "\n\n---\n\n".join(parts) + "\n"


def _list_item(name: str, text: str, remark: str = "") -> str:
    if "\n" not in text:
        return f"- **{name}**{remark}: {code(text) if text else '*(empty)*'}"
    shown = block(printable(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."), "")
    body = "\n".join(f"  {line}" for line in shown.split("\n"))
    return f"- **{name}**{remark}:\n\n{body}\n"


def results_table(results: dict[str, dict[str, Any]]) -> str:
    """The content of metrics.json as Markdown: losses, then the metrics of the answers and the judge's grades, if any."""
    titles = {"before": "validation, before", "validation": "validation", "test": "test"}
    remark = "The loss is that of the answers only. The validation split was used to follow training."
    parts = [losses_table({title: results[name] for name, title in titles.items() if name in results}), remark]
    if "test" in results:
        parts[-1] += " The test split was used once, at the end."
        answers = {"the base": results["base"], "this model": results["test"]}.items()
        rows = ((name, f"{row['finished']:.1%}", f"{row['exact_match']:.1%}", f"{row['chrf']:.1f}") for name, row in answers)
        parts.append(table("| answers to the test split | finished | exact match | chrF |", rows))
        if row := results.get("judge"):
            parts.append(f"Judge {code(row['model'])}: {Verdicts(row['mean'], row['graded'], row['malformed'])}.")
    return "\n\n".join(parts)
