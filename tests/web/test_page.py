"""The page that runs a model in its visitor's browser, driven in headless Chromium."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import onnxruntime
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from modeling_scratchgpt import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTTokenizer,
)
from space import app, check
from tests.conftest import MODERN, TINY, made_once
from tests.web.pages import (
    BEYOND,
    CLASSIFIERS,
    LABELS,
    LANGUAGE_MODELS,
    MARKUP,
    export,
    make_tokenizer,
    quantize,
    serving,
    serving_cdn,
)
from training.errors import UserError

MISSING = [program for program in ("chromium", "openssl") if not shutil.which(program)]
pytestmark = [pytest.mark.web, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]
TEXT = "to be, naïve 🙂"


def drive(node_modules: Path, directory: Path, addresses: dict[str, Any], *scenarios: str) -> dict[str, Any]:
    """Start the driver and return what it has seen."""
    with serving_cdn(node_modules, directory) as cdn:
        file = directory / "addresses.json"
        file.write_text(json.dumps({**addresses, "cdn": cdn, "scenarios": scenarios}))
        driver = Path(__file__).with_name("page_driver.mjs")
        command = ["node", str(driver), str(node_modules), str(shutil.which("chromium")), str(file)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def seen(exports, node_modules, tmp_path_factory) -> dict[str, Any]:
    """What the driver has seen of the pages. It is started once."""
    cut = []

    class CutOnce(app.Handler):
        """Cut the first download of a model."""

        def copyfile(self, source, outputfile):
            if cut or not self.path.endswith(".onnx"):
                return super().copyfile(source, outputfile)
            cut.append(self.path)
            outputfile.write(source.read(1000))
            self.close_connection = True

    def make(directory: Path) -> None:
        size = len(make_tokenizer()(TEXT)["input_ids"])
        with ExitStack() as stack:
            addresses: dict[str, Any] = {kind: stack.enter_context(serving(path, kind)) for kind, path in exports.items()}
            addresses["missing"] = stack.enter_context(serving(exports["chat"] / "missing", "memory-bot"))
            addresses["cut"] = stack.enter_context(serving(exports["completion"], "cut", CutOnce))
            addresses["cells"] = size * (size + 1) // 2
            results = drive(node_modules, directory, addresses, *LANGUAGE_MODELS, *CLASSIFIERS, "webgpu", "failures")
        (directory / "seen.json").write_text(json.dumps(results | {"cut": cut}))

    return json.loads((made_once(tmp_path_factory, "driver", make) / "seen.json").read_text())


def load_model(exports, kind: str = "chat") -> Any:
    path = exports[kind].with_name(f"{kind}-model")
    model = ScratchGPTForCausalLM if kind == "chat" else ScratchGPTForSequenceClassification
    return model.from_pretrained(path, attn_implementation="eager").eval()


def test_completion_streams_and_equals_generate(seen, exports):
    page, tokenizer = seen["completion"], make_tokenizer()
    facts = ("2 layers with 4 heads each", "context of 64 tokens", "vocabulary of 286", "32-bit weights in WebAssembly")
    assert page["facts"] == " · ".join(facts)
    inputs = tokenizer("to be", return_tensors="pt")
    output = load_model(exports).generate(**inputs, do_sample=False, max_new_tokens=24)
    assert page["written"] == page["inspected"] == tokenizer.decode(output[0], skip_special_tokens=True)
    count = output.shape[1] - inputs["input_ids"].shape[1]
    assert re.fullmatch(rf"{count} tokens in \d+\.\d seconds \(\d+ tokens/s\)", page["note"])
    assert page["lengths"] > 5
    penalized = load_model(exports).generate(**inputs, do_sample=False, max_new_tokens=24, repetition_penalty=1.5)
    assert page["penalized"] == tokenizer.decode(penalized[0], skip_special_tokens=True) != page["written"]


def test_a_seed_gives_the_same_text_again(seen):
    first, again, other = seen["completion"]["sampled"]
    assert first == again != other


def test_tokens_and_ids(seen):
    page = seen["completion"]
    assert page["ids"] == make_tokenizer()(TEXT)["input_ids"]
    assert page["names"][-4:] == [r"\xf0", r"\x9f", r"\x99", r"\x82"]
    joined = "".join(page["names"]).replace("·", " ")
    assert joined.encode().decode("unicode_escape").encode("latin-1").decode() == TEXT


def test_next_token_distribution(seen, exports):
    with torch.no_grad():
        inputs = make_tokenizer()(TEXT, return_tensors="pt")
        logits = load_model(exports)(**inputs).logits[:, -1]
    logits = RepetitionPenaltyLogitsProcessor(1.57)(inputs["input_ids"], logits)[0]
    probabilities, ids = (logits / 0.53).softmax(-1).topk(20)
    rows = seen["completion"]["next"]
    assert [int(row[1]) for row in rows] == ids.tolist()
    assert [float(row[2].removesuffix("%")) / 100 for row in rows] == pytest.approx(probabilities.tolist(), abs=6e-5)
    assert seen["completion"]["pale"] == 15


def test_attention_of_one_head(seen, exports):
    with torch.no_grad():
        outputs = load_model(exports)(**make_tokenizer()(TEXT, return_tensors="pt"), output_attentions=True)
    weights = outputs.attentions[1][0, 2].tolist()
    expected = [weight for row, row_weights in enumerate(weights) for weight in row_weights[: row + 1]]
    shown = [float(title.rpartition(": ")[2].removesuffix("%")) / 100 for title in seen["completion"]["attention"]]
    assert shown == pytest.approx(expected, abs=6e-5)


def test_a_tokenizer_of_characters(seen, exports):
    """As `convert` makes it of nanoGPT's: without a token for unknown characters."""
    page, path = seen["characters"], exports["characters"].with_name("characters-model")
    model, tokenizer = ScratchGPTForCausalLM.from_pretrained(path), ScratchGPTTokenizer.from_pretrained(path)
    inputs = tokenizer("to be\n", return_tensors="pt")
    assert page["ids"] == inputs["input_ids"][0].tolist()
    output = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    assert page["written"] == tokenizer.decode(output[0])
    assert page["unknown"] == "The text has characters that the tokenizer of this model does not know."


