"""The page, as a reader meets it: a process of its own, driven in headless Chromium."""

import html
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from modeling_scratchgpt import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTTokenizer,
)
from tests.conftest import MODERN, TINY
from training.data.prompts import STYLES, teach

pytest.importorskip("gradio", reason="gradio is not installed: there is no page")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: nothing drives the browser")
CHROMIUM = shutil.which("chromium")
if not CHROMIUM:
    pytest.skip("chromium is not installed: nothing shows the page", allow_module_level=True)

APP = Path(__file__).parents[1] / "space" / "app.py"
TEXT = "to be, naïve 🙂"
HOSTILE = '<img src=x onerror="window.ran = 1"> {{7 * 7}} ${7 * 7} <b>&amp;'
KINDS = ("completion", "chat", "one label", "several labels", "regression")
SERVED = KINDS[:3]


def tokenizer() -> ScratchGPTTokenizer:
    return ScratchGPTTokenizer.train(["to be or not to be, that is the question"] * 9, 290)


def save_model(kind: str, folder: Path) -> None:
    """A tiny model with weights far enough from zero that everything shows."""
    torch.manual_seed(0)
    words = tokenizer()
    if kind == "chat":
        teach(words, STYLES["chat"], 64)
    shape = {**TINY, **MODERN, "vocab_size": len(words)}
    if kind in ("completion", "chat"):
        model = ScratchGPTForCausalLM(ScratchGPTConfig(**shape))
        model.generation_config.max_new_tokens = 24
        if kind == "completion":
            model.generation_config.update(do_sample=True, temperature=0.7, top_k=40)
    else:
        problem = {"one label": "single_label_classification", "several labels": "multi_label_classification"}.get(kind, kind)
        labels = ["ham", "<i>spam</i>", "eggs"] if kind != "regression" else ["stars"]
        config = ScratchGPTConfig(**shape, id2label=dict(enumerate(labels)), problem_type=problem)
        model = ScratchGPTForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def run_app(*words: object, log: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in ("MODEL", "REVISION")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(log.parent)}
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, str(APP), *map(str, words)],
            cwd=log.parent,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="session")
def app() -> Any:
    """The page's file as a module."""
    spec: Any = importlib.util.spec_from_file_location("app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp("models") / kind.replace(" ", "_") for kind in KINDS}
    for kind, folder in made.items():
        save_model(kind, folder)
    return made


@pytest.fixture(scope="session")
def addresses(folders, tmp_path_factory) -> Iterator[dict[str, str]]:
    """A page for each kind of model, all started at once."""
    ports = {kind: free_port() for kind in SERVED}
    logs = {kind: tmp_path_factory.mktemp("page") / "log" for kind in SERVED}
    processes = {kind: run_app("--model", folders[kind], "--port", ports[kind], log=logs[kind]) for kind in SERVED}
    try:
        deadline = time.monotonic() + 200
        for kind, port in ports.items():
            while True:
                assert processes[kind].poll() is None, logs[kind].read_text()
                assert time.monotonic() < deadline, logs[kind].read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.2)
        yield {kind: f"http://127.0.0.1:{port}" for kind, port in ports.items()}
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait(20)


@pytest.fixture(scope="session")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, addresses):
    """Opens the page of a kind of model; in the end nobody else must have been asked for anything, and nothing have failed."""
    pages = []

    def open_page(kind: str, width: int = 1280):
        context = browser.new_context(viewport={"width": width, "height": 844})
        context.set_default_timeout(60000)
        page = context.new_page()
        hosts, errors = set(), []
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(addresses[kind])
        page.locator("textarea:visible").first.wait_for()
        pages.append((context, hosts, errors))
        return page

    yield open_page
    for context, hosts, errors in pages:
        context.close()
        assert hosts - {None} == {"127.0.0.1"}  # a blob or data address has no host
        assert not errors


def look_inside(page, text: str, tab: str) -> None:
    page.get_by_role("tab", name="Look inside").click()
    page.get_by_label("Text", exact=True).locator("visible=true").fill(text)
    page.get_by_role("tab", name=tab, exact=True).click()


def loaded(folders, kind: str):
    return ScratchGPTForCausalLM.from_pretrained(folders[kind], attn_implementation="eager").eval()


def percentages(page, number: int) -> list[float]:
    page.wait_for_function("n => document.querySelectorAll('.bars:not([hidden]) tr').length === n", arg=number)
    return [float(cell.removesuffix("%")) / 100 for cell in page.locator(".bars tr td:nth-last-child(2)").all_inner_texts()]


