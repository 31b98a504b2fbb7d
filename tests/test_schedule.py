import copy
import dataclasses
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_prune import Schedule, ScheduleError
from lightning_prune.errors import ArgumentError, FileFormatError, PruneError

PROVENANCE = {
    "device": "a CPU",
    "batch_size": 4,
    "precision": "32-true",
    "alpha": 0.5,
    "milliseconds": [1.25, 2.5e-05],
    "versions": {"torch": "2.15.0", "timm": "1.0"},
    "compiled": False,
    "note": None,
}


class TestConstruction:
    def test_any_iterable_of_whole_numbers(self) -> None:
        schedule = Schedule([0, 3, 2])
        assert schedule.removed == (0, 3, 2)
        assert schedule == Schedule(removed=(0, 3, 2)) == Schedule(iter([0, 3, 2]))
        assert (schedule.depth, schedule.total, schedule.reducing) == (3, 5, {1: 3, 2: 2})
        assert schedule.provenance == {}

    def test_whole_numbers_of_other_libraries(self) -> None:
        schedule = Schedule(np.array([0, 3, 2]))
        assert schedule == Schedule([0, 3, 2]) == Schedule([np.int64(0), np.uint8(3), 2])
        assert {type(entry) for entry in schedule.removed} == {int}
        assert Schedule.single(np.int64(4), np.int32(1), np.int64(5)) == Schedule([0, 5, 0, 0])
        assert schedule.tokens(np.int64(10)) == (10, 7, 5)

    def test_tome_form(self) -> None:
        assert Schedule(removed=[13] * 12).tokens(197)[-1] == 197 - 13 * 12

    @pytest.mark.parametrize(
        ("removed", "message"),
        [
            ([], r"`removed` must hold one number for each block, got an empty list\."),
            (7, r"`removed` must be a list with one number a block, got 7\."),
            (None, r"`removed` must be a list with one number a block, got None\."),
            ([0, -1], r"`removed` must hold whole numbers >= 0, got -1 for block 1\."),
            ([0, 1, 2.0], r"`removed` must hold whole numbers >= 0, got 2\.0 for block 2\."),
            ([np.bool_(True)], r"`removed` must hold whole numbers >= 0, got .*True.* for block 0\."),
            ([True], r"`removed` must hold whole numbers >= 0, got True for block 0\."),
            ("12", r"`removed` must hold whole numbers >= 0, got '1' for block 0\."),
            ([0, None], r"got None for block 1\."),
        ],
    )
    def test_bad_entries(self, removed: Any, message: str) -> None:
        with pytest.raises(ScheduleError, match=message):
            Schedule(removed)

    def test_the_error_is_also_the_built_in_one(self) -> None:
        assert issubclass(ScheduleError, ValueError)
        assert issubclass(ScheduleError, PruneError)


class TestSingle:
    def test_one_block(self) -> None:
        schedule = Schedule.single(depth=12, block=3, remove=56, provenance={"a": 1})
        assert schedule.removed == (0, 0, 0, 56) + (0,) * 8
        assert schedule.provenance == {"a": 1}

    @pytest.mark.parametrize("block", [0, 3])
    def test_first_and_last_block(self, block: int) -> None:
        assert Schedule.single(4, block, 2).reducing == {block: 2}

    @pytest.mark.parametrize(
        ("depth", "block", "remove", "message"),
        [
            (0, 0, 1, r"`depth` must be a whole number >= 1, got 0\."),
            (1.0, 0, 1, r"`depth` must be a whole number >= 1, got 1\.0\."),
            (True, 0, 1, r"`depth` must be a whole number >= 1, got True\."),
            (4, 4, 1, r"`block` must be a block index from 0 to 3, got 4\."),
            (4, -1, 1, r"`block` must be a block index from 0 to 3, got -1\."),
            (4, 0.25, 1, r"`block` must be a block index from 0 to 3, got 0\.25\."),
            (4, 1, -3, r"`removed` must hold whole numbers >= 0, got -3 for block 1\."),
            (4, 1, "3", r"`removed` must hold whole numbers >= 0, got '3' for block 1\."),
        ],
    )
    def test_bad_arguments(self, depth: Any, block: Any, remove: Any, message: str) -> None:
        with pytest.raises(ScheduleError, match=message):
            Schedule.single(depth, block, remove)


