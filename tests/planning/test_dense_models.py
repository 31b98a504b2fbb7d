"""Planning for dense models: the module around the transformer is what runs, and its outputs are compared by patch."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from timm.models.qwen3_vit import Qwen3VitEncoder
from torch import Tensor, nn

import lightning_prune as lp
from helpers.clock import TokenClock
from helpers.data import noise_images
from helpers.dense import DenseNet, FeatureNet
from helpers.models import disturb, tiny_vit
from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.models import restoring
from lightning_prune.patching.models.dense_outputs import unit_features
from lightning_prune.patching.token_readers import RestoreMode
from lightning_prune.profiling.environment import accuracy_dependencies, model_conditions

IMAGES = noise_images(24)


def cosines(one: Any, other: Any) -> list[float]:
    """The cosine similarity at each position of each tap, of all images, in loops."""
    found = []
    for a, b in zip(one, other, strict=True):
        mine = []
        for image in range(len(a)):
            for row in range(a.shape[2]):
                for column in range(a.shape[3]):
                    x, y = a[image, :, row, column].double(), b[image, :, row, column].double()
                    mine.append(float(x @ y / (x.norm() * y.norm())))
        found.append(sum(mine) / len(mine))
    return found


def planned(net: nn.Module, **more: Any) -> lp.Plan:
    options: dict[str, Any] = {
        "methods": ["topk", "tome"],
        "objective": lp.LatencyBudget(speedup=1.2),
        "time_limit": 60,
    }
    blocks = find_vision_transformer(net, restore="auto").blocks
    options |= {"calibration": IMAGES, "verbose": False, "use_cache": False, "clock": TokenClock(blocks), **more}
    images = options.pop("images", IMAGES)
    return lp.plan(net, images[:2], restore="auto", **options)


@pytest.fixture
def net() -> FeatureNet:
    return FeatureNet(tiny_vit(noise=0.1)).eval()


@pytest.mark.long
@torch.no_grad()
def test_a_plan_of_features(net: FeatureNet) -> None:
    dense = net(IMAGES)
    made = planned(net)
    assert made.proxy == "cosine similarity per patch"
    assert made.schedule.total_removed > 0
    assert made.speedup >= 1.19
    with lp.patch(net, made, restore="auto"):
        pruned = net(IMAGES)
    taps = cosines(list(dense.values()), list(pruned.values()))
    assert float(made.accuracy) == pytest.approx(sum(taps) / len(taps), abs=1e-5)
    assert all(torch.equal(grid, net(IMAGES)[name]) for name, grid in dense.items())


def test_the_module_around_the_transformer_is_what_runs(net: FeatureNet) -> None:
    calls: list[int] = []

    class Counting(DenseNet):
        def forward(self, images: Tensor) -> Tensor:
            calls.append(len(images))
            return super().forward(images)

    dense_net = Counting(net.backbone, channels=3).eval()
    assert find_vision_transformer(dense_net, restore="auto").reader is dense_net
    assert planned(dense_net).speedup > 1
    assert calls.count(2) > 20  # the example inputs, timed
    assert sum(calls) > 10 * len(IMAGES)  # the calibration images


@pytest.mark.long
def test_hugging_face_backbones_are_planned() -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        out_features=["stage2", "stage4"],
    )
    model = disturb(transformers.Dinov2Backbone(config))
    with pytest.raises(UnsupportedModelError, match="restore"):
        lp.plan(model, IMAGES[:2], calibration=IMAGES)
    made = planned(model)
    assert made.speedup > 1
    assert made.proxy == "cosine similarity per patch"


def test_encoders_with_channels_last_are_planned() -> None:
    torch.manual_seed(0)
    model = disturb(Qwen3VitEncoder(img_size=24, patch_size=4, embed_dim=32, depth=4, num_heads=4, global_pool=""))
    images = noise_images(8, size=24)
    made = planned(model, calibration=images, images=images, methods="topk")
    with torch.no_grad():
        dense = model(images)
        with lp.patch(model, made, restore="auto"):
            pruned = model(images)
    expected = torch.cosine_similarity(dense, pruned, dim=3).mean()
    assert float(made.accuracy) == pytest.approx(float(expected), abs=1e-5)


def test_code_of_the_head_is_a_condition(net: FeatureNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two versions of a file with the same names, settings and weights."""
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for number, taps in enumerate(("1, 3", "2, 3")):
        text = f"TAPS = [{taps}]\n" + _HEAD
        (tmp_path / f"head_{number}.py").write_text(text)
        module = importlib.import_module(f"head_{number}")
        module.Head.__module__ = "head"
        sys.modules["head"] = module
        head = module.Head(net.backbone).eval()
        found.append(model_conditions(find_vision_transformer(head, restore="auto"), IMAGES[:2]))
        del sys.modules["head"]
    assert found[0]["structure"] == found[1]["structure"]
    assert found[0]["reader"] != found[1]["reader"]


