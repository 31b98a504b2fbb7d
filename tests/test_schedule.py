import copy
import dataclasses
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_prune import KeepRates, Schedule, ScheduleError
from lightning_prune.errors import ArgumentError, FileFormatError, PruneError
from lightning_prune.schedule import MeasurementSource, MethodSpec, PlannedSchedule, read_schedule

MADE_ON = MeasurementSource(
    device="a CPU",
    batch_size=4,
    precision="32-true",
    image_shape=(3, 224, 224),
    runtime="torch",
    dense_tokens=197,
    objective="utility, alpha 0.5",
    details={"milliseconds": [1.25, 2.5e-05], "versions": {"torch": "2.15.0", "timm": "1.0"}, "compiled": False},
)
METHODS: list[Any] = [
    None,
    "tome",
    MethodSpec("random", {"seed": 3}),
    ["topk", None, "tome:schedule=decreasing"],
]


class TestConstruction:
    def test_any_iterable_of_integers(self) -> None:
        schedule = Schedule([0, 3, 2])
        assert schedule.removed == (0, 3, 2)
        assert schedule == Schedule(removed=(0, 3, 2)) == Schedule(iter([0, 3, 2]))
        assert (schedule.depth, schedule.total_removed, schedule.reducing) == (3, 5, {1: 3, 2: 2})
        assert (schedule.method, schedule.made_on, schedule.methods) == (None, None, {})

    def test_integers_of_other_libraries(self) -> None:
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
            ([], r"`removed` must hold one number per block, got an empty list\."),
            (7, r"`removed` must be a list with one number per block, got 7\."),
            (None, r"`removed` must be a list with one number per block, got None\."),
            ([0, -1], r"`removed` must hold integers >= 0, got -1 for block 1\."),
            ([0, 1, 2.0], r"`removed` must hold integers >= 0, got 2\.0 for block 2\."),
            ([np.bool_(True)], r"`removed` must hold integers >= 0, got .*True.* for block 0\."),
            ([True], r"`removed` must hold integers >= 0, got True for block 0\."),
            ("12", r"`removed` must hold integers >= 0, got '1' for block 0\."),
            ([0, None], r"got None for block 1\."),
        ],
    )
    def test_invalid_entries_are_rejected(self, removed: Any, message: str) -> None:
        with pytest.raises(ScheduleError, match=message):
            Schedule(removed)

    def test_the_error_is_a_value_error(self) -> None:
        assert issubclass(ScheduleError, ValueError)
        assert issubclass(ScheduleError, PruneError)


class TestSingle:
    def test_one_block(self) -> None:
        schedule = Schedule.single(depth=12, block=3, remove=56, method="tome", made_on=MADE_ON)
        assert schedule.removed == (0, 0, 0, 56) + (0,) * 8
        assert (schedule.method, schedule.made_on) == (MethodSpec("tome"), MADE_ON)

    @pytest.mark.parametrize("block", [0, 3])
    def test_first_and_last_block(self, block: int) -> None:
        assert Schedule.single(4, block, 2).reducing == {block: 2}

    @pytest.mark.parametrize(
        ("depth", "block", "remove", "message"),
        [
            (0, 0, 1, r"`depth` must be an integer >= 1, got 0\."),
            (1.0, 0, 1, r"`depth` must be an integer >= 1, got 1\.0\."),
            (True, 0, 1, r"`depth` must be an integer >= 1, got True\."),
            (4, 4, 1, r"`block` must be a block index from 0 to 3, got 4\."),
            (4, -1, 1, r"`block` must be a block index from 0 to 3, got -1\."),
            (4, 0.25, 1, r"`block` must be a block index from 0 to 3, got 0\.25\."),
            (4, 1, -3, r"`removed` must hold integers >= 0, got -3 for block 1\."),
            (4, 1, "3", r"`removed` must hold integers >= 0, got '3' for block 1\."),
        ],
    )
    def test_invalid_arguments_are_rejected(self, depth: Any, block: Any, remove: Any, message: str) -> None:
        with pytest.raises(ScheduleError, match=message):
            Schedule.single(depth, block, remove)


