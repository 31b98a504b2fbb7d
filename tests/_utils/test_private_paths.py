"""No home folder and no user name in what is published."""

from pathlib import Path

import pytest

from lightning_prune._utils.private_paths import without_names
from lightning_prune._utils.readings import NotReadable


@pytest.fixture(autouse=True)
def _alice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("/home/alice"))
    monkeypatch.setattr("getpass.getuser", lambda: "alice")


@pytest.mark.parametrize(
    ("value", "cleaned"),
    [
        ("/home/alice/.cache", "~/.cache"),
        ("/home/alice", "~"),
        ("LD=/home/alice/a.so:/home/alice/b.so", "LD=~/a.so:~/b.so"),
        ("/home/alice2/x", "/home/alice2/x"),
        ("/scratch/alice/cache", "/scratch/<user>/cache"),
        ("alice in a sentence", "alice in a sentence"),
        ({"a": ["/home/alice/x", 3, None]}, {"a": ["~/x", 3, None]}),
        (NotReadable("no /home/alice/x"), NotReadable("no ~/x")),
        (True, True),
    ],
)
def test_names_are_taken_out(value: object, cleaned: object) -> None:
    assert without_names(value) == cleaned


def test_a_system_without_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise KeyError("no such user")

    monkeypatch.setattr("getpass.getuser", fail)
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("/"))
    assert without_names("/scratch/alice") == "/scratch/alice"