_HEAD = """
from torch import nn

class Head(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        return self.backbone.forward_intermediates(images, indices=TAPS, intermediates_only=True)
"""


def test_a_reader_that_takes_something_else_is_named(net: FeatureNet) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: Tensor, targets: Tensor) -> Any:
            return self.net(images)

    with pytest.raises(ArgumentError, match="inputs of Pair, which reads it"):
        planned(Pair().eval())


def test_a_plan_says_that_tokens_were_given_back(net: FeatureNet) -> None:
    made = planned(net)
    assert made.schedule.made_on is not None
    assert made.schedule.made_on.details["restore"] == "auto"
    with pytest.warns(UserWarning, match="restore='auto'"):
        lp.patch(net, made).remove()
    with pytest.raises(ArgumentError, match="protocol"):
        planned(net, protocol="paper")


def test_a_container_is_no_reader(net: FeatureNet) -> None:
    inside = nn.ModuleDict({"net": net})
    assert find_vision_transformer(inside, restore="auto").reader is net
    assert find_vision_transformer(net.backbone, restore="auto").reader is None
    assert find_vision_transformer(inside).reader is None
    with restoring("copy"):
        assert find_vision_transformer(inside).restore == "copy"
        assert find_vision_transformer(inside, restore="delta").restore == "delta"
    assert find_vision_transformer(inside).restore is None


def test_what_is_kept_depends_on_the_mode_and_on_the_head(net: FeatureNet) -> None:
    modes: tuple[RestoreMode | None, ...] = (None, "copy", "delta")
    found = [find_vision_transformer(net, restore=mode) for mode in modes]
    conditions = [model_conditions(each, IMAGES[:2]) for each in found]
    assert len({str(sorted(map(str, each.items()))) for each in conditions}) == 3
    head = DenseNet(net.backbone).eval()
    transformer = find_vision_transformer(head, restore="copy")
    before = accuracy_dependencies(transformer, IMAGES[:2], IMAGES, "auto")
    with torch.no_grad():
        head.head.weight.add_(1)
    assert accuracy_dependencies(transformer, IMAGES[:2], IMAGES, "auto") != before


def test_a_compiled_reader_runs_compiled(net: FeatureNet) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(net, backend=backend)
    transformer = find_vision_transformer(compiled, restore="auto")
    assert transformer.reader is net
    assert transformer.compiled_root is compiled
    with torch.no_grad():
        assert transformer.run(IMAGES[:2]).keys() == net(IMAGES[:2]).keys()
    assert len(graphs) == 1
    backbone: Any = torch.compile(net.backbone, backend="eager")
    found = find_vision_transformer(backbone, restore="auto")
    assert found.compiled_root is backbone


def test_a_handle_knows_what_the_reader_returns(net: FeatureNet) -> None:
    with lp.patch(net, "topk", [0, 5, 0, 3], restore="auto") as handle:
        before = handle.transformer
        handle.update([0, 4, 0, 3])
        assert handle.transformer == before
        assert handle.transformer.num_classes == 0 < net.backbone.num_classes


@pytest.mark.long
@pytest.mark.parametrize("by_path", [False, True])
def test_a_patch_without_what_was_planned_with_warns(net: FeatureNet, tmp_path: Path, by_path: bool) -> None:
    made = planned(net).schedule
    with pytest.warns(UserWarning, match="restore='auto'"):
        lp.patch(net, "topk", made.save(tmp_path / "plan.yaml") if by_path else made).remove()


