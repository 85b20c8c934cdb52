"""Sharing, over real HTTP, with a Hub on the loopback."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import hub_upload
from modeling_scratchgpt import ScratchGPTForCausalLM
from tests.conftest import WITHOUT_THE_PACKAGE
from tests.hub_server import Hub
from tests.training.conftest import ROOT, snippet_of
from training import pretrain
from training.errors import UserError
from training.sharing import checks as sharing

SENT = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "loss.png", "metrics.jsonl", "configuration_scratchgpt.py", "cross_entropy.py", "interchange.py", "modeling_scratchgpt.py",
    "packed_linear.py", "tokenization_scratchgpt.py",
}  # fmt: skip


@pytest.fixture
def hub():
    server = Hub()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def model(run, tmp_path) -> Path:
    """A finished run, with all that lies about there, and a licence."""
    folder = shutil.copytree(run[0], tmp_path / "book")
    with_license(folder / "README.md")
    (folder / ".env").write_text("KEY=1")
    (folder / "notes.txt").write_text("mine")
    (folder / "optimizer.pt").write_bytes(b"0")
    return folder


def with_license(card: Path) -> None:
    card.write_text(card.read_text().replace("---\n", "---\nlicense: apache-2.0\n", 1))


def program(hub: Hub, tmp_path: Path, *words: object, token: str = "hf_ann", **environment: str) -> subprocess.CompletedProcess:
    """`hub_upload.py` as a user runs it."""
    return subprocess.run(
        [sys.executable, str(ROOT / "hub_upload.py"), *map(str, words)],
        env=environment_of(hub, tmp_path, token) | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def environment_of(hub: Hub, tmp_path: Path, token: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    place = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    return {**known, **place, **({"HF_TOKEN": token} if token else {})}


@pytest.fixture
def upload(hub, tmp_path, monkeypatch, capsys):
    """The same in this process, without loading the model once more in another: quicker."""
    monkeypatch.setattr(hub_upload, "check_loads", lambda *_: None)
    for name, value in {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("huggingface_hub.utils._http.constants.HF_HUB_OFFLINE", False)

    def start(*words: object, token: str = "hf_ann") -> str:
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(sys, "argv", ["hub_upload.py", *map(str, words)])
        hub_upload.main()
        return capsys.readouterr().out

    return start


# In a clean process: what a user of the Hub does.
USE = (
    WITHOUT_THE_PACKAGE
    + """
from transformers import AutoModelForCausalLM, AutoTokenizer

