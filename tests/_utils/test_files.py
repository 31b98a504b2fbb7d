import errno
import os
import stat
from pathlib import Path

import pytest

from lightning_prune._utils.documents import read_document, write_document
from lightning_prune._utils.files import atomic_write, ensure_output_dir, output_folder, staging_folder, user_path
from lightning_prune.errors import ArgumentError, FileFormatError, FileWriteError

KIND = "lightning_prune.note"
NOTE = {
    "format": KIND,
    "version": 3,
    "text": "Größe 5 µs",
    "numbers": [1, 2.5e-05, -0.0],
    "deep": {"on": True, "x": None},
}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("name", ["note.yaml", "note.yml", "note", "note.json"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert write_document(path, NOTE) == path
    assert read_document(path, KIND, 3) == NOTE
    assert read_document(str(path), KIND, 3) == NOTE


def test_entries_keep_their_order(tmp_path: Path) -> None:
    for name in ("note.yaml", "note.json"):
        assert list(read_document(write_document(tmp_path / name, NOTE), KIND, 3)) == list(NOTE)


def test_folders_are_created(tmp_path: Path) -> None:
    path = write_document(tmp_path / "a" / "b" / "note.yaml", NOTE)
    assert [entry.name for entry in path.parent.iterdir()] == ["note.yaml"]


def test_atomic_write_replaces_the_file_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "plot.png"
    target.write_text("old")
    with atomic_write(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "note.yaml"
    target.write_text("old")
    with pytest.raises(error), atomic_write(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "note.yaml"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_system_names_the_file_and_the_reason(tmp_path: Path) -> None:
    target = tmp_path / "note.yaml"
    target.write_text("old")
    with (
        pytest.raises(FileWriteError, match=rf"Cannot write {target}: No space left on device\.$"),
        atomic_write(target),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(FileWriteError, match="3 requested and 0 written"), atomic_write(target):
        raise OSError("3 requested and 0 written")  # as NumPy says it
    with pytest.raises(FileWriteError, match=rf"{target / 'below'}"), atomic_write(target / "below"):
        pass


def test_a_staging_folder_names_files_where_they_will_be(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "new") as stage:
        written = write_document(stage / "note.json", NOTE).replace(tmp_path / "new" / "note.json")
        assert stage.parent == tmp_path / "new"
    assert [*(tmp_path / "new").iterdir()] == [written]
    name = tmp_path / "new" / "plot.png"
    with (
        pytest.raises(FileWriteError, match=f"Cannot write {name}: full"),
        staging_folder(tmp_path / "new") as stage,
        atomic_write(stage / "plot.png"),
    ):
        raise OSError("full")
    assert [*(tmp_path / "new").iterdir()] == [written]


@pytest.mark.parametrize("name", ["note.yaml", "note.json"])
def test_an_invalid_entry_keeps_the_old_file(tmp_path: Path, name: str) -> None:
    path = write_document(tmp_path / name, NOTE)
    before = path.read_bytes()
    for entry, culprit in [(1j, "complex for `thing`"), ({"on": True, "at": [0, 1j]}, "complex for `thing.at.1`")]:
        with pytest.raises(ArgumentError, match=rf"{name} can hold plain values only, got {culprit}\.$"):
            write_document(path, {**NOTE, "thing": entry})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_an_ordinary_new_file(tmp_path: Path, umask: int, expected: int) -> None:
    before = os.umask(umask)
    try:
        path = write_document(tmp_path / "note.yaml", NOTE)
        assert os.umask(umask) == umask, "the process's umask was left as it was"
    finally:
        os.umask(before)
    assert mode(path) == expected


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"Cannot read .*none\.yaml: No such file or directory\."):
        read_document(tmp_path / "none.yaml", KIND, 3)


def test_a_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"Cannot read .*: Is a directory\."):
        read_document(tmp_path, KIND, 3)


@pytest.mark.parametrize("name", ["note.yaml", "note.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x95\x00\xff",
        b"\x00\x01\x02\x03",
        bytes(range(256)),
        b"[1, 2",
        b'{"format": "lightning_prune.note", "version"',
        b"format: [unclosed",
        b"a: b: c",
        b"[" * 20_000,
        b"a: !!int ''",
        b"a: !!bool maybe",
        b"a: !!timestamp soon",
    ],
    ids=["latin", "control", "bytes", "list", "json", "flow", "colons", "deep", "int-tag", "bool-tag", "time-tag"],
)
def test_a_damaged_file_is_rejected(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=rf"{name} is damaged or not a {KIND} file: ") as caught:
        read_document(path, KIND, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "42", "text", "[1, 2]", "null", "{}", '{"version": 3}'])
@pytest.mark.parametrize("name", ["note.yaml", "note.json"])
def test_a_file_without_a_format_is_rejected(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(FileFormatError, match=rf"{name} is (not a {KIND} file: it has no format entry\.|damaged)"):
        read_document(path, KIND, 3)


def test_another_format_is_rejected(tmp_path: Path) -> None:
    path = write_document(tmp_path / "note.yaml", {"format": "other.thing", "version": 3})
    with pytest.raises(FileFormatError, match=r"note\.yaml is not a .*note file: it has format 'other\.thing'\."):
        read_document(path, KIND, 3)


@pytest.mark.parametrize("version", [4, 2, "3", None])
def test_another_version_is_rejected(tmp_path: Path, version: object) -> None:
    path = write_document(tmp_path / "note.yaml", {"format": KIND, "version": version})
    with pytest.raises(FileFormatError, match=rf"of version {version!r}; this release reads version 3\."):
        read_document(path, KIND, 3)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [{there}]", "!!python/name:os.mkdir", "!!python/object:pathlib.Path {{}}"]
)
def test_python_objects_are_rejected_and_not_executed(tmp_path: Path, tag: str) -> None:
    path, there = tmp_path / "note.yaml", tmp_path / "there"
    path.write_text(f"format: {KIND}\nversion: 3\nthing: {tag.format(there=there)}\n")
    with pytest.raises(FileFormatError, match="could not determine a constructor for the tag"):
        read_document(path, KIND, 3)
    assert not there.exists()


def test_an_output_folder_is_created_and_checked(tmp_path: Path) -> None:
    assert ensure_output_dir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("old")
    with pytest.raises(ArgumentError, match=r"^`output` must be a writable folder, got .*file"):
        ensure_output_dir(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"


def test_a_leading_tilde_is_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not expand it after an equals sign, and nobody does in a configuration file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert user_path("~/a/b") == tmp_path / "a" / "b"
    assert write_document("~/a/file.yaml", {"format": "f", "version": 1}) == tmp_path / "a" / "file.yaml"
    assert read_document("~/a/file.yaml", "f", 1) == read_document(tmp_path / "a" / "file.yaml", "f", 1)
    with output_folder("~/results") as folder, staging_folder("~/results") as stage:
        assert folder == stage.parent == tmp_path / "results"
    assert not Path("~").exists()


def test_without_a_home_a_path_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_path("~nobody-of-this-name/results") == Path("~nobody-of-this-name/results")


def test_an_error_leaves_no_empty_output_folder(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()

    def fail(name: str, left: list[str]) -> None:
        with output_folder(tmp_path / name) as folder:
            assert folder.is_dir()
            for file in left:
                (tmp_path / file).write_text("")
            raise KeyError

    for name, left in (("there", []), ("there/a/b", []), ("full/a", ["full/a/x"])):
        with pytest.raises(KeyError):
            fail(name, left)
        assert (tmp_path / name).exists() is (name != "there/a/b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "there"]
    assert list((tmp_path / "there").iterdir()) == []


def test_results_of_another_kind_are_refused_and_no_folder_is_made(tmp_path: Path) -> None:
    foreign = {"plan.json": "a plan"}
    with output_folder(tmp_path / "new", foreign) as folder:
        (folder / "plan.json").write_text("{}")
    message = r"`output` must be a folder without a plan, got .*which holds plan\.json"
    with pytest.raises(ArgumentError, match=message), output_folder(folder, foreign):
        raise AssertionError
    assert (folder / "plan.json").read_text() == "{}"
