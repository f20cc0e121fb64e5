from crepe_llm.checkpoints.folders import new_folder


def test_new_folder_takes_an_empty_place(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("content")
        assert list((tmp_path / "empty").iterdir()) == []
    assert (tmp_path / "empty" / "file").read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
