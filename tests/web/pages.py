"""Models, exports and servers of the tests of the page."""

import functools
import json
import pickle
import re
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_scratchgpt import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTTokenizer,
)
from modeling_scratchgpt.convert import __main__ as convert
from modeling_scratchgpt.convert.reading import character_tokenizer
from modeling_scratchgpt.convert.web import write_format
from space import app
from tests.conftest import MODERN, TINY, shaken
from training.data.prompts import CHAT_TEMPLATES, set_up_chat_template

LABELS = ["ham", "<i>spam</i>", "eggs"]
MARKUP = '<img src=x onerror="ran=1"><script>ran=1</script>'
BEYOND = "<beyond>"  # a token that has no embedding
LANGUAGE_MODELS = ("completion", "chat", "markup", "characters")
CLASSIFIERS = ("classifier", "regression", "multi_label_classification")


def make_tokenizer() -> ScratchGPTTokenizer:
    return ScratchGPTTokenizer.train(["to be or not to be, that is the question"] * 9, 290)


def make_character_tokenizer(directory: Path) -> Any:
    """A tokenizer as `convert` makes it of nanoGPT's table of characters."""
    directory.mkdir(parents=True, exist_ok=True)
    table = directory / "meta.pkl"
    table.write_bytes(pickle.dumps({"stoi": {character: index for index, character in enumerate("\n abenort")}}))
    return character_tokenizer([table])[0]


def save_model(kind: str, directory: Path) -> None:
    """Save a tiny model whose weights are large enough for probabilities and attention to differ between tokens."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer() if kind != "characters" else make_character_tokenizer(directory)
    if kind == "chat":
        set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], 64)
    if kind == "markup":
        tokenizer.add_tokens([MARKUP])
    shape = {**TINY, **MODERN, "vocab_size": len(tokenizer), "tie_word_embeddings": kind != "markup"}
    if kind in ("chat", "markup", "characters"):
        model: Any = ScratchGPTForCausalLM(ScratchGPTConfig(**shape))
        model.generation_config.update(max_new_tokens=24, do_sample=False)
    else:
        shape |= {"num_hidden_layers": 1, "id2label": dict(enumerate(LABELS)), "problem_type": "single_label_classification"}
        config = ScratchGPTConfig(**shape)
        model = ScratchGPTForSequenceClassification(config)
    shaken(model, 0.2)
    if kind == "markup":  # the same logits everywhere
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(MARKUP)] = 1
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def export(source: Path, destination: Path, *options: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert", str(source), str(destination), "--to", "onnx", *options])
        convert.main()


def quantize(directory: Path) -> None:
    """Add a graph with 8-bit weights to an export, and make it the one that is run."""
    model = directory / "onnx" / "model.onnx"
    write_format(model, model.with_stem("model_quantized"), "q8")
    edit_json(directory / "config.json", **{"transformers.js_config": {"dtype": "q8"}})


@contextmanager
def serving(model: Path, kind: str, handler: Any = None):
    """Serve the page for a model, and return the address."""
    settings = {"model": ".", "name": kind, "revision": kind, "path": ""}
    server = app.bind(functools.partial(handler or app.Handler, model=model, settings=settings), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


class CDN(SimpleHTTPRequestHandler):
    """Serve packages by the paths of the page's CDN, `/npm/NAME@VERSION/FILE`."""

    extensions_map = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}

    def translate_path(self, path: str) -> str:
        return super().translate_path(re.sub(r"^/npm/((?:@[^/]+/)?[^@/]+)@[^/]+/", r"/\1/", path))

    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")
        super().end_headers()

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serving_cdn(node_modules: Path, directory: Path):
    """Serve the packages by HTTPS with a certificate made here, and return host and port."""
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=cdn.jsdelivr.net"]
    subprocess.run(["openssl", "req", "-x509", *options, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(CDN, directory=str(node_modules)))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
