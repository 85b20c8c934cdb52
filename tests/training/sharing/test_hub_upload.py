"""Uploads over HTTP, to a Hub on this machine."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

import hub_upload
from modeling_scratchgpt import ScratchGPTForCausalLM
from tests.conftest import WITHOUT_THE_PACKAGE
from tests.training.conftest import snippet_of
from tests.training.sharing.conftest import UPLOADED, edit_card, hub_environment, run_python
from training import pretrain
from training.errors import UserError
from training.sharing import checks
from training.sharing.checks import check_loads  # `upload` replaces it

LOAD_FROM_HUB = (
    WITHOUT_THE_PACKAGE
    + """
from transformers import AutoModelForCausalLM, AutoTokenizer

options = {"revision": sys.argv[2], "trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **options)
logits = model(**tokenizer("It was a dark", return_tensors="pt", return_token_type_ids=False)).logits
print("RESULT", json.dumps([type(model).__module__, logits[0, -1].tolist()]))
"""
)


def test_upload_and_load_without_the_package(hub, model, upload, tmp_path, monkeypatch):
    """An earlier version, pinned by its commit, gives the logits of the local model."""
    monkeypatch.setattr(checks, "check_loads", check_loads)
    printed = upload(model, "ann/book", "--private")
    monkeypatch.setattr(checks, "check_loads", lambda *_: None)
    assert "Not uploaded: .env, checkpoints, held_out.jsonl, notes.txt, optimizer.pt" in printed
    repository = hub.repositories["model", "ann/book"]
    assert repository.private
    assert repository.commits[repository.branches["main"]].keys() - {".gitattributes"} == UPLOADED
    (oid,) = re.findall(r"from_pretrained\('ann/book', revision='(\w{40})', trust_remote_code=True\)", printed)
    for name in UPLOADED - {"README.md"}:
        assert hub.content("ann/book", name) == (model / name).read_bytes()
    card = hub.content("ann/book", "README.md").decode()
    assert "PATH_OR_HUB_ID" not in card
    assert 'model="ann/book"' in card

    edit_card(model, "\n# ", "\nLater.\n\n# ")
    upload(model, "ann/book")
    assert repository.branches["main"] != oid
    process = run_python(
        "-c", LOAD_FROM_HUB + snippet_of(card), "ann/book", oid, env=hub_environment(hub, tmp_path), cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    module, logits = json.loads(re.findall("^RESULT (.*)", process.stdout, re.M)[0])
    assert module == f"transformers_modules.ann.book.{oid}.modeling_scratchgpt"
    local = ScratchGPTForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    with torch.no_grad():
        expected = local(**tokenizer("It was a dark", return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
    torch.testing.assert_close(torch.tensor(logits), expected)


def test_dry_run_sends_nothing_and_needs_no_token(hub, model, upload):
    output = upload(model, "ann/book", "--dry_run", token="")
    assert not hub.requests
    for name in UPLOADED:
        assert re.search(rf"^ *[\d,]+  {re.escape(name)}$", output, re.M)
    total = sum((model / name).stat().st_size for name in UPLOADED - {"README.md"})
    assert int(re.search(r"([\d,]+)  bytes in total", output)[1].replace(",", "")) == pytest.approx(total, abs=10_000)
    assert "texts of the test data" not in output
    (model / "mistakes.md").write_text("Mistakes: none.\n")
    output = upload(model, "ann/book", "--dry_run", token="")
    assert "Note: mistakes.md and README.md contain texts of the test data." in output


def test_after_a_broken_connection_the_rest_is_sent(hub, model, upload, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its five retries
    size = (model / "model.safetensors").stat().st_size
    hub.break_upload_after = size - 1000  # the picture is uploaded, the weights are not
    with pytest.raises(UserError, match="the connection to the Hub broke .*: an upload changes all files or none; run"):
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


def test_broken_download_is_resumed(hub, model, upload, tmp_path):
    upload(model, "ann/book")
    hub.break_download_after = 10_000
    code = "import huggingface_hub; print(huggingface_hub.hf_hub_download('ann/book', 'model.safetensors'))"
    process = run_python("-c", code, env=hub_environment(hub, tmp_path))
    assert process.returncode == 0, process.stderr
    assert hub.break_download_after is None
    assert Path(process.stdout.strip()).read_bytes() == (model / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("token", "repository", "message"),
    [
        ("hf_wrong", "ann/book", "the Hub rejected ann/book .*: log in again with `hf auth login`"),
        ("hf_reads", "ann/book", "the Hub rejected ann/book .*: use a token with write access"),
        ("hf_ann", "bob/book", "the Hub rejected bob/book .*: use a token with write access"),
        ("", "ann/book", "no token: log in with `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_no_write_access(hub, model, upload, token, repository, message):
    with pytest.raises(UserError, match=message):
        upload(model, repository, token=token)
    assert not hub.repositories


def change(hub, name: str, content: bytes, kind: str = "model") -> None:
    """A commit by another program."""
    repository = hub.repositories[kind, "ann/book"]
    files = repository.files("main")[1]
    repository.commit("main", {**files, name: hub.store(content)}, f"Update {name}")


@pytest.mark.parametrize(("kind", "name"), [("model", "config.json"), ("space", "page.js")])
def test_changes_by_others_are_not_overwritten(hub, model, upload, kind, name):
    """A changed Space stops the upload of the model, too."""
    upload(model, "ann/book", "--space")
    model_repository = hub.repositories["model", "ann/book"]
    change(hub, name, b"{}", kind)
    commits = len(model_repository.commits)
    message = rf"the {kind} ann/book .main. has changes not made by this program .{name}., the last in 'Update {name}': review"
    with pytest.raises(UserError, match=message):
        upload(model, "ann/book", "--space")
    assert len(model_repository.commits) == commits
    if kind == "space":  # the model can be uploaded without it
        upload(model, "ann/book")
    upload(model, "ann/book", "--space", "--overwrite")
    upload(model, "ann/book", "--revision", "v2")
    assert set(model_repository.branches) == {"main", "v2"}


def test_a_space_with_a_squashed_history_is_not_overwritten(hub, model, upload):
    """Its only commit is not that of a new Space."""
    upload(model, "ann/book", "--space")
    change(hub, "page.js", b"mine", "space")
    space = hub.repositories["space", "ann/book"]
    files = space.files("main")[1]
    space.commits.clear()
    space.commit("main", files, "Super-squash branch 'main'")
    with pytest.raises(UserError, match="has changes not made by this program"):
        upload(model, "ann/book", "--space")
    assert hub.content("ann/book", "page.js", kind="space") == b"mine"


def test_an_edited_card_keeps_its_text_and_its_metadata(hub, model, upload):
    """At every later upload, until it is overwritten; metrics and base are those of the upload."""
    upload(model, "ann/book")
    card = ModelCard(hub.content("ann/book", "README.md").decode())
    card.text += "\nWritten by the owner.\n"
    card.data["tags"], card.data["license"], card.data["library_name"], card.data["pipeline_tag"] = ["poems"], "mit", "x", "y"
    change(hub, "README.md", f"\ufeff{card}".replace("\n", "\r\n").encode())  # as editors on Windows write it
    edit_card(model, "\n# ", "\nLater.\n\n# ")
    for _ in range(2):
        assert "ann/book: the text of the card, which was edited on the Hub, is kept" in upload(model, "ann/book")
        found = ModelCard(hub.content("ann/book", "README.md").decode())
        assert found.text == card.text.replace("\n", "\r\n")
        assert (found.data.tags, found.data.license, found.data.library_name) == (["poems"], "mit", "transformers")
        assert found.data.pipeline_tag == "text-generation"  # pipelines choose the head by it
    upload(model, "ann/book", "--license", "cc0-1.0")
    assert ModelCard(hub.content("ann/book", "README.md").decode()).data.license == "cc0-1.0"
    assert "is kept" not in upload(model, "ann/book", "--overwrite")
    assert "Later." in hub.content("ann/book", "README.md").decode()
    assert "is kept" not in upload(model, "ann/book")
    for unreadable in (b"---\nlicense: [\n---\nMine.", b"\xdcber mich"):
        change(hub, "README.md", unreadable)
        with pytest.raises(UserError, match="the card on the Hub cannot be read .*: correct it there, or replace it with"):
            upload(model, "ann/book")


def test_private_model_is_not_sent_to_a_public_repository(hub, model, upload):
    upload(model, "ann/book")
    requests = len(hub.requests)
    with pytest.raises(UserError, match="ann/book exists and is public: make it private in its settings"):
        upload(model, "ann/book", "--private")
    assert not any("commit/" in request for request in hub.requests[requests:])


def test_license_unknown_to_the_hub(hub, model, upload):
    edit_card(model, "license: apache-2.0\n", "")
    with pytest.raises(UserError, match=r"the Hub rejected ann/book \(.*\"license\" must be one of mit, apache-2.0"):
        upload(model, "ann/book", "--license", "apache")
    assert len(hub.repositories["model", "ann/book"].commits) == 1


@pytest.mark.parametrize("answer", [b"garbage", b"{}", b"[]", b"null", b'{"url": "x"}', None])
def test_server_that_is_not_the_hub(hub, model, upload, monkeypatch, answer):
    """It answers something else, or nothing (None)."""
    monkeypatch.setattr(hub_upload, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(hub, "instead", answer if answer is not None else lambda: time.sleep(5))
    message = "the connection to the Hub broke" if answer is None else "does not answer like the Hub"
    with pytest.raises(UserError, match=message):
        upload(model, "ann/book")


def test_commit_by_others_during_the_upload(hub, model, upload, monkeypatch):
    upload(model, "ann/book")
    repository = hub.repositories["model", "ann/book"]
    create_commit = hub_upload.HfApi.create_commit

    def create_commit_late(*arguments, **keywords):
        repository.commit("main", repository.files("main")[1], "Update README.md")
        return create_commit(*arguments, **keywords)

    monkeypatch.setattr(hub_upload.HfApi, "create_commit", create_commit_late)
    edit_card(model, "\n# ", "\nNew.\n\n# ")
    with pytest.raises(UserError, match="the Hub rejected ann/book .*: it changed during the upload; run the same"):
        upload(model, "ann/book")


def test_files_of_earlier_uploads_are_deleted(hub, model, upload):
    """Only those that an upload knows: the others are the owner's."""
    local = ScratchGPTForCausalLM.from_pretrained(model)
    earlier = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "metrics.json",
        "responses.jsonl",
        "hub.py",
    ]
    upload(model, "ann/book")
    for name in [*earlier, "LICENSE", "notes.txt"]:
        change(hub, name, name.encode())
    (model / "model.safetensors").unlink()
    local.save_pretrained(model, max_shard_size="40KB")
    printed = upload(model, "ann/book", "--overwrite")
    assert f"ann/book: deleting files of an earlier upload: {', '.join(sorted([*earlier, 'model.safetensors']))}\n" in printed
    names = set(hub.repositories["model", "ann/book"].files("main")[1])
    sharded = {name for name in names if name.startswith("model-0")} | {"model.safetensors.index.json"}
    assert names == UPLOADED - {"model.safetensors"} | {".gitattributes", "LICENSE", "notes.txt"} | sharded


