"""What must not leave: whatever it stands in, and however it is written."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from training.errors import UserError
from training.sharing import leaks

SECRETS = ["hf_" + "aB3" * 12, "sk-proj-" + "x9" * 20, "ghp_" + "k" * 36, "AKIA" + "Q" * 16, "AIza" + "d" * 35]


def refused(*files: tuple[str, Path | bytes]) -> str:
    with pytest.raises(UserError) as error:
        leaks.check_leaks(dict(files))
    return str(error.value)


@given(
    secret=st.sampled_from(SECRETS), before=st.text("\n\t\r\f\b\"' =:_-.äß", max_size=3), after=st.text("\n\"' ,;ß", max_size=3)
)
def test_a_secret_is_seen_in_text_and_in_json(secret, before, after):
    text = before + secret + after
    for content in (text, json.dumps(text), json.dumps([text], ensure_ascii=False)):
        message = refused(("metrics.json", content.encode()))
        assert message.startswith("metrics.json holds what looks like a token")
        assert secret not in message


@pytest.mark.parametrize(
    "text", ["task-classification-of-long-names", "hf_hub_download", "a_hf_short", "skills-and-more", "-----BEGIN"]
)
def test_words_like_them_are_no_secrets(text):
    leaks.check_leaks({"README.md": text.encode()})


@pytest.mark.parametrize("home", ["ann", "jörg", "a b", 'quo"te'])
def test_paths_of_this_machine(home, tmp_path, monkeypatch):
    home = tmp_path / home
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir("/")
    for path in (str(home), f"{home}/data/x.txt", f"see {home}, or not"):
        for content in (path, json.dumps({"path": path}), json.dumps(path, ensure_ascii=False)):
            assert refused(("config.json", content.encode())) == (
                "config.json holds a path of this machine, so nothing was sent: take it out."
            ), content
    leaks.check_leaks({"config.json": f"{home}-other/x and {home}2".encode()})


def test_where_the_folder_lies_with_and_without_links(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    real = tmp_path / "disk" / "outputs"
    (real / "book").mkdir(parents=True)
    (tmp_path / "here").symlink_to(tmp_path / "disk" / "outputs")
    config = tmp_path / "here" / "book" / "config.json"
    for place in (real, tmp_path / "here"):
        config.write_text(json.dumps({"corpus": f"{place}/corpus.txt"}))
        assert "a path of this machine" in refused(("config.json", config))


def test_a_common_place_is_one_of_this_machine_only_with_what_is_in_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home")
    leaks.check_leaks({"tokenizer.json": b'{"/home": 3, "/home/ ": 4}'})
    assert "a path of this machine" in refused(("README.md", b"from /home/data/x.txt"))


def test_what_the_environment_keeps(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_PASSWORD", 'geh"eim-ü-12345')
    for content in ('geh"eim-ü-12345'.encode(), json.dumps('geh"eim-ü-12345').encode()):
        assert "looks like a token" in refused(("README.md", content))
    monkeypatch.setenv("MY_PASSWORD", b"\xff\xfe12345678".decode(errors="surrogateescape"))  # not UTF-8
    leaks.check_leaks({"README.md": b"nothing"})
    assert "looks like a token" in refused(("README.md", b"x \xff\xfe12345678"))


def test_weights_are_read_as_far_as_they_are_words(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", {"by": SECRETS[0]})
    assert refused(("model.safetensors", tmp_path / "model.safetensors")).startswith("model.safetensors holds what looks")
