"""Loops of real Trainers: which batches they run, what is pruned in them, and what pruning leaves alone in `fit`."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_prune as lp
from helpers.data import loader, noise_images
from helpers.models import TOKENS, tiny_vit
from lightning_prune.patching.class_swap import is_patched_module

from .tiny import Snapshot, Tiny, brief, stop_counting, trainer, validated

pytestmark = pytest.mark.usefixtures("clockwork")
COUNT = 22


class Numbered(Tiny):
    """Remembers which images each step saw: a batch is (images, their numbers)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.numbers: dict[str, list[int]] = {}

    def step(self, stage: str, batch: Any) -> Tensor:
        self.numbers.setdefault(stage, []).extend(batch[1].tolist())
        return super().step(stage, batch)


def numbered(count: int = COUNT, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(noise_images(count, seed=1), torch.arange(count)), **{"batch_size": 4, **options})


class Once:
    """No DataLoader, no length, and what was read of it is gone."""

    def __init__(self) -> None:
        self.batches = iter(list(numbered()))

    def __iter__(self) -> Iterator[Any]:
        return self.batches


class Shards(IterableDataset[Any]):
    """Every worker yields its own part."""

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        yield from list(TensorDataset(noise_images(COUNT, seed=1), torch.arange(COUNT)))[first::step]


LOADERS: dict[str, Callable[[], Any]] = {
    "generator": lambda: (batch for batch in numbered()),
    "iterable": Once,
    "stream": lambda: DataLoader(Shards(), batch_size=4),
    "stream with workers": lambda: DataLoader(Shards(), batch_size=4, num_workers=2, persistent_workers=True),
    "persistent workers": lambda: numbered(num_workers=2, persistent_workers=True),
}


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("kind", LOADERS)
def test_each_image_is_evaluated_once(kind: str, stage: str) -> None:
    module = Numbered()
    getattr(trainer(brief(schedule=6)), stage)(module, LOADERS[kind]())
    (name,) = module.numbers
    assert sorted(module.numbers[name]) == list(range(COUNT))
    assert module.tokens(name) == {TOKENS - 6}


@pytest.mark.parametrize("kind", ["stream", "stream with workers", "persistent workers"])
def test_each_image_is_evaluated_once_in_each_validation_of_fit(kind: str) -> None:
    module = Numbered()
    running = trainer(brief(), max_epochs=2, num_sanity_val_steps=0, check_val_every_n_epoch=1)
    running.fit(module, numbered(8), LOADERS[kind]())
    assert sorted(module.numbers["val"]) == sorted([*range(COUNT)] * 2)
    assert module.numbers["train"] == [*range(8)] * 2
    assert TOKENS not in module.tokens()
    assert module.tokens("train") == {TOKENS}


def test_a_generator_is_read_once_in_fit() -> None:
    module = Numbered()
    trainer(brief(schedule=6), max_epochs=1, num_sanity_val_steps=0).fit(module, numbered(8), LOADERS["generator"]())
    assert module.numbers["val"] == [*range(COUNT)]


@pytest.mark.parametrize(("limit", "batches"), [(1, 1), (4, 4), (0.5, 3), (1.0, 6), (100, 6)])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_limits_on_batches_are_kept(stage: str, limit: Any, batches: int) -> None:
    module, option = Tiny(), {"validate": "limit_val_batches"}.get(stage, f"limit_{stage}_batches")
    getattr(trainer(brief(schedule=6), **{option: limit}), stage)(module, loader(24))
    assert [step.tokens for step in module.steps] == [TOKENS - 6] * batches


def test_limit_val_batches_0_warns() -> None:
    module = Tiny()
    with pytest.warns(UserWarning, match="TokenPruning measured nothing"):
        validated(brief(), module, limit_val_batches=0)
    assert module.steps == []


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("kind", [list, lambda loaders: dict(zip("ab", loaders, strict=True)), CombinedLoader])
def test_several_loaders_in_sequence_are_pruned_by_one_decision(kind: Any, stage: str, decisions: list[str]) -> None:
    class Both(Tiny):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            return self.step("predict", batch)

    module, data = Both(), [loader(8), loader(9, batch_size=3)]
    combined = CombinedLoader(data, "sequential") if kind is CombinedLoader else kind(data)
    getattr(trainer(brief()), stage)(module, combined)
    assert [step.images for step in module.steps] == [4, 4, 3, 3, 3]
    assert len({step.tokens for step in module.steps} | {TOKENS}) == 2
    assert TOKENS not in {step.tokens for step in module.steps}
    assert decisions == ["plan"]