def test_full_disk_while_downloading_the_base_model(hub, model, upload, book, mount, tmp_path, monkeypatch):
    upload(model, "ann/book")
    address = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {"HF_HUB_CACHE": str(mount("size=128k")), "HUGGINGFACE_CO_URL_TEMPLATE": address}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    argv = ["--base_model", "ann/book", "--dataset", book, "--context_length", "32", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="^--base_model ann/book cannot be used .*No space left on device.*$"):
        pretrain.main([*argv, "--validation_fraction", "0.1"])
    assert not (tmp_path / "out").exists()


def test_space(hub, model, upload, tmp_path, monkeypatch):
    """A static Space shows the version of the model that was uploaded with it, from the export in the model's repository."""
    directory = shutil.copytree(hub_upload.WEB, tmp_path / "page")
    page = {path.name for path in directory.iterdir()}
    for name in (".DS_Store", "page.js~"):  # of the Finder, and of editors
        (directory / name).touch()
    (directory / ".idea").mkdir()
    monkeypatch.setattr(hub_upload, "WEB", directory)
    assert "Space of the same name: README.md, model.json, index.html, page.js" in upload(
        model, "ann/book", "--space", "--dry_run"
    )
    output = upload(model, "ann/book", "--space")
    assert "The page was started." in output
    assert f"{hub.address}/spaces/ann/book" in output
    repository, space = hub.repositories["model", "ann/book"], hub.repositories["space", "ann/book"]
    assert space.files("main")[1].keys() - {".gitattributes"} == {"README.md", "model.json", *page}
    settings = json.loads(hub.content("ann/book", "model.json", kind="space"))
    first = repository.branches["main"]
    assert settings == {"model": "ann/book", "revision": first, "path": "web"}
    data = ModelCard(hub.content("ann/book", "README.md", kind="space").decode()).data.to_dict()
    assert (data["sdk"], data["models"]) == ("static", ["ann/book"])
    assert hub.content("ann/book", "web/onnx/model.onnx") == b"graph"
    exported = {name for name in repository.files("main")[1] if name.startswith("web/")}
    assert exported == {"web/README.md", "web/config.json", "web/onnx/model.onnx"}

    card = ModelCard(hub.content("ann/book", "README.md").decode())
    assert card.data.tags == ["scratchgpt", "transformers.js"]
    assert re.search(r"^\s*# .+\n\n\[Try it in your browser\.\]\(https://huggingface.co/spaces/ann/book\)\n", card.text)
    usage = 'env.remotePathTemplate = "{model}/resolve/{revision}/web/";\n\npipeline("ann/book");\n```\n\n### Size\n\n- 8 bits'
    assert usage in card.text

    assert "deleting files of an earlier upload: web/README.md, web/config.json, web/onnx/model.onnx" in upload(
        model, "ann/book"
    )
    assert "transformers.js" not in hub.content("ann/book", "README.md").decode()
    assert json.loads(hub.content("ann/book", "model.json", kind="space"))["revision"] == first  # and there it stays


