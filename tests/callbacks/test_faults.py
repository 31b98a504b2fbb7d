"""An error anywhere in a run: afterwards the model is as it was, and nothing is left in the process."""

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader, Dataset

import lightning_prune as lp
from helpers.data import labelled, loader, noise_images
from helpers.models import TOKENS, tiny_vit
from helpers.watch import before_forward
from lightning_prune.callbacks.decision import Decision
from lightning_prune.patching.class_swap import is_patched_module

from .tiny import Snapshot, Tiny, pruner, trainer

pytestmark = pytest.mark.usefixtures("clockwork", "interruptible")
STAGES = ("validate", "test", "predict", "fit")


class Fault(Exception):
    """What the tests throw."""


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores Ctrl-C for good once it has seen one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def decision() -> Decision:
    """Six tokens in block 1, measured once for all runs that are not about measuring."""
    callback = pruner(schedule=6, time_limit=0.1)
    trainer(callback).validate(Tiny(), loader(4), verbose=False)
    assert callback.decision is not None
    return callback.decision


class Bystanders:
    """Other models of the process, one dense and one patched, and what they say to an image."""

    def __init__(self) -> None:
        self.dense, self.patched = tiny_vit(), tiny_vit()
        self.handle = lp.patch(self.patched, "pomt", [0, 0, 5, 0])
        self.before = self._say()
        assert not torch.equal(*self.before)

    def _say(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.dense(noise_images(2, seed=1)), self.patched(noise_images(2, seed=1))

    def problems(self) -> Iterator[str]:
        dense, patched = self._say()
        if not torch.equal(dense, self.before[0]):
            yield "another model changed"
        if not (self.handle.active and torch.equal(patched, self.before[1])):
            yield "another patched model changed"


class Account:
    """A module before a run; `problems` says what is not as it was, in the module and in the process."""

    def __init__(self, module: Tiny, bystanders: Bystanders) -> None:
        self.module, self.bystanders, self.snapshot = module, bystanders, Snapshot(module)

    def problems(self) -> Iterator[str]:
        left = [name for name, part in self.module.named_modules() if is_patched_module(part)]
        if left:
            yield f"patched: {left}"
        if _get_current_function_mode_stack():
            yield "a torch function mode is on"
        if torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
            yield "autograd or autocast is switched"
        yield from self.bystanders.problems()
        before, now = self.snapshot.before, self.snapshot._look()
        yield from (f"{what} changed" for what in ("classes", "attributes", "hooks") if before[what] != now[what])
        if list(before["state"]) != list(now["state"]):
            yield "the keys of the state_dict changed"
        dense = Tiny().eval()  # fit has trained the weights, so the model is compared with a dense one that has them
        dense.load_state_dict(self.module.state_dict())
        with torch.no_grad():
            if not torch.equal(dense(self.snapshot.probe), now["output"]):
                yield "the output changed"


class Tripwire:
    """Counts what happens in a run by name, and throws at one of the times."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.patched: dict[str, int] = {}  # name -> the first time that it happened while the model was patched
        self.module: Tiny | None = None  # while a run lasts
        self.at: tuple[str, int] | None = None
        self.error: BaseException = Fault()

    def __call__(self, name: str) -> None:
        if self.module is None:
            return
        self.seen[name] += 1
        if is_patched_module(self.module.vit.blocks[1]):
            self.patched.setdefault(name, self.seen[name])
        if self.at == (name, self.seen[name]):
            raise self.error


def spied(base: type, names: list[str], prefix: str) -> type:
    """A subclass that tells its tripwire of every call of these methods, then runs the base's own."""

    def wrapped(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.__dict__["wire"](f"{prefix}.{name}")
            return getattr(super(kind, self), name)(*args, **kwargs)

        return method

    kind = type(f"Spied{base.__name__}", (base,), {name: wrapped(name) for name in names})
    return kind


def hooks_of(*kinds: type) -> list[str]:
    names = {name for kind in kinds for name, value in vars(kind).items() if callable(value)}
    # Deprecated, or a source of data that the trainer would then ask.
    left_out = {"configure_sharded_model"} | {name for name in names if name.endswith("_dataloader")}
    return sorted(name for name in names - left_out if not name.startswith("_"))


class Trained(Tiny):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]


STEPS = ["training_step", "validation_step", "test_step", "predict_step", "forward", "configure_optimizers"]
OPTIMISING = ["optimizer_step", "optimizer_zero_grad", "backward", "lr_scheduler_step", "configure_gradient_clipping"]
MODULE_HOOKS = [*hooks_of(ModelHooks, DataHooks, CheckpointHooks), *STEPS, *OPTIMISING, "configure_callbacks"]
SpiedModule = spied(Trained, MODULE_HOOKS, "module")
SpiedCallback = spied(L.Callback, hooks_of(L.Callback), "callback")
SpiedData = spied(L.LightningDataModule, [*hooks_of(DataHooks), "setup", "teardown"], "data")


class Counted(Dataset[Any]):
    def __init__(self, wire: Tripwire) -> None:
        self.wire, self.all = wire, labelled(8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        self.wire("data.item")
        return self.all[index]


class Run:
    """A short run in which everything that Lightning calls passes a tripwire."""

    def __init__(self, stage: str, decision: Decision, bystanders: Bystanders, folder: Path) -> None:
        self.stage, self.wire = stage, Tripwire()
        self.module, self.callback, self.data = SpiedModule(), SpiedCallback(), SpiedData()
        for part in (self.module, self.callback, self.data):
            part.__dict__["wire"] = self.wire
        batches = DataLoader(Counted(self.wire), batch_size=4)
        for name in ("train", "val", "test", "predict"):
            setattr(self.data, f"{name}_dataloader", lambda: batches)
        pruning = pruner()
        pruning.use(decision)
        options: dict[str, Any] = {}
        callbacks = [self.callback, pruning]
        if stage == "fit":
            callbacks.append(ModelCheckpoint(folder, save_last=True))
            options = {"max_epochs": 1, "num_sanity_val_steps": 1, "val_check_interval": 1, "gradient_clip_val": 1.0}
        self.trainer = trainer(*callbacks, **{**options, "enable_checkpointing": stage == "fit"})
        self.account = Account(self.module, bystanders)

    def go(self) -> None:
        self.wire.module = self.module
        try:
            getattr(self.trainer, self.stage)(self.module, datamodule=self.data)
        finally:
            self.wire.module = None


@pytest.fixture(scope="module")
def bystanders() -> Bystanders:
    return Bystanders()


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_an_error_in_any_hook_leaves_the_model_as_it_was(
    stage: str, decision: Decision, bystanders: Bystanders, tmp_path: Path
) -> None:
    whole = Run(stage, decision, bystanders, tmp_path)
    whole.go()
    assert [*whole.account.problems()] == []
    loop = {"validate": "validation", "fit": "validation"}.get(stage, stage)
    expected = {f"callback.on_{loop}_{when}" for when in ("start", "epoch_start", "batch_start", "batch_end", "end")}
    expected |= {f"module.{loop}_step", f"module.on_{loop}_epoch_end", "module.forward", "data.item", "data.setup"}
    expected |= {"callback.setup", "callback.teardown", "module.setup", "module.teardown"}
    if stage == "fit":
        expected |= {"module.training_step", "module.backward", "module.optimizer_step", "module.lr_scheduler_step"}
        expected |= {"callback.on_sanity_check_end", "callback.on_train_batch_end", "callback.on_save_checkpoint"}
    assert expected <= set(whole.wire.seen)
    assert {"module.forward", f"callback.on_{loop}_batch_end"} <= set(whole.wire.patched)

    found = []
    for name, times in whole.wire.seen.items():
        for time in sorted({1, whole.wire.patched.get(name, times)}):
            run = Run(stage, decision, bystanders, tmp_path)
            run.wire.at = (name, time)
            with pytest.raises(Fault):
                run.go()
            found += [f"{name}, time {time}: {problem}" for problem in run.account.problems()]
    assert found == []


def interrupted(error: BaseException) -> Any:
    """What comes out of a Trainer: it turns Ctrl-C into an exit."""
    return pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error))


