import pytest

from modeling_scratchgpt.hub import is_hub_id


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai-community/gpt2", True),
        ("gpt2", True),
        ("someone/model.v1", True),
        ("a/b/c", False),
        ("./model", False),
        ("/model", False),
        ("~/model", False),
        ("data/*.txt", False),
        ("with space", False),
        ("größer/model", False),
        ("", False),
        ("directory", False),  # it exists
        ("directory/missing", False),  # a mistyped path is not looked up on the Hub
    ],
)
def test_names_on_the_hub_and_paths(name, expected, tmp_path, monkeypatch):
    (tmp_path / "directory").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name) == expected