def test_a_card_that_was_edited_gets_the_page(hub, model, upload):
    upload(model, "ann/book")
    card = hub.content("ann/book", "README.md").decode().replace("- scratchgpt", "- stories")
    change(hub, "README.md", (card + "\nMy words.\n").encode())
    for _ in range(2):
        upload(model, "ann/book", "--space")
        card = ModelCard(hub.content("ann/book", "README.md").decode())
        assert card.data.tags == ["stories", "transformers.js"]
        text, _, page = card.text.partition("<!-- about the page: -->\n\n## In a browser\n")
        assert text.endswith("\nMy words.\n\n")
        assert "(https://huggingface.co/spaces/ann/book)" in page
        assert page.count("env.remotePathTemplate = ") == 1


def test_an_edited_card_without_tags_gets_none():
    edited = b"---\nlicense: mit\ntags:\n---\n\nMy words.\n"
    merged = ModelCard(checks.merge_card(b"---\nlicense: mit\n---\n\n# book\n", edited, "").decode())
    assert (merged.data.tags, merged.text) == (None, "\nMy words.\n")


def test_the_page_in_an_edited_card_is_that_of_the_upload(hub, model, upload, tmp_path):
    """Its size in 8 bits, too; an upload without the page deletes it."""
    upload(model, "ann/book", "--space")
    card = hub.content("ann/book", "README.md").replace(b"## Samples", b"## In a browser\n\nMine.\n\n## Samples")
    change(hub, "README.md", (card + b"\nMy words.\n").replace(b"\n", b"\r\n"))
    edit_card(tmp_path / "export", "7.0 MB", "6.0 MB")
    upload(model, "ann/book", "--space")
    card = hub.content("ann/book", "README.md").decode()
    assert ("7.0 MB" in card, "6.0 MB" in card, "My words." in card, "Mine." in card) == (False, True, True, True)
    upload(model, "ann/book")
    card = ModelCard(hub.content("ann/book", "README.md").decode())
    assert card.data.tags == ["scratchgpt"]
    assert ("remotePathTemplate" in card.text, "My words." in card.text, "Mine." in card.text) == (False, True, True)


