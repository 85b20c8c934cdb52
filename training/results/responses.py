"""What a model answers: generated in batches, scored against what was expected, and side by side in a page for people.

Notable:
- Prompts of a batch are padded on the left, so that all answers begin at the same place; the longest come first, so that a
  batch which is too large for the memory shows at once.
- A batch goes on until its longest answer ends. So answers are generated in stages, each twice as long as the one before; those
  that have not ended yet fill the batches of the next.
- Nothing is drawn at random: an answer is what the model's generation config makes of the likeliest tokens. What is measured
  can be had again, and is what users get.
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
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.data.cache import atomic_file
from training.data.conversations import Conversation, Message
from training.errors import printable
from training.results.markdown import TEXT, block, code

RESPONSES, PAGE = "responses.jsonl", "responses.md"
MOST_ON_PAGE = 100
FIRST_STAGE = 16  # tokens
ROW = {"prompt", "expected", "base", "base_ended", "response", "ended", "chrf"}
NEVER_ENDED = " *(cut: it did not end)*"


@dataclass(frozen=True)
class Response:
    """An answer of a model."""

    text: str
    ended: bool  # by the model itself, and not because it had said enough

    def __str__(self) -> str:
        return self.text if self.ended else f"{self.text} ..."


@dataclass(frozen=True)
class ResponseScores:
    """How good answers are."""

    ended: float  # share that the model ended itself
    exact_match: float  # share that is what was expected, word for word
    chrf: float  # character n-gram F-score of all answers together, 0 to 100 (Popović, 2015)

    def __str__(self) -> str:
        return f"{self.ended:.1%} ended by themselves, {self.exact_match:.1%} word for word as expected, chrF {self.chrf:.1f}"


@torch.no_grad()
def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message]],
    batch_size: int,
    max_new_tokens: int,
    progress: str = "",
) -> list[Response]:
    """The model's answers, in the order of the prompts.

    Args:
        model: says in its generation config which token ends an answer.
        tokenizer: with a chat template, a token to pad with, and padding on the left.
        prompts: messages that end with the user's.
        batch_size: prompts that are answered at once.
        max_new_tokens: an answer is cut after so many, or where the model has no more positions.
        progress: what a bar says that shows how far it is; none is shown without it.
    """
    model.eval()
    stop_token_id: Any = model.generation_config.eos_token_id  # type: ignore[union-attr]
    encoded: Any = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)
    starts = [len(ids) for ids in encoded["input_ids"]]
    limits = [min(start + max_new_tokens, model.config.max_position_embeddings) for start in starts]
    rows: list[list[int]] = encoded["input_ids"]
    left, stage = list(range(len(rows))), FIRST_STAGE
    most = sum(limits) - sum(starts)
    with tqdm(total=most, desc=progress, unit=" tokens at most", leave=False, disable=not progress) as bar:
        while left:
            left.sort(key=lambda index: -len(rows[index]))
            for first in range(0, len(left), batch_size):
                batch = left[first : first + batch_size]
                padded = tokenizer.pad(
                    {"input_ids": [rows[index] for index in batch]}, padding_side="left", return_tensors="pt"
                )
                width = padded["input_ids"].shape[1]
                room = min(stage, model.config.max_position_embeddings - width)
                output: Any = model.generate(**padded.to(model.device), max_new_tokens=room)  # type: ignore[operator]
                for index, ids in zip(batch, output[:, width:].tolist(), strict=True):
                    end = ids.index(stop_token_id) + 1 if stop_token_id in ids else len(ids)
                    before = len(rows[index])
                    rows[index] = (rows[index] + ids[:end])[: limits[index]]
                    has_ended = rows[index][-1] == stop_token_id
                    bar.update((limits[index] if has_ended else len(rows[index])) - before)
            still = [index for index in left if rows[index][-1] != stop_token_id and len(rows[index]) < limits[index]]
            left, stage = still, 2 * stage
    responses = []
    for start, ids in zip(starts, rows, strict=True):
        ended = ids[-1] == stop_token_id
        text = tokenizer.decode(ids[start : len(ids) - ended], skip_special_tokens=True)
        responses.append(Response(str(text).strip(), ended))
    return responses


def respond_together(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    progress: str,
    **how: Any,
) -> list[Response]:
    """As `respond`, each process a share of the prompts; all get all answers."""
    with accelerator.split_between_processes(list(range(len(prompts))), apply_padding=True) as mine:
        shown = progress if accelerator.is_main_process else ""
        answers = respond(model, tokenizer, [prompts[index] for index in mine], progress=shown, **how)
        found = dict(gather_object(list(zip(mine, answers, strict=True))))
    return [found[index] for index in range(len(prompts))]


def score_responses(responses: Sequence[Response], conversations: Sequence[Conversation]) -> ResponseScores:
    """Against the answers that were expected."""
    expected = [conversation.answer for conversation in conversations]
    pairs = list(zip(responses, expected, strict=True))
    return ResponseScores(
        ended=sum(response.ended for response in responses) / len(pairs),
        exact_match=sum(response.text == answer for response, answer in pairs) / len(pairs),
        chrf=CHRF().corpus_score([response.text for response in responses], [expected]).score,
    )


def response_rows(
    conversations: Sequence[Conversation], base: Sequence[Response], tuned: Sequence[Response]
) -> list[dict[str, Any]]:
    """What is told of each conversation, as it is written: the prompt, what was expected, what both models answer."""
    chrf = CHRF()
    return [
        {
            "prompt": talk.prompt,
            "expected": talk.answer,
            "base": before.text,
            "base_ended": before.ended,
            "response": after.text,
            "ended": after.ended,
            "chrf": round(chrf.sentence_score(after.text, [talk.answer]).score, 2),
        }
        for talk, before, after in zip(conversations, base, tuned, strict=True)
    ]


def read_responses(folder: Path) -> list[dict[str, Any]]:
    """The rows that `write_responses` wrote.

    Raises:
        OSError, ValueError: they are not there, or not whole.
    """
    lines = (folder / RESPONSES).read_text(encoding="utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.keys() >= ROW:
            raise ValueError(f"row {number} of {RESPONSES} lacks some of {', '.join(sorted(ROW))}")
    if not rows:
        raise ValueError(f"{RESPONSES} is empty")
    return rows


def responses_page(rows: Sequence[dict[str, Any]]) -> str:
    """The first of the answers side by side, as Markdown."""
    first = f"the first {MOST_ON_PAGE:,} of " if len(rows) > MOST_ON_PAGE else ""
    parts = [f"# What it answers\n\nTo {first}{len(rows):,} held-out prompts; everything stands in [{RESPONSES}]({RESPONSES})."]
    for row in rows[:MOST_ON_PAGE]:
        marks = [f"chrF {row['chrf']:.0f}", *([f"judge {row['judge']}"] if row.get("judge") is not None else [])]
        answers = {
            "expected": (row["expected"], True),
            "base": (row["base"], row["base_ended"]),
            f"tuned ({', '.join(marks)})": (row["response"], row["ended"]),
        }
        said = [_said(message["role"], message["content"]) for message in row["prompt"]]
        said += [_said(who, text, "" if ended else NEVER_ENDED) for who, (text, ended) in answers.items()]
        parts.append("\n".join(said))
    return "\n\n---\n\n".join(parts) + "\n"


def write_responses(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All answers as JSON lines, and a page with the first of them."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, text in ((RESPONSES, lines), (PAGE, responses_page(rows))):
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _said(who: str, text: str, remark: str = "") -> str:
    """An item of a list: who says what, as it is written."""
    if "\n" not in text:
        return f"- **{who}**{remark}: {code(text) if text else '*(nothing)*'}"
    shown = block(printable(text if len(text) <= TEXT else f"{text[:TEXT]}..."), "")
    body = "\n".join(f"  {line}" for line in shown.split("\n"))
    return f"- **{who}**{remark}:\n\n{body}\n"