def set_number(page, label: str, value: float) -> None:
    box = page.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Tab")


def test_a_text_is_continued_as_it_is_written(open_page, folders):
    page = open_page("completion")
    lengths = "new MutationObserver(() => seen.push(document.querySelector('.written').innerText.length))"
    changes = "{subtree: true, childList: true, characterData: true}"
    page.evaluate(f"() => {{ window.seen = []; {lengths}.observe(document.body, {changes}) }}")
    set_number(page, "Temperature", 0)
    page.get_by_label("Text", exact=True).locator("visible=true").fill("to be")
    page.get_by_role("button", name="Continue").click()
    page.get_by_text("24 tokens in").wait_for()
    model, words = loaded(folders, "completion"), tokenizer()
    inputs = words("to be", return_tensors="pt")
    expected = words.decode(model.generate(**inputs, do_sample=False, max_new_tokens=24)[0], skip_special_tokens=True)
    assert page.locator(".written:visible").inner_text() == expected.replace("\r", "\n")
    assert len(set(page.evaluate("seen"))) > 2  # it grew
    page.get_by_role("tab", name="Look inside").click()
    assert page.get_by_label("Text", exact=True).locator("visible=true").input_value() == expected


def test_stop_stops_the_model(app, folders):
    """Gradio closes the iterator of an event that it cancels; the thread that writes must end with it."""
    show = app.Showcase(str(folders["completion"]), None)
    threads = threading.active_count()
    writing = show.write([5], show.settings(1, 1.0, 0, 1.0, 1.0, 60))
    next(writing)
    writing.close()
    assert threading.active_count() == threads
    assert app.when_stopped("3 tokens so far") == "3 tokens when it was stopped"
    assert app.when_stopped("9 tokens in 0.1 seconds") == "9 tokens in 0.1 seconds"
    assert app.when_stopped(None) == ""


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "5"])
def test_a_setting_that_is_no_number(app, folders, bad):
    """The sliders cannot say these, but the page's API can."""
    show = app.Showcase(str(folders["completion"]), None)
    good = [1.0, 5, 0.9, 1.0, 3]
    for place in range(len(good)):
        with pytest.raises(app.gr.Error, match="Each setting needs a number"):
            list(show.complete("to", *good[:place], bad, *good[place + 1 :]))
    with pytest.raises(app.gr.Error, match="Each setting needs a number"):
        show.attention("to be", bad, 0)


def test_settings_between_those_of_the_sliders(app, folders):
    show = app.Showcase(str(folders["completion"]), None)
    surest = list(show.complete("to", 0, 0, 1, 1, 8))[-1][1]
    assert list(show.complete("to", 5e-324, 1.5, 0.9, 1, 8.5))[-1][1] == surest
    assert "At temperature 0" in show.next_tokens("to", 5e-324, 1.5, 0.9)


def test_a_text_that_nobody_waits_for_ends(app, folders, monkeypatch):
    monkeypatch.setattr(app, "LONGEST_SECONDS", -1)
    show = app.Showcase(str(folders["completion"]), None)
    assert list(show.write([5], show.settings(1, 1.0, 0, 1.0, 1.0, 60)))[-1][1].startswith("1 tokens in")


def test_a_model_that_reads_both_ways(app, tmp_path):
    """RoBERTa: its map is whole, and two of its positions are none of a text's."""
    config = RobertaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(0)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    words = tokenizer()
    words.model_max_length = 510
    words.save_pretrained(tmp_path)
    show = app.Showcase(str(tmp_path), None)
    assert show.positions == 510
    assert "Only the first 510 of" in show.classify("to be " * 600)
    shown = show.attention("to be or not", 0, 1)
    assert "up to itself" not in shown
    for row in shown.split("<tbody>")[1].split("<tr>")[1:]:
        assert sum(float(share) for share in re.findall(r'looks at [^"]*: ([\d.]+)%', row)) == pytest.approx(100, abs=0.1)


def test_nothing_can_be_left_there(addresses):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + b"1" * 10 + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{addresses['completion']}/gradio_api/upload", body, kind)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=20)
    assert error.value.code == 413


def test_a_chat_by_keyboard_alone(open_page, folders):
    page = open_page("chat")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "TEXTAREA":
            break
    page.keyboard.type("to be?")
    page.keyboard.press("Enter")
    page.get_by_text(re.compile(r"\d+ tokens in")).wait_for()
    words = ScratchGPTTokenizer.from_pretrained(folders["chat"])
    talk = [{"role": "user", "content": "to be?"}]
    inputs = words.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt")
    output = loaded(folders, "chat").generate(**inputs, do_sample=False, max_new_tokens=24)
    answer = words.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert page.get_by_test_id("user").inner_text() == "to be?"
    assert " ".join(page.get_by_test_id("bot").inner_text().split()) == " ".join(answer.split())