how = {"revision": sys.argv[2], "trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **how).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **how)
logits = model(**tokenizer("It was a dark", return_tensors="pt", return_token_type_ids=False)).logits
print(json.dumps([type(model).__module__, logits[0, -1].tolist()]))
"""
)


def in_a_clean_process(code: str, hub: Hub, tmp_path: Path, *words: str, token: str = "hf_ann") -> subprocess.CompletedProcess:
    tmp_path.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment_of(hub, tmp_path, token),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_up_and_down_again(hub, model, upload, tmp_path):
    """What is loaded from the Hub, pinned, without the package, says what the folder says."""
    process = program(hub, tmp_path, model, "ann/book", "--private")
    assert process.returncode == 0, process.stderr
    assert "Stays here: .env, checkpoints, notes.txt, optimizer.pt" in process.stdout
    repository = hub.repositories["model", "ann/book"]
    assert repository.private
    assert repository.commits[repository.branches["main"]].keys() - {".gitattributes"} == SENT
    (oid,) = re.findall(r"from_pretrained\('ann/book', revision='(\w{40})', trust_remote_code=True\)", process.stdout)
    for name in SENT - {"README.md"}:
        assert hub.content("ann/book", name) == (model / name).read_bytes()
    card = hub.content("ann/book", "README.md").decode()
    assert "PATH_OR_HUB_ID" not in card
    assert 'model="ann/book"' in card

    (model / "README.md").write_text((model / "README.md").read_text() + "\nLater.\n")
    upload(model, "ann/book")
    assert repository.branches["main"] != oid  # a version after the one that is loaded now
    process = in_a_clean_process(USE, hub, tmp_path, "ann/book", oid)
    assert process.returncode == 0, process.stderr
    module, logits = json.loads(process.stdout.splitlines()[-1])
    assert module == f"transformers_modules.ann.book.{oid}.modeling_scratchgpt"
    ours = ScratchGPTForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    with torch.no_grad():
        expected = ours(**tokenizer("It was a dark", return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
    torch.testing.assert_close(torch.tensor(logits), expected)
    process = in_a_clean_process(WITHOUT_THE_PACKAGE + snippet_of(card), hub, tmp_path)
    assert process.returncode == 0, process.stderr
    strangers = in_a_clean_process(USE, hub, tmp_path / "other", "ann/book", oid, token="")
    assert strangers.returncode != 0  # it is private
    assert "ann/book" in strangers.stderr


def test_a_dry_run_sends_nothing_and_needs_no_token(hub, model, tmp_path):
    process = program(hub, tmp_path, model, "ann/book", "--dry_run", token="")
    assert process.returncode == 0, process.stderr
    assert not hub.requests
    for name in SENT:
        assert re.search(rf"^ *[\d,]+  {re.escape(name)}$", process.stdout, re.M)
    total = sum((model / name).stat().st_size for name in SENT - {"README.md"})
    assert int(re.search(r"([\d,]+)  bytes in all", process.stdout)[1].replace(",", "")) == pytest.approx(total, abs=10_000)


def test_after_a_cut_connection_the_rest_is_sent(hub, model, upload, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its five tries
    size = (model / "model.safetensors").stat().st_size
    hub.break_upload_after = size - 1000  # the picture goes through, the weights do not
    with pytest.raises(
        UserError, match="the connection to the Hub broke .*: the files there change all at once or not at all, and the same"
    ):
        upload(model, "ann/book")
    repository = hub.repositories["model", "ann/book"]
    assert set(repository.commits[repository.branches["main"]]) == {".gitattributes"}
    hub.break_upload_after, hub.received = None, 0
    upload(model, "ann/book")
    assert hub.received == size
    assert hub.content("ann/book", "model.safetensors") == (model / "model.safetensors").read_bytes()
    hub.received = 0
    upload(model, "ann/book")
    assert hub.received == 0


def test_a_download_that_is_cut_goes_on(hub, model, upload, tmp_path):
    upload(model, "ann/book")
    hub.break_download_after = 10_000
    process = in_a_clean_process(USE, hub, tmp_path, "ann/book", "main")
    assert process.returncode == 0, process.stderr
    assert hub.break_download_after is None


@pytest.mark.parametrize(
    ("token", "repository", "message"),
    [
        ("hf_wrong", "ann/book", "the Hub refuses ann/book .*: log in again by `hf auth login`"),
        ("hf_reads", "ann/book", "the Hub refuses ann/book .*: take a token that may write there"),
        ("hf_ann", "bob/book", "the Hub refuses bob/book .*: take a token that may write there"),
    ],
)
def test_who_may_not(hub, model, upload, token, repository, message):
    with pytest.raises(UserError, match=message):
        upload(model, repository, token=token)
    assert not hub.repositories


def test_nobody_is_logged_in(hub, model, tmp_path):
    process = program(hub, tmp_path, model, "ann/book", token="")
    assert process.returncode == 2
    assert process.stderr.strip().endswith("there is no token to write with: log in by `hf auth login`, or set HF_TOKEN.")
    assert not hub.requests


def test_a_remote_that_is_ahead(hub, model, upload):
    upload(model, "ann/book")
    repository = hub.repositories["model", "ann/book"]
    _, files = repository.files("main")
    repository.commit("main", files, "Update README.md")
    with pytest.raises(UserError, match="ann/book .main. is ahead: others have changed it, the last time by 'Update R"):
        upload(model, "ann/book")
    upload(model, "ann/book", "--overwrite")
    upload(model, "ann/book", "--revision", "v2")
    assert set(repository.branches) == {"main", "v2"}


def test_what_is_private_is_not_sent_where_all_can_read(hub, model, upload):
    upload(model, "ann/book")
    requests = len(hub.requests)
    with pytest.raises(UserError, match="ann/book is there already, and public: make it private in its settings"):
        upload(model, "ann/book", "--private")
    assert not any("commit/" in it for it in hub.requests[requests:])


def test_a_page_that_is_ahead_stops_the_model_too(hub, model, upload):
    upload(model, "ann/book", "--space")
    space = hub.repositories["space", "ann/book"]
    space.commit("main", space.files("main")[1], "Update app.py")
    commits = len(hub.repositories["model", "ann/book"].commits)
    with pytest.raises(UserError, match="ann/book .main. is ahead: .*'Update app.py'"):
        upload(model, "ann/book", "--space")
    assert len(hub.repositories["model", "ann/book"].commits) == commits


def test_a_licence_that_the_hub_does_not_know(hub, model, upload):
    (model / "README.md").write_text((model / "README.md").read_text().replace("license: apache-2.0\n", "", 1))
    with pytest.raises(UserError, match=r"the Hub refuses ann/book \(.*\"license\" must be one of mit, apache-2.0"):
        upload(model, "ann/book", "--license", "apache")
    assert len(hub.repositories["model", "ann/book"].commits) == 1


def test_texts_of_the_data_are_pointed_out(model, upload):
    assert "texts of the data" not in upload(model, "ann/book", "--dry_run")
    (model / "mistakes.md").write_text("Mistakes: none.\n")
    assert "Of these mistakes.md and README.md hold texts of the data that it was tested on." in upload(
        model, "ann/book", "--dry_run"
    )


@pytest.mark.parametrize("answer", [b"garbage", b"{}", b"[]", b"null", b'{"url": "x"}', None])
def test_what_is_no_hub(hub, model, upload, monkeypatch, answer):
    """Something else answers, or nothing does."""
    monkeypatch.setattr(hub_upload, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(hub, "instead", answer if answer is not None else lambda: time.sleep(5))
    with pytest.raises(UserError, match="the connection to the Hub broke" if answer is None else "does not speak as one"):
        upload(model, "ann/book")


def test_a_commit_in_this_very_moment(hub, model, upload, monkeypatch):
    upload(model, "ann/book")
    repository = hub.repositories["model", "ann/book"]
    send = hub_upload.HfApi.create_commit

    def late(*arguments, **keywords):
        repository.commit("main", repository.files("main")[1], "Update README.md")
        return send(*arguments, **keywords)

    monkeypatch.setattr(hub_upload.HfApi, "create_commit", late)
    (model / "README.md").write_text((model / "README.md").read_text() + "\nNew.\n")
    with pytest.raises(UserError, match="the Hub refuses ann/book .*: it has changed in this very moment; run the same"):
        upload(model, "ann/book")


def test_weights_in_other_parts_go(hub, model, upload):
    ours = ScratchGPTForCausalLM.from_pretrained(model)
    upload(model, "ann/book")
    (model / "model.safetensors").unlink()
    ours.save_pretrained(model, max_shard_size="40KB")
    upload(model, "ann/book")
    repository = hub.repositories["model", "ann/book"]
    names = set(repository.files("main")[1])
    assert "model.safetensors" not in names
    assert "model.safetensors.index.json" in names


def test_a_disk_that_fills_on_download(hub, model, upload, book, mount, tmp_path):
    upload(model, "ann/book")
    disk, out = mount("size=128k"), tmp_path / "out"
    words = ["--base_model", "ann/book", "--dataset", book, "--context_length", "32", "--output_dir", str(out)]
    process = subprocess.run(
        [sys.executable, "training/pretrain.py", *words, "--validation_fraction", "0.1"],
        cwd=ROOT,
        env=environment_of(hub, tmp_path, "hf_ann") | {"HF_HUB_CACHE": str(disk)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 2
    last = process.stderr.splitlines()[-1]
    assert re.fullmatch(r"pretrain.py: error: --base_model ann/book cannot be used .*No space left on device.*", last), last
    assert "Traceback" not in process.stderr
    assert not out.exists()


def test_a_page_beside_it(hub, model, upload, tmp_path):
    out = upload(model, "ann/book", "--space")
    space = hub.repositories["space", "ann/book"]
    page_files = {"README.md", "app.py", "requirements.txt", "style.css"}
    assert page_files <= set(space.files("main")[1])
    assert space.variables == {"MODEL": "ann/book", "REVISION": hub.repositories["model", "ann/book"].branches["main"]}
    card = ModelCard(hub.content("ann/book", "README.md", kind="space").decode())
    data = card.data.to_dict()
    assert f"{data['sdk']}=={data['sdk_version']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert f"{hub.address}/spaces/ann/book" in out
    assert "secret" not in out
    assert "add a token that may read it, as the secret HF_TOKEN" in upload(model, "ann/own", "--space", "--private")

    pytest.importorskip("gradio", reason="gradio is not installed: there is no page")
    (tmp_path / "space").mkdir()
    for name in page_files:
        (tmp_path / "space" / name).write_bytes(hub.content("ann/book", name, kind="space"))
    (model / "README.md").write_text((model / "README.md").read_text() + "\nLater.\n")
    upload(model, "ann/book")  # the page stays with the version that it was made for
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = f"{WITHOUT_THE_PACKAGE}\nimport runpy\nsys.argv = ['app.py']\nrunpy.run_path('app.py', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path / "space",
        env=environment_of(hub, tmp_path, "") | space.variables | {"GRADIO_SERVER_PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = next(process.stdout)
        assert f"ann/book is at http://127.0.0.1:{port}" in said, said + process.stdout.read()
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=20).read().decode()
    finally:
        process.terminate()
        process.wait(20)
    assert "parameters · 2 layers of 2 heads" in page
    assert (
        tmp_path / "home" / "hub" / "models--ann--book" / "snapshots" / space.variables["REVISION"] / "config.json"
    ).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere", "ann/book"], "/nowhere is no folder"),
        (["MODEL", "book"], "USER/NAME 'book' lacks a user"),
        (["MODEL", "ann/bo ok"], "USER/NAME 'ann/bo ok' cannot be a name on the Hub"),
        (["MODEL", "a/b/c"], "USER/NAME 'a/b/c' cannot be a name on the Hub"),
        *((["MODEL", "ann/book", f"--revision={it}"], "cannot be a branch") for it in ("", "..", "a..b", "../x", "refs/pr/1")),
        *((["MODEL", "ann/book", f"--revision={it}"], "cannot be a branch") for it in ("a" * 40, "v1\n", "x?y", "-x", "é")),
        (["~nosuchuser/x", "ann/book"], "~nosuchuser/x is no folder"),
        (["MODEL", "ann/book", "--adapter"], "--adapter is of use with its base alone"),
        (["MODEL", "ann/book", "--adapter", "--base_model", "ann/base"], "holds no adapter_config.json"),
        (["MODEL", "ann/book", "--adapter", "--space", "--base_model", "ann/base"], "--space shows a whole model"),
    ],
)
def test_what_cannot_be_asked(hub, model, upload, words, message):
    with pytest.raises(UserError, match=message):
        upload(*(model if word == "MODEL" else word for word in words))
    assert not hub.requests


@pytest.mark.parametrize("way", ["custom_generate", "configuration_files"])
def test_code_that_is_not_sent_is_not_run(hub, model, tmp_path, way):
    """Transformers would run both of these from the folder itself."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\ngenerate = lambda *_, **__: 0\n"
    if way == "custom_generate":
        (model / "custom_generate").mkdir()
        (model / "custom_generate" / "generate.py").write_text(code)
    else:
        config = json.loads((model / "config.json").read_text())
        config["configuration_files"] = ["config.4.0.0.json"]
        (model / "config.json").write_text(json.dumps(config))
        config["auto_map"] = {name: f"evil.{it.rpartition('.')[2]}" for name, it in config["auto_map"].items()}
        (model / "config.4.0.0.json").write_text(json.dumps(config))
        (model / "evil.py").write_text(code)
    process = program(hub, tmp_path, model, "ann/book", "--dry_run")
    assert process.returncode == (0 if way == "custom_generate" else 2), process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "ran").exists()


