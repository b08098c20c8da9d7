"""The folder of a run while the run goes on."""

import shutil

import pytest

from tests.helpers.checkpoints import config_of
from train.run.errors import run_errors
from train.run.place import MovedError, Place, check_shared, remove_all


def move(folder):
    folder.rename(folder.with_name("new"))


def replace(folder):
    move(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (move, r"was moved: go on by --resume --out .*new"),
        (replace, r"was moved: go on by --resume --out .*new"),
        (shutil.rmtree, "was removed"),
    ],
)
def test_a_folder_that_is_gone_is_a_sentence(tmp_path, change, words):
    folder = tmp_path / "run"
    folder.mkdir()
    place = Place(folder)
    place.check()
    change(folder)
    with pytest.raises(MovedError, match=words):
        place.check()
    words = r"^error: .* is no longer this run's folder"
    with pytest.raises(SystemExit, match=words), run_errors():
        place.check()
    place.close()


def test_a_folder_that_was_emptied_is_a_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    place = Place(tmp_path)
    place.check()
    (tmp_path / "config.json").unlink()
    with pytest.raises(MovedError, match=r"config\.json was removed"):
        place.check()
    place.close()


def test_a_link_to_where_it_went_is_as_good(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    place = Place(folder)
    move(folder)
    folder.symlink_to(tmp_path / "new")
    place.check()
    place.close()


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path):
    check_shared(tmp_path, "8.mark")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="No such file"):
        check_shared(tmp_path / "nowhere", "8.mark")


def test_what_a_link_names_is_not_removed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("here")
    (tmp_path / "8.tmp").symlink_to(tmp_path / "kept")
    (tmp_path / "9.tmp").symlink_to("nowhere")
    (tmp_path / "10.tmp").write_text("a file")
    (tmp_path / "11.tmp" / "deep").mkdir(parents=True)
    remove_all(tmp_path.glob("*.tmp"))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "file").read_text() == "here"


@pytest.mark.parametrize("name", ["", " "])
def test_a_folder_without_a_name_is_refused(name, capsys):
    with pytest.raises(SystemExit):
        config_of(name)
    assert "an empty name is no folder" in " ".join(capsys.readouterr().err.split())
