"""The program that converts a model and serves the page."""

import functools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from space import app
from tests.web.pages import edit_json, save_model, serving


def test_the_server_shows_the_page_and_the_export_only(exports):
    with serving(exports["chat"], "chat") as address:
        with urllib.request.urlopen(f"{address}model/chat/config.json") as response:
            assert json.load(response)["architectures"] == ["Qwen3ForCausalLM"]
            assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        with urllib.request.urlopen(address) as response:
            assert response.headers.get_content_type() == "text/html"
        paths = ["model/chat/", "model/chat/onnx/", "../app.py", "%2e%2e/app.py", "model/chat/../../app.py"]
        for path in (*paths, "model/other/config.json", "%00", "model/chat/config.json%00"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(address + path)
        with pytest.raises(urllib.error.HTTPError, match="403"):  # the name of another page that has this address
            urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "example.com"}))


def test_a_reload_during_a_download_prints_nothing(exports, capfd):
    settings = {"model": ".", "name": "chat", "revision": "chat", "path": ""}
    with app.bind(functools.partial(app.Handler, model=exports["chat"], settings=settings), 0) as server:
        server.daemon_threads = False  # closing the server waits for its threads
        with socket.create_connection(server.server_address) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset when it is closed
            client.sendall(b"GET /model/chat/onnx/model.onnx HTTP/1.1\r\nHost: localhost\r\n\r\n")
            server.handle_request()
            client.recv(1000)
    assert capfd.readouterr() == ("", "")


def test_a_directory_is_converted_once_for_its_weights(tmp_path, monkeypatch, capfd):
    """Also by two servers that start at the same time; what a killed one has left, and what is not used, is deleted."""
    save_model("chat", tmp_path / "chat")
    (tmp_path / "chat" / "onnx").mkdir()
    (tmp_path / "chat" / app.EXPORT).touch()  # beside a ScratchGPT, which is not an export by that
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache" / "scratchgpt"
    abandoned, unused = cache / ".writing-0", cache / "0123456789abcdef"
    for directory in (abandoned, unused):
        directory.mkdir(parents=True)
    os.utime(unused, (0, 0))
    commands = []

    def convert_quickly(command, env):
        commands.append(command)
        time.sleep(0.2)
        (Path(command[4]) / "onnx").mkdir(parents=True)
        (Path(command[4]) / app.EXPORT).touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(app.subprocess, "run", convert_quickly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(app.export, [tmp_path / "chat"] * 2)
    os.utime(first[0], (0, 0))  # old, but in use
    assert app.export(tmp_path / "chat") == first == second
    assert [path for path in cache.iterdir() if path.is_dir()] == [first[0]]
    assert commands == [
        [sys.executable, "-m", "modeling_scratchgpt.convert", *commands[0][3:5], "--to", "onnx", "--attentions"]
    ]
    edit_json(tmp_path / "chat" / "config.json", changed=1)
    assert app.export(tmp_path / "chat") != first
    assert len(commands) == 2
    assert first[0].exists()

    def interrupt(command, env):
        raise KeyboardInterrupt

    monkeypatch.setattr(app.subprocess, "run", interrupt)
    edit_json(tmp_path / "chat" / "config.json", changed=2)
    monkeypatch.setattr(sys, "argv", ["app.py", str(tmp_path / "chat")])
    with pytest.raises(SystemExit, match="^130$"):
        app.main()


def test_another_graph_has_another_address(exports, tmp_path):
    """The browser's cache must not show the model that was trained before."""
    directory = shutil.copytree(exports["chat"], tmp_path / "chat")
    first = app.export(directory)
    assert first[0] == directory
    (directory / app.EXPORT).write_bytes(b"retrained")
    assert app.export(directory)[1] != first[1]


def test_a_model_of_the_hub_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "snapshot_download", lambda name: str(tmp_path / name))
    assert app.locate("user/name") == tmp_path / "user" / "name"
    exported = tmp_path / "user" / "page" / "web"
    (exported / "onnx").mkdir(parents=True)
    (exported / app.EXPORT).touch()
    assert app.locate("user/page") == exported


def test_errors_are_one_line(exports, tmp_path, monkeypatch, capsys):
    bare = tmp_path / "bare"
    save_model("chat", bare)
    (bare / "tokenizer.json").unlink()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        messages = {
            (str(tmp_path / "no"),): f"{tmp_path / 'no'} cannot be loaded (it has no config.json: pass the directory of a",
            ("tests/no",): "tests/no cannot be loaded (it has no config.json: pass the directory of a",
            ("user/no",): "user/no cannot be loaded (",
            (str(bare),): f"{bare} cannot be loaded (it has no tokenizer.json: save its tokenizer there, or convert it again",
            (str(exports["chat"]), "--port", port): f"--port {port} is in use: pass another.",
        }
        for argv, message in messages.items():
            monkeypatch.setattr(sys, "argv", ["app.py", *argv])
            with pytest.raises(SystemExit, match="2"):
                app.main()
            assert capsys.readouterr().err.splitlines()[-1].startswith(f"app.py: error: {message}")
