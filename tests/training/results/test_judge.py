"""Asked over real HTTP: `transformers serve` with models of ours, and servers that misbehave."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from training.data.prompts import CHAT_TEMPLATES, set_up_chat_template
from training.errors import UserError
from training.results import judge as judging
from training.results.judge import REQUEST, VERDICT, Judge, judge_all

ROWS = [
    {"prompt": [{"role": "user", "content": question}], "expected": expected, "response": response}
    for question, expected, response in (("Two and two?", "Four.", "Four."), ("The sea?", "Blue.", "A fish."))
]


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Folders of models that have learned to say one thing to whatever they are asked."""

    def make(verdict: str) -> str:
        folder = str(tmp_path_factory.mktemp("judge"))
        tokenizer = ScratchGPTTokenizer.train([REQUEST] * 9 + ["I think it is 73."] * 9, vocab_size=500)
        set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], 1024)
        asked = [REQUEST.format(question=it["prompt"][0]["content"], **it) for it in ROWS] + ["Say 1."]
        torch.manual_seed(0)
        model = ScratchGPTForCausalLM(
            ScratchGPTConfig(
                vocab_size=len(tokenizer),
                max_position_embeddings=1024,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(60):
            messages = [{"role": "user", "content": asked[step % 3]}, {"role": "assistant", "content": verdict}]
            batch = tokenizer.apply_chat_template(
                messages, return_assistant_tokens_mask=True, return_dict=True, return_tensors="pt"
            )
            labels = batch["input_ids"].masked_fill(batch["assistant_masks"] == 0, -100)
            model(batch["input_ids"], labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return {verdict: make(verdict) for verdict in ("73", "I think 73")}


def test_a_model_of_ours_judges(server, judges):
    rows = [dict(row) for row in ROWS]
    judge = Judge(server + "/v1/", judges["73"])
    judge.check()
    verdicts = judge_all(judge, rows, show_progress=False)
    assert (verdicts.mean, verdicts.graded, verdicts.malformed) == (73, 2, 0)
    assert [row["judge"] for row in rows] == [73, 73]
    assert str(verdicts) == "mean grade 73.0 of 100, over 2 answers; 0 verdicts were no grade"


def test_what_is_no_grade_is_counted_and_not_guessed(server, judges):
    rows = [dict(row) for row in ROWS]
    verdicts = judge_all(Judge(server + "/v1", judges["I think 73"]), rows, show_progress=False)
    assert (verdicts.mean, verdicts.graded, verdicts.malformed) == (None, 0, 2)
    assert [row["judge"] for row in rows] == [None, None]
    assert [row["judge_said"] for row in rows] == ["I think 73"] * 2
    assert str(verdicts) == "mean grade none, over 0 answers; 2 verdicts were no grade"


def test_a_model_that_the_server_has_not(server):
    with pytest.raises(UserError, match=r"the judge at http://.* refuses \(\d+ "):
        Judge(server + "/v1", "nobody/nothing").check()


@pytest.mark.parametrize(
    ("said", "grade"),
    [("0", 0), ("100", 100), (" 85\n", 85), ("7/100", 7), ("90 / 100.", 90), ("42.", 42)]
    + [(said, None) for said in ("101", "-1", "007", "85.5", "Score: 85", "85 or 90", "", "eighty", "8 5", "²", "1e2")],
)
def test_what_is_a_grade(said, grade):
    found = VERDICT.fullmatch(said)
    assert (int(found[1]) if found else None) == grade


@pytest.fixture
def answering():
    """Starts servers that answer every request in one way, and remembers what they were asked."""
    servers, requests = [], []

    def start(status: int, body: bytes, **headers: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                requests.append((self.path, dict(self.headers), json.loads(content)))
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


def test_what_is_asked(answering, monkeypatch):
    start, requests = answering
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    url = start(200, json.dumps({"choices": [{"message": {"content": "85"}}]}).encode())
    assert Judge(url, "some-model").grade(ROWS[1]) == (85, "85")
    ((path, headers, body),) = requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-secret"
    assert (body["model"], body["temperature"]) == ("some-model", 0)
    (message,) = body["messages"]
    for part in ("The sea?", "Blue.", "A fish."):
        assert part in message["content"]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b'{"error": "no such key"}', r"refuses \(401 Unauthorized .*no such key"),
        (200, b"<html>", "does not answer"),
        (200, b'{"choices": []}', "does not answer"),
        (200, b'{"choices": [{"message": null}]}', "does not answer"),
        (200, b"\xff", "does not answer"),
        (500, b"x" * 100_000, "refuses .500"),
        (401, b"the key sk-secret is none", r"refuses .401 Unauthorized the key \.\.\. is none"),
        (200, b'{"choices": [{"message": {"content": [{"text": "85"}]}}]}', "does not answer .its message is no text"),
        (200, b"[" * 100_000, "does not answer"),
        (200, b"x" * 2_000_000, "does not answer .it goes on and on"),
        (500, b"x" * 2_000_000, "does not answer .it goes on and on"),
    ],
)
def test_a_server_that_is_no_judge_is_refused_in_one_line(answering, status, body, message, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(UserError, match=message) as error:
        Judge(answering[0](status, body), "m").check()
    assert "\n" not in str(error.value)
    assert "sk-secret" not in str(error.value)


def test_the_key_goes_to_no_other_server(answering, monkeypatch):
    start, requests = answering
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    elsewhere = start(200, b"{}")
    with pytest.raises(UserError, match="refuses .302"):
        Judge(start(302, b"", Location=elsewhere), "m").check()
    assert len(requests) == 1


@pytest.mark.parametrize(("key", "sent"), [("sk-secret\r\n", "Bearer sk-secret"), (" ", None)])
def test_the_key_as_it_stands_in_a_file(answering, monkeypatch, key, sent):
    start, requests = answering
    monkeypatch.setenv("OPENAI_API_KEY", key)
    Judge(start(200, b'{"choices": [{"message": {"content": null}}]}'), "m").check()
    assert requests[0][1].get("Authorization") == sent


def test_what_is_no_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-se\rcret")
    with pytest.raises(UserError, match="OPENAI_API_KEY is no key") as error:
        Judge("http://127.0.0.1:9/v1", "m").check()
    assert "cret" not in str(error.value)


def test_grades_are_kept_when_the_judge_stops_answering(answering, monkeypatch):
    """What was graded is not asked again; another judge grades anew."""
    rows = [dict(row) for row in ROWS]
    answer = json.dumps({"choices": [{"message": {"content": "85"}}]}).encode()
    start, requests = answering
    url = start(200, answer)
    judge_all(Judge(url, "m"), rows[:1], show_progress=False)
    with pytest.raises(UserError, match="does not answer"):
        judge_all(Judge(start(200, b""), "m"), rows, show_progress=False)
    assert [row.get("judge") for row in rows] == [85, None]
    assert len(requests) == 2
    assert judge_all(Judge(url, "m"), rows, show_progress=False).mean == 85
    assert len(requests) == 3
    judge_all(Judge(url, "/models/other"), rows, show_progress=False)
    assert len(requests) == 5
    assert [row["judge_model"] for row in rows] == ["other"] * 2


def test_nobody_is_there(monkeypatch):
    with pytest.raises(UserError, match=r"the judge at http://127.0.0.1:9/v1 does not answer .*refused.* --judge_url"):
        Judge("http://127.0.0.1:9/v1", "m").check()


def test_a_server_that_never_answers(answering, monkeypatch):
    monkeypatch.setattr(judging, "SECONDS", 0.5)
    url = answering[0](200, b"{", **{"Content-Length": "100"})
    with pytest.raises(UserError, match="does not answer"):
        Judge(url, "m").check()
