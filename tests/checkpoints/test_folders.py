"""Folders that are complete or absent, at every kind of destination, however the work ends."""

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from crepe_llm.checkpoints import folders
from crepe_llm.checkpoints.folders import check_space, new_folder
from crepe_llm.checkpoints.leftovers import MARKER

# Runs with a mount table of its own, so that nothing that it mounts is seen outside.
NAMESPACE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]


def can_mount(tmp_path):
    if shutil.which("unshare") is None:
        return False
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "none", str(tmp_path)]
    return subprocess.run(command, capture_output=True).returncode == 0


def write(folder, names=("config.json", "model.safetensors", "code/file.py")):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


WRITTEN = ["code", "code/file.py", "config.json", "model.safetensors"]


def test_new_folder_takes_an_empty_place(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("content")
        assert list((tmp_path / "empty").iterdir()) == []
    assert (tmp_path / "empty" / "file").read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("exists", [False, True])
def test_others_may_read_what_new_files_let_them_read(tmp_path, exists):
    if exists:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/tokenizer.json").write_text("")
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out") as folder:
            save_file({"a": torch.ones(4)}, folder / "model.safetensors")
            write(folder, ["code/file.py"])
            (folder / "run.sh").touch(0o700)
    finally:
        os.umask(before)
    modes = {name: (tmp_path / "out" / name).stat().st_mode & 0o777 for name in ("model.safetensors", "code", "run.sh")}
    assert modes == {"model.safetensors": 0o640, "code": 0o750, "run.sh": 0o740}
    assert exists or (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_links_are_followed(tmp_path):
    real = tmp_path / "real"
    (real / "empty").mkdir(parents=True)
    for name, target in [("to_empty", "real/empty"), ("to_missing", "real/missing"), ("deeper", "real/new/deep")]:
        (tmp_path / name).symlink_to(target)
        with new_folder(tmp_path / name) as folder:
            write(folder)
        assert (tmp_path / name).is_symlink() and contents(tmp_path / target) == WRITTEN
    (tmp_path / "chain").symlink_to("to_more")
    (tmp_path / "to_more").symlink_to(real / "more")
    with new_folder(tmp_path / "chain" / "") as folder:
        write(folder)
    assert contents(real / "more") == WRITTEN
    assert contents(real)[:1] == ["empty"] and not any(".partial" in name for name in contents(tmp_path))


@pytest.mark.parametrize("place", ["file", "to_file", "loop", "file/below", "to_file/below/deep"])
def test_a_destination_that_is_no_folder_is_refused_before_the_work(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "to_file").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(NotADirectoryError, match="name a folder to save to"), new_folder(tmp_path / place):
        pytest.fail("the work began")


def test_a_place_that_takes_no_folder_is_named(tmp_path):
    message = r"nothing can be written to /proc \(.*\); name a folder elsewhere"
    with pytest.raises(OSError, match=message), new_folder(Path("/proc/out")):
        pytest.fail("the work began")


MOUNTED = """
    import os, subprocess, sys
    from pathlib import Path
    from crepe_llm.checkpoints.folders import new_folder

    root = Path(sys.argv[1])
    kind = sys.argv[2]
    outer, out = root / "outer", root / "outer" / "out"
    out.mkdir(parents=True)
    (root / "source").mkdir()
    if kind == "bind":  # of the same file system, which os.path.ismount does not see
        subprocess.run(["mount", "--bind", root / "source", out], check=True)
        assert not os.path.ismount(out)
    else:
        subprocess.run(["mount", "-t", "tmpfs", "none", out], check=True)
        assert os.path.ismount(out)
    if kind == "read-only parent":
        subprocess.run(["mount", "--bind", outer, outer], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", out], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", outer], check=True)
    destination = out
    if kind == "link":
        destination = root / "link"
        destination.symlink_to(out)
    (out / "lost+found").mkdir()
    with new_folder(destination) as folder:
        (folder / "model.safetensors").write_text("weights")
        (folder / "config.json").write_text("{}")
        (folder / "code").mkdir()
        (folder / "code/file.py").write_text("")
        assert folder.parent == out and sorted(os.listdir(out)) == [folder.name, "lost+found"]
    assert sorted(os.listdir(out)) == ["code", "config.json", "lost+found", "model.safetensors"]
    try:
        with new_folder(destination, keep=True) as folder:
            (folder / "config.json").write_text("[]")
    except FileExistsError as error:
        assert str(out / "out-1") in str(error), error
    assert (out / "config.json").read_text() == "{}" and (out / "out-1/config.json").read_text() == "[]"
    with new_folder(destination, replace=True) as folder:
        (folder / "config.json").write_text("[1]")
    assert sorted(os.listdir(out)) == ["config.json", "lost+found"] and (out / "config.json").read_text() == "[1]"
    try:
        with new_folder(out / "out-2") as folder:
            raise RuntimeError
    except RuntimeError:
        pass
    assert not any(".partial" in name for name in [*os.listdir(out), *os.listdir(outer)])
"""


@pytest.mark.parametrize("kind", ["tmpfs", "bind", "read-only parent", "link"])
def test_a_mount_point_is_filled(tmp_path, kind):
    if not can_mount(tmp_path):
        pytest.skip("mounting is not allowed here")
    command = [*NAMESPACE, sys.executable, "-c", textwrap.dedent(MOUNTED), tmp_path, kind]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


FULL = """
    import os, subprocess, sys
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from crepe_llm.checkpoints.folders import new_folder

    disk, how = Path(sys.argv[1]), sys.argv[2]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
    try:
        with new_folder(disk / "out", size=2 << 20 if how == "known" else 0) as folder:
            assert how != "known", "the work began"
            if how == "safetensors":
                save_file({"a": torch.ones(1 << 20)}, folder / "model.safetensors")
            else:
                (folder / "text").write_bytes(bytes(2 << 20))
    except OSError as error:
        print(error)
    assert os.listdir(disk) == [], os.listdir(disk)
"""


@pytest.mark.parametrize("how", ["safetensors", "text", "known"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, how):
    if not can_mount(tmp_path):
        pytest.skip("mounting is not allowed here")
    command = [*NAMESPACE, sys.executable, "-c", textwrap.dedent(FULL), tmp_path, how]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert str(tmp_path) in line
    assert "0.0021 GB are to be written" in line if how == "known" else "is full" in line


def test_room_is_asked_of_the_first_folder_that_exists(tmp_path):
    check_space(tmp_path / "a/b/c", 1)
    with pytest.raises(OSError, match="GB free; make room") as error:
        check_space(tmp_path / "a/b/c", 1 << 60)
    assert error.value.errno == errno.ENOSPC


def test_finished_work_is_kept_where_its_name_is_taken_meanwhile(tmp_path):
    taken = pytest.raises(FileExistsError, match=r"out cannot be written \(it already has config\.json\).*out-1$")
    with taken, new_folder(tmp_path / "out") as folder:
        write(folder)
        (tmp_path / "out").mkdir()
        write(tmp_path / "out", ["config.json"])
    assert contents(tmp_path / "out") == ["config.json"] and contents(tmp_path / "out-1") == WRITTEN
    with pytest.raises(OSError, match=r"the finished folder is .*file-1$"), new_folder(tmp_path / "file") as folder:
        write(folder)
        (tmp_path / "file").write_text("")
    assert contents(tmp_path / "file-1") == WRITTEN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file-1", "out", "out-1"]


def test_a_folder_is_replaced_when_the_new_one_is_complete(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(out)
    with pytest.raises(RuntimeError), new_folder(out, replace=True) as folder:
        write(folder, ["config.json"])
        raise RuntimeError
    assert contents(out) == WRITTEN
    with new_folder(out, replace=True) as folder:
        write(folder, ["config.json", "notes.txt"])
        assert contents(out) == WRITTEN
    assert contents(out) == ["config.json", "notes.txt"] and list(tmp_path.iterdir()) == [out]


def test_what_cannot_be_replaced_is_left_as_it_was(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    write(out)
    rename = os.rename

    def fails(source, target):
        if ".partial-" in str(source) and target == out:
            raise PermissionError(errno.EPERM, "not this one")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    monkeypatch.setattr(folders, "_move_entries", fails)
    failing = pytest.raises(OSError, match=r"not this one\); the finished folder is .*out-1$")
    with failing, new_folder(out, replace=True) as folder:
        write(folder, ["notes.txt"])
    assert contents(out) == WRITTEN and contents(tmp_path / "out-1") == ["notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-1"]


WORK = """
    import os, signal, sys, time
    from pathlib import Path
    from crepe_llm.checkpoints.folders import new_folder

    with new_folder(Path(sys.argv[1])) as folder:
        (folder / "model.safetensors").write_bytes(bytes(1000))
        if len(sys.argv) > 2:
            os.kill(os.getpid(), int(sys.argv[2]))
        print("working", flush=True)
        time.sleep(float(sys.argv[3]) if len(sys.argv) > 3 else 60)
"""


def work(*arguments, **options):
    command = [sys.executable, "-c", textwrap.dedent(WORK), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -signal.SIGINT)]
)
def test_signals_clean_up(tmp_path, number, status):
    heard = functools.partial(
        signal.signal, number, signal.SIG_DFL
    )  # nohup and &, which this may run under, are inherited
    process = work(tmp_path / "out", int(number), preexec_fn=heard)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_ignores_hangups_goes_on(tmp_path):
    ignore = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    process = work(tmp_path / "out", int(signal.SIGHUP), 0, preexec_fn=ignore)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    with new_folder(tmp_path / "out") as folder:
        assert signal.getsignal(signal.SIGTERM) is not before[0]
        write(folder)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == before


def test_what_a_killed_run_left_is_named_and_removed(tmp_path, caplog):
    processes = [work(tmp_path / name) for name in ("out", "another")]
    for process in processes:
        assert process.stdout.readline() == "working\n"
    for process in processes:
        process.kill()
        process.communicate()
    left = sorted(tmp_path.iterdir())
    assert [path.name.split("-")[0] for path in left] == [".another.partial", ".out.partial"]
    with new_folder(tmp_path / "out") as folder:
        write(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for path in left:
        assert f"{path} was removed" in caplog.text
    for process in processes:
        assert f"process {process.pid} on" in caplog.text
    assert caplog.text.count("has left it unfinished") == 2


def test_what_is_being_written_is_left_alone(tmp_path, caplog):
    process = work(tmp_path / "out")
    try:
        assert process.stdout.readline() == "working\n"
        (theirs,) = tmp_path.iterdir()
        with new_folder(tmp_path / "out") as folder:
            write(folder)
            with new_folder(tmp_path / "out" / "nested"):  # of this process itself
                pass
        assert contents(theirs) == [MARKER, "model.safetensors"]
        assert f"process {process.pid} on" in caplog.text and "writes it, or has left it there" in caplog.text
        # So it is where its process cannot be seen, but holds the lock; and where it is another machine's.
        mark = json.loads((theirs / MARKER).read_text())
        for change in ({"pid": 2**22 + 1}, {"started": "0"}, {"host": "elsewhere"}):
            (theirs / MARKER).write_text(json.dumps(mark | change))
            with new_folder(tmp_path / "new") as folder:
                pass
            assert theirs.is_dir()
    finally:
        process.kill()
        process.communicate()
    # The last mark names another machine; without one nobody knows.
    for content in (
        None,
        "",
        "[]",
        "{}",
        '{"host": 1}',
        json.dumps(mark | {"pid": "1"}),
        json.dumps(mark | {"pid": 0}),
    ):
        (theirs / MARKER).unlink() if content is None else (theirs / MARKER).write_text(content)
        caplog.clear()
        with new_folder(tmp_path / "out2"):
            pass
        assert theirs.is_dir() and not caplog.text
        with pytest.raises(FileExistsError), new_folder(tmp_path / "out"):
            pass
        assert theirs.is_dir() and "does not say who writes it" in caplog.text
    (theirs / MARKER).write_text(json.dumps(mark))
    with new_folder(tmp_path / "new"):
        pass
    assert not theirs.exists()


def test_names_of_any_length_and_bytes(tmp_path):
    for name in ("a" * 255, "é" * 127, os.fsdecode(b"\xff\xfe")):
        with new_folder(tmp_path / name) as folder:
            write(folder)
        assert contents(tmp_path / name) == WRITTEN


def test_no_library_error_passes_for_a_full_disk(tmp_path):
    with pytest.raises(Exception, match="No such file"), new_folder(tmp_path / "out") as folder:
        save_file({"a": torch.ones(4)}, folder / "absent" / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