ERRORS = pytest.mark.parametrize("error", [Fault(), KeyboardInterrupt(), SystemExit(3), GeneratorExit()], ids=repr)


@ERRORS
@pytest.mark.parametrize("where", ["module.validation_step", "callback.on_validation_batch_end", "data.item"])
def test_ctrl_c_and_system_exit_leave_the_model_as_it_was(
    where: str, error: BaseException, decision: Decision, bystanders: Bystanders, tmp_path: Path
) -> None:
    run = Run("validate", decision, bystanders, tmp_path)
    run.wire.at, run.wire.error = (where, 8 if where == "data.item" else 2), error
    with interrupted(error):
        run.go()
    assert "module.forward" in run.wire.patched
    assert [*run.account.problems()] == []


@pytest.mark.parametrize("part", ["callback", "data"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_error_in_on_exception_leaves_the_model_as_it_was(
    stage: str, part: str, decision: Decision, bystanders: Bystanders, tmp_path: Path
) -> None:
    """Lightning then calls no further hook of anyone."""

    class Second(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Second

    run = Run(stage, decision, bystanders, tmp_path)
    getattr(run, part).on_exception = fail
    loop = {"validate": "validation", "fit": "validation"}.get(stage, stage)
    run.wire.at = (f"callback.on_{loop}_batch_end", 3 if stage == "fit" else 1)  # fit checks its sanity first
    with pytest.raises(Second):
        run.go()
    assert f"callback.on_{loop}_batch_end" in run.wire.patched
    assert [*run.account.problems()] == []


class Fragile(Tiny):
    """Fails in one of its parts, at one of the times that it runs with six tokens fewer."""

    def __init__(self, part: str, time: int, error: BaseException) -> None:
        super().__init__()
        self.times, self.time, self.error = 0, time, error
        self.watch(self.vit.get_submodule(part))

    def watch(self, part: torch.nn.Module) -> None:
        part.register_forward_pre_hook(self._fail)

    def _fail(self, *_: Any) -> None:
        self.times += is_patched_module(self.vit.blocks[1])
        if self.times == self.time:
            self.times += 1
            raise self.error


class FragileWhileMeasured(Fragile):
    """Fails in measurements, too, where hooks are not called."""

    def watch(self, part: torch.nn.Module) -> None:
        before_forward(part, self._fail)


@ERRORS
@pytest.mark.parametrize(
    "part", ["patch_embed", "blocks.1", "blocks.1.norm1", "blocks.1.attn.proj", "blocks.1.mlp", "blocks.2.attn", "head"]
)
def test_an_error_inside_the_transformer_leaves_the_model_as_it_was(
    part: str, error: BaseException, decision: Decision, bystanders: Bystanders
) -> None:
    """Also where the block's attention is being watched."""
    module = Fragile(part, 2, error)
    account = Account(module, bystanders)
    pruning = pruner()
    pruning.use(decision)
    with interrupted(error):
        trainer(pruning).validate(module, loader(), verbose=False)
    assert [step.tokens for step in module.steps] == [TOKENS - 6]
    assert [*account.problems()] == []


@pytest.mark.parametrize("error", [Fault(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("schedule", ["auto", 6])
@pytest.mark.parametrize("time", [1, 2, 4])
def test_an_error_while_profiling_leaves_the_model_as_it_was(
    time: int, schedule: Any, error: BaseException, bystanders: Bystanders, decisions: list[str]
) -> None:
    module = FragileWhileMeasured("blocks.1.attn.proj", time, error)
    account = Account(module, bystanders)
    with interrupted(error):
        trainer(pruner(schedule=schedule)).validate(module, loader(), verbose=False)
    assert decisions == ["plan" if schedule == "auto" else "given"]
    assert module.steps == []
    assert [*account.problems()] == []


@pytest.mark.parametrize(
    "name", ["calibration_images", "plan_many", "find_vision_transformer", "PatchHandle", "replace"]
)
def test_an_error_in_a_function_of_the_callback_leaves_the_model_as_it_was(
    name: str, bystanders: Bystanders, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_prune.callbacks import decider, first_batch, planned_schedule, pruned_run

    def fail(*_: Any, **__: Any) -> Any:
        raise Fault(name)

    home = next(module for module in (pruned_run, decider, first_batch, planned_schedule) if hasattr(module, name))
    monkeypatch.setattr(home, name, fail)
    module = Tiny()
    account = Account(module, bystanders)
    with pytest.raises(Fault, match=name):
        trainer(pruner()).validate(module, loader(), verbose=False)
    assert [*account.problems()] == []


class Torn(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        if index == 13:
            raise Fault("item 13")
        return labelled()[index]


def torn_generator() -> Iterator[Any]:
    yield from list(loader(8))
    raise Fault("generator")


def torn_collate(items: Any) -> Any:
    if len(items) < 4:
        raise Fault("collate")
    return torch.utils.data.default_collate(items)


@pytest.mark.parametrize(
    ("make", "steps", "message"),
    [
        (lambda: DataLoader(Torn(), batch_size=4), 3, "item 13"),
        (lambda: DataLoader(Torn(), batch_size=4, num_workers=1, persistent_workers=True), 3, "item 13"),
        (torn_generator, 1, "generator"),  # Lightning looks a batch ahead where there is no length
        (lambda: loader(6, collate_fn=torn_collate), 1, "collate"),
    ],
    ids=["item", "worker", "generator", "collate"],
)
def test_an_error_of_the_loader_leaves_the_model_as_it_was(
    make: Any, steps: int, message: str, decision: Decision, bystanders: Bystanders
) -> None:
    module = Tiny()
    account = Account(module, bystanders)
    pruning = pruner()
    pruning.use(decision)
    with pytest.raises(Fault, match=message):
        trainer(pruning).validate(module, make(), verbose=False)
    assert [step.tokens for step in module.steps] == [TOKENS - 6] * steps
    assert [*account.problems()] == []


def test_callback_and_trainer_can_be_used_again_after_an_error(decision: Decision, bystanders: Bystanders) -> None:
    module = Fragile("blocks.1.mlp", 2, Fault())
    pruning = pruner()
    pruning.use(decision)
    running = trainer(pruning)
    with pytest.raises(Fault):
        running.validate(module, loader(), verbose=False)
    account = Account(module, bystanders)
    module.steps.clear()
    running.validate(module, loader(), verbose=False)
    assert [step.tokens for step in module.steps] == [TOKENS - 6] * 6
    assert [*account.problems()] == []


class During(L.Callback):
    """Does something once, after a batch of a validation."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action, self.batches = action, 0

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.batches += 1
        if self.batches == 2:
            self.action()


def test_a_run_inside_another_prunes_its_own_model(bystanders: Bystanders) -> None:
    """Two Trainers, modules, data and callbacks, one run inside the other's; and both restored."""
    inner, outer = Tiny(), Tiny()
    accounts = [Account(inner, bystanders), Account(outer, bystanders)]
    small, large = pruner(schedule=3), pruner(schedule=[0, 0, 9, 0])
    nested = During(lambda: trainer(small).validate(inner, loader(10, batch_size=5), verbose=False))
    trainer(large, nested).validate(outer, loader(), verbose=False)
    assert [(step.images, step.tokens) for step in inner.steps] == [(5, TOKENS - 3)] * 2
    assert [(step.images, step.tokens) for step in outer.steps] == [(4, TOKENS - 9)] * 6
    assert (small.decision.schedule.reducing, large.decision.schedule.reducing) == ({1: 3}, {2: 9})
    assert [*accounts[0].problems(), *accounts[1].problems()] == []


def test_a_failing_run_inside_another_leaves_the_outer_model_pruned(bystanders: Bystanders) -> None:
    inner, outer = FragileWhileMeasured("blocks.1.mlp", 5, Fault()), Tiny()
    accounts = [Account(inner, bystanders), Account(outer, bystanders)]

    def fail() -> None:
        with pytest.raises(Fault):
            trainer(pruner(schedule=3)).validate(inner, loader(8), verbose=False)

    trainer(pruner(schedule=9), During(fail)).validate(outer, loader(), verbose=False)
    assert [step.tokens for step in outer.steps] == [TOKENS - 9] * 6
    assert [*accounts[0].problems(), *accounts[1].problems()] == []


def test_a_callback_in_the_runs_of_two_trainers_at_once_is_refused(bystanders: Bystanders) -> None:
    shared, inner, outer = pruner(schedule=6), Tiny(), Tiny()
    accounts = [Account(inner, bystanders), Account(outer, bystanders)]

    def again() -> None:
        with pytest.raises(lp.ArgumentError, match=r"TokenPruning .* another Trainer"):
            trainer(shared).validate(inner, loader(), verbose=False)
        assert is_patched_module(outer.vit.blocks[1])  # the refused run has not ended this one

    nested = During(again)
    trainer(shared, nested).validate(outer, loader(), verbose=False)
    assert nested.batches == 6
    assert inner.steps == []
    assert [step.tokens for step in outer.steps] == [TOKENS - 6] * 6
    trainer(shared).validate(inner, loader(), verbose=False)  # one after the other is as good as two
    assert inner.tokens() == {TOKENS - 6}
    assert [*accounts[0].problems(), *accounts[1].problems()] == []


def test_a_copy_made_during_a_run_can_be_used_in_another_run(bystanders: Bystanders) -> None:
    import copy

    callback, module, copies = pruner(schedule=6), Tiny(), []
    trainer(callback, During(lambda: copies.append(copy.deepcopy(callback)))).validate(module, loader(), verbose=False)
    (copied,), other = copies, Tiny()
    trainer(copied).validate(other, loader(), verbose=False)
    assert other.tokens() == {TOKENS - 6}
    assert [*Account(other, bystanders).problems()] == []


@pytest.mark.parametrize("replaced", [False, True])
def test_a_patch_removed_or_replaced_during_a_run_is_an_error(
    replaced: bool, decision: Decision, bystanders: Bystanders
) -> None:
    """The rest of the run would be dense, or pruned otherwise, in silence."""
    module = Tiny()
    account = Account(module, bystanders)
    pruning, mine = pruner(), []
    pruning.use(decision)

    def meddle() -> None:
        mine.append(lp.patch(module, "random", [0, 0, 2, 0]))
        if not replaced:
            mine.pop().remove()

    message = "patch of this run .* batch 2"
    with pytest.raises(lp.UnsupportedModelError, match=message):
        trainer(pruning, During(meddle)).validate(module, loader(), verbose=False)
    assert len(module.steps) == 2
    assert all(handle.active for handle in mine)  # what the user has put on is the user's
    for handle in mine:
        handle.remove()
    assert [*account.problems()] == []


@pytest.mark.parametrize("decided", [False, True])
def test_a_patched_model_is_refused(decided: bool, decision: Decision) -> None:
    module, pruning = Tiny(), pruner(schedule=3)
    if decided:
        pruning.use(decision)
    with lp.patch(module, "pomt", [0, 0, 2, 0]) as mine:
        with pytest.raises(lp.ArgumentError, match=r"`model` .* got a patched model"):
            trainer(pruning).validate(module, loader(), verbose=False)
        assert mine.active
    assert module.steps == []
