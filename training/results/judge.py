"""A language model as the judge of another's answers: any endpoint that speaks OpenAI's protocol, asked over HTTP.

Notable:
- Each answer is graded by itself, from 0 to 100, beside the question and the answer that was expected; at temperature 0.
- What is no such number is counted as no verdict, and never guessed at.
- The key of the endpoint is read from the environment alone, so that it stands in no command, log or card.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from training.errors import UserError, one_line
from training.results.cards import without_folders

KEY = "OPENAI_API_KEY"
MOST_BYTES = 1_000_000
SECONDS = 300  # to wait for a verdict; a large model on a CPU takes its time
TOKENS = 16
LONGEST = 200  # characters that are kept of what it says
VERDICT = re.compile(r"\s*(100|[1-9]?[0-9])(\s*/\s*100)?\s*\.?\s*")
REQUEST = """You grade answers. Compare the answer with the reference: it may be worded otherwise, but must be as right, as \
complete and as much to the point.

Question:
{question}

Reference:
{expected}

Answer:
{response}

Say how good the answer is: one whole number from 0 (useless) to 100 (as good as the reference), and nothing else."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: the key is for the server that was named."""

    def redirect_request(self, *_: Any) -> None:
        return None


OPENER = urllib.request.build_opener(_Stay)


@dataclass(frozen=True)
class Judge:
    """Where the judge is asked, and for which of the models there."""

    url: str  # up to /v1
    model: str

    def grade(self, row: dict[str, Any]) -> tuple[int | None, str]:
        """The grade of an answer, or None if the judge says something else; and what it said.

        Raises:
            UserError: it does not answer.
        """
        question = "\n\n".join(message["content"] for message in row["prompt"])
        request = REQUEST.format(question=question, expected=row["expected"], response=row["response"])
        said = self._ask(request)
        found = VERDICT.fullmatch(said)
        return (int(found[1]) if found else None), said[:LONGEST]

    def check(self) -> None:
        """Ask it something, to see that it answers.

        Raises:
            UserError: it does not.
        """
        self._ask("Say 1.")

    def _ask(self, text: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": TOKENS,
        }
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{KEY} is no key: it holds characters that are not ASCII, or that are not printed.")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
            try:
                with OPENER.open(request, timeout=SECONDS) as answer:
                    content = json.loads(_read(answer))["choices"][0]["message"]["content"]
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.reason} {_read(error).decode('utf-8', 'replace')}"
                said = one_line(ValueError(said.replace(key, "...") if key else said))  # some servers repeat what they refuse
                raise UserError(f"the judge at {self.url} refuses ({said}).") from error
            if not isinstance(content, str | None):
                raise ValueError("its message is no text")
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, RecursionError) as error:
            cause = getattr(error, "reason", error)  # urllib wraps the system's errors
            reason = getattr(cause, "strerror", None) or one_line(cause)
            raise UserError(
                f"the judge at {self.url} does not answer ({reason}): give the address of a server that speaks "
                "OpenAI's protocol as --judge_url, up to and with /v1, and the name of its model as --judge_model."
            ) from error
        return content or ""


def _read(answer: Any) -> bytes:
    """The body of an answer, which comes in time and is of a size for a verdict, or is none."""
    content, deadline = b"", time.monotonic() + SECONDS
    while part := answer.read1(MOST_BYTES):
        content += part
        if len(content) > MOST_BYTES or time.monotonic() > deadline:
            raise ValueError("it goes on and on")
    return content


@dataclass(frozen=True)
class Verdicts:
    """What a judge thinks of all answers."""

    mean: float | None  # of the grades, 0 to 100
    graded: int
    malformed: int  # answers of which it said no grade

    def __str__(self) -> str:
        mean = "none" if self.mean is None else f"{self.mean:.1f} of 100"
        return f"mean grade {mean}, over {self.graded:,} answers; {self.malformed:,} verdicts were no grade"


def judge_all(judge: Judge, rows: Sequence[dict[str, Any]], show_progress: bool = True) -> Verdicts:
    """Have all answers graded that this judge has not graded yet. The grade goes into the row of the answer, as `judge`, with
    what was said and the judge's name.

    Raises:
        UserError: the judge does not answer; the rows hold the grades until then.
    """
    name = without_folders(judge.model)
    for row in tqdm(rows, desc="Judging", unit=" answers", disable=not show_progress):
        if row.get("judge_model") != name:
            grade, said = judge.grade(row)
            row |= {"judge": grade, "judge_said": said, "judge_model": name}
    grades = [row["judge"] for row in rows if row["judge"] is not None]
    return Verdicts(sum(grades) / len(grades) if grades else None, len(grades), len(rows) - len(grades))
