"""torchvision's VisionTransformer."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from torchvision.models.vision_transformer import ConvStemConfig, EncoderBlock, VisionTransformer

import lightning_prune as lp
from helpers import reference as naive
from helpers.models import disturb
from lightning_prune.callbacks import TokenPruning
from lightning_prune.patching import find_vision_transformer
from lightning_prune.reduction import POMT, RandomDrop, Reduction, ReductionOutput, TokenSequence

from .by_hand import Pairs, Parts, looped, pruned_by_hand

WHERE = {"one": [0, 6, 0, 0], "two": [5, 0, 7, 0], "all": [3, 3, 3, 3]}
METHODS: dict[str, str | Reduction] = {"pomt": "pomt", "random": "random", "pairs": Pairs()}


def build_tv(**more: Any) -> VisionTransformer:
    options = {"image_size": 20, "patch_size": 4, "num_layers": 4, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    model = disturb(VisionTransformer(**{**options, "num_classes": 7, **more}))
    assert isinstance(model, VisionTransformer)
    return model


def blocks_of(model: Any) -> list[nn.Module]:
    return list(model.encoder.layers)


def parts_of(block: Any, kwargs: dict[str, Any]) -> Parts:
    attention = block.self_attention

    def project(x: Tensor) -> Any:
        """Query, key and value by the rows of the packed weight."""
        width = x.shape[-1]
        found = []
        for first in range(0, 3 * width, width):
            weight = attention.in_proj_weight[first : first + width]
            bias = attention.in_proj_bias[first : first + width]
            heads = (x @ weight.T + bias).split(width // attention.num_heads, dim=-1)
            found.append(torch.stack(heads))
        return tuple(found)

    same = nn.Identity()
    return Parts(block.ln_1, project, attention.out_proj, same, block.ln_2, block.mlp, same)


@torch.no_grad()
def run(model: Any, images: Tensor) -> Tensor:
    output: Tensor = model(images)
    return output


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the token counts of every call of the native multi-head attention."""
    counts: list[int] = []
    real = torch._native_multi_head_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts.append(query.shape[1])
        return real(query, *args, **kwargs)

    monkeypatch.setattr(torch, "_native_multi_head_attention", counted)
    return counts


class TestFacts:
    @pytest.mark.parametrize(
        ("name", "tokens", "channels", "depth"),
        [
            ("vit_b_16", 197, 768, 12),
            ("vit_b_32", 50, 768, 12),
            ("vit_l_16", 197, 1024, 24),
            ("vit_l_32", 50, 1024, 24),
            ("vit_h_14", 257, 1280, 32),
        ],
    )
    def test_every_name(self, name: str, tokens: int, channels: int, depth: int) -> None:
        with torch.device("meta"):
            model = getattr(models, name)()
        found = find_vision_transformer(nn.Sequential(model))
        assert (found.num_tokens, found.embed_dim, found.depth, found.num_classes) == (tokens, channels, depth, 1000)
        assert (found.num_prefix_tokens, found.has_class_token, found.path) == (1, True, "0")
        assert found.patch_embed is model.conv_proj

    def test_num_classes_is_that_of_the_last_layer(self) -> None:
        assert find_vision_transformer(build_tv(representation_size=9)).num_classes == 7
        model = build_tv()
        model.heads.head = nn.Linear(32, 3)
        assert find_vision_transformer(model).num_classes == 3
        model.heads = nn.Identity()
        found = find_vision_transformer(model)
        assert found.num_classes == 0
        assert found.outputs(torch.zeros(2, 3, 20, 20)).shape == (2, 32)
        model.heads = nn.Sequential(nn.Linear(32, 5), nn.Softmax(-1))
        model.num_classes = 5
        assert find_vision_transformer(model).num_classes == 5

    def test_a_subclass_with_a_convolutional_stem(self, images: Tensor) -> None:
        class Mine(VisionTransformer):
            pass

        stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2)]
        model = disturb(Mine(20, 4, 4, 4, 32, 64, num_classes=7, conv_stem_configs=stem))
        before = run(model, images)
        with lp.patch(model, "pomt", WHERE["one"]) as handle:
            assert handle.transformer.patch_embed is model.conv_proj
            assert not torch.equal(run(model, images), before)
        assert torch.equal(run(model, images), before)


