"""Try a model in the browser: `python space/app.py outputs/instruct`, or with the id of a model on the Hub.

The page in `web/` runs the model inside the browser; this program converts a trained directory to ONNX, once for each state
of its files, and serves both on this machine only. A directory that holds an ONNX export is served as it is.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import snapshot_download
from huggingface_hub.utils import WeakFileLock

ROOT = Path(__file__).parents[1]
WEB = ROOT / "space" / "web"
EXPORT = Path("onnx", "model.onnx")
WEB_EXPORT = "web"  # the directory of an export in the repository of its model
UNUSED_SECONDS = 30 * 24 * 3600  # after which an export is deleted
FIRST_PORT, NUM_PORTS = 7860, 100
# With these headers, WebAssembly may use threads.
HEADERS = {"cross-origin-embedder-policy": "require-corp", "cross-origin-opener-policy": "same-origin"}
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html; charset=utf-8", ".json": "application/json"}


def locate(name: str) -> Path:
    """Return the directory of a model: `name` itself, or a download of the repository of this name on the Hub.

    Raises:
        ValueError: it is not the directory of a finished model.
        OSError: it cannot be downloaded.
    """
    directory = Path(name).expanduser()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not directory.parent.exists():  # else it is a mistyped directory
        snapshot = Path(snapshot_download(name))
        return snapshot / WEB_EXPORT if (snapshot / WEB_EXPORT / EXPORT).is_file() else snapshot
    if not (directory / "config.json").is_file():
        raise ValueError("it has no config.json: pass the directory of a finished model, such as outputs/pretrain")
    return directory


def fingerprint(directory: Path) -> str:
    """Hash of a model's files, and of the code that converts them; it also names the export in the browser's cache."""
    digest = hashlib.sha256()
    patterns = ("*.json", "*.jinja", "*.safetensors", "held_out.jsonl", "onnx/*")
    files = [path for pattern in patterns for path in directory.glob(pattern)]
    for path in sorted(files) + sorted(ROOT.glob("modeling_scratchgpt/**/*.py")):
        digest.update(f"{path.name}\0".encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def export(directory: Path) -> tuple[Path, str]:
    """Return the ONNX export of a model directory, converted unless that has been done, and the hash of the model.

    Raises:
        SystemExit: the model cannot be converted; the converter has printed why.
        OSError, ValueError: a file cannot be read, or the cache not be written.
    """
    if not (directory / "tokenizer.json").is_file():
        raise ValueError("it has no tokenizer.json: save its tokenizer there, or convert it again with --tokenizer")
    revision, config = fingerprint(directory), json.loads((directory / "config.json").read_text("utf-8"))
    if (directory / EXPORT).is_file() and config.get("model_type") != "scratchgpt":
        return directory, revision
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scratchgpt" / revision
    cache.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(cache.parent / ".lock"):  # of several processes, one converts
        since = time.time() - UNUSED_SECONDS
        unused = [path for path in cache.parent.glob("*/") if path != cache and path.stat().st_mtime < since]
        for abandoned in (*cache.parent.glob(".writing-*"), *unused):  # by a killed process, or for earlier weights
            shutil.rmtree(abandoned, ignore_errors=True)
        if not (cache / EXPORT).is_file():
            print(f"Converting {directory} to ONNX, once for these weights", flush=True)
            words = ["modeling_scratchgpt.convert", str(directory.absolute()), str(cache), "--to", "onnx", "--attentions"]
            path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            if code := subprocess.run([sys.executable, "-m", *words], env=os.environ | {"PYTHONPATH": path}).returncode:
                raise SystemExit(code)
        os.utime(cache)
    return cache, revision


class Handler(SimpleHTTPRequestHandler):
    """Serve the page, `model.json` and, below `model/REVISION/`, the export."""

    protocol_version = "HTTP/1.1"
    extensions_map = TYPES | {"": "application/octet-stream"}

    def __init__(self, *arguments, model: Path, settings: dict[str, str], **options):
        self.model, self.settings = model, settings
        super().__init__(*arguments, directory=str(WEB), **options)

    def handle(self) -> None:
        with suppress(ConnectionError):  # the page was closed or reloaded during a download
            super().handle()

    def parse_request(self) -> bool:
        """Answer to names of this machine only: other pages could give their own name its address, and read the model."""
        is_valid = super().parse_request()
        if is_valid and (self.headers["Host"] or "").partition(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(403)
            return False
        return is_valid

    def translate_path(self, path: str) -> str:
        prefix = f"/model/{self.settings['revision']}/"
        is_model = urlsplit(path).path.startswith(prefix)
        self.directory = str(self.model if is_model else WEB)
        found = super().translate_path(path.removeprefix(prefix[:-1]) if is_model else path)
        return found.replace("\0", "\N{REPLACEMENT CHARACTER}")

    def do_GET(self) -> None:
        if unquote(urlsplit(self.path).path) != "/model.json":
            return super().do_GET()
        content = json.dumps(self.settings).encode()
        self.send_response(200)
        self.send_header("Content-Type", TYPES[".json"])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path):
        self.send_error(404, "File not found")

    def log_message(self, *_) -> None:
        """Print nothing: the page shows what went wrong."""


class Server(ThreadingHTTPServer):
    """A server whose port no other program may bind, as Windows would else allow."""

    allow_reuse_address = os.name != "nt"


def bind(handler: Callable[..., Handler], port: int | None) -> Server:
    """Bind to a port of this machine, without a number to the first free one from 7860.

    Raises:
        OSError: the port is in use.
    """
    ports = [port] if port is not None else range(FIRST_PORT, FIRST_PORT + NUM_PORTS)
    for number in ports[:-1]:
        with suppress(OSError):
            return Server(("127.0.0.1", number), handler)
    return Server(("127.0.0.1", ports[-1]), handler)


def main() -> None:
    parser = argparse.ArgumentParser(description="Try a model in the browser.")
    parser.add_argument("model", metavar="MODEL", help="directory or Hub id of a finished model, or of an ONNX export")
    parser.add_argument("--port", type=int, help="port on this machine (default: the first free one from 7860)")
    parser.add_argument("--no_browser", action="store_true", help="only print the address")
    arguments = parser.parse_args()
    try:
        model, revision = export(locate(arguments.model))
    except (OSError, ValueError) as error:
        parser.error(f"{arguments.model} cannot be loaded ({' '.join(str(error).split()):.200}).")
    except KeyboardInterrupt:
        sys.exit(130)
    settings = {"model": ".", "name": Path(arguments.model).resolve().name, "revision": revision, "path": ""}
    try:
        server = bind(functools.partial(Handler, model=model, settings=settings), arguments.port)
    except OSError:
        parser.error(f"--port {arguments.port} is in use: pass another.")
    address = f"http://127.0.0.1:{server.server_port}"
    print(f"{settings['name']} is running at {address} (press Ctrl-C to stop)", flush=True)
    if not arguments.no_browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
