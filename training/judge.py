"""LLM as a judge: have another language model grade the answers of a finished run of training/instruct.py.

    python training/judge.py outputs/instruct --base_url http://localhost:11434/v1 --model llama3.2

The judge is any server that speaks OpenAI's protocol, such as Ollama, vLLM or `transformers serve`. The grades are added to the
answers and to the card. A run that was interrupted continues with the answers that have no grade yet.

Notable:
- Each answer is graded alone, from 0 to 100, with the question and the reference answer, at temperature 0.
- A reply that is not such a number counts as malformed; it is not interpreted.
- The API key is read from OPENAI_API_KEY only, so that it is in no command, log or card.
"""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from tqdm.auto import tqdm

from modeling_scratchgpt.atomic import atomic_file
from training.cli import option, parse_arguments, run_main
from training.engine.run_folder import CARD, RESPONSES, RESPONSES_PAGE, SCORES
from training.errors import UserError, explain_errors, one_line
from training.progress import bar_options
from training.results.cards import without_directories
from training.results.responses import Verdicts, read_responses, responses_page, results_table, write_responses

KEY = "OPENAI_API_KEY"
SECONDS = 300  # to wait for a reply; a large model on a CPU is slow
SAVE_SECONDS = 60  # between writing the grades
MAX_TOKENS = 16
MAX_CHARACTERS = 200  # of a reply, that are kept
VERDICT = re.compile(r"\s*(100|[1-9]?[0-9])(\s*/\s*100)?\s*\.?\s*")
REQUEST = """You grade answers. Compare the answer with the reference: it may be worded differently, but must be as correct, \
as complete and as relevant.

Question:
{question}

Reference:
{expected}

Answer:
{response}

Reply with one whole number from 0 (useless) to 100 (as good as the reference), and nothing else."""


@dataclass
class JudgeArguments:
    run: str = option("", "directory of a finished run of instruct.py; also the first word of the command line")
    base_url: str = option("", "server that speaks OpenAI's protocol, up to /v1; the API key is read from OPENAI_API_KEY")
    model: str = option("", "name of the model on that server")


class Judge:
    """A language model on a server; `model` is its name there."""

    def __init__(self, base_url: str, model: str):
        self.base_url, self.model = base_url, model
        self.key = os.environ.get(KEY, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError(f"{KEY} is not a valid key: it contains characters that are not printable ASCII.")
        # Without a key the client would send the user's Hub token.
        self.client = InferenceClient(base_url=base_url.rstrip("/"), api_key=self.key or "none", timeout=SECONDS)

    def grade(self, row: dict[str, Any]) -> tuple[int | None, str]:
        """The grade of an answer, None if the reply is not a grade; and the reply.

        Raises:
            UserError: the server gives no reply.
        """
        question = "\n\n".join(message["content"] for message in row["prompt"])
        request = REQUEST.format(question=question, expected=row["expected"], response=row["response"])
        messages = [{"role": "user", "content": request}]
        try:
            answer = self.client.chat_completion(messages, model=self.model, temperature=0, max_tokens=MAX_TOKENS)
            content: Any = answer.choices[0].message.content
            if not isinstance(content, str | None):
                raise ValueError("its message is not a text")
        except HfHubHTTPError as error:
            text = f"{error.response.status_code} {error.response.reason_phrase} {error.response.text}"
            text = text.replace(self.key, "...") if self.key else text  # some servers repeat what they reject
            raise UserError(f"the judge at {self.base_url} refuses the request ({one_line(ValueError(text))}).") from error
        except (OSError, HTTPError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            remedy = "the URL of a server with OpenAI's protocol as --base_url, up to /v1, and its model's name as --model"
            raise UserError(f"the judge at {self.base_url} gives no valid reply ({one_line(error)}): pass {remedy}.") from error
        reply = content or ""
        found = VERDICT.fullmatch(reply)
        return (int(found[1]) if found else None), reply[:MAX_CHARACTERS]


def judge_all(judge: Judge, rows: Sequence[dict[str, Any]], save: Callable[[], object] = lambda: None) -> Verdicts:
    """Grade all answers that this judge has not graded yet; `judge`, `judge_reply` and `judge_model` are added to each row.

    Raises:
        UserError: the server gives no reply; the rows keep the grades so far.
    """
    name = without_directories(judge.model)
    saved = time.monotonic()
    for row in tqdm(rows, desc="Judging", unit=" answers", **bar_options()):
        if row.get("judge_model") != name:
            grade, reply = judge.grade(row)
            row |= {"judge": grade, "judge_reply": reply, "judge_model": name}
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
    grades = [row["judge"] for row in rows if row["judge"] is not None]
    return Verdicts(sum(grades) / len(grades) if grades else None, len(grades), len(rows) - len(grades))


def judge_responses(judge: Judge, directory: Path) -> None:
    """Grade the answers of a run, and add the grades to its files and its card.

    Raises:
        UserError: the directory has no answers; the server gives no reply.
    """
    with explain_errors(f"{directory} has no answers of a finished run with a test split"):
        rows = read_responses(directory)
        results = json.loads((directory / SCORES).read_text(encoding="utf-8"))
        card = (directory / CARD).read_text(encoding="utf-8")
        table = results_table(results)
        responses_page(rows)
    write_responses(directory, rows)  # a directory that cannot be written shows before the first request
    try:
        verdicts = judge_all(judge, rows, lambda: write_responses(directory, rows))
    finally:
        write_responses(directory, rows)  # the same command continues with the others
    results["judge"] = {"model": without_directories(judge.model), **asdict(verdicts)}
    card = card.replace(table, results_table(results))
    for name, text in ((SCORES, json.dumps(results, indent=2)), (CARD, card)):
        with atomic_file(directory / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"Judge {judge.model}: {verdicts}. The grades are in {directory / RESPONSES_PAGE} and {directory / RESPONSES}")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(JudgeArguments, __doc__, argv, positional="run")
    for name, value in vars(arguments).items():
        if not value:
            raise UserError(f"--{name} is missing: pass the run, and the judge's --base_url and --model.")
    if not arguments.base_url.startswith(("http://", "https://")):
        raise UserError(f"--base_url {arguments.base_url} must begin with http:// or https://.")
    judge_responses(Judge(arguments.base_url, arguments.model), Path(os.path.expanduser(arguments.run)))


if __name__ == "__main__":
    run_main(main)