@pytest.mark.parametrize(("mode", "batches"), [("min_size", 2), ("max_size", 3), ("max_size_cycle", 3)])
@pytest.mark.parametrize("form", ["list", "mapping"])
def test_combined_batches_give_the_first_batch_for_calibration(mode: Any, form: str, batches: int) -> None:
    """The dataset then holds no such batches, so the first one of the loop is what pruning is judged by."""

    def images(batch: Any) -> Tensor:
        both = [batch["a"], batch["b"]] if form == "mapping" else batch
        return torch.cat([part[0] for part in both if part is not None])

    class Both(Tiny):
        def images(self, batch: Any) -> Tensor:
            return images(batch)

    loaders: Any = [loader(8), loader(12)]
    data = CombinedLoader(dict(zip("ab", loaders, strict=True)) if form == "mapping" else loaders, mode)
    module, callback = Both(), brief(images_from_batch=images)
    trainer(callback).validate(module, data, verbose=False)
    assert [step.images for step in module.steps] == [8, 8, 8 if mode == "max_size_cycle" else 4][:batches]
    assert TOKENS not in module.tokens()
    assert callback.decision.calibration == "the first batch, since the dataset cannot be sampled"


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": 2},
        {"inference_mode": False},
        {"overfit_batches": 2},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_runs_are_pruned_under_trainer_options(options: dict[str, Any]) -> None:
    module, other = Tiny(), Tiny()
    before = Snapshot(module)
    trainer(brief(), **options).validate(module, loader(), verbose=False)
    assert module.steps
    assert TOKENS not in module.tokens()
    before.assert_unchanged()
    trainer(brief(), max_epochs=1, **options).fit(other, loader(8), loader(8))
    assert other.tokens("train") == {TOKENS}
    assert other.tokens("val") == module.tokens()


def test_a_barebones_trainer_is_pruned() -> None:
    module, callback = Tiny(), brief()
    L.Trainer(callbacks=[callback], barebones=True, accelerator="cpu").validate(module, loader(), verbose=False)
    assert module.tokens() == {callback.decision.tokens} != {TOKENS}


def test_the_model_is_dense_after_early_stopping() -> None:
    module = Tiny()
    stopping = EarlyStopping("val/mean", patience=1, mode="max", min_delta=1e9)
    trainer(brief(schedule=6), stopping, max_epochs=20).fit(module, loader(8), loader(8))
    assert module.seen("val") == 2 * 8
    assert not any(is_patched_module(part) for part in module.modules())