@pytest.mark.parametrize("access", ["private", "gated"])
def test_a_model_that_not_everyone_can_read_gets_no_page(hub, model, upload, access):
    upload(model, "ann/own", *(["--private"] if access == "private" else []))
    repository = hub.repositories["model", "ann/own"]
    repository.gated = "manual" if access == "gated" else False
    before = repository.branches["main"]
    with pytest.raises(UserError, match=f"the model ann/own is {access}: make it public in its settings, or drop --space"):
        upload(model, "ann/own", "--space")
    assert repository.branches["main"] == before


BRANCHES = ("", "..", "a..b", "../x", "refs/pr/1", "a" * 40, "v1\n", "x?y", "-x", "é")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["/nowhere", "ann/book"], "/nowhere is not a directory"),
        (["~nosuchuser/x", "ann/book"], "~nosuchuser/x is not a directory"),
        (["MODEL", "book"], "USER/NAME 'book' is not a Hub id .the user is missing.: pass USER/NAME"),
        *((["MODEL", name], f"USER/NAME '{name}' is not a Hub id") for name in ("", "ann/bo ok", "a/b/c")),
        *((["MODEL", "ann/book", f"--revision={name}"], "is not a branch name") for name in BRANCHES),
        (["MODEL", "ann/book", "--base_model", "base"], "--base_model 'base' is not a Hub id"),
        (["MODEL", "ann/book", "--adapter"], "--adapter needs the base model on the Hub"),
        (["MODEL", "ann/book", "--adapter", "--base_model", "ann/base"], "has no adapter_config.json"),
        (["MODEL", "ann/book", "--space", "--private"], "--space needs a public model"),
        (["MODEL", "ann/book", "--adapter", "--space", "--base_model", "ann/base"], "--space needs a whole model"),
    ],
)
def test_invalid_arguments(hub, model, upload, argv, message):
    with pytest.raises(UserError, match=message):
        upload(*(model if word == "MODEL" else word for word in argv))
    assert not hub.requests