def test_tokens_and_ids(open_page):
    page = open_page("completion")
    look_inside(page, TEXT, "Tokens")
    ids = tokenizer()(TEXT)["input_ids"]
    page.get_by_text(f"{len(ids)} tokens for {len(TEXT)} characters.").wait_for()
    assert list(map(int, page.locator(".tokens small").all_inner_texts())) == ids
    shown = page.locator(".tokens b").all_inner_texts()
    assert shown[-4:] == [r"\xf0", r"\x9f", r"\x99", r"\x82"]
    assert "".join(shown).replace("·", " ").encode().decode("unicode_escape").encode("latin-1").decode() == TEXT


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_what_comes_next(open_page, folders, temperature):
    page = open_page("completion")
    look_inside(page, TEXT, "Next token")
    set_number(page, "Temperature", temperature)
    set_number(page, "Top-k", 5)
    page.get_by_text(f"5 of {len(tokenizer())} tokens can come next, at temperature {temperature:g};").wait_for()
    with torch.no_grad():
        logits = loaded(folders, "completion")(**tokenizer()(TEXT, return_tensors="pt")).logits[0, -1]
    shares, ids = (logits / temperature).softmax(-1).topk(20)
    page.wait_for_function(  # what was typed first may be answered in between
        "it => String([...document.querySelectorAll('.bars tr td:nth-child(2)')].map(cell => cell.innerText)) === it",
        arg=",".join(map(str, ids.tolist())),
    )
    assert percentages(page, 20) == pytest.approx(shares.tolist(), abs=6e-5)
    assert page.locator(".bars .out").count() == 15


def test_the_attention_of_a_head(open_page, folders):
    page = open_page("completion")
    look_inside(page, TEXT, "Attention")
    set_number(page, "Layer (0 to 1)", 1)
    set_number(page, "Head (0 to 3)", 2)
    inputs = tokenizer()(TEXT, return_tensors="pt")
    with torch.no_grad():
        weights = loaded(folders, "completion")(**inputs, output_attentions=True).attentions[1][0, 2]
    expected = [f"{weight:.2%}" for place, row in enumerate(weights.tolist()) for weight in row[: place + 1]]
    page.wait_for_function(
        "it => String([...document.querySelectorAll('.map td[title]')].map(cell => cell.title.split(': ').at(-1))) === it",
        arg=",".join(expected),
    )
    assert page.locator(".map tbody tr").count() == len(weights)
    assert page.locator(".map thead th").count() == len(weights)


def test_classes(open_page, folders):
    page = open_page("one label")
    page.get_by_label("Text", exact=True).locator("visible=true").fill(TEXT)
    page.keyboard.press("Enter")
    shares, names = scores("one label", folders, torch.softmax)
    assert percentages(page, 3) == pytest.approx(shares, abs=6e-5)
    assert page.locator(".bars th").all_inner_texts() == names


def scores(kind: str, folders, function) -> tuple[list[float], list[str]]:
    """What the classifier says of the text, the most first, and of which labels."""
    model = ScratchGPTForSequenceClassification.from_pretrained(folders[kind]).eval()
    with torch.no_grad():
        values, order = function(model(**tokenizer()(TEXT, return_tensors="pt")).logits[0], -1).sort(descending=True)
    return values.tolist(), [model.config.id2label[index] for index in order.tolist()]


def test_several_labels_and_numbers(app, folders):
    shares, names = scores("several labels", folders, lambda logits, _: logits.sigmoid())
    shown = app.Showcase(str(folders["several labels"]), None).classify(TEXT)
    assert re.findall(r"([\d.]+%)</td>", shown) == [f"{share:.2%}" for share in shares]
    assert [html.unescape(name) for name in re.findall(r"<th[^>]*>(.*?)</th>", shown)] == names
    assert "<i>spam" not in shown
    (number,), _ = scores("regression", folders, lambda logits, _: logits)
    assert f">{number:.4f}</td>" in app.Showcase(str(folders["regression"]), None).classify(TEXT)