class Loss(Tiny):
    """Trains on a loss that depends on every token of every image, and remembers its gradients."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gradients: list[list[Tensor]] = []
        self.trained_blocks = 0
        self.vit.blocks[1].register_forward_pre_hook(self._count_block)

    def _count_block(self, *_: Any) -> None:
        self.trained_blocks += self.training

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append([p.grad.clone() for p in self.vit.parameters() if p.grad is not None])


class Checkpointed(Loss):
    def __init__(self) -> None:
        super().__init__()
        self.vit.set_grad_checkpointing(True)


def fitted(kind: type[Loss], prunes: bool, *callbacks: L.Callback, **options: Any) -> Loss:
    module = kind()
    L.seed_everything(3)
    pruning = [brief(schedule=6)] if prunes else []
    running = trainer(*pruning, *callbacks, max_epochs=2, val_check_interval=2, **options)
    running.fit(module, loader(16, shuffle=True), loader(8))
    return module


@pytest.mark.parametrize(
    ("kind", "callbacks", "options", "updates"),
    [
        (Loss, [], {"accumulate_grad_batches": 3}, 4),
        (Loss, [GradientAccumulationScheduler({0: 1, 1: 2})], {}, 6),
        (Loss, [], {"gradient_clip_val": 0.01}, 8),
        (Checkpointed, [], {}, 8),
        (Checkpointed, [], {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}, 4),
    ],
    ids=["accumulated", "scheduled", "clipped", "checkpointed", "checkpointed and accumulated in bf16"],
)
def test_gradients_are_those_without_the_callback(
    kind: type[Loss], callbacks: list[L.Callback], options: dict[str, Any], updates: int
) -> None:
    with_it, without = fitted(kind, True, *callbacks, **options), fitted(kind, False, *callbacks, **options)
    assert with_it.tokens("train") == without.tokens("train") == without.tokens("val") == {TOKENS}
    assert with_it.tokens("val") == {TOKENS - 6}
    assert len(with_it.gradients) == len(without.gradients) == updates
    for first, second in zip(with_it.gradients, without.gradients, strict=True):
        assert len(first) == len(list(with_it.vit.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_checkpointed_gradients_are_those_of_a_plain_backward() -> None:
    """So that the comparison above is not one of nothing with nothing."""
    plain, checkpointed = fitted(Loss, True), fitted(Checkpointed, True)
    assert (plain.trained_blocks, checkpointed.trained_blocks) == (8, 16)  # the second time during backward
    for first, second in zip(plain.gradients, checkpointed.gradients, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True))
        assert any(a.abs().max() > 0 for a in first)


class Holding(Tiny):
    """Has the model itself among its hyperparameters, and saves in the middle of a pruned validation."""

    def __init__(self, vit: Any = None, folder: str = "") -> None:
        super().__init__()
        self.vit = vit if vit is not None else tiny_vit().train()
        self.save_hyperparameters()
        self.folder = folder

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.vit(batch[0])
        if not self.trainer.sanity_checking and batch_idx == 1:
            assert is_patched_module(self.vit.blocks[1])
            self.trainer.save_checkpoint(Path(self.folder) / "middle.ckpt")
            assert is_patched_module(self.vit.blocks[1])


@pytest.mark.filterwarnings("ignore:Attribute 'vit' is an instance of `nn.Module`")
def test_a_checkpoint_saved_during_validation_is_dense(tmp_path: Path) -> None:
    module = Holding(tiny_vit().train(), str(tmp_path))
    trainer(brief(schedule=6), max_epochs=1).fit(module, loader(8), loader(8))
    again = Holding.load_from_checkpoint(tmp_path / "middle.ckpt", weights_only=False)
    assert not any(is_patched_module(part) for part in again.modules())
    with torch.no_grad():
        assert torch.equal(again.eval()(noise_images(3, seed=1)), module.eval()(noise_images(3, seed=1)))


def test_checkpoints_of_fit_reload_into_an_unpatched_model(tmp_path: Path) -> None:
    """Those that Lightning writes after a validation, in the middle of an epoch, at its end and after an error."""
    outputs: dict[str, Tensor] = {}

    class Saving(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            assert not any(is_patched_module(part) for part in pl_module.modules())
            with torch.no_grad():
                outputs[f"{trainer.current_epoch}-{trainer.global_step}"] = pl_module.vit.eval()(
                    noise_images(3, seed=1)
                )
            pl_module.train()

    def saver(name: str, **options: Any) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, filename="{epoch}-{step}", save_top_k=-1, **options)

    savers = [
        saver("validation", monitor="val/mean"),
        saver("steps", every_n_train_steps=1, save_on_train_epoch_end=False),
        saver("epochs", save_on_train_epoch_end=True),
        saver("weights", save_weights_only=True, monitor="val/mean", mode="max"),
    ]
    module = Tiny()
    options = {"max_epochs": 2, "val_check_interval": 2, "enable_checkpointing": True}
    trainer(Saving(), *savers, brief(schedule=6), **options).fit(module, loader(16), loader(8))
    assert module.tokens("val") == {TOKENS - 6}
    paths = sorted(tmp_path.glob("*/*.ckpt"))
    assert {path.parent.name for path in paths} == {"validation", "steps", "epochs", "weights"}
    compared = 0
    for path in paths:
        saved = torch.load(path, weights_only=True)
        again = Tiny.load_from_checkpoint(path, weights_only=True)
        assert list(saved["state_dict"]) == list(Tiny().state_dict())
        assert not any(is_patched_module(part) for part in again.modules())
        with torch.no_grad():
            output = again.vit.eval()(noise_images(3, seed=1))
        assert torch.equal(output, outputs[f"{saved['epoch']}-{saved['global_step']}"])
        compared += 1
    assert compared == len(paths) > 10


def test_fit_resumes_from_a_checkpoint_of_a_pruned_one(tmp_path: Path) -> None:
    """With the callback or without: training goes on as if it had never stopped."""
    options = {"num_sanity_val_steps": 0, "enable_checkpointing": True}
    whole = Tiny()
    trainer(max_epochs=3, default_root_dir=tmp_path / "whole", **options).fit(whole, loader(16), loader(8))
    saving = ModelCheckpoint(tmp_path, save_last=True)
    trainer(brief(schedule=6), saving, max_epochs=2, **options).fit(Tiny(), loader(16), loader(8))
    for callbacks, tokens in (([brief(schedule=3)], TOKENS - 3), ([], TOKENS)):
        module = Tiny()
        running = trainer(*callbacks, max_epochs=3, default_root_dir=tmp_path, **options)
        running.fit(module, loader(16), loader(8), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
        assert module.seen("train") == 16
        assert module.tokens("val") == {tokens}
        state = module.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())


def test_validate_loads_its_checkpoint_before_it_prunes(tmp_path: Path) -> None:
    trained = Tiny()
    trainer(max_epochs=1).fit(trained, loader(16))
    torch.save({"state_dict": trained.state_dict(), "pytorch-lightning_version": L.__version__}, tmp_path / "a.ckpt")
    module = Tiny()
    running = trainer(brief(schedule=6))
    predicted = running.predict(module, loader(8), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    with lp.patch(trained.eval(), "pomt", [0, 6, 0, 0]), torch.no_grad():
        assert torch.allclose(torch.cat(predicted), trained(noise_images(8, seed=1)), atol=1e-6)
    assert module.tokens("predict") == {TOKENS - 6}


def test_trainers_in_two_threads_prune_their_own_models() -> None:
    """Each waits for the other in every step, so that both are pruned at the same time."""
    together = threading.Barrier(2, timeout=60)

    class Waiting(Tiny):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            together.wait()
            super().validation_step(batch, batch_idx)
            together.wait()

    modules, errors = [Waiting(), Waiting()], []
    before = [Snapshot(module) for module in modules]

    def work(module: Tiny, remove: int) -> None:
        try:
            trainer(brief(schedule=remove)).validate(module, loader(), verbose=False)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(module, remove)) for module, remove in zip(modules, (3, 9), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert errors == []
    assert [module.tokens() for module in modules] == [{TOKENS - 3}, {TOKENS - 9}]
    for snapshot in before:
        snapshot.assert_unchanged()


class Unwatched(Tiny):
    """Without the account of tokens, which is not for the compiler; says its logits instead."""

    def __init__(self) -> None:
        super().__init__(depth=2)  # every token count is traced anew
        stop_counting(self.vit)
        self.logits: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.logits.append(self(batch[0]).clone())


@pytest.mark.long
@pytest.mark.parametrize(
    ("way", "schedule"), [("the module", 6), ("the module in place", 6), ("the transformer in place", "auto")]
)
@pytest.mark.filterwarnings("ignore:The whole LightningModule is compiled")
def test_a_model_compiled_by_the_user_gives_the_pruned_logits(way: str, schedule: Any) -> None:
    torch._dynamo.reset()
    module, callback = Unwatched(), brief(schedule=schedule)
    given: Any = module
    if way == "the module":
        given = torch.compile(module, backend="eager")
    elif way == "the module in place":
        module.compile(backend="eager")
    else:
        module.vit.compile(backend="eager")
    dense, pruned, again = [], [], []
    for logits, callbacks in ((dense, []), (pruned, [callback]), (again, [])):
        module.logits = logits
        trainer(*callbacks).validate(given, loader(8), verbose=False)
    torch._dynamo.reset()
    plain = Unwatched().eval()
    with torch.no_grad(), lp.patch(plain, "pomt", callback.decision.schedule):
        expected = plain(noise_images(8, seed=1))
    assert callback.decision.schedule.total_removed > 0
    assert torch.allclose(torch.cat(pruned), expected, atol=1e-5)
    assert not torch.allclose(torch.cat(pruned), torch.cat(dense), atol=1e-4)
    assert torch.equal(torch.cat(dense), torch.cat(again))
    assert not any(is_patched_module(part) for part in module.modules())
