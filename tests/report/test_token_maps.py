import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from lightning_prune.errors import ArgumentError
from lightning_prune.patching.token_map import TokenTrace
from lightning_prune.report.token_maps import plot_tokens, save_tokens


def trace(kind: str, images: int = 2, tokens: tuple[int, ...] = (11, 11)) -> TokenTrace:
    groups = torch.arange(16).repeat(images, 1)
    if kind == "dropped":
        groups[:, ::3] = -1
    elif kind == "fused":
        groups[:, ::3] = 10
    elif kind == "merged":
        groups = groups // 2
    return TokenTrace(groups, torch.ones(images, 11, dtype=torch.int64), torch.tensor(tokens), (4, 4))


def shown(figure: Figure, panel: int) -> np.ndarray[Any, Any]:
    return np.asarray(figure.axes[panel].images[0].get_array())


def entries(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_row_for_each_image_and_a_column_for_each_method() -> None:
    images = torch.rand(2, 3, 16, 16)
    figure = plot_tokens(images, {"topk 1.5x": trace("dropped"), "pomt 1.5x": trace("fused")}, mean=0.0, std=1.0)
    assert len(figure.axes) == 6
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["picture\n16 patches", "topk 1.5x\n11 tokens left", "pomt 1.5x\n11 tokens left"]
    assert titles[3:] == [""] * 3
    assert shown(figure, 3) == pytest.approx(images[1].permute(1, 2, 0).double().numpy())
    assert entries(figure) == ["unchanged: kept as it is", "tinted: fused into one token", "crossed out: dropped"]


def test_many_shared_tokens_are_merged_ones() -> None:
    figure = plot_tokens(torch.rand(2, 3, 16, 16), {"tome": trace("merged")}, mean=0.0, std=1.0)
    assert entries(figure) == ["unchanged: kept as it is", "one colour in a border: merged into one token"]
    block = shown(figure, 1)[:4, :8]
    assert block == pytest.approx(np.broadcast_to(shown(figure, 0)[:4, :8].mean((0, 1)), block.shape))


def test_normalisation_is_undone() -> None:
    pixels = torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    images = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    figure = plot_tokens(images, {"pomt": trace("fused")}, mean=mean.tolist(), std=std.tolist())
    assert shown(figure, 0) == pytest.approx(pixels[0].permute(1, 2, 0).double().numpy(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grey_images_and_unknown_normalisation(dtype: torch.dtype) -> None:
    images = (7 * torch.randn(1, 1, 8, 8) - 3).to(dtype)
    one = trace("merged", 1, (11,))
    first = shown(plot_tokens(images, {"tome": one}), 0)
    assert first.shape == (8, 8, 3)
    assert (first.min(), first.max()) == pytest.approx((0.0, 1.0))
    assert (np.ptp(first, axis=2) == 0).all()
    assert np.isfinite(shown(plot_tokens(torch.zeros(1, 1, 8, 8), {"tome": one}), 0)).all()


def test_token_counts_that_differ_are_given_for_each_image() -> None:
    figure = plot_tokens(torch.rand(2, 3, 16, 16), {"vwt-inter": trace("merged", tokens=(9, 13))})
    assert figure.axes[1].get_title() == "vwt-inter\n9 to 13 tokens left"
    assert [figure.axes[panel].get_xlabel() for panel in (1, 3)] == ["9", "13"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.rand(2, 4, 8, 8)}, "`images` must be of shape (B, 1 or 3, H, W), got (2, 4, 8, 8)"),
        ({"images": torch.rand(3, 8, 8)}, "got (3, 8, 8)"),
        ({"images": torch.rand(0, 3, 8, 8)}, "got (0, 3, 8, 8)"),
        ({"traces": {}}, "`traces` must hold the trace of one method or more, got none"),
        ({"traces": {"a": trace("fused", 3, (1, 1, 1))}}, "must be of the 2 images, got that of 3 for 'a'"),
        ({"traces": {"a": trace("fused")._replace(grid=None)}}, "must be of patches that form a grid, got 'a'"),
        ({"mean": 0.5}, "must be given together, got mean=0.5 and std=None"),
        ({"mean": [0.5, 0.5], "std": 1.0}, "`mean` must be one number or 3, one a channel, got [0.5, 0.5]"),
    ],
)
def test_arguments_that_cannot_be_drawn_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"images": torch.rand(2, 3, 8, 8), "traces": {"pomt": trace("fused")}} | changes
    with pytest.raises(ArgumentError, match=re.escape(message)):
        plot_tokens(**arguments)


def test_saved_whole(tmp_path: Path) -> None:
    path = save_tokens(torch.rand(2, 3, 16, 16), {"pomt": trace("fused")}, tmp_path / "tokens.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