def test_markup_is_shown_as_text(seen):
    hostile = seen["completion"]["hostile"]
    assert hostile["shown"].startswith(hostile["expected"])
    assert hostile["tokens"].replace("·", " ") == hostile["expected"]
    assert hostile["ran"] is None
    assert not seen["errors"]
    assert seen["completion"]["margin"] < 30
    written = seen["markup"]
    assert written["shown"] == "to be" + MARKUP * 24
    assert (written["images"], written["ran"]) == (0, None)


def test_after_an_error_of_the_runtime_the_model_is_loaded_again(seen):
    page = seen["markup"]
    assert page["broken"].startswith("The model cannot be run (")
    assert page["text"] == BEYOND
    assert page["shown"] == page["again"]


@pytest.mark.parametrize("kind", ["right", "wrong", "missing"])
def test_webgpu_is_used_if_it_computes_the_same(kind, seen):
    """Computed by Chromium on the CPU; else WebAssembly runs the model, and a note says so."""
    page = seen["webgpu"][kind]
    assert page["isOffered"] == (kind != "missing")
    assert page["engine"] == ("WebGPU" if kind == "right" else "WebAssembly")
    assert page["written"] == seen["completion"]["written"]
    reason = {"wrong": "it computes other logits.", "missing": "The model cannot be run ("}.get(kind, "")
    assert kind == "right" or page["note"].startswith(f"WebAssembly runs this model. With WebGPU: {reason}")


def test_other_hosts_are_blocked_and_not_contacted(seen):
    """The policy also holds in the worker, which downloads the model."""
    policy = seen["completion"]["policy"]
    assert (policy["without"], policy["page"], policy["worker"]) == ("allowed", "blocked", "blocked")
    assert {urlsplit(source).hostname for source in policy["hub"] if "//" in source} == {
        "cdn.jsdelivr.net", "huggingface.co", "*.huggingface.co", "*.hf.co",
    }  # fmt: skip
    assert set(seen["hosts"]) <= {"127.0.0.1", "cdn.jsdelivr.net", "example.com", ""}  # blobs have no host


def test_keyboard_and_labels(seen):
    page = seen["completion"]
    expected = ["run", "clear", "Settings", "seed", "inspected", "Tokens", "Next token", "Attention", "layer", "head"]
    positions = [page["focus"].index(name) for name in expected]
    assert positions == sorted(positions)
    assert not page["unnamed"]
    assert seen["chat"]["focused"] == "text"


def test_chat_on_a_phone(seen, exports):
    page, tokenizer = seen["chat"], ScratchGPTTokenizer.from_pretrained(exports["chat"].with_name("chat-model"))
    conversation = [{"role": "user", "content": "to be?"}]
    inputs = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")
    output = load_model(exports).generate(**inputs, do_sample=False, max_new_tokens=24)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert page["messages"] == ["to be?", answer]
    conversation.append({"role": "assistant", "content": answer})
    assert page["inspected"] == tokenizer.apply_chat_template(conversation, tokenize=False)
    assert "messages no longer fit in the context" in page["dropped"]
    assert page["width"] <= 390
    assert page["open"] is None  # the settings are folded on a phone
    assert sum(map(int, re.findall(r"\d+", page["background"])[:3])) < 150  # dark
    assert page["cleared"] == 0
    assert (page["typed"], page["hints"]) == ("to\nbe", 0)  # Enter does not send, and no hint says so