class TestValue:
    def test_frozen(self) -> None:
        schedule: Any = Schedule([1])
        with pytest.raises(dataclasses.FrozenInstanceError):
            schedule.removed = (2,)

    def test_provenance_is_a_copy(self) -> None:
        given = {"device": "here"}
        schedule = Schedule([1], given)
        given["device"] = "there"
        assert schedule.provenance == {"device": "here"}

    def test_provenance_plays_no_part_in_equality_and_hash(self) -> None:
        one, other = Schedule([1, 2], {"device": "here"}), Schedule([1, 2])
        assert one == other
        assert hash(one) == hash(other)
        assert len({one, other, Schedule([2, 1])}) == 2
        assert one != Schedule([2, 1])
        assert one != (1, 2)

    @pytest.mark.parametrize(
        ("schedule", "text"),
        [
            (Schedule.single(12, 3, 56), "Schedule(depth=12, removed={3: 56})"),
            (Schedule([0, 0]), "Schedule(depth=2, removed={})"),
            (Schedule([2, 2], {"device": "long"}), "Schedule(depth=2, removed={0: 2, 1: 2})"),
        ],
    )
    def test_repr(self, schedule: Schedule, text: str) -> None:
        assert repr(schedule) == text

    def test_copies_and_pickles(self) -> None:
        schedule = Schedule([1, 2], PROVENANCE)
        for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
            assert other == schedule
            assert other.provenance == PROVENANCE


class TestTokens:
    def test_they_leave_each_block(self) -> None:
        assert Schedule.single(12, 3, 56).tokens(197) == (197,) * 3 + (141,) * 9
        assert Schedule([5, 0, 4]).tokens(10) == (5, 5, 1)

    def test_nothing_removed(self) -> None:
        assert Schedule([0, 0]).tokens(1) == (1, 1)

    @pytest.mark.parametrize(
        ("removed", "message"),
        [
            ([0, 10], r"Block 1 is asked to remove 10 tokens, but only 10 enter it\."),
            ([4, 0, 7], r"Block 2 is asked to remove 7 tokens, but only 6 enter it\."),
        ],
    )
    def test_no_block_is_left_without_a_token(self, removed: list[int], message: str) -> None:
        with pytest.raises(ScheduleError, match=message):
            Schedule(removed).tokens(10)

    @pytest.mark.parametrize("n", [0, -3, 197.0, True])
    def test_a_token_at_least_has_to_enter(self, n: Any) -> None:
        with pytest.raises(ScheduleError, match=rf"`n` must be a whole number >= 1, got {n}\."):
            Schedule([0, 0]).tokens(n)


