"""One progress of a whole: a bar on a terminal, lines elsewhere, and nothing of its parts but their names."""

import io
import re
import sys
import threading
import time

import pytest

from lightning_prune._utils import progress
from lightning_prune._utils.progress import WorkProgress, expect_seconds, note_progress, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", found)
    return found


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_elsewhere_than_on_a_terminal_there_is_a_line_at_most_every_10_seconds(clock, capsys):
    with progress_bar("Planning", 60.0) as on_step:
        for second in range(1, 41):
            clock.now = 100.0 + second
            on_step()
    assert lines(capsys) == [
        "Planning: 10 s of 1 min 00 s taken, about 50 s left",
        "Planning: 20 s of 1 min 00 s taken, about 40 s left",
        "Planning: 30 s of 1 min 00 s taken, about 30 s left",
        "Planning: 40 s of 1 min 00 s taken, about 20 s left",
    ]


def test_short_work_prints_nothing(clock, capsys):
    with progress_bar("Planning", 60.0) as on_step:
        clock.now += 9
        on_step()
    assert lines(capsys) == []


def test_parts_have_no_progress_of_their_own_and_are_named(clock, capsys):
    with progress_bar("Comparing", None):
        for number, what in enumerate(("Profiling latency", "Accuracy of tome")):
            with progress_bar(what, 1000.0) as on_step:
                clock.now += 20
                on_step()
                expect_seconds(90.0 - number)
        clock.now += 20
        expect_seconds(None)
    assert lines(capsys) == [
        "Comparing: profiling latency: 20 s taken",
        "Comparing: accuracy of tome: 40 s of 1 min 50 s taken, about 1 min 10 s left",
        "Comparing: 1 min 00 s taken",
    ]


def test_how_far_a_part_is_stands_behind_its_name_until_it_ends(clock, capsys):
    with progress_bar("Planning", 60.0):
        with progress_bar("Sensitivity of the blocks") as on_step:
            for block in (3, 6):
                clock.now += 11
                note_progress(f"tome, block {block} of 12")
                on_step()
        with progress_bar("Timing 2 candidates"), progress_bar("Comparing latency") as on_step:
            clock.now += 11
            on_step()
            note_progress("round 2 of 31")
        clock.now += 11
        note_progress("of the whole, which has no other part")
    note_progress("of nothing")
    assert lines(capsys) == [
        "Planning: sensitivity of the blocks, tome, block 3 of 12: 11 s of 1 min 00 s taken, about 49 s left",
        "Planning: sensitivity of the blocks, tome, block 6 of 12: 22 s of 1 min 00 s taken, about 38 s left",
        "Planning: timing 2 candidates: comparing latency: 33 s of 1 min 00 s taken, about 27 s left",
    ]


def test_a_part_that_repeats_the_whole_is_named_once(clock, capsys):
    with progress_bar("Comparing"), progress_bar("Planning auto"), progress_bar("Planning"):
        clock.now += 20
        with progress_bar("Accuracy of tome"):
            pass
    assert lines(capsys) == ["Comparing: planning auto: accuracy of tome: 20 s taken"]


def test_a_limit_that_has_passed_leaves_nothing(clock, capsys):
    with progress_bar("Planning", 10.0) as on_step:
        clock.now += 16
        on_step()
    assert lines(capsys) == ["Planning: 16 s of 10 s taken, about 0 s left"]


def test_what_follows_has_a_progress_of_its_own_also_after_an_error(clock, capsys):
    with pytest.raises(KeyError), progress_bar("Planning", 60.0), progress_bar("Accuracy"):
        raise KeyError
    with progress_bar("Timing", 60.0) as on_step:
        clock.now += 15
        on_step()
    assert lines(capsys) == ["Timing: 15 s of 1 min 00 s taken, about 45 s left"]
    expect_seconds(3.0)  # of nothing


def test_nothing_is_shown_where_that_is_not_wanted(clock, capsys, monkeypatch):
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar("Planning", 60.0, enabled=False), progress_bar("Accuracy", enabled=True) as on_step:
            clock.now += 30
            on_step()
        assert stream.getvalue() == ""


def test_on_a_terminal_it_is_one_bar_that_disappears(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    whole = WorkProgress("Comparing", 60.0)
    with whole.shown(), whole.doing("accuracy of tome"):
        clock.now += 20
        whole.step()
        whole._bar.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "Comparing: accuracy of tome" in text
    assert "20 s of 1 min 00 s taken, about 40 s left" in text
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[2K")  # the line is deleted
    assert whole._bar.tasks[0].percentage == pytest.approx(100 * 20 / 60)


def test_what_is_printed_meanwhile_stays_in_its_file(monkeypatch):
    terminal, file = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", file)
    with progress_bar("Comparing"):
        print("a line")
    assert file.getvalue() == "a line\n"
    assert "a line" not in terminal.getvalue()


def test_a_long_step_writes_lines_too(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    monkeypatch.setattr(progress, "SHORTEST_WAIT", 0.01)
    before = threading.active_count()
    with progress_bar("Exporting"):
        time.sleep(0.1)  # no step
    assert threading.active_count() == before
    found = lines(capsys)
    assert found
    assert set(found) == {"Exporting: 0 s taken"}