class TestValue:
    def test_frozen(self) -> None:
        schedule: Any = Schedule([1])
        with pytest.raises(dataclasses.FrozenInstanceError):
            schedule.removed = (2,)

    def test_made_on_is_ignored_by_equality_and_hash(self) -> None:
        one, other = Schedule([1, 2], made_on=MADE_ON), Schedule([1, 2])
        assert one == other
        assert hash(one) == hash(other)
        assert len({one, other, Schedule([2, 1])}) == 2
        assert one != Schedule([2, 1])
        assert one != (1, 2)

    def test_equality_depends_on_the_method(self) -> None:
        given = [Schedule([2, 0, 3], method) for method in METHODS]
        assert len({*given, *given}) == len(METHODS)
        assert Schedule([0, 2], "tome") != Schedule([0, 2], "pomt")
        assert Schedule([0, 2], "random:seed=1") != Schedule([0, 2], "random:seed=2")

    def test_made_on_must_be_a_measurement_source(self) -> None:
        given: Any = {"device": "here"}
        with pytest.raises(ScheduleError, match=r"`made_on` must be a MeasurementSource or None, got \{'device'"):
            Schedule([1], made_on=given)

    @pytest.mark.parametrize(
        ("schedule", "text"),
        [
            (Schedule.single(12, 3, 56), "Schedule(depth=12, removed={3: 56})"),
            (Schedule([0, 0]), "Schedule(depth=2, removed={})"),
            (Schedule([2, 2], made_on=MADE_ON), "Schedule(depth=2, removed={0: 2, 1: 2})"),
            (Schedule([0, 2], "random:seed=3"), "Schedule(depth=2, removed={1: 2}, method='random:seed=3')"),
            (
                Schedule([2, 2], ["topk", "tome"]),
                "Schedule(depth=2, removed={0: 2, 1: 2}, method={0: 'topk', 1: 'tome'})",
            ),
        ],
    )
    def test_repr(self, schedule: Schedule, text: str) -> None:
        assert repr(schedule) == text

    def test_copies_and_pickles(self) -> None:
        for method in METHODS:
            schedule = Schedule([1, 2, 3] if method is not METHODS[-1] else [1, 0, 3], method, MADE_ON)
            for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule)), dataclasses.replace(schedule)):
                assert other == schedule
                assert (other.method, other.made_on) == (schedule.method, MADE_ON)


class TestMethod:
    def test_one_for_all_blocks(self) -> None:
        spec = MethodSpec("random", {"seed": 3})
        for given in ("random:seed=3", spec, {"name": "random", "settings": {"seed": 3}}):
            schedule = Schedule([0, 2, 1], given)
            assert schedule.method == spec
            assert schedule.methods == {1: spec, 2: spec}
        assert schedule.with_method("tome") == Schedule([0, 2, 1], "tome")
        assert schedule.with_method(None) == Schedule([0, 2, 1])

    def test_one_for_each_block(self) -> None:
        schedule = Schedule([2, 0, 3], ["topk", "pomt", "tome"])
        assert schedule.method == (MethodSpec("topk"), None, MethodSpec("tome"))
        assert schedule.methods == {0: MethodSpec("topk"), 2: MethodSpec("tome")}
        assert schedule == Schedule([2, 0, 3], ["topk", None, "tome"]), "what a block names that removes nothing"

    def test_the_same_for_each_block_is_one(self) -> None:
        assert Schedule([2, 0, 3], ["tome", "pomt", "tome"]) == Schedule([2, 0, 3], "tome")
        assert Schedule([0, 0], ["tome", "pomt"]) == Schedule([0, 0])

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            (7, "`method` must be a name or `name:key=value,...`, got 7"),
            (["tome"], "`method` must have an entry for each of the 2 blocks, got 1"),
            (["tome", None], "`method` must name a method for block 1, which removes tokens, got None"),
            ({"settings": {}}, "`method` must be a name"),
            ("tome:seed", "`method` must be a name or `name:key=value,...`, got 'tome:seed'"),
            (":seed=1", "got ':seed=1'"),
            ("tome:a=1,a=2", "got 'tome:a=1,a=2'"),
            ("tome:a=[", "`method` must give 'a' a plain value, got '\\['"),
        ],
    )
    def test_invalid_methods_are_rejected(self, method: Any, message: str) -> None:
        for kind, entries in ((Schedule, [0, 2]), (KeepRates, [1, 0.5])):
            with pytest.raises(PruneError, match=message):
                kind(entries, method)

    def test_keep_rates_have_methods(self) -> None:
        rates = KeepRates([0.5, 1, 0.5], ["topk", None, "tome"], MADE_ON)
        assert rates.methods == {0: MethodSpec("topk"), 2: MethodSpec("tome")}
        schedule = rates.schedule(197)
        assert (schedule.methods, schedule.made_on) == (rates.methods, MADE_ON)
        assert KeepRates.of(schedule, 197).methods == rates.methods
        assert rates.with_method("tome") == KeepRates([0.5, 1, 0.5], "tome")


