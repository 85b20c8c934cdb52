"""Start the page for a model in a browser without a window, before it is uploaded."""

import functools
import html
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from space.app import Handler, bind
from training.errors import UserError

# Chrome first: Ubuntu's chromium is a snap, which does not see all directories.
BROWSERS = ("google-chrome", "google-chrome-stable", "chrome", "chromium", "chromium-browser", "msedge")
MAC_BROWSER = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = ["--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
CDN = "cdn.jsdelivr.net"  # where the page's library comes from; without it nothing is known about the model
LOADING, LOADED = "Loading a model", "The model is loaded"  # titles of the page; another one says what is wrong
SECONDS = 120


def check_page(directory: Path) -> str:
    """Load an ONNX export in the page, and return a line that says whether it works.

    Raises:
        UserError: the page says why it does not.
    """
    browser = next(filter(None, map(shutil.which, (*BROWSERS, MAC_BROWSER))), None)
    if not browser:
        return f"The page was not started: none of {', '.join(BROWSERS)} was found."
    settings = {"model": ".", "name": LOADED, "revision": "checked", "path": ""}
    with bind(functools.partial(Handler, model=directory, settings=settings), 0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        title = _title_after_loading(browser, f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
    if title == LOADED:
        return f"The page was started in {Path(browser).name}: it runs the model."
    if title == LOADING or CDN in title:
        return f"The page was not checked in {Path(browser).name}, which got no further than: {title}"
    raise UserError(f"the page does not run the model: {html.unescape(title)}")


def _title_after_loading(browser: str, address: str) -> str:
    """The title of a page when it is no longer loading, or after two minutes, from the browser's interface for developers."""
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    title, end = LOADING, time.monotonic() + SECONDS
    with socket.create_server(("127.0.0.1", 0)) as free:
        pages = f"http://127.0.0.1:{free.getsockname()[1]}/json/list"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # the browser may still write to it
        options = [f"--remote-debugging-port={urlsplit(pages).port}", f"--user-data-dir={profile}", *["--no-sandbox"] * is_root]
        command = [browser, *FLAGS, *options, address]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while title in (LOADING, "", urlsplit(address).netloc) and process.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
                with suppress(OSError, ValueError, HTTPException), direct.open(pages) as response:
                    title = next((page["title"] for page in json.load(response) if page["url"] == address), LOADING)
            process.terminate()
    return title
