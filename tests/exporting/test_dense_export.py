"""Exported dense models: the file gives all tokens back as the patched model does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lightning_prune as lp
from helpers.data import noise_images
from helpers.dense import FeatureNet, dense_net
from helpers.models import disturb, tiny_vit
from lightning_prune.errors import ArgumentError

IMAGES = noise_images(6)


@pytest.mark.parametrize(
    ("method", "format", "graph"),
    [
        ("tome", "torch-export", "native"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                ("topk", "onnx", "native"),
                ("tome", "onnx", "native"),
                ("topk", "onnx", "portable"),
                ("tome", "onnx", "portable"),
                ("topk", "openvino", "native"),
                ("tome", "openvino", "native"),
            ]
        ),
    ],
)
def test_a_dense_head(tmp_path: Path, method: str, format: Any, graph: Any) -> None:
    net = dense_net(class_token=True)
    with torch.no_grad(), lp.patch(net, method, [0, 5, 0, 3], restore="auto"):
        expected = net(IMAGES)
        report = lp.export(net, tmp_path / "out", IMAGES[:2], format=format, graph=graph, calibration=IMAGES)
    assert report.classes == 0
    assert report.max_relative_error < 1e-4
    found = lp.load_exported(tmp_path / "out")(IMAGES)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(net(IMAGES), expected, rtol=1e-3, atol=1e-4)


def test_several_outputs_are_refused(tmp_path: Path) -> None:
    net = FeatureNet(tiny_vit()).eval()
    with lp.patch(net, "tome", [0, 5, 0, 3], restore="auto"), pytest.raises(ArgumentError, match="return a tensor"):
        lp.export(net, tmp_path / "out", IMAGES[:2])
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_backbone_is_exported_with_what_reads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.Dinov2Config(**shape, image_size=32, patch_size=8, out_features=["stage2", "stage4"])
    backbone = disturb(transformers.Dinov2Backbone(config))

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, images: Tensor) -> Tensor:
            return torch.cat(self.backbone(images).feature_maps, dim=1)

    net = Head().eval()
    with torch.no_grad(), lp.patch(net, "topk", [0, 5, 0, 0], restore="auto"):
        expected = net(IMAGES)
        lp.export(net, tmp_path / "out", IMAGES[:2], format="onnx")
        with pytest.raises(ArgumentError, match="return a tensor"):
            lp.export(backbone, tmp_path / "other", IMAGES[:2], format="onnx")
    torch.testing.assert_close(lp.load_exported(tmp_path / "out")(IMAGES), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_a_plan_gives_tokens_back(tmp_path: Path, method: str) -> None:
    net, schedule = dense_net(), lp.Schedule([0, 5, 0, 3], method)
    report = lp.export(
        net, tmp_path / "out", IMAGES[:2], plan=schedule, restore="auto", format="torch-export", rounds=1
    )
    assert report.tokens == (17, 12, 12, 9)
    with torch.no_grad(), lp.patch(net, schedule, restore="auto"):
        expected = net(IMAGES[:2])
    torch.testing.assert_close(lp.load_exported(tmp_path / "out")(IMAGES[:2]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("restore", [None, "auto"])
def test_scaled_images(tmp_path: Path, restore: Any) -> None:
    net = dense_net(class_token=True, dynamic_img_size=True)
    handle = lp.patch(net, "resize", 0.6, restore="auto")
    with torch.no_grad():
        expected = net(IMAGES[:2])
    if restore is not None:
        handle.remove()
    plan = lp.Schedule([7, 0, 0, 0], "resize") if restore is not None else None
    report = lp.export(net, tmp_path / "out", IMAGES[:2], plan=plan, restore=restore, format="torch-export", rounds=0)
    assert report.tokens == (10, 10, 10, 10)
    torch.testing.assert_close(lp.load_exported(tmp_path / "out")(IMAGES[:2]), expected, rtol=1e-4, atol=1e-5)
    handle.remove()


@pytest.mark.parametrize("plan", [None, lp.Schedule([0, 0, 0, 0])])
def test_the_dense_model(tmp_path: Path, plan: Any) -> None:
    net = dense_net()
    lp.export(net, tmp_path / "out", IMAGES[:2], plan=plan, restore="auto", format="torch-export", rounds=0)
    with torch.no_grad():
        torch.testing.assert_close(lp.load_exported(tmp_path / "out")(IMAGES[:2]), net(IMAGES[:2]))


@pytest.mark.parametrize("restore", ["delta", "all"])
def test_a_patched_model_is_exported_as_it_is(tmp_path: Path, restore: Any) -> None:
    net = dense_net()
    with lp.patch(net, "topk", [0, 5, 0, 3], restore="copy"), pytest.raises(ArgumentError, match="restore"):
        lp.export(net, tmp_path / "out", IMAGES[:2], restore=restore, format="torch-export")
    assert not (tmp_path / "out").exists()


class Hooked(nn.Module):
    """A head on the tokens that a hook collects, a method or a closure."""

    def __init__(self, is_method: bool) -> None:
        super().__init__()
        self.vit = tiny_vit(noise=0.1)
        self.head = nn.Linear(self.vit.embed_dim, 3)
        self.vit.blocks[1].register_forward_hook(self.keep if is_method else lambda *args: self.keep(*args))

    def keep(self, block: nn.Module, args: Any, output: Tensor) -> None:
        self.seen = output

    def forward(self, images: Tensor) -> Tensor:
        self.vit(images)
        return self.head(self.seen[:, 1:]).transpose(1, 2)


@pytest.mark.long
@pytest.mark.parametrize("is_planned", [False, True])
def test_a_head_on_hooks(tmp_path: Path, is_planned: bool) -> None:
    options: dict[str, Any] = {"format": "torch-export", "rounds": 0}
    net, schedule = Hooked(is_method=True).eval(), lp.Schedule([5, 0, 4, 0], "tome")
    with torch.no_grad(), lp.patch(net, schedule, restore="auto"):
        expected = net(IMAGES[:2])
        if not is_planned:
            lp.export(net, tmp_path / "out", IMAGES[:2], **options)
    if is_planned:
        lp.export(net, tmp_path / "out", IMAGES[:2], plan=schedule, restore="auto", **options)
    torch.testing.assert_close(lp.load_exported(tmp_path / "out")(IMAGES[:2]), expected, rtol=1e-4, atol=1e-5)


def test_hooks_that_a_copy_would_share_are_refused(tmp_path: Path) -> None:
    net = Hooked(is_method=False).eval()
    with (
        lp.patch(net, "tome", [5, 0, 4, 0], restore="auto"),
        pytest.raises(ArgumentError, match="methods of its modules"),
    ):
        lp.export(net, tmp_path / "out", IMAGES[:2], format="torch-export")
    assert not (tmp_path / "out").exists()