class TestRestoration:
    @pytest.mark.parametrize("method", METHODS)
    def test_removal(self, images: Tensor, method: str) -> None:
        model = build_tv()
        before, classes, keys = run(model, images), [type(m) for m in model.modules()], list(model.state_dict())
        attributes = [set(vars(m)) for m in model.modules()]
        with lp.patch(model, METHODS[method], [0, 0, 0, 0]):
            assert torch.equal(run(model, images), before)
        with lp.patch(model, METHODS[method], WHERE["two"]):
            assert not torch.equal(run(model, images), before)
            assert list(model.state_dict()) == keys
        assert torch.equal(run(model, images), before)
        assert [type(m) for m in model.modules()] == classes
        assert [set(vars(m)) for m in model.modules()] == attributes

    @pytest.mark.parametrize("method", METHODS)
    def test_copies(self, images: Tensor, method: str) -> None:
        model = build_tv()
        lp.patch(model, METHODS[method], WHERE["two"])
        expected = run(model, images)
        assert torch.equal(run(copy.deepcopy(model), images), expected)
        assert torch.equal(run(pickle.loads(pickle.dumps(model)), images), expected)


class RecordingReduction(Reduction):
    """Random pruning, which records its inputs."""

    name: ClassVar[str] = "watching"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    seen: ClassVar[list[TokenSequence]] = []

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        self.seen.append(sequence)
        return RandomDrop().reduce(sequence, remove)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        return RandomDrop().max_removed(tokens, num_prefix_tokens)