def test_an_adapter_and_its_base(hub, model, upload, book, tmp_path, monkeypatch):
    """Both from the Hub, by the snippet of the adapter's card."""
    words = ["--base_model", str(model), "--dataset", book, "--output_dir", str(tmp_path / "lora"), "--report_to", "none"]
    words += ["--lora_r", "2", "--max_steps", "2", "--context_length", "32", "--license", "mit", "--validation_fraction", "0.1"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    pretrain.main()
    upload(model, "ann/base")
    with pytest.raises(UserError, match="names 'book' as the base of this model, which is no place on the Hub"):
        upload(tmp_path / "lora", "ann/whole")
    upload(tmp_path / "lora", "ann/whole", "--base_model", "ann/base")
    assert ModelCard(hub.content("ann/whole", "README.md").decode()).data.base_model == "ann/base"
    with pytest.raises(UserError, match="--base_model ann/nothing is not on the Hub"):
        upload(tmp_path / "lora", "ann/lora", "--adapter", "--base_model", "ann/nothing")
    out = upload(tmp_path / "lora", "ann/lora", "--adapter", "--base_model", "ann/base", "--license", "apache-2.0")
    repository = hub.repositories["model", "ann/lora"]
    sent = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    sent |= {"tokenization_scratchgpt.py"}
    assert repository.files("main")[1].keys() - {".gitattributes"} == sent
    assert json.loads(hub.content("ann/lora", "adapter_config.json"))["base_model_name_or_path"] == "ann/base"
    card = ModelCard(hub.content("ann/lora", "README.md").decode())
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("peft", "ann/base", "apache-2.0")
    (pinned,) = re.findall(r"^    (peft\..*)  # model: ann/base$", out, re.M)
    code = f"""{WITHOUT_THE_PACKAGE}
{snippet_of(card.text)}
print(model.active_adapters)
import peft
from transformers import AutoTokenizer
model = model.unload()
print({pinned}.active_adapters, AutoTokenizer.from_pretrained("ann/lora", trust_remote_code=True)("It was")["input_ids"])
"""
    process = in_a_clean_process(code, hub, tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("default") == 2
