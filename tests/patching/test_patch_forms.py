"""The forms in which `lp.patch` takes method and schedule, and schedules of several methods."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_prune as lp
from lightning_prune.errors import ArgumentError, FileFormatError, ScheduleError, UnsupportedModelError
from lightning_prune.reduction import POMT, RandomDrop, Reduction, ToMe, names, resolve, spec_of
from lightning_prune.schedule import KeepRates, MethodSpec, Schedule

REMOVED = [0, 6, 0, 0]  # of 26 tokens


class Planned:
    """The protocol of a Plan."""

    reason = "It is the fastest."

    def __init__(self, schedule: Schedule | KeepRates) -> None:
        self.schedule = schedule


class TestForms:
    @pytest.mark.parametrize(
        ("value", "method", "expected"),
        [
            (REMOVED, "pomt", Schedule(REMOVED)),
            (Schedule(REMOVED), "pomt", Schedule(REMOVED)),
            (KeepRates([1, 0.5, 1, 1]), "pomt", KeepRates([1, 0.5, 1, 1])),
            (6, "pomt", Schedule([0, 6, 0, 0])),
            (0, "pomt", Schedule([0, 0, 0, 0])),
            (0.7, "pomt", KeepRates([1, 0.7, 1, 1])),
            (6, "tome", Schedule([2, 2, 1, 1])),
            (0.7, "tome", KeepRates.of(Schedule([2, 2, 2, 1]), 26)),
            (0, "tome", Schedule([0, 0, 0, 0])),
            (6, "vwt-intra", Schedule([6, 0, 0, 0])),
            (0.7, "vwt-intra", KeepRates([0.7, 1, 1, 1])),
        ],
    )
    def test_a_schedule_with_a_method(self, build: Any, value: Any, method: str, expected: Any) -> None:
        for given in (value, Planned(expected.with_method(method))):
            with lp.patch(build(), method, given) as handle:
                assert handle.schedule == expected.with_method(method)

    def test_a_number_is_removed_in_the_usual_blocks(self, build: Any) -> None:
        for block in (2, 0.5):
            with lp.patch(build(), "pomt", 6, block=block) as handle:
                assert handle.schedule == Schedule([0, 0, 6, 0], "pomt")
        with pytest.raises(ArgumentError, match=r"`block` must be an index from 0 to 3 or a fraction .* got 4"):
            lp.patch(build(), "pomt", 6, block=4)

    def test_a_schedule_that_names_its_method(self, build: Any, draw: Any, tmp_path: Path) -> None:
        schedule = Schedule(REMOVED, "random:seed=3")
        with lp.patch(build(), RandomDrop(seed=3), REMOVED) as handle:
            expected = handle.transformer.root(draw())
        files = [schedule.save(tmp_path / name) for name in ("s.yaml", "s.json", "s")]
        for given in (schedule, Planned(schedule), *files, *map(str, files)):
            with lp.patch(build(), given) as handle:
                assert handle.reduction == RandomDrop(seed=3)
                assert handle.schedule == schedule
                assert torch.equal(handle.transformer.root(draw()), expected)

    def test_keep_rates_that_name_their_method(self, build: Any, tmp_path: Path) -> None:
        rates = KeepRates([1, 0.5, 1, 1], "topk")
        for given in (rates, rates.save(tmp_path / "rates.yaml")):
            with lp.patch(build(), given) as handle:
                assert handle.schedule == rates

    @pytest.mark.parametrize("method", ["random:seed=3", MethodSpec("random", {"seed": 3}), RandomDrop(seed=3)])
    def test_methods_with_settings(self, build: Any, method: Any) -> None:
        with lp.patch(build(), method, REMOVED) as handle:
            assert (handle.reduction, handle.schedule) == (RandomDrop(seed=3), Schedule(REMOVED, "random:seed=3"))

    def test_defaults_that_are_written_out_are_the_same_method(self, build: Any) -> None:
        written = Schedule([2, 2, 2, 2], MethodSpec("tome", {"proportional_attention": True, "schedule": "constant"}))
        with lp.patch(build(), "tome", written) as handle:
            assert handle.schedule == Schedule([2, 2, 2, 2], "tome")

    @pytest.mark.parametrize("given", [Schedule(REMOVED), KeepRates([1, 0.5, 1, 1])])
    def test_a_schedule_without_a_method(self, build: Any, given: Any) -> None:
        with pytest.raises(ArgumentError, match="`method` must be given, because the schedule names none, got"):
            lp.patch(build(), given)

    @pytest.mark.parametrize("given", [6, 0.7, True, None])
    def test_a_missing_method_is_rejected(self, build: Any, given: Any) -> None:
        with pytest.raises(ArgumentError, match=f"`method` must be .*got {given}"):
            lp.patch(build(), given)
        with pytest.raises(ArgumentError, match="`method` must be given"):
            lp.patch(build(), [0, 6, 0, 0])

    def test_a_contradicting_method_is_rejected(self, build: Any, tmp_path: Path) -> None:
        schedule = Schedule(REMOVED, "tome")
        for given in (
            schedule,
            Planned(schedule),
            schedule.save(tmp_path / "s.yaml"),
            KeepRates([1, 0.5, 1, 1], "tome"),
        ):
            with pytest.raises(ArgumentError, match="`method` must be that of the schedule, tome, got pomt"):
                lp.patch(build(), "pomt", given)
        with pytest.raises(ArgumentError, match="that of the schedule, tome, got tome:proportional_attention=False"):
            lp.patch(build(), ToMe(proportional_attention=False), schedule)
        with lp.patch(build(), "pomt", REMOVED) as handle, pytest.raises(ArgumentError, match="tome, got pomt"):
            handle.update(schedule)

    @pytest.mark.parametrize("value", [1.0, 0.0, -0.5, True, -1, {1: 6}])
    def test_invalid_values_are_rejected(self, build: Any, value: Any) -> None:
        with pytest.raises(ArgumentError, match="`schedule` must be "):
            lp.patch(build(), "pomt", value)

    def test_more_than_the_method_can_remove_is_rejected(self, build: Any) -> None:
        with pytest.raises(ScheduleError, match=r"at most 23 of the .* block 1 .* got 24"):
            lp.patch(build(), "pomt", 24)
        with pytest.raises(ScheduleError, match=r"at most 23 of the 26 tokens with tome, got 25"):
            lp.patch(build(), "tome", 25)

    def test_images_of_any_size(self, build: Any, draw: Any, leaving: Any) -> None:
        with lp.patch(build("dynamic-size"), "pomt", 0.7) as handle:
            assert handle.schedule == KeepRates([1, 0.7, 1, 1], "pomt")
        for value in (6, 0.7):
            with pytest.raises(ScheduleError, match=rf"`schedule` must be .* with tome, .* got {value}\."):
                lp.patch(build("dynamic-size"), "tome", value)

    def test_a_file_with_the_name_of_a_method_is_not_read(
        self, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "tome").write_text("[0, 6, 0, 0]")
        (tmp_path / "mine").write_text("{}")
        with lp.patch(build(), "tome", 6) as handle:
            assert handle.schedule.removed == (2, 2, 1, 1)
        with pytest.raises(ScheduleError):  # a method without a schedule
            lp.patch(build(), "tome")
        with pytest.raises(FileFormatError, match="mine"):
            lp.patch(build(), "mine")

    def test_files_without_a_schedule_are_rejected(self, build: Any, tmp_path: Path) -> None:
        for arguments in (("none.yaml",), ("pomt", "none.yaml")):
            with pytest.raises(FileFormatError, match=r"Cannot read .*none\.yaml"):
                lp.patch(build(), *arguments)
        path = tmp_path / "s"
        path.write_text("nothing")
        with pytest.raises(FileFormatError, match=r"s is not a lightning_prune"):
            lp.patch(build(), str(path))


class TestSpecs:
    @pytest.mark.parametrize(
        "reduction",
        [
            *(resolve(name) for name in names() if name != "vwt-inter"),
            RandomDrop(seed=4, site="input"),
            POMT(dropped="nearest", proportional_attention=False),
            ToMe(schedule="decreasing"),
        ],
        ids=str,
    )
    def test_spec_of_and_resolve_are_inverse(self, reduction: Reduction) -> None:
        spec = spec_of(reduction)
        assert resolve(spec) == resolve(str(spec)) == resolve(MethodSpec.of(spec.to_plain())) == reduction
        assert spec_of(resolve(spec)) == spec

    def test_a_spec_has_only_settings_that_differ_from_defaults(self) -> None:
        assert spec_of(ToMe()) == MethodSpec("tome")
        assert spec_of(POMT(dropped="nearest")) == MethodSpec("pomt-nearest")

    def test_settings_given_twice(self) -> None:
        assert resolve("random:seed=3", seed=5) == RandomDrop(seed=5)
        with pytest.raises(ArgumentError, match=r"`settings` must be .* 'random', got \{'speed': 3\}"):
            resolve("random:speed=3")


class TestSeveralMethods:
    def test_each_block_uses_its_method(self, build: Any, draw: Any, leaving: Any) -> None:
        model, images = build(), draw()
        dense = model(images)
        schedule = Schedule([0, 6, 0, 4], [None, "topk", None, "pomt"])
        with lp.patch(model, schedule) as handle:
            assert handle.reduction is None
            assert handle.schedule == schedule
            assert leaving(model, images) == (26, 20, 20, 16)
            both = model(images)
        assert torch.equal(model(images), dense)
        with lp.patch(build(), "topk", [0, 6, 0, 0]) as one:
            entering: list[Any] = []
            one.transformer.blocks[3].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
            one.transformer.root(images)
        with lp.patch(build(), "pomt", [0, 0, 0, 4]) as other:
            root: Any = other.transformer.root
            expected = root.forward_head(root.norm(root.blocks[3](entering[0])))
        torch.testing.assert_close(both, expected)

    def test_sizes_count_from_the_first_method_that_tracks_them(self, build: Any, draw: Any) -> None:
        """Merged tokens keep their weight in attention if later blocks prune."""
        images, sizes = draw(), []
        model = build()
        schedule = Schedule([5, 0, 5, 0], ["tome", None, "topk", None])
        with lp.patch(model, schedule) as handle:
            for block in handle.transformer.blocks:
                block.register_forward_pre_hook(
                    lambda _, args: sizes.append(getattr(args[0], "_lightning_prune_state", None))
                )
            model(images)
        first, merged, kept, pruned = (
            None if each is None or each.token_state is None else each.token_state for each in sizes
        )
        assert first is None
        assert merged is not None
        assert kept is not None
        assert pruned is not None
        assert merged.sizes.sum(dim=1).tolist() == [26.0, 26.0]
        assert pruned.sizes.shape == (2, 16)
        torch.testing.assert_close(pruned.log_sizes.flatten(1), pruned.sizes.log())
        with lp.patch(build(), "topk", [0, 0, 5, 0]) as alone:
            assert not torch.equal(alone.transformer.root(images), model(images))

    def test_saved_and_loaded(self, build: Any, draw: Any, tmp_path: Path) -> None:
        schedule = Schedule([0, 6, 0, 4], [None, "random:seed=3", None, "tome"])
        with lp.patch(build(), schedule) as handle:
            expected = handle.transformer.root(draw())
        with lp.patch(build(), schedule.save(tmp_path / "s.yaml")) as handle:
            assert torch.equal(handle.transformer.root(draw()), expected)

    def test_keep_rates(self, build: Any, draw: Any, leaving: Any) -> None:
        rates = KeepRates([1, 0.5, 1, 0.5], [None, "topk", None, "tome"])
        model = build("dynamic-size")
        with lp.patch(model, rates):
            assert leaving(model, draw()) == (26, 14, 14, 8)
            assert leaving(model, draw(size=28)) == (50, 26, 26, 14)

    def test_updates(self, build: Any, draw: Any, leaving: Any) -> None:
        model = build()
        with lp.patch(model, Schedule([0, 6, 0, 4], ["tome", "topk", "tome", "tome"])) as handle:
            handle.update(Schedule([3, 0, 0, 4], ["vwt-intra", "topk", "tome", "tome"]))
            assert leaving(model, draw()) == (23, 23, 23, 19)
            with pytest.raises(ArgumentError, match="`method` must be given"):
                handle.update(Schedule([3, 0, 0, 4]))
            assert leaving(model, draw()) == (23, 23, 23, 19)

    def test_one_graph(self, build: Any, draw: Any) -> None:
        model = build()
        torch._dynamo.reset()
        with lp.patch(model, Schedule([3, 6, 0, 4], ["vwt-intra", "topk", "pomt", "tome"])), torch.no_grad():
            fast = torch.compile(model, backend="eager", fullgraph=True)
            torch.testing.assert_close(fast(draw()), model(draw()), rtol=1e-5, atol=1e-5)

    def test_errors(self, build: Any) -> None:
        mixed = Schedule([0, 6, 0, 4], ["tome", "topk", "tome", "tome"])
        with pytest.raises(ArgumentError, match=r"`method` must be left out if the schedule has several methods"):
            lp.patch(build(), "tome", mixed)
        with pytest.raises(ScheduleError, match=r"`schedule` must .* before which vwt-intra acts, got block 1"):
            lp.patch(build(), Schedule([0, 6, 0, 4], [None, "vwt-intra", None, "tome"]))
        with pytest.raises(ScheduleError, match=r"at most 9 of the 20 tokens that enter block 3 with tome, got 11"):
            lp.patch(build(), Schedule([0, 6, 0, 11], [None, "topk", None, "tome"]))
        with pytest.raises(UnsupportedModelError, match="pools over its patch tokens"):
            lp.patch(build("pool-avg"), mixed)
