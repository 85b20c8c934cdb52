"""Grading over real HTTP: `transformers serve` with small models, and servers that misbehave."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from tests.training.conftest import scores
from training import instruct, judge
from training.data.prompts import CHAT_TEMPLATES, set_up_chat_template
from training.errors import UserError
from training.judge import REQUEST, VERDICT, Judge, judge_all
from training.results.responses import write_responses

ROWS = [
    {"prompt": [{"role": "user", "content": question}], "expected": expected, "response": response}
    for question, expected, response in (("Two and two?", "Four.", "Four."), ("The sea?", "Blue.", "A fish."))
]


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    """The client refuses all requests offline, also to this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def make_judge(folder: str, verdict: str) -> str:
    """A model that has learned to reply to the requests for `ROWS` with one verdict."""
    tokenizer = ScratchGPTTokenizer.train([REQUEST] * 9 + ["I think it is 73."] * 9, vocab_size=500)
    set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], 1024)
    requests = [REQUEST.format(question=row["prompt"][0]["content"], **row) for row in ROWS]
    shape = {"max_position_embeddings": 1024, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ScratchGPTForCausalLM(ScratchGPTConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        messages = [{"role": "user", "content": requests[step % 2]}, {"role": "assistant", "content": verdict}]
        options = {"return_assistant_tokens_mask": True, "return_dict": True, "return_tensors": "pt"}
        batch = tokenizer.apply_chat_template(messages, **options)
        labels = batch["input_ids"].masked_fill(batch["assistant_masks"] == 0, -100)
        model(batch["input_ids"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("verdict", "mean", "graded", "text"),
    [
        ("73", 73, 2, "mean grade 73.0 of 100 over 2 answers, 0 malformed replies"),
        ("I think 73", None, 0, "mean grade none over 0 answers, 2 malformed replies"),  # counted, not interpreted
    ],
)
def test_a_scratchgpt_is_the_judge(server, tmp_path, verdict, mean, graded, text):
    rows = [dict(row) for row in ROWS]
    verdicts = judge_all(Judge(server + "/v1/", make_judge(str(tmp_path), verdict)), rows)
    assert (verdicts.mean, verdicts.graded, verdicts.malformed) == (mean, graded, 2 - graded)
    assert [row["judge"] for row in rows] == [mean] * 2
    assert [row["judge_reply"] for row in rows] == [verdict] * 2
    assert str(verdicts) == text


def test_a_model_that_the_server_does_not_have(server):
    with pytest.raises(UserError, match=r"the judge at http://.* refuses the request \(\d+ "):
        Judge(server + "/v1", "nobody/nothing").grade(ROWS[0])


def test_grades_are_saved_while_others_are_awaited(monkeypatch):
    monkeypatch.setattr(judge, "SAVE_SECONDS", 0)
    rows, saved = [dict(row) for row in ROWS], []
    grader = SimpleNamespace(model="judge", grade=lambda row: (50, "50"))
    judge_all(grader, rows, lambda: saved.append([row.get("judge") for row in rows]))
    assert saved == [[50, None], [50, 50]]


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("0", 0), ("100", 100), (" 85\n", 85), ("7/100", 7), ("90 / 100.", 90), ("42.", 42)]
    + [(reply, None) for reply in ("101", "-1", "007", "85.5", "Score: 85", "85 or 90", "", "eighty", "8 5", "²", "1e2")],
)
def test_grades(reply, grade):
    found = VERDICT.fullmatch(reply)
    assert (int(found[1]) if found else None) == grade


@pytest.fixture
def answering():
    """Starts servers that answer every request in one way, and keeps the requests."""
    servers, requests = [], []

    def start(status: int, body: bytes, **headers: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                requests.append((self.path, dict(self.headers), json.loads(content or "null")))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST  # noqa: N815

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1"

    yield start, requests
    for server in servers:
        server.shutdown()
        server.server_close()


def reply(content: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@pytest.mark.parametrize(("key", "sent"), [("sk-secret", "sk-secret"), ("sk-secret\r\n", "sk-secret"), (" ", "none")])
def test_the_request(answering, monkeypatch, key, sent):
    """A key may have the line end of its file; without a key, the user's token for the Hub is not sent either."""
    start, requests = answering
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert Judge(start(200, reply("85")), "some-model").grade(ROWS[1]) == (85, "85")
    ((path, headers, body),) = requests
    assert path == "/v1/chat/completions"
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == f"Bearer {sent}"
    assert (body["model"], body["temperature"]) == ("some-model", 0)
    (message,) = body["messages"]
    for part in ("The sea?", "Blue.", "A fish."):
        assert part in message["content"]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b'{"error": "no such key"}', r"refuses the request \(401 Unauthorized .*no such key"),
        (200, b"<html>", "gives no valid reply"),
        (200, b'{"choices": []}', "gives no valid reply"),
        (200, b'{"choices": [{"message": null}]}', "gives no valid reply"),
        (200, b"\xff", "gives no valid reply"),
        (500, b"x" * 100_000, "refuses the request .500"),
        (401, b"the key sk-secret is unknown", r"refuses the request .401 Unauthorized the key \.\.\. is unknown"),
        (200, b'{"choices": [{"message": {"content": [{"text": "85"}]}}]}', "gives no valid reply .its message is not a text"),
        (200, b"[" * 100_000, "gives no valid reply"),
        (200, b"x" * 2_000_000, "gives no valid reply"),
    ],
)
def test_a_server_that_is_not_a_judge_is_an_error_of_one_line(answering, status, body, message, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(UserError, match=message) as error:
        Judge(answering[0](status, body), "m").grade(ROWS[0])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert "sk-secret" not in str(error.value)


def test_the_key_is_not_sent_to_another_server(answering, monkeypatch):
    start, requests = answering
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    elsewhere = start(200, b"{}")
    with pytest.raises(UserError, match="refuses the request|gives no valid reply"):
        Judge(start(302, b"", Location=elsewhere), "m").grade(ROWS[0])
    assert ["sk-secret" in str(headers) for _, headers, _ in requests] == [True, False][: len(requests)]


def test_an_invalid_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-se\rcret")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not a valid key") as error:
        Judge("http://127.0.0.1:9/v1", "m")
    assert "cret" not in str(error.value)