def test_markup_is_shown_and_does_nothing(open_page):
    page = open_page("completion")
    box = page.get_by_label("Text", exact=True).locator("visible=true")
    box.fill(HOSTILE)
    box.press("Enter")
    page.get_by_text(re.compile(r"\d+ tokens in")).wait_for()
    assert page.locator(".written:visible").inner_text().startswith(HOSTILE)
    look_inside(page, HOSTILE, "Tokens")
    page.get_by_text(f"for {len(HOSTILE)} characters.").wait_for()
    assert "".join(page.locator(".tokens b").all_inner_texts()).replace("·", " ") == HOSTILE
    for tab in ("Next token", "Attention"):
        page.get_by_role("tab", name=tab).click()
    page.locator(".map td[title]").first.wait_for()
    assert page.locator("img[src=x]").count() == 0
    page = open_page("chat")
    page.locator("textarea:visible").first.fill(HOSTILE[:40])
    page.keyboard.press("Enter")
    page.get_by_text(re.compile(r"\d+ tokens in")).wait_for()
    assert page.get_by_test_id("user").inner_text() == HOSTILE[:40].strip()
    assert page.evaluate("window.ran") is None


def test_a_classifier_does_not_guess_at_nothing(app, folders):
    assert "Type something first." in app.Showcase(str(folders["one label"]), None).classify(" \n")


def test_a_text_that_is_too_long(open_page):
    page = open_page("completion")
    box = page.get_by_label("Text", exact=True).locator("visible=true")
    box.fill("?" * 70)
    box.press("Enter")
    page.get_by_text("The text has 70 tokens, and the model has 64 positions: shorten it.").wait_for()
    look_inside(page, "?" * 70, "Tokens")
    page.get_by_text("The text has 70 tokens, and the model has 64 positions: only the first 64 are looked at.").wait_for()
    page.get_by_role("tab", name="Attention").click()
    page.get_by_text("Mapped are the first 40 of 64 tokens.").wait_for()
    page = open_page("chat")
    page.locator("textarea:visible").first.fill("?" * 70)
    page.keyboard.press("Enter")
    page.get_by_text("tokens, and the model has 64 positions: shorten it.").wait_for()


def test_an_old_message_makes_room(open_page):
    page = open_page("chat")
    for count in (1, 2, 3):
        page.locator("textarea:visible").first.fill("to be or not to be?")
        page.keyboard.press("Enter")
        page.get_by_test_id("bot").nth(count - 1).wait_for()
        page.get_by_text(re.compile(r"\d+ tokens in")).wait_for()
    page.get_by_text("messages are out of its sight").wait_for()


@pytest.mark.parametrize("kind", ["completion", "chat", "one label"])
def test_nothing_is_wider_than_a_phone(open_page, app, kind):
    page = open_page(kind, width=390)
    width = "document.documentElement.scrollWidth"
    page.locator("textarea:visible").first.fill("to be")
    page.keyboard.press("Enter")
    page.get_by_role("tab", name="Look inside").click()
    box = page.get_by_label("Text", exact=True).locator("visible=true")
    playwright.expect(box).not_to_have_value(app.SAMPLE, timeout=60000)  # what was asked for has come, and is shown here
    box.fill("to be or not to be, " * 6 + "x" * 30)
    for tab in page.get_by_role("tab").all_inner_texts():
        page.get_by_role("tab", name=tab, exact=True).click()
        assert page.evaluate(width) <= 390, tab
    page.locator(".map td[title]").nth(819).wait_for()
    assert page.evaluate(width) <= 390


def test_a_mistake_is_one_line(tmp_path):
    process = run_app("--model", tmp_path / "nothing", log=tmp_path / "log")
    assert process.wait(100) == 2
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line == f"app.py: error: --model {tmp_path / 'nothing'} cannot be shown (there is no such folder)."


def test_other_mistakes(app, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MODEL", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        shutil.copytree(folders["completion"], tmp_path / "panics")
        content = json.loads((tmp_path / "panics" / "tokenizer.json").read_text())
        content["model"]["continuing_subword_prefix"] = "longer than a token"
        (tmp_path / "panics" / "tokenizer.json").write_text(json.dumps(content))
        mistakes = {
            (): "no model is named: give its folder or Hub id by --model.",
            ("--model", str(tmp_path)): f"--model {tmp_path} cannot be shown (",
            ("--model", str(tmp_path / "panics")): f"--model {tmp_path / 'panics'} cannot be shown (range end index",
            ("--model", str(folders["completion"]), "--port", port): f"--port {port} is in use: give another.",
        }
        for words, said in mistakes.items():
            monkeypatch.setattr(sys, "argv", ["app.py", *words])
            with pytest.raises(SystemExit, match="2"):
                app.main()
            assert capsys.readouterr().err.splitlines()[-1].startswith(f"app.py: error: {said}")
