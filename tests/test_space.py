"""The page for trying a model, driven in headless Chromium."""

import html
import importlib
import json
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

from modeling_scratchgpt import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTTokenizer,
)
from tests.conftest import MODERN, TINY, shaken
from training.data.prompts import CHAT_TEMPLATES, set_up_chat_template

if not find_spec("gradio"):  # importing it here would slow down every worker
    pytest.skip("gradio is not installed", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
if not CHROMIUM:
    pytest.skip("chromium is not installed", allow_module_level=True)

SPACE = Path(__file__).parents[1] / "space"
TEXT = "to be, naïve 🙂"
HOSTILE = '<img src=x onerror="window.ran = 1"> {{7 * 7}} ${7 * 7} <b>&amp;'
PROBLEMS = {"one label": "single_label_classification", "several labels": "multi_label_classification"}
KINDS = ("completion", "chat", "one label", "several labels", "regression")
SERVED = KINDS[:3]


def make_tokenizer() -> ScratchGPTTokenizer:
    return ScratchGPTTokenizer.train(["to be or not to be, that is the question"] * 9, 290)


def save_model(kind: str, directory: Path) -> None:
    """Save a tiny model whose weights are large enough for probabilities and attention to differ between tokens."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    if kind == "chat":
        set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], 64)
    shape = {**TINY, **MODERN, "vocab_size": len(tokenizer)}
    if kind in ("completion", "chat"):
        model = ScratchGPTForCausalLM(ScratchGPTConfig(**shape))
        model.generation_config.max_new_tokens = 24
        if kind == "completion":
            model.generation_config.update(do_sample=True, temperature=0.7, top_k=40)
    else:
        labels = ["ham", "<i>spam</i>", "eggs"] if kind != "regression" else ["stars"]
        config = ScratchGPTConfig(**shape, id2label=dict(enumerate(labels)), problem_type=PROBLEMS.get(kind, kind))
        model = ScratchGPTForSequenceClassification(config)
    shaken(model, 0.2).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="session")
def directories(tmp_path_factory) -> dict[str, Path]:
    paths = {kind: tmp_path_factory.mktemp("models") / kind.replace(" ", "_") for kind in KINDS}
    for kind, path in paths.items():
        save_model(kind, path)
    return paths


@pytest.fixture(scope="session")
def app() -> Any:
    """The module behind the page."""
    sys.path.insert(0, str(SPACE))  # as Python does for `python space/app.py`
    return importlib.import_module("app")


@pytest.fixture(scope="session")
def model_demo(app) -> Any:
    """The module behind the model."""
    return importlib.import_module("model_demo")


@pytest.fixture(scope="session")
def demos(app, directories) -> dict[str, Any]:
    return {kind: app.ModelDemo(str(path), None) for kind, path in directories.items()}


@pytest.fixture(scope="session")
def addresses(app, demos):
    """A running page for each kind of model."""
    pages = {kind: app.launch(demos[kind], None) for kind in SERVED}
    yield {kind: address.rstrip("/") for kind, (_, address) in pages.items()}
    for blocks, _ in pages.values():
        blocks.close(verbose=False)


@pytest.fixture(scope="session")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, addresses):
    """Open the page of a kind of model. At teardown, no other host was contacted and no JavaScript error occurred."""
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
        assert hosts - {None} == {"127.0.0.1"}  # blob and data addresses have no host
        assert not errors


def text_box(page):
    return page.get_by_label("Text", exact=True).locator("visible=true")


def submit(page, text: str) -> None:
    box = page.locator("textarea:visible").first
    box.fill(text)
    box.press("Enter")


def look_inside(page, text: str, tab: str) -> None:
    page.get_by_role("tab", name="Look inside").click()
    text_box(page).fill(text)
    page.get_by_role("tab", name=tab, exact=True).click()


def set_number(page, label: str, value: float) -> None:
    box = page.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Tab")


def load_model(directories, kind: str):
    return ScratchGPTForCausalLM.from_pretrained(directories[kind], attn_implementation="eager").eval()


def percentages(page, number: int) -> list[float]:
    page.wait_for_function("n => document.querySelectorAll('.bars:not([hidden]) tr').length === n", arg=number)
    return [float(cell.removesuffix("%")) / 100 for cell in page.locator(".bars tr td:nth-last-child(2)").all_inner_texts()]


def class_scores(kind: str, directories, function) -> tuple[list[float], list[str]]:
    """The scores of a classifier in descending order, with their labels."""
    model = ScratchGPTForSequenceClassification.from_pretrained(directories[kind]).eval()
    with torch.no_grad():
        logits = model(**make_tokenizer()(TEXT, return_tensors="pt")).logits[0]
    values, order = function(logits).sort(descending=True)
    return values.tolist(), [model.config.id2label[index] for index in order.tolist()]


def test_completion_streams_and_equals_generate(open_page, directories):
    page = open_page("completion")
    lengths = "new MutationObserver(() => seen.push(document.querySelector('.written').innerText.length))"
    changes = "{subtree: true, childList: true, characterData: true}"
    page.evaluate(f"() => {{ window.seen = []; {lengths}.observe(document.body, {changes}) }}")
    set_number(page, "Temperature", 0)
    text_box(page).fill("to be")
    page.get_by_role("button", name="Continue").click()
    page.get_by_text("24 tokens in").wait_for()
    model, tokenizer = load_model(directories, "completion"), make_tokenizer()
    inputs = tokenizer("to be", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**inputs, do_sample=False, max_new_tokens=24)[0], skip_special_tokens=True)
    assert page.locator(".written:visible").inner_text() == expected.replace("\r", "\n")
    assert len(set(page.evaluate("seen"))) > 2
    page.get_by_role("tab", name="Look inside").click()
    assert text_box(page).input_value() == expected


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_streamed_text_is_what_decode_gives(model_demo, kind):
    """Spaces before words are kept after a prompt and a line end, and incomplete characters are not printed as �."""
    if kind == "bytes":
        tokenizer = ScratchGPTTokenizer.train(["to be"], 260)
        prompt, generated = (tokenizer(text)["input_ids"] for text in ("to", " naïve 🙂\n 日本語 "))
    else:
        vocabulary = {token: index for index, token in enumerate(["<unk>", "▁to", "▁be", "\n", "▁or"])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        tokenizer, prompt, generated = PreTrainedTokenizerFast(tokenizer_object=backend), [1], [2, 3, 4, 1]
    streamer = model_demo.ExactStreamer(tokenizer)
    for ids in (prompt, *([index] for index in generated)):
        streamer.put(torch.tensor(ids))
    streamer.end()
    start = len(tokenizer.decode(prompt))
    prefixes = [tokenizer.decode(prompt + generated[: end + 1])[start:] for end in range(len(generated))]
    assert list(streamer) == prefixes
    assert all(prefixes[-1].startswith(prefix.rstrip("�")) for prefix in prefixes)


def test_closing_the_iterator_stops_generation(app, demos):
    """Gradio closes the iterator of a cancelled event."""
    demo, start = demos["completion"], time.monotonic()
    hook = demo.model.register_forward_hook(lambda *_: time.sleep(0.5))
    generated = demo.generate([5], 1.0, 0, 1.0, 1.0, 60)
    next(generated)
    generated.close()
    hook.remove()
    assert time.monotonic() - start < 20  # all 60 tokens would take 30 seconds
    assert app.stopped_note("3 tokens so far") == "3 tokens before it was stopped"
    assert app.stopped_note("9 tokens in 0.1 seconds") == "9 tokens in 0.1 seconds"
    assert app.stopped_note(None) == ""


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "5"])
def test_settings_that_are_no_numbers(app, demos, bad):
    """The sliders cannot send these, but a client of the page's API can."""
    good = [1.0, 5, 0.9, 1.0, 3]
    for index in range(len(good)):
        with pytest.raises(app.gr.Error, match="Each setting needs a number"):
            list(demos["completion"].complete("to", "", *good[:index], bad, *good[index + 1 :]))
    with pytest.raises(app.gr.Error, match="Each setting needs a number"):
        demos["completion"].attention("to be", bad, 0)


def test_settings_between_slider_steps(demos):
    demo = demos["completion"]
    (*_, greedy) = demo.complete("to", "", 0, 0, 1, 1, 8)
    (*_, tiny_temperature) = demo.complete("to", "", 5e-324, 1.5, 0.9, 1, 8.5)
    assert tiny_temperature[1] == greedy[1]
    assert "At temperature 0" in demo.next_tokens("to", 5e-324, 1.5, 0.9)


def test_generation_has_a_time_limit(model_demo, demos, monkeypatch):
    monkeypatch.setattr(model_demo, "MAX_SECONDS", -1)
    assert list(demos["completion"].generate([5], 1.0, 0, 1.0, 1.0, 60))[-1][1].startswith("1 tokens in")


def test_bidirectional_classifier(app, tmp_path):
    """RoBERTa: attention in both directions, and two positions that no text can use."""
    config = RobertaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 510
    tokenizer.save_pretrained(tmp_path)
    demo = app.ModelDemo(str(tmp_path), None)
    assert demo.context_length == 510
    assert "Only the first 510 of" in demo.classify("to be " * 600)
    heat_map = demo.attention("to be or not", 0, 1)
    assert "between all tokens" in heat_map
    for row in heat_map.split("<tbody>")[1].split("<tr>")[1:]:
        assert sum(float(share) for share in re.findall(r'attends to [^"]*: ([\d.]+)%', row)) == pytest.approx(100, abs=0.1)


def test_uploads_are_refused(addresses):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + b"1" * 10 + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{addresses['completion']}/gradio_api/upload", body, headers)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=20)
    assert error.value.code == 413


def test_chat_by_keyboard(open_page, directories):
    page = open_page("chat")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "TEXTAREA":
            break
    page.keyboard.type("to be?")
    page.keyboard.press("Enter")
    page.get_by_text(re.compile(r"\d+ tokens in")).wait_for()
    tokenizer = ScratchGPTTokenizer.from_pretrained(directories["chat"])
    conversation = [{"role": "user", "content": "to be?"}]
    inputs = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")
    output = load_model(directories, "chat").generate(**inputs, do_sample=False, max_new_tokens=24)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert page.get_by_test_id("user").inner_text() == "to be?"
    assert " ".join(page.get_by_test_id("bot").inner_text().split()) == " ".join(answer.split())


def test_tokens_and_ids(open_page):
    page = open_page("completion")
    look_inside(page, TEXT, "Tokens")
    ids = make_tokenizer()(TEXT)["input_ids"]
    page.get_by_text(f"{len(ids)} tokens for {len(TEXT)} characters.").wait_for()
    assert list(map(int, page.locator(".tokens small").all_inner_texts())) == ids
    tokens = page.locator(".tokens b").all_inner_texts()
    assert tokens[-4:] == [r"\xf0", r"\x9f", r"\x99", r"\x82"]
    assert "".join(tokens).replace("·", " ").encode().decode("unicode_escape").encode("latin-1").decode() == TEXT


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_next_token_distribution(open_page, directories, temperature):
    page = open_page("completion")
    look_inside(page, TEXT, "Next token")
    set_number(page, "Temperature", temperature)
    set_number(page, "Top-k", 5)
    page.get_by_text(f"5 of {len(make_tokenizer())} tokens can be sampled at temperature {temperature:g};").wait_for()
    with torch.no_grad():
        logits = load_model(directories, "completion")(**make_tokenizer()(TEXT, return_tensors="pt")).logits[0, -1]
    probabilities, ids = (logits / temperature).softmax(-1).topk(20)
    page.wait_for_function(  # an answer for a part of the text may arrive before
        "ids => String([...document.querySelectorAll('.bars tr td:nth-child(2)')].map(cell => cell.innerText)) === ids",
        arg=",".join(map(str, ids.tolist())),
    )
    assert percentages(page, 20) == pytest.approx(probabilities.tolist(), abs=6e-5)
    assert page.locator(".bars .out").count() == 15


def test_attention_of_one_head(open_page, directories):
    page = open_page("completion")
    look_inside(page, TEXT, "Attention")
    set_number(page, "Layer (0 to 1)", 1)
    set_number(page, "Head (0 to 3)", 2)
    inputs = make_tokenizer()(TEXT, return_tensors="pt")
    with torch.no_grad():
        weights = load_model(directories, "completion")(**inputs, output_attentions=True).attentions[1][0, 2]
    expected = [f"{weight:.2%}" for row, row_weights in enumerate(weights.tolist()) for weight in row_weights[: row + 1]]
    page.wait_for_function(
        "all => String([...document.querySelectorAll('.map td[title]')].map(cell => cell.title.split(': ').at(-1))) === all",
        arg=",".join(expected),
    )
    assert page.locator(".map tbody tr").count() == page.locator(".map thead th").count() == len(weights)


def test_class_probabilities(open_page, directories, demos):
    page = open_page("one label")
    submit(page, TEXT)
    probabilities, names = class_scores("one label", directories, lambda logits: logits.softmax(-1))
    assert percentages(page, 3) == pytest.approx(probabilities, abs=6e-5)
    assert page.locator(".bars th").all_inner_texts() == names
    assert "Type something first." in demos["one label"].classify(" \n")


def test_several_labels_and_regression(demos, directories):
    probabilities, names = class_scores("several labels", directories, torch.sigmoid)
    table = demos["several labels"].classify(TEXT)
    assert re.findall(r"([\d.]+%)</td>", table) == [f"{probability:.2%}" for probability in probabilities]
    assert [html.unescape(name) for name in re.findall(r"<th[^>]*>(.*?)</th>", table)] == names
    assert "<i>spam" not in table
    (number,), _ = class_scores("regression", directories, lambda logits: logits)
    assert f">{number:.4f}</td>" in demos["regression"].classify(TEXT)


def test_markup_is_shown_as_text(open_page):
    page = open_page("completion")
    submit(page, HOSTILE)
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
    submit(page, HOSTILE[:40])
    page.get_by_text(re.compile(r"\d+ tokens in")).wait_for()
    assert page.get_by_test_id("user").inner_text() == HOSTILE[:40].strip()
    assert page.evaluate("window.ran") is None


def test_text_longer_than_the_context(open_page):
    page = open_page("completion")
    submit(page, "?" * 70)
    page.get_by_text("The text has 70 tokens, but the context of the model holds 64: shorten it.").wait_for()
    look_inside(page, "?" * 70, "Tokens")
    page.get_by_text("The text has 70 tokens, but the context of the model holds 64: the rest is left out.").wait_for()
    page.get_by_role("tab", name="Attention").click()
    page.get_by_text("Only the first 40 of 64 tokens are shown.").wait_for()
    page = open_page("chat")
    submit(page, "?" * 70)
    page.get_by_text("tokens, but the context of the model holds 64: shorten it.").wait_for()
    assert page.locator("textarea:visible").first.input_value() == "?" * 70


def test_old_messages_are_dropped_and_clear_starts_again(open_page):
    page = open_page("chat")
    for count in (1, 2, 3):
        submit(page, "to be or not to be?")
        page.get_by_test_id("bot").nth(count - 1).wait_for()
        page.get_by_text(re.compile(r"\d+ tokens in")).wait_for()
    page.get_by_text("messages no longer fit in the context").wait_for()
    page.get_by_role("button", name="Clear").first.click()
    page.get_by_test_id("bot").first.wait_for(state="detached")


@pytest.mark.parametrize("kind", SERVED)
def test_the_page_fits_a_phone(open_page, app, kind):
    page = open_page(kind, width=390)
    width = "document.documentElement.scrollWidth"
    submit(page, "to be")
    page.get_by_role("tab", name="Look inside").click()
    playwright.expect(text_box(page)).not_to_have_value(app.EXAMPLE_TEXT, timeout=60000)  # the result has arrived here
    text_box(page).fill("to be or not to be, " * 6 + "x" * 30)
    for tab in page.get_by_role("tab").all_inner_texts():
        page.get_by_role("tab", name=tab, exact=True).click()
        assert page.evaluate(width) <= 390, tab
    page.locator(".map td[title]").nth(819).wait_for()
    assert page.evaluate(width) <= 390


def test_errors_are_one_line(app, directories, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MODEL", raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        shutil.copytree(directories["completion"], tmp_path / "panics")
        content = json.loads((tmp_path / "panics" / "tokenizer.json").read_text())
        content["model"]["continuing_subword_prefix"] = "longer than a token"
        (tmp_path / "panics" / "tokenizer.json").write_text(json.dumps(content))
        messages = {
            (): "no model: pass --model with a directory or a Hub id.",
            ("--model", str(tmp_path / "no")): f"--model {tmp_path / 'no'} cannot be loaded (no such directory).",
            ("--model", str(tmp_path)): f"--model {tmp_path} cannot be loaded (",
            ("--model", str(tmp_path / "panics")): f"--model {tmp_path / 'panics'} cannot be loaded (range end index",
            ("--model", str(directories["completion"]), "--port", port): f"--port {port} is in use: pass another.",
        }
        for argv, message in messages.items():
            monkeypatch.setattr(sys, "argv", ["app.py", *argv])
            with pytest.raises(SystemExit, match="2"):
                app.main()
            assert capsys.readouterr().err.splitlines()[-1].startswith(f"app.py: error: {message}")
