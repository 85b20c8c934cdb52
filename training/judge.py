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
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from training.arguments import UserError, one_line

KEY = "OPENAI_API_KEY"
SECONDS = 300  # to wait for a verdict; a large model on a CPU takes its time
TOKENS = 16
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

    def grade(self, row: dict[str, Any]) -> int | None:
        """The grade of an answer, or None if the judge says something else.

        Raises:
            UserError: it does not answer.
        """
        question = "\n\n".join(message["content"] for message in row["prompt"])
        request = REQUEST.format(question=question, expected=row["expected"], response=row["response"])
        found = VERDICT.fullmatch(self._ask(request))
        return int(found[1]) if found else None

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
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        try:
            request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
            with OPENER.open(request, timeout=SECONDS) as answer:
                content = json.load(answer)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            said = one_line(ValueError(error.read(2000).decode("utf-8", "replace")))
            raise UserError(f"the judge at {self.url} refuses ({error.code} {error.reason}: {said}).") from error
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"the judge at {self.url} does not answer ({one_line(error)}): give the address of a server that speaks "
                "OpenAI's protocol as --judge_url, up to and with /v1, and the name of its model as --judge_model."
            ) from error
        return content or ""


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
    """Have all answers graded; each grade goes into its row, as `judge`.

    Raises:
        UserError: the judge does not answer.
    """
    for row in tqdm(rows, desc="Judging", unit=" answers", disable=not show_progress):
        row["judge"] = judge.grade(row)
    grades = [row["judge"] for row in rows if row["judge"] is not None]
    return Verdicts(sum(grades) / len(grades) if grades else None, len(grades), len(rows) - len(grades))