def test_adapter_and_base_model(hub, model, upload, book, tmp_path, monkeypatch):
    """Both are loaded from the Hub by the snippet on the adapter's card."""
    argv = ["--base_model", str(model), "--dataset", book, "--output_dir", str(tmp_path / "lora"), "--report_to", "none"]
    argv += ["--lora_r", "2", "--max_steps", "2", "--context_length", "32", "--license", "mit", "--validation_fraction", "0.1"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *argv])
    pretrain.main()
    upload(model, "ann/base")
    with pytest.raises(UserError, match="base_model 'book' is not a Hub id .*: upload the base model and pass --base_model"):
        upload(tmp_path / "lora", "ann/whole")
    upload(tmp_path / "lora", "ann/whole", "--base_model", "ann/base")
    assert ModelCard(hub.content("ann/whole", "README.md").decode()).data.base_model == "ann/base"
    with pytest.raises(UserError, match="--base_model ann/missing is not on the Hub"):
        upload(tmp_path / "lora", "ann/lora", "--adapter", "--base_model", "ann/missing")
    output = upload(tmp_path / "lora", "ann/lora", "--adapter", "--base_model", "ann/base", "--license", "apache-2.0")
    assert "Not uploaded: nothing" in output
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    names = hub.repositories["model", "ann/lora"].files("main")[1].keys() - {".gitattributes"}
    assert names == expected | {"tokenization_scratchgpt.py"}
    assert json.loads(hub.content("ann/lora", "adapter_config.json"))["base_model_name_or_path"] == "ann/base"
    card = ModelCard(hub.content("ann/lora", "README.md").decode())
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("peft", "ann/base", "apache-2.0")
    (pinned,) = re.findall(r"^    (peft\..*)  # model: ann/base$", output, re.M)
    code = f"""{WITHOUT_THE_PACKAGE}
{snippet_of(card.text)}
print(model.active_adapters)
import peft
from transformers import AutoTokenizer
model = model.unload()
print({pinned}.active_adapters, AutoTokenizer.from_pretrained("ann/lora", trust_remote_code=True)("It was")["input_ids"])
"""
    process = run_python("-c", code, env=hub_environment(hub, tmp_path), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("default") == 2
