import os

import pytest

from training.arguments import UserError
from training.checkpoints import check_output_folder, written_whole


def test_new_and_empty_folders_are_fine(tmp_path):
    check_output_folder(tmp_path / "new" / "deep")
    (tmp_path / "empty").mkdir()
    check_output_folder(tmp_path / "empty")


@pytest.mark.parametrize(
    ("file", "what"),
    [("config.json", "a finished model"), ("metrics.jsonl", "a run that did not finish"), ("notes.txt", "files")],
)
def test_a_folder_in_use_says_what_is_there_and_what_to_pass(tmp_path, file, what):
    (tmp_path / file).write_text("kept")
    with pytest.raises(UserError, match=f"already holds {what}: pass another --output_dir"):
        check_output_folder(tmp_path)
    assert (tmp_path / file).read_text() == "kept"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written .*: give the name of a new folder"):
        check_output_folder(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        check_output_folder(tmp_path / "new")


def test_all_files_appear_or_none(tmp_path):
    folder = tmp_path / "model"
    with written_whole(folder) as temporary:
        (temporary / "config.json").write_text("{}")
        (temporary / "weights").write_text("1")
        assert [path for path in folder.iterdir() if path != temporary] == []
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "weights"]

    def fail():
        with written_whole(tmp_path / "other") as temporary:
            (temporary / "config.json").write_text("{}")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list((tmp_path / "other").iterdir()) == []
