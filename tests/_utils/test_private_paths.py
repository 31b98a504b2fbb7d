"""No home folder, and no name of a user or of the machine, in what is published."""

from pathlib import Path

import pytest

from lightning_prune._utils.private_paths import without_names
from lightning_prune._utils.readings import NotReadable


@pytest.fixture(autouse=True)
def _alice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("/home/alice"))
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    monkeypatch.setattr("platform.node", lambda: "box17.lab.example")
    monkeypatch.delenv("USERPROFILE", raising=False)


@pytest.mark.parametrize(
    ("value", "cleaned"),
    [
        ("/home/alice/.cache", "~/.cache"),
        ("/home/alice", "~"),
        ("LD=/home/alice/a.so:/home/alice/b.so", "LD=~/a.so:~/b.so"),
        ("no /home/alice.", "no ~."),
        ("-L/home/alice/lib", "-L/home/<user>/lib"),
        ("/home/alice2/x", "/home/<user>/x"),
        ("/home/alice.smith/x", "/home/<user>/x"),
        ("/home/bob/x", "/home/<user>/x"),
        ("no /home/bob and no /Users/carol, or so", "no /home/<user> and no /Users/<user>, or so"),
        ("/mnt/home/alice/x", "/mnt/home/<user>/x"),
        ("/scratch/alice/cache", "/scratch/<user>/cache"),
        ("/scratch/alice_models/lib.so", "/scratch/<user>_models/lib.so"),
        ("/scratch/alice-libs/x.so", "/scratch/<user>-libs/x.so"),
        ("/tmp/cache_alice/x", "/tmp/cache_<user>/x"),
        ("/scratch/malice/alice2/x", "/scratch/malice/alice2/x"),
        ("/scratch/Alice/x", "/scratch/Alice/x"),
        (r"D:\scratch\Alice\x", r"D:\scratch\<user>\x"),
        ("D:/scratch/ALICE/x", "D:/scratch/<user>/x"),
        (r"c:\users\Bob Smith\x", r"c:\users\<user>\x"),
        (r"'C:\\Users\\bob'", r"'C:\\Users\\<user>'"),
        ("box17: no route to box17.lab.example", "<host>: no route to <host>"),
        ("/scratch/box17_tmp, box171", "/scratch/<host>_tmp, box171"),
        ("alice in a sentence", "alice in a sentence"),
        ({"a": ["/home/alice/x", 3, None]}, {"a": ["~/x", 3, None]}),
        (NotReadable("no /home/alice/x"), NotReadable("no ~/x")),
        (True, True),
    ],
)
def test_names_are_taken_out(value: object, cleaned: object) -> None:
    assert without_names(value) == cleaned


def test_a_home_is_the_start_of_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/data")
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("/data"))
    assert without_names("/mnt/data/x:/data/x /data-old/x") == "/mnt/data/x:~/x /data-old/x"


def test_a_home_on_windows_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USERPROFILE", r"C:\Users\Alice B")
    assert without_names(r"no c:\users\alice b\x") == r"no ~\x"
    assert without_names("no C:/Users/ALICE B/x") == "no ~/x"


def test_a_system_without_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise KeyError("no such user")

    monkeypatch.setattr("getpass.getuser", fail)
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("/"))
    assert without_names("/scratch/alice") == "/scratch/alice"
