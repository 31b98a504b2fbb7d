"""How commands end: signals, full disks, unexpected errors, warnings."""

import argparse
import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lightning_prune as lp
from helpers.fresh import run_fresh
from lightning_prune.__main__ import main
from lightning_prune.cli.endings import run_to_end
from lightning_prune.report import styles

TINY = [
    "--model.model=vit_digits_patch4_56",
    "--model.pretrained=false",
    '--model.model_kwargs={"depth": 4, "embed_dim": 32, "num_heads": 2}',
    "--data=DigitsData",
    "--data.init_args.batch_size=4",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.limit_val_batches=2",
    "--prune.time_limit=0.5",
    "--prune.calibration=8",
    "--prune.method=pomt",
    "--prune.objective=Utility",
]
# Commands one after the other in one process; each sends itself a signal at a call of a function: the name of the case,
# the command, the signal, and how many calls of timed runs or of validation steps come before.
PROGRAM = """
import contextlib, io, json, os, signal, sys
from lightning_prune.__main__ import main
from lightning_prune import ImageClassifier
from lightning_prune.profiling import InterleavedTimer

words, cases, found = json.loads(sys.argv[1]), json.loads(sys.argv[2]), {}

def sending(cls, name, number, calls):
    real, left = getattr(cls, name), [calls]
    def call(self, *args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)
    setattr(cls, name, call)
    return lambda: setattr(cls, name, real)

for name, (command, number, where, calls) in cases.items():
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    cls, function = {"timing": (InterleavedTimer, "once"), "step": (ImageClassifier, "validation_step")}[where]
    undo = sending(cls, function, number, calls)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        output = [] if command == "validate" else ["--output=" + sys.argv[3] + "/" + name]
        # On a busy machine planning may find that nothing is gained; a variant like dense is not validated again.
        given = ["--prune.schedule=20"] if name == "compare validating" else []
        named = ["--controls=false"] if command == "compare" else []  # the rows that are counted
        status = main([command, *words, *given, *named, *output])
    undo()
    restored = handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    found[name] = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "restored": restored}
print(json.dumps(found))
"""
CASES = {
    "validate planning": ("validate", signal.SIGTERM, "timing", 4),
    "validate last batch": ("validate", signal.SIGTERM, "step", 2),
    "validate ctrl-c": ("validate", signal.SIGINT, "timing", 4),
    "plan": ("plan", signal.SIGTERM, "timing", 4),
    "profile": ("profile", signal.SIGTERM, "timing", 4),
    "profile ctrl-c": ("profile", signal.SIGINT, "timing", 4),
    "compare planning": ("compare", signal.SIGTERM, "timing", 4),
    "compare ctrl-c": ("compare", signal.SIGINT, "step", 3),
    "compare validating": ("compare", signal.SIGTERM, "step", 4),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How each of the commands ended, and the names of what it had written."""
    folder = tmp_path_factory.mktemp("ended")
    run = run_fresh(PROGRAM, json.dumps(TINY), json.dumps(CASES), str(folder), lightning=True)
    assert run.returncode == 0, run.stderr
    found: dict[str, dict[str, Any]] = json.loads(run.stdout)
    for name, each in found.items():
        each["files"] = sorted(path.name for path in (folder / name).glob("*"))
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_signals_end_a_command_with_their_status(name: str, ended: dict[str, dict[str, Any]]) -> None:
    number = CASES[name][1]
    end = ended[name]
    assert end["status"] == 128 + number
    said = "stopped by SIGTERM before the end." if number == signal.SIGTERM else "stopped by Ctrl-C before the end."
    (line,) = (line for line in end["err"].splitlines() if line.startswith("stopped"))
    assert line.startswith(said)
    assert "same c" in line  # how to go on
    assert "Traceback" not in end["err"]
    assert not {"results.csv", "profile.json", "schedule.yaml"} & {*end["files"]}
    assert "Written" not in end["out"]
    assert "val/top1" not in end["out"]
    assert end["restored"]


@pytest.mark.long
def test_a_comparison_says_what_is_kept(ended: dict[str, dict[str, Any]]) -> None:
    assert "the plan and 0 of 2 validated variants. The same comparison goes on" in ended["compare ctrl-c"]["err"]
    assert "the plan and 1 of 2 validated variants." in ended["compare validating"]["err"]
    for name in ("compare ctrl-c", "compare validating"):
        assert ended[name]["files"] == ["state"]
    assert ended["compare planning"]["files"] == []  # nothing was planned that could be kept


def test_an_ignored_signal_stays_ignored() -> None:
    """As SIGINT is for jobs in the background, and SIGTERM where a user says so."""
    run = run_fresh(
        "import os, signal; from lightning_prune.cli.endings import run_to_end\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "raise SystemExit(run_to_end(lambda: os.kill(os.getpid(), signal.SIGINT) or 7))",
        lightning=True,
    )
    assert run.returncode == 7, run.stderr


def test_a_signal_counts_where_another_error_follows_from_it(capsys: pytest.CaptureFixture[str]) -> None:
    """As where a worker of a loader is ended by the same signal."""

    def work() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit as error:
            raise RuntimeError("a worker is gone") from error
        return 0

    assert run_to_end(work) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err


def fail(error: BaseException) -> Callable[..., Any]:
    def failing(*_: Any, **__: Any) -> Any:
        raise error

    return failing


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (lp.DataError("two\nlines"), 2, "error: two lines"),
        (lp.FileWriteError("Cannot write x: full."), 2, "error: Cannot write x: full."),
        (argparse.ArgumentError(None, "no such option"), 2, "error: no such option"),
        (FULL, 2, "error: No space left on device."),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), 2, "error: /a/b: Read-only file system."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_input_and_environment_are_one_line(
    error: Exception, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_to_end(fail(error)) == status
    assert capsys.readouterr().err.splitlines() == [line]


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyError("a"), OSError("image file is truncated")], ids=repr)
def test_unexpected_errors_are_raised_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_to_end(fail(error))
    assert caught.value is error


def test_the_status_of_the_work_is_returned() -> None:
    assert [run_to_end(lambda: 0), run_to_end(lambda: 3)] == [0, 3]
    with pytest.raises(SystemExit) as end:
        run_to_end(fail(SystemExit(0)))  # as after --print_config
    assert end.value.code == 0


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes writing to a file whose name ends in a word fail, as on a full disk."""
    real = Path.write_text

    def fill(ending: str) -> None:
        def write_text(self: Path, *args: Any, **kwargs: Any) -> int:
            if self.name.endswith(ending):
                raise FULL
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", write_text)
        if ending == ".png":
            monkeypatch.setattr(styles.Figure, "savefig", fail(FULL))

    return fill


@pytest.mark.parametrize(
    ("command", "ending", "name", "printed"),
    [
        ("profile", ".json", "profile.json", "latency ms"),
        ("profile", ".png", "profile.png", "latency ms"),
        ("plan", ".yaml", "schedule.yaml", "because"),
        ("plan", ".png", "plan.png", "because"),
        ("compare", ".png", "profile.png", "pomt utility"),
    ],
)
def test_a_full_disk_is_one_line_after_the_table(
    command: str,
    ending: str,
    name: str,
    printed: str,
    full: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full(ending)
    words = ["--prune.use_cache=false", f"--output={tmp_path}"]
    assert main([command, *TINY, *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == f"error: Cannot write {tmp_path / name}: No space left on device."
    assert "Traceback" not in captured.err
    assert printed in captured.out
    assert "Written" not in captured.out
    assert not list(tmp_path.glob(".*"))


def test_a_limit_of_file_sizes_is_one_line_after_the_table(tmp_path: Path) -> None:
    """By the operating system itself."""
    code = (
        "import resource, sys; from lightning_prune.__main__ import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    run = run_fresh(code, "profile", *TINY, "--prune.use_cache=false", f"--output={tmp_path}", lightning=True)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    written = [line for line in run.stderr.splitlines() if line.startswith(f"error: Cannot write {tmp_path}/profile.")]
    assert len(written) == 1
    assert "File too large" in written[0]


def test_warnings_are_printed_in_their_own_words() -> None:
    run = run_fresh(
        "import warnings; from lightning_prune.cli.endings import run_to_end\n"
        "before = warnings.formatwarning\n"
        "def work():\n"
        "    warnings.warn('The schedule was made\\nelsewhere.')\n"
        "    warnings.warn('old', FutureWarning)\n"
        "    warnings.warn('This DataLoader will create 4 worker processes in total. Our suggested max is 2')\n"
        "    return 0\n"
        "assert run_to_end(work) == 0\n"
        "assert warnings.formatwarning is before\n"
        "warnings.warn('after', FutureWarning)",
        lightning=True,
    )
    assert run.returncode == 0, run.stderr
    said, workers, *after = run.stderr.splitlines()
    assert said == "warning: The schedule was made elsewhere."
    assert workers.startswith("warning: This DataLoader will create 4 worker processes")
    assert "FutureWarning: after" in after[0]