class TestTokens:
    def test_tokens_that_leave_each_block(self) -> None:
        assert Schedule.single(12, 3, 56).tokens(197) == (197,) * 3 + (141,) * 9
        assert Schedule([5, 0, 4]).tokens(10) == (5, 5, 1)

    def test_nothing_removed(self) -> None:
        assert Schedule([0, 0]).tokens(1) == (1, 1)

    @pytest.mark.parametrize(
        ("removed", "message"),
        [
            ([0, 10], r"`removed` must be < 10, .* block 1, got 10\."),
            ([4, 0, 7], r"`removed` must be < 6, .* block 2, got 7\."),
        ],
    )
    def test_removing_all_tokens_is_rejected(self, removed: list[int], message: str) -> None:
        with pytest.raises(ScheduleError, match=message):
            Schedule(removed).tokens(10)

    @pytest.mark.parametrize("n", [0, -3, 197.0, True])
    def test_no_tokens_are_rejected(self, n: Any) -> None:
        with pytest.raises(ScheduleError, match=rf"`n` must be an integer >= 1, got {n}\."):
            Schedule([0, 0]).tokens(n)


class TestFiles:
    @pytest.mark.parametrize("name", ["s.yaml", "s.yml", "s.json", "s"])
    @pytest.mark.parametrize("made_on", [None, MADE_ON], ids=["bare", "made on"])
    @pytest.mark.parametrize("method", METHODS, ids=str)
    def test_round_trip(self, tmp_path: Path, name: str, method: Any, made_on: MeasurementSource | None) -> None:
        schedule = Schedule([4, 0, 3], method, made_on)
        path = schedule.save(tmp_path / name)
        assert path == tmp_path / name
        for loaded in (Schedule.load(path), Schedule.load(str(path))):
            assert loaded == schedule
            assert (loaded.method, loaded.made_on) == (schedule.method, made_on)

    def test_dict_round_trip(self) -> None:
        schedule = Schedule([0, 4], "tome", MADE_ON)
        assert Schedule.from_dict(schedule.to_dict()).to_dict() == schedule.to_dict()

    def test_the_file_is_readable(self, tmp_path: Path) -> None:
        text = Schedule([0, 4]).save(tmp_path / "s.yaml").read_text()
        assert text == "format: lightning_prune.schedule\nversion: 2\nremoved: [0, 4]\n"
        text = (
            Schedule([0, 4], "tome", MeasurementSource(device="a CPU", batch_size=1))
            .save(tmp_path / "s.yaml")
            .read_text()
        )
        assert text == (
            "format: lightning_prune.schedule\nversion: 2\nmethod: tome\nremoved: [0, 4]\n"
            "made_on: {device: a CPU, batch_size: 1}\n"
        )

    @pytest.mark.parametrize("name", ["s.yaml", "s.json"])
    def test_a_truncated_file_is_never_another_schedule(self, tmp_path: Path, name: str) -> None:
        schedule = Schedule([0, 0, 56, 0, 12], "tome", MADE_ON)
        content = schedule.save(tmp_path / name).read_bytes()
        cut = tmp_path / f"cut-{name}"
        ends = content.index(b"]") + 1
        for length in range(len(content)):
            cut.write_bytes(content[:length])
            if length < ends or (name == "s.json" and length < len(content) - 1):
                with pytest.raises(FileFormatError, match=cut.name):
                    Schedule.load(cut)
            else:  # what is lost of a YAML file that still parses is where it was made
                with suppress(FileFormatError):
                    assert Schedule.load(cut) == schedule

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("format: lightning_prune.profile\nversion: 1\n", r"it has format 'lightning_prune\.profile'\."),
            ("removed: [1]\n", r"it has no format entry\."),
            (
                "format: lightning_prune.schedule\nversion: 3\nremoved: [1]\n",
                r"of version 3; this release reads version 1 and 2\.",
            ),
            (
                "format: lightning_prune.schedule\nversion: 1\n",
                r"not a usable lightning_prune.schedule file: `removed` must be a list .* None",
            ),
            ("format: lightning_prune.schedule\nversion: 1\nremoved: {0: 3}\n", r"must be a list .*, got \{0: 3\}\."),
            ("format: lightning_prune.schedule\nversion: 1\nremoved: []\n", r"got an empty list\."),
            ("format: lightning_prune.schedule\nversion: 1\nremoved: [1, -1]\n", r"got -1 for block 1\."),
            (
                "format: lightning_prune.schedule\nversion: 1\nremoved: [1]\nprovenance: here\n",
                r"`provenance` must be a mapping, got 'here'\.",
            ),
            (
                "format: lightning_prune.schedule\nversion: 2\nremoved: [1]\nmade_on: here\n",
                r"`made_on` must be a mapping, got 'here'\.",
            ),
            (
                "format: lightning_prune.schedule\nversion: 2\nremoved: [1]\nmade_on: {batch_size: many}\n",
                r"`made_on.batch_size` must be an integer or None, got 'many'\.",
            ),
            (
                "format: lightning_prune.schedule\nversion: 2\nmethod: 3\nremoved: [1]\n",
                r"`method` must be a name or .* got 3\.",
            ),
            ("\x89PNG\r\n", r"is damaged or not a lightning_prune\.schedule or lightning_prune\.keep_rates file"),
        ],
    )
    def test_an_invalid_file_is_named(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "given.yaml"
        path.write_text(text)
        with pytest.raises(FileFormatError, match=rf"given\.yaml .*{message}"):
            Schedule.load(path)

    def test_a_binary_file_is_rejected(self, tmp_path: Path) -> None:
        path = tmp_path / "given.yaml"
        path.write_bytes(pickle.dumps({"removed": [1]}))
        with pytest.raises(
            FileFormatError,
            match=r"given\.yaml is damaged or not a lightning_prune\.schedule or lightning_prune\.keep_rates file",
        ):
            Schedule.load(path)

    def test_a_missing_file_is_rejected(self, tmp_path: Path) -> None:
        with pytest.raises(FileFormatError, match=r"Cannot read .*none\.yaml: No such file"):
            Schedule.load(tmp_path / "none.yaml")

    @pytest.mark.parametrize("name", ["s.yaml", "s.json"])
    def test_details_that_cannot_be_written_are_rejected(self, tmp_path: Path, name: str) -> None:
        path = Schedule([1, 2], made_on=MADE_ON).save(tmp_path / name)
        before = path.read_bytes()
        message = rf"{name} can hold plain values only, got float32 for `made_on\.details\.cuda`\."
        with pytest.raises(ArgumentError, match=message):
            Schedule([3], made_on=MeasurementSource(details={"cuda": np.float32(12.4)})).save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_a_failed_save_keeps_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = Schedule([1, 2], made_on=MADE_ON).save(tmp_path / "s.yaml")
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


VERSION_1 = """\
format: lightning_prune.schedule
version: 1
removed: [69, 48, 36, 0]
provenance:
  method: tome
  int8: false
  settings: {proportional_attention: true, schedule: constant}
  target_speedup: 1.5
  tokens_dense: 197
  tokens: 44
  device: AMD EPYC
  device_type: cpu
  threads: 2
  batch_size: 1
  image_shape: [3, 56, 56]
  precision: float32
  compiled: false
  torch: 2.15.0+cu132
"""


class TestVersion1:
    """Documents of before the method had a field of its own."""

    def test_a_schedule(self, tmp_path: Path) -> None:
        path = tmp_path / "s.yaml"
        path.write_text(VERSION_1)
        schedule = Schedule.load(path)
        assert schedule == Schedule([69, 48, 36, 0], "tome:proportional_attention=true,schedule=constant")
        assert schedule.made_on == MeasurementSource(
            device="AMD EPYC",
            batch_size=1,
            precision="float32",
            image_shape=(3, 56, 56),
            dense_tokens=197,
            details={
                "int8": False,
                "target_speedup": 1.5,
                "device_type": "cpu",
                "threads": 2,
                "compiled": False,
                "torch": "2.15.0+cu132",
            },
        )
        assert Schedule.load(schedule.save(tmp_path / "again.yaml")).to_dict() == schedule.to_dict()

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("removed: [0, 4]\n", Schedule([0, 4])),
            ("removed: [0, 4]\nprovenance: {}\n", Schedule([0, 4])),
            ("removed: [0, 4]\nprovenance: {method: '', tokens: 5}\n", Schedule([0, 4])),
            ("removed: [0, 4]\nprovenance: {method: pomt}\n", Schedule([0, 4], "pomt")),
        ],
    )
    def test_without_a_source(self, tmp_path: Path, text: str, expected: Schedule) -> None:
        path = tmp_path / "s.yaml"
        path.write_text(f"format: lightning_prune.schedule\nversion: 1\n{text}")
        loaded = Schedule.load(path)
        assert (loaded, loaded.made_on) == (expected, None)

    def test_keep_rates(self, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        path.write_text(
            '{"format": "lightning_prune.keep_rates", "version": 1, "rates": [1.0, 0.5],'
            ' "provenance": {"method": "topk", "device": "a CPU", "objective": "utility"}}'
        )
        for loaded in (KeepRates.load(path), Schedule.load(path)):
            assert loaded == KeepRates([1, 0.5], "topk")
            assert loaded.made_on == MeasurementSource(device="a CPU", objective="utility")


class TestMeasurementSource:
    def test_from_a_context(self) -> None:
        source = MeasurementSource.from_context(
            {"device": "a CPU", "batch_size": 4, "image_shape": [3, 8, 8], "threads": 2}, dense_tokens=17, proxy="soft"
        )
        assert source == MeasurementSource(
            device="a CPU",
            batch_size=4,
            image_shape=(3, 8, 8),
            dense_tokens=17,
            details={"threads": 2, "proxy": "soft"},
        )

    def test_differences(self) -> None:
        source = MeasurementSource(device="there", batch_size=4, image_shape=(3, 8, 8))
        assert source.differences(device="there", batch_size=4, image_shape=(3, 8, 8)) == ()
        assert source.differences(device="here", batch_size=4, precision="float32") == (
            "device there there, here here",
        )
        assert source.differences(batch_size=None, image_shape=(3, 9, 9)) == (
            "image_shape (3, 8, 8) there, (3, 9, 9) here",
        )

    @pytest.mark.parametrize(
        "name", ["device", "precision", "runtime", "objective", "batch_size", "image_shape", "details"]
    )
    def test_entries_of_the_wrong_type_are_rejected(self, name: str) -> None:
        wrong: Any = {name: 1.5}
        with pytest.raises(ScheduleError, match=rf"`made_on.{name}` must be .*, got 1\.5\."):
            MeasurementSource(**wrong)


class TestReadSchedule:
    @pytest.mark.parametrize("value", [Schedule([0, 3], "tome"), KeepRates([1, 0.5])])
    def test_schedules_are_returned_unchanged(self, value: Any, tmp_path: Path) -> None:
        assert read_schedule(value) is value
        path = value.save(tmp_path / "s.yaml")
        assert read_schedule(path) == read_schedule(str(path)) == value

    def test_lists(self) -> None:
        assert read_schedule([0, 3]) == read_schedule((0, 3)) == Schedule([0, 3])
        array: Any = np.array([0, 3])
        assert read_schedule(array) == Schedule([0, 3])
        with pytest.raises(ScheduleError, match="got -1 for block 1"):
            read_schedule([0, -1])

    @pytest.mark.parametrize("value", [0, 5, np.int64(5), 0.5, np.float32(0.5), 1e-9])
    def test_numbers(self, value: Any) -> None:
        found = read_schedule(value)
        assert found == value
        assert type(found) in (int, float)

    def test_plans(self) -> None:
        class Made:
            schedule = Schedule([0, 3], "tome")
            reason = "It is the fastest."

        assert isinstance(Made(), PlannedSchedule)
        assert read_schedule(Made()) is Made.schedule

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (1.0, r"share of the patch tokens in \(0, 1\), got 1\.0\. Write 0 to keep all tokens, 1 to remove one"),
            (0.0, r"in \(0, 1\), got 0\.0\. Write an int"),
            (-0.5, r"got -0\.5"),
            (1.5, r"got 1\.5"),
            (float("nan"), "got nan"),
            (True, "got True"),
            (np.True_, "got np.True_"),
            (-1, "got -1"),
            (None, "got None"),
            (b"s.yaml", "got b's.yaml'"),
            ({0: 3}, "got {0: 3}"),
        ],
    )
    def test_invalid_values_are_rejected(self, value: Any, message: str) -> None:
        for name in ("schedule", "prune.schedule"):
            with pytest.raises(ArgumentError, match=f"`{name}` must be .*{message}"):
                read_schedule(value, name)

    def test_missing_files_are_rejected(self, tmp_path: Path) -> None:
        with pytest.raises(FileFormatError, match=r"Cannot read .*none\.yaml"):
            read_schedule(tmp_path / "none.yaml")