class TestFastPath:
    @pytest.mark.parametrize("method", ["pomt", "random"])
    def test_other_blocks_keep_the_fast_path(self, images: Tensor, native_calls: list[int], method: str) -> None:
        with lp.patch(build_tv(), method, WHERE["two"]) as handle:
            native_calls.clear()  # those of the check that blocks come apart
            run(handle.transformer.root, images)
        assert native_calls == [26, 21, 21, 14]

    def test_blocks_with_key_bias_do_not_use_the_fast_path(self, images: Tensor, native_calls: list[int]) -> None:
        """The native call does not support a float mask; blocks before the first merge have none."""
        with lp.patch(build_tv(), Pairs(), WHERE["one"]) as handle:
            native_calls.clear()
            run(handle.transformer.root, images)
        assert native_calls == [26, 26]

    def test_the_reducing_block_keeps_its_output(self, images: Tensor, native_calls: list[int]) -> None:
        model, entering = build_tv(), []
        block: Any = model.encoder.layers[1]
        hook = block.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
        RecordingReduction.seen.clear()
        with lp.patch(model, RecordingReduction(), WHERE["one"]):
            native_calls.clear()
            run(model, images)
        hook.remove()
        with torch.no_grad():
            y = block.ln_1(entering[0])
            expected = block.self_attention(y, y, y, need_weights=False)[0] + entering[0]
        ((sequence),) = RecordingReduction.seen
        assert torch.equal(sequence.tokens, expected)
        assert len(native_calls) == 5
        assert sequence.attention is not None
        for found, part in zip(sequence.attention[:3], parts_of(block, {}).project(y[1]), strict=True):
            torch.testing.assert_close(found[1], part, rtol=1e-5, atol=1e-5)

    def test_blocks_are_split_bit_identically(self, caplog: pytest.LogCaptureFixture) -> None:
        """Bit-identical, so nothing is logged about blocks that cannot be split."""
        with caplog.at_level("INFO", "lightning_prune"):
            lp.patch(build_tv(), "pomt", WHERE["all"])
        assert caplog.messages == []

    def test_without_the_fast_path_the_result_is_the_same(self, images: Tensor, native_calls: list[int]) -> None:
        model = build_tv()
        with lp.patch(model, "pomt", WHERE["two"]):
            expected = run(model, images)
            native_calls.clear()
            output = model.train()(images)
            output.square().sum().backward()
        assert native_calls == []
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class TestNumbers:
    @pytest.mark.parametrize("where", WHERE)
    @pytest.mark.parametrize("method", METHODS)
    def test_matches_by_hand(self, images: Tensor, relative_error: Any, leaving: Any, method: str, where: str) -> None:
        model, removed = build_tv(), WHERE[where]
        expected = pruned_by_hand(model, images, removed, looped(method), 1, blocks_of, parts_of, lambda output: output)
        with lp.patch(model, METHODS[method], removed):
            assert relative_error(run(model, images), expected) < 1e-5
        model = model.double()
        with lp.patch(model, METHODS[method], removed):
            for _ in range(2):  # nothing is left of the pass before
                assert relative_error(run(model, images.double()), expected) < 1e-10

    @pytest.mark.parametrize("where", WHERE)
    def test_pruning_equals_masking(self, images: Tensor, relative_error: Any, where: str) -> None:
        """Compared with the unpatched model with masked tokens in later blocks."""
        model, removed = build_tv(), WHERE[where]
        hidden: set[int] = set()
        hooks = []
        for block, remove in zip(blocks_of(model), removed, strict=True):
            gone = sorted(hidden)

            def hide(module: Any, args: Any, kwargs: Any, gone: list[int] = gone) -> Any:
                mask = torch.zeros(args[0].shape[:2], dtype=torch.bool)
                mask[:, gone] = True
                return args, {**kwargs, "key_padding_mask": mask}

            attention: Any = block.self_attention
            hooks.append(attention.register_forward_pre_hook(hide, with_kwargs=True))
            there = [i for i in range(26) if i not in hidden]
            kept = naive.random(torch.zeros(len(there), 1), remove, 1, 0)[1]
            hidden |= {place for i, place in enumerate(there) if i not in kept}
        low, high = run(model, images), run(copy.deepcopy(model).double(), images.double())
        for hook in hooks:
            hook.remove()
        with lp.patch(model, "random", removed):
            assert relative_error(run(model, images), low.double()) < 1e-5
        model = model.double()
        with lp.patch(model, "random", removed):
            assert relative_error(run(model, images.double()), high) < 1e-10

    @pytest.mark.parametrize("method", METHODS)
    def test_an_image_does_not_depend_on_its_batch(self, draw: Any, method: str) -> None:
        model, images = build_tv(), draw(4)
        images[1:] *= torch.tensor([10.0, 0.1, 3.0]).view(3, 1, 1, 1)
        with lp.patch(model, METHODS[method], WHERE["two"]):
            together = run(model, images)
            for b in range(4):
                torch.testing.assert_close(run(model, images[b : b + 1]), together[b : b + 1], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("method", METHODS)
    def test_bfloat16(self, images: Tensor, relative_error: Any, method: str) -> None:
        """Approximately, because bfloat16 ranks near-ties differently."""
        model = build_tv()
        with lp.patch(model, METHODS[method], WHERE["one"]):
            full = run(model, images).double()
            with torch.autocast("cpu", torch.bfloat16):
                cast = run(model, images)
        model.bfloat16()
        with lp.patch(model, METHODS[method], WHERE["one"]):
            low = run(model, images.bfloat16())
        assert low.dtype == cast.dtype == torch.bfloat16
        assert relative_error(cast, full) < 0.1
        assert relative_error(low, full) < 0.1


@pytest.mark.long
class TestGraphs:
    @pytest.mark.parametrize(
        ("method", "backend"), [("pomt", "eager"), ("pomt", "aot_eager"), ("pairs", "aot_eager"), ("random", "eager")]
    )
    def test_compile(self, draw: Any, method: str, backend: str) -> None:
        torch._dynamo.reset()
        model = build_tv()
        lp.patch(model, METHODS[method], WHERE["two"])
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for seed in range(2):
            images = draw(seed=seed)
            torch.testing.assert_close(run(compiled, images), run(model, images), rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 1

    @pytest.mark.parametrize("method", METHODS)
    def test_export(self, images: Tensor, method: str) -> None:
        model = build_tv()
        handle = lp.patch(model, METHODS[method], WHERE["two"])
        expected = run(model, images)
        with torch.no_grad():
            program = torch.export.export(model, (images,))
        assert set(program.state_dict) == set(model.state_dict())
        assert torch.equal(run(model, images), expected)
        handle.remove()
        torch.testing.assert_close(run(program.module(), images), expected, rtol=1e-5, atol=1e-5)


class Halved(EncoderBlock):
    """A user's own."""

    def forward(self, input: Tensor) -> Tensor:
        half: Tensor = input + 0.5 * (super().forward(input) - input)
        return half


class TestOthers:
    def test_an_unknown_block_is_not_split(self, images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
        model = build_tv()
        block = blocks_of(model)[1]
        block.__class__ = Halved
        with caplog.at_level("INFO", "lightning_prune"), lp.patch(model, "random", WHERE["one"]):
            found = run(model, images)
        assert caplog.messages == ["Block 1 (Halved) is cut after its MLP, which still sees all its tokens."]
        after = block.register_forward_hook(
            lambda module, args, x: RandomDrop().reduce(TokenSequence(x, 1, True), 6).tokens
        )
        torch.testing.assert_close(run(model, images), found)
        after.remove()

    @pytest.mark.parametrize(
        "attention",
        [nn.MultiheadAttention(32, 4, batch_first=True, add_bias_kv=True), nn.MultiheadAttention(32, 4), nn.Identity()],
        ids=["extra keys", "batch second", "no attention"],
    )
    def test_attention_of_the_user_is_rejected(self, images: Tensor, attention: nn.Module) -> None:
        model: Any = build_tv()
        model.encoder.layers[2].self_attention = attention
        message = rf"The attention of block 2 must be .* got {type(attention).__name__}\."
        for method in (POMT(), Pairs()):
            with pytest.raises(lp.UnsupportedModelError, match=message):
                lp.patch(model, method, WHERE["one"])
        lp.patch(model, "random", WHERE["one"])

    def test_too_many_tokens_are_rejected(self) -> None:
        message = r"at most 23 of the 26 tokens that enter block 1 with pomt, got 24\."
        with pytest.raises(lp.ScheduleError, match=message):
            lp.patch(build_tv(), "pomt", [0, 24, 0, 0])

    def test_a_replaced_forward_is_rejected(self, images: Tensor) -> None:
        """It would silently run unpruned."""
        model: Any = build_tv()
        block = model.encoder.layers[1]
        block.forward = block.forward
        message = r"The `forward` of this EncoderBlock was replaced on the module itself \(as accelerate"
        with pytest.raises(lp.UnsupportedModelError, match=message):
            lp.patch(model, "pomt", WHERE["all"])
        del block.forward
        assert not any("_prune_patch" in vars(module) for module in model.modules())


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.vit = build_tv()
        self.seen: list[int] = []
        self.vit.encoder.ln.register_forward_pre_hook(lambda module, args: self.seen.append(args[0].shape[1]))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/mean", self.vit(batch[0]).mean())


def test_in_a_trainer(draw: Any) -> None:
    module = Module()
    loader: Any = DataLoader(TensorDataset(draw(8), torch.arange(8) % 7), batch_size=4)
    pruning = TokenPruning("pomt", schedule=6, block=1)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", callbacks=[pruning], **options)
    before = run(module.vit, draw())
    trainer.validate(module, loader, verbose=False)
    assert module.seen[-2:] == [20, 20]
    assert trainer.callback_metrics["pruning/removed"] == 6
    assert torch.equal(run(module.vit, draw()), before)


def test_planning(draw: Callable[..., Tensor]) -> None:
    module, images = Module().eval(), draw(16)
    before = run(module.vit, images)
    profile = lp.profile_latency(module, images[:4], time_limit=1, verbose=False)
    assert profile.tokens[-1] == 26
    plan = lp.plan(module, images[:4], calibration=images, methods="pomt", profile=profile, time_limit=1, verbose=False)
    assert plan.schedule.depth == 4
    assert torch.equal(run(module.vit, images), before)