class TestFiles:
    @pytest.mark.parametrize("name", ["s.yaml", "s.yml", "s.json", "s"])
    @pytest.mark.parametrize("provenance", [None, PROVENANCE], ids=["bare", "provenance"])
    def test_round_trip(self, tmp_path: Path, name: str, provenance: dict[str, Any] | None) -> None:
        schedule = Schedule.single(12, 3, 56, provenance)
        path = schedule.save(tmp_path / name)
        assert path == tmp_path / name
        for loaded in (Schedule.load(path), Schedule.load(str(path))):
            assert loaded == schedule
            assert loaded.provenance == (provenance or {})

    def test_dict_round_trip(self) -> None:
        schedule = Schedule([0, 4], PROVENANCE)
        assert Schedule.from_dict(schedule.to_dict()).to_dict() == schedule.to_dict()

    def test_the_file_is_for_people_too(self, tmp_path: Path) -> None:
        text = Schedule([0, 4]).save(tmp_path / "s.yaml").read_text()
        assert text == "format: lightning_prune.schedule\nversion: 1\nremoved: [0, 4]\n"

    @pytest.mark.parametrize("name", ["s.yaml", "s.json"])
    def test_no_truncation_is_taken_for_another_schedule(self, tmp_path: Path, name: str) -> None:
        schedule = Schedule([0, 0, 56, 0, 12], PROVENANCE)
        content = schedule.save(tmp_path / name).read_bytes()
        cut = tmp_path / f"cut-{name}"
        ends = content.index(b"]") + 1
        for length in range(len(content)):
            cut.write_bytes(content[:length])
            if length < ends or (name == "s.json" and length < len(content) - 1):
                with pytest.raises(FileFormatError, match=cut.name):
                    Schedule.load(cut)
            else:  # what is lost of a YAML file that still parses is provenance
                with suppress(FileFormatError):
                    assert Schedule.load(cut) == schedule

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("format: lightning_prune.profile\nversion: 1\n", r"it has format 'lightning_prune\.profile'\."),
            ("removed: [1]\n", r"it has no format entry\."),
            (
                "format: lightning_prune.schedule\nversion: 2\nremoved: [1]\n",
                r"of version 2; this release reads version 1\.",
            ),
            (
                "format: lightning_prune.schedule\nversion: 1\n",
                r"not a usable schedule: `removed` must be a list .* None",
            ),
            ("format: lightning_prune.schedule\nversion: 1\nremoved: {0: 3}\n", r"must be a list .*, got \{0: 3\}\."),
            ("format: lightning_prune.schedule\nversion: 1\nremoved: []\n", r"got an empty list\."),
            ("format: lightning_prune.schedule\nversion: 1\nremoved: [1, -1]\n", r"got -1 for block 1\."),
            (
                "format: lightning_prune.schedule\nversion: 1\nremoved: [1]\nprovenance: here\n",
                r"`provenance` must be a mapping, got 'here'\.",
            ),
            ("\x89PNG\r\n", r"is damaged or not a lightning_prune\.schedule file"),
        ],
    )
    def test_not_a_schedule_names_the_file(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "given.yaml"
        path.write_text(text)
        with pytest.raises(FileFormatError, match=rf"given\.yaml .*{message}"):
            Schedule.load(path)

    def test_binary(self, tmp_path: Path) -> None:
        path = tmp_path / "given.yaml"
        path.write_bytes(pickle.dumps({"removed": [1]}))
        with pytest.raises(FileFormatError, match=r"given\.yaml is damaged or not a lightning_prune\.schedule file"):
            Schedule.load(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileFormatError, match=r"Cannot read .*none\.yaml: No such file"):
            Schedule.load(tmp_path / "none.yaml")

    @pytest.mark.parametrize("name", ["s.yaml", "s.json"])
    def test_provenance_that_a_file_cannot_hold(self, tmp_path: Path, name: str) -> None:
        path = Schedule([1, 2], PROVENANCE).save(tmp_path / name)
        before = path.read_bytes()
        message = rf"{name} can hold plain values only, got float32 for `provenance\.versions\.cuda`\."
        with pytest.raises(ArgumentError, match=message):
            Schedule([3], {**PROVENANCE, "versions": {"torch": "2.6", "cuda": np.float32(12.4)}}).save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_a_save_that_fails_leaves_the_old_file_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = Schedule([1, 2], PROVENANCE).save(tmp_path / "s.yaml")
        before = path.read_bytes()

        def full_disk(self: Path, text: str, **_: Any) -> int:
            with self.open("w") as file:
                file.write(text[:10])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(Path, "write_text", full_disk)
            with pytest.raises(OSError, match="No space left"):
                Schedule([3]).save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
