"""Bundles of dense models and of zero-shot classifiers: the graphs are of the module that reads the tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lightning_prune as lp
from helpers.data import noise_images
from helpers.dense import FeatureNet, HeadOnHook, dense_net
from helpers.models import tiny_vit
from helpers.refusing import ONLY_PYTHON, run_refusing
from lightning_prune.classification import ZeroShotModel
from lightning_prune.errors import ArgumentError
from lightning_prune.exporting import bundle_profile
from lightning_prune.exporting.bundle_graphs import bundled_graphs

IMAGES = noise_images(1)


def zero_shot() -> nn.Module:
    torch.manual_seed(1)
    tower = tiny_vit(noise=0.1, num_classes=0)
    return ZeroShotModel(tower, torch.randn(5, tower.embed_dim)).eval()


CASES: dict[str, Any] = {
    "head": (dense_net, "tome", "auto"),
    "head, delta": (dense_net, "topk", "delta"),
    "features": (lambda: FeatureNet(tiny_vit(noise=0.1)).eval(), "topk", "copy"),
    "hook": (lambda: HeadOnHook().eval(), "tome", "auto"),
    "zero-shot": (zero_shot, "tome", None),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ["head", *(pytest.param(name, marks=pytest.mark.long) for name in list(CASES)[1:])])
def test_the_graphs_compute_what_the_reader_computes(name: str, tmp_path: Path) -> None:
    build, method, restore = CASES[name]
    net = build()
    made = lp.bundle(net, tmp_path / "bundle", IMAGES, methods=method, restore=restore, verbose=False)
    described = bundle_profile.read_bundle(made.folder)
    assert described["context"]["model"] == type(net).__name__
    assert described["context"].get("restore") == restore
    graphs = bundled_graphs(made.folder, described, None, 1)
    images = torch.from_numpy(np.random.default_rng(0).standard_normal(IMAGES.shape).astype(np.float32))

    def check() -> None:
        expected = net(images)
        leaves = list(expected.values()) if isinstance(expected, dict) else [expected]
        for one, other in zip(graphs.run(), leaves, strict=True):
            torch.testing.assert_close(torch.from_numpy(one.numpy()), other, rtol=1e-3, atol=1e-4)

    graphs.to(described["curve"], made.tokens)
    check()
    assert described["probes"]["graphs"]
    for probe in described["probes"]["graphs"]:
        graphs.to(probe["file"])
        with lp.patch(net, probe["method"], probe["removed"], restore=restore):
            check()


@pytest.mark.long
def test_a_plan_for_the_device(tmp_path: Path) -> None:
    net = dense_net()
    folder = lp.bundle(net, tmp_path / "bundle", IMAGES, methods="tome", restore="auto", verbose=False).folder
    ran = run_refusing(ONLY_PYTHON, folder / "profile.py", "--time-limit=0.5", "--threads=1")
    assert ran.returncode == 0, ran.stderr
    profile = lp.LatencyProfile.load(folder / "profile.json")
    options: dict[str, Any] = {"calibration": noise_images(4), "verbose": False, "use_cache": False, "time_limit": 2}
    made = lp.plan(
        net, IMAGES, profile=profile, methods="tome", objective=lp.AccuracyBudget(0.9), restore="auto", **options
    )
    assert all(candidate.timing is None for candidate in made.front)
    assert profile.context["runtime"] == "onnxruntime"
    assert made.latency_ms == made.predicted_ms


def test_bad_restore(tmp_path: Path) -> None:
    wrong: Any = "mean"
    with pytest.raises(ArgumentError, match=r"`restore`.*'mean'"):
        lp.bundle(dense_net(), tmp_path / "bundle", IMAGES, restore=wrong)
    assert not (tmp_path / "bundle").exists()