def test_bad_arguments(net: FeatureNet) -> None:
    with pytest.raises(ArgumentError, match="proxy"):
        planned(net, proxy="soft_agreement")
    with pytest.raises(ArgumentError, match="proxy"):
        lp.plan(tiny_vit(), IMAGES[:2], calibration=IMAGES, proxy="patch_cosine")
    with pytest.raises(ArgumentError, match="restore"):
        lp.plan(net, IMAGES[:2], calibration=IMAGES, restore="yes")  # type: ignore[arg-type] # wrong on purpose


class TestUnitFeatures:
    def test_products_are_mean_cosines(self) -> None:
        one = {
            "a": noise_images(3, 8, 4),
            "b": (noise_images(3, 6, (2, 5), seed=1), noise_images(3, 2, seed=2)[:, :, :1]),
        }
        other = {"a": noise_images(3, 8, 4, seed=3), "b": (noise_images(3, 6, (2, 5), seed=4), one["b"][1])}
        products = (unit_features(one) * unit_features(other)).sum(1).mean()
        pairs = ([one["a"], *one["b"]], [other["a"], *other["b"]])
        taps = cosines(*pairs)
        assert float(products) == pytest.approx(sum(taps) / 3, abs=1e-6)

    def test_tokens_and_vectors(self) -> None:
        tokens, other = noise_images(2, 5, (7, 1))[..., 0], noise_images(2, 5, (7, 1), seed=1)[..., 0]
        expected = torch.cosine_similarity(tokens, other, dim=2).mean(1)
        torch.testing.assert_close((unit_features(tokens) * unit_features(other)).sum(1), expected)
        expected = torch.cosine_similarity(tokens[:, 0], other[:, 0], dim=1)
        torch.testing.assert_close((unit_features(tokens[:, 0]) * unit_features(other[:, 0])).sum(1), expected)

    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"predicted_depth": x[:, 0]}, lambda x: x[:, 0]])
    def test_a_map_is_compared_by_its_correlation(self, wrap: Any) -> None:
        one, other = noise_images(2, 1, 5) + 10, noise_images(2, 1, 5, seed=1) + 20
        found = (unit_features(wrap(one), channels=32) * unit_features(wrap(other), channels=32)).sum(1)
        pairs = zip(one, other, strict=True)
        expected = [float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) for a, b in pairs]
        assert found.tolist() == pytest.approx(expected, abs=1e-5)

    def test_channels_last(self) -> None:
        one, other = noise_images(2, 6, (4, 5)), noise_images(2, 6, (4, 5), seed=1)
        expected = torch.cosine_similarity(one, other, dim=1).mean((1, 2))
        last = [unit_features(x.permute(0, 2, 3, 1), 6, channels_last=True) for x in (one, other)]
        torch.testing.assert_close((last[0] * last[1]).sum(1), expected)

    def test_many_positions_are_sampled(self) -> None:
        one = noise_images(2, 64, 40)
        other = one + 0.5 * noise_images(2, 64, 40, seed=1)
        assert unit_features(one).shape[1] <= 2**15
        found = (unit_features(one) * unit_features(other)).sum(1)
        torch.testing.assert_close(found, torch.cosine_similarity(one, other, dim=1).mean((1, 2)), atol=5e-3, rtol=0)
        torch.testing.assert_close((unit_features(one) ** 2).sum(1), torch.ones(2))

    def test_large_maps_are_sampled(self) -> None:
        one, other = noise_images(2, 1, 384) + 10, noise_images(2, 1, 384, seed=1)
        other = one + 0.5 * other
        assert unit_features(one).shape[1] <= 2**15
        found = (unit_features(one) * unit_features(other)).sum(1)
        pairs = zip(one, other, strict=True)
        expected = [float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) for a, b in pairs]
        assert found.tolist() == pytest.approx(expected, abs=5e-3)

    @pytest.mark.parametrize("result", [None, torch.arange(6).reshape(2, 3), torch.zeros(3), {"loss": torch.zeros(())}])
    def test_no_features(self, result: Any) -> None:
        with pytest.raises(UnsupportedModelError, match="features of images"):
            unit_features(result)