def test_stop(seen):
    count, stopped = re.match(r"(\d+) tokens? in .*?(, stopped)?$", seen["chat"]["stopped"]).groups()
    assert stopped
    assert 1 <= int(count) < 50


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_scores_of_classes(kind, seen, exports):
    """The 8-bit graph in the browser and in Python: what `pipeline` makes of its logits, the highest first."""
    session = onnxruntime.InferenceSession(exports["classifier"] / "onnx" / "model_quantized.onnx")
    logits = torch.tensor(session.run(["logits"], {**make_tokenizer()(TEXT, return_tensors="np")})[0][0])
    expected = {"classifier": logits.softmax(-1), "regression": logits}.get(kind, logits.sigmoid())
    shown = {label: float(value.removesuffix("%")) / (100 if "%" in value else 1) for label, value, _ in seen[kind]["rows"]}
    assert [shown[label] for label in LABELS] == pytest.approx(expected.tolist(), abs=0.005)
    assert list(shown) == LABELS if kind == "regression" else list(shown.values()) == sorted(shown.values(), reverse=True)
    assert seen[kind]["empty"] == "Type something first."
    assert seen[kind]["visible"] == ["Tokens", "Attention"]


def test_failures_are_explained_and_retried(seen):
    pages = seen["failures"]
    assert re.match(r"config.json from 127.0.0.1:\d+ cannot be downloaded \(HTTP 404\): the model was moved", pages["missing"])
    assert seen["cut"]
    assert re.match(r"model.onnx from 127.0.0.1:\d+ cannot be downloaded. Check the connection, then retry", pages["cut"])
    assert pages["focused"] == "retry"
    assert pages["recovered"] == seen["completion"]["facts"]
    assert pages["damaged"].startswith("The model cannot be run (")
    assert pages["again"] == pages["recovered"]
    assert {urlsplit(url).path.split("/")[2] for url in pages["kept"]} == {"cut"}  # of this version only
    assert pages["withoutWorker"] == "A part of this page cannot be loaded. Check the connection, then retry."
    assert pages["unnamed"].startswith("model.json names no model")
    assert pages["withoutWebAssembly"].startswith("This browser has no WebAssembly, which runs the model. Use a current")
    assert seen["completion"]["tooLong"] == "The text has 70 tokens, but the context of the model holds 64: shorten it."


def test_library_files_are_pinned(node_modules):
    """The hashes are those of the packages, and the runtime is the one that the library was built with."""
    source = (app.WEB / "worker.js").read_text()
    runtime = re.search(r"onnxruntime-web@([^/]+)/", source)[1]
    package = json.loads((node_modules / "@huggingface/transformers/package.json").read_text())
    assert package["dependencies"]["onnxruntime-web"] == runtime
    files = re.findall(r'\["@huggingface/transformers@4.3.2/(\S+)",\s+"(\S+)"', source)
    files += [(f"../../onnxruntime-web/dist/ort-wasm-simd-threaded{name}", digest)
              for name, digest in re.findall(r'\{ORT\}(\S+)`, "(\S+)"', source)]  # fmt: skip
    assert len(files) == 5
    for name, digest in files:
        content = (node_modules / "@huggingface/transformers" / name).read_bytes()
        assert digest == f"sha384-{base64.b64encode(hashlib.sha384(content).digest()).decode()}"


def test_the_page_is_started_before_an_upload(exports, node_modules, tmp_path, monkeypatch):
    def start(directory: Path, cdn: str) -> str:
        rules = ["--ignore-certificate-errors", f"--host-resolver-rules=MAP cdn.jsdelivr.net {cdn}"]
        monkeypatch.setattr(check, "FLAGS", [*flags, *rules])
        monkeypatch.setattr(check, "BROWSERS", ("chromium",))
        return check.check_page(directory)

    flags = check.FLAGS
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # is not asked for the page or the browser's interface
    broken = shutil.copytree(exports["completion"], tmp_path / "broken")
    works = shutil.copytree(exports["completion"], tmp_path / "<b>&amp;  é%20")
    for graph in (broken / "onnx").iterdir():
        graph.write_bytes(b"no graph")
    with serving_cdn(node_modules, tmp_path) as cdn:
        assert start(works, cdn) == "The page was started in chromium: it runs the model."
        with pytest.raises(UserError, match="the page does not run the model: The model cannot be run"):
            start(broken, cdn)
    offline = start(exports["chat"], "127.0.0.1:9")
    assert "was not checked in chromium, which got no further than: transformers.min.js from cdn.jsdelivr.net " in offline
    monkeypatch.setattr(check, "BROWSERS", ("missing",))
    monkeypatch.setattr(check, "MAC_BROWSER", "missing")
    assert check.check_page(broken) == "The page was not started: none of missing was found."


@pytest.mark.slow
def test_speed(node_modules, tmp_path):
    """The goals for the model of the README's first command with random weights: pytest -m slow -s -k test_speed -n 0."""
    tokenizer = make_tokenizer()
    shape = {**TINY, **MODERN, "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_key_value_heads": 4}
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**shape | {"max_position_embeddings": 256, "eos_token_id": None}))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "web", "--attentions")  # as space/app.py does
    quantize(tmp_path / "web")
    with serving(tmp_path / "web", "speed") as address:
        page = drive(node_modules, tmp_path, {"speed": address}, "speed")["speed"]
    print(page)
    assert page["firstToken"] <= 6000  # the goal is 3 seconds; measured: 1.7 to 3.4 (docs/log.md)
    assert int(re.search(r"\((\d+) tokens/s\)", page["note"])[1]) >= 60