def test_grades_are_kept_when_the_judge_fails(answering):
    """The same judge continues; another judge grades all answers."""
    rows = [dict(row) for row in ROWS]
    start, requests = answering
    url = start(200, reply("85"))
    judge_all(Judge(url, "m"), rows[:1])
    with pytest.raises(UserError, match="gives no valid reply"):
        judge_all(Judge(start(200, b""), "m"), rows)
    assert [row.get("judge") for row in rows] == [85, None]
    assert len(requests) == 2
    assert judge_all(Judge(url, "m"), rows).mean == 85
    assert len(requests) == 3
    judge_all(Judge(url, "/models/other"), rows)
    assert len(requests) == 5
    assert [row["judge_model"] for row in rows] == ["other"] * 2


def test_no_server_and_a_server_that_never_replies(answering, monkeypatch):
    with pytest.raises(UserError, match=r"the judge at http://127.0.0.1:9/v1 gives no valid reply .*refused.* --base_url"):
        Judge("http://127.0.0.1:9/v1", "m").grade(ROWS[0])
    monkeypatch.setattr(judge, "SECONDS", 0.5)
    url = answering[0](200, b"{", **{"Content-Length": "100"})
    with pytest.raises(UserError, match="gives no valid reply"):
        Judge(url, "m").grade(ROWS[0])


def test_the_grades_of_a_run_are_in_its_files_and_its_card(answering, tune, capsys):
    folder = tune(instruct, "--num_train_epochs", "1")
    argv = [str(folder), "--base_url", answering[0](200, reply("73")), "--model", "/models/large"]
    for _ in range(2):  # again, without a request
        judge.main(argv)
        assert "Judge /models/large: mean grade 73.0 of 100 over 8 answers, 0 malformed replies." in capsys.readouterr().out
    assert len(answering[1]) == 8
    assert scores(folder)["judge"] == {"model": "large", "mean": 73, "graded": 8, "malformed": 0}
    answers = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert {(row["judge"], row["judge_reply"], row["judge_model"]) for row in answers} == {(73, "73", "large")}
    assert "Judge `large`: mean grade 73.0 of 100 over 8 answers" in (folder / "README.md").read_text()
    assert "judge 73)" in (folder / "responses.md").read_text()
    answers[0]["response"] = "a\u2028b"  # a line end in some places, but not in JSON lines
    write_responses(folder, answers)
    judge.main(argv)
    for content, message in (
        ([{}], "row 1 of responses.jsonl lacks some of base, base_finished"),
        ([1], "row 1 of responses.jsonl lacks"),
        ([], "responses.jsonl is empty"),
        ([{**answers[0], "chrf": "much"}], "has no answers of a finished run"),
        ([{**answers[0], "response": None}], "has no answers of a finished run"),
        ([{**answers[0], "prompt": "What?"}], "has no answers of a finished run"),
    ):
        (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        with pytest.raises(UserError, match=message):
            judge.main(argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--base_url", "http://x", "--model", "m"], "--run is missing"),
        (["/nowhere", "--base_url", "http://x"], "--model is missing"),
        (["/nowhere", "--model", "m"], "--base_url is missing"),
        (["/nowhere", "--base_url", "file:///x", "--model", "m"], "--base_url file:///x must begin with http"),
        (["/nowhere", "--base_url", "http://127.0.0.1:9", "--model", "m"], "/nowhere has no answers of a finished run"),
    ],
)
def test_a_mistake_is_an_error(argv, message):
    with pytest.raises(UserError, match=message):
        judge.main(argv)
