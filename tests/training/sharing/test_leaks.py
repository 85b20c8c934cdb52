"""Secrets and local paths are found in every kind of file and in every encoding."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from training.errors import UserError
from training.sharing import leaks

SECRETS = ["hf_" + "aB3" * 12, "sk-proj-" + "x9A" * 15, "sk-or-v1-" + "a9" * 32, "sk-" + "0f" * 16, "ghp_" + "k" * 36]
SECRETS += ["AKIA" + "Q" * 16, "AIza" + "d" * 35]
SECRETS += ["ASIA" + "Q" * 16, "glpat-" + "a1" * 10, "sk_live_" + "a1" * 12, "npm_" + "a" * 36, "GOCSPX-" + "a1" * 12]


def refusal(*files: tuple[str, Path | bytes]) -> str:
    """Check files that must be refused, and return the error message."""
    with pytest.raises(UserError) as error:
        leaks.check_leaks(dict(files))
    return str(error.value)


@given(
    secret=st.sampled_from(SECRETS), before=st.text("\n\t\r\f\b\"' =:_-.äß", max_size=3), after=st.text("\n\"' ,;ß", max_size=3)
)
def test_secrets_in_text_and_in_json(secret, before, after):
    text = before + secret + after
    for content in (text, json.dumps(text), json.dumps([text], ensure_ascii=False), "https://x.y/?token%3D" + secret):
        message = refusal(("metrics.json", content.encode()))
        assert message.startswith("metrics.json contains what looks like a token")
        assert secret not in message


@pytest.mark.parametrize(
    "text",
    [
        *("task-classification-of-long-names", "hf_hub_download", "a_hf_short", "skills-and-more", "-----BEGIN"),
        *("/sk-hynix-starts-mass-production-of-hbm3e", "sk-toggleable__label-arrow-2"),
    ],
)
def test_similar_words_are_not_secrets(text):
    leaks.check_leaks({"README.md": text.encode()})


@pytest.mark.parametrize("home", ["ann", "jörg", "a b", 'quo"te'])
def test_local_paths(home, tmp_path, monkeypatch):
    home = tmp_path / home
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir("/")
    for path in (str(home), f"{home}/data/x.txt", f"see {home}, or not"):
        for content in (path, json.dumps({"path": path}), json.dumps(path, ensure_ascii=False)):
            assert refusal(("config.json", content.encode())) == (
                "config.json contains a path of this machine, in line 1; nothing was uploaded: remove it."
            ), content
    assert "in line 3;" in refusal(("README.md", f"\n\n{home}".encode()))
    leaks.check_leaks({"config.json": f"{home}-other/x and {home}2".encode()})


def test_path_of_the_model_with_and_without_symlinks(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    real = tmp_path / "disk" / "outputs"
    (real / "book").mkdir(parents=True)
    (tmp_path / "here").symlink_to(tmp_path / "disk" / "outputs")
    config = tmp_path / "here" / "book" / "config.json"
    for place in (real, tmp_path / "here"):
        config.write_text(json.dumps({"corpus": f"{place}/corpus.txt"}))
        assert "a path of this machine" in refusal(("config.json", config))


@pytest.mark.parametrize("home", ["/home", "/app"])
def test_directories_of_the_root_are_local_only_with_something_below_them(monkeypatch, home):
    """Containers and notebooks work in /app or /content: such words are in addresses, and in the vocabularies of tokenizers."""
    monkeypatch.setenv("HOME", home)
    leaks.check_leaks({"tokenizer.json": f'{{"{home}": 3, "{home}/ ": 4}}'.encode()})
    leaks.check_leaks({"README.md": f"src{home}/models.py and https://example.com{home}/login".encode()})
    assert "a path of this machine" in refusal(("README.md", f"from {home}/data/x.txt".encode()))


def test_secrets_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_PASSWORD", 'geh"eim-ü-12345')
    for content in ('geh"eim-ü-12345'.encode(), json.dumps('geh"eim-ü-12345').encode()):
        assert "contains the value of $MY_PASSWORD, in line 1; nothing was uploaded: " in refusal(("README.md", content))
    monkeypatch.setenv("MY_PASSWORD", b"\xff\xfe12345678".decode(errors="surrogateescape"))  # not UTF-8
    leaks.check_leaks({"README.md": b"nothing"})
    assert "the value of $MY_PASSWORD" in refusal(("README.md", b"x \xff\xfe12345678"))


def test_metadata_of_weights(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", {"by": SECRETS[0]})
    assert refusal(("model.safetensors", tmp_path / "model.safetensors")).startswith("model.safetensors contains what looks")
