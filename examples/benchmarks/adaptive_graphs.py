"""The static graphs and the scores of images among which `adaptive.py` chooses: outputs, and what each costs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_prune as lp
from lightning_prune._utils.digests import tensor_digest, weights_digest
from lightning_prune.profiling import InterleavedTimer, Variant, between_runs
from lightning_prune.profiling.clocks import CLOCKS
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.profiling.model_cost import count_model_cost
from lightning_prune.profiling.model_variants import DENSE, VariantSwitch
from lightning_prune.reduction.pixel_variance import patch_variances

EDGE = 0.5  # standard deviations of a channel between two neighbouring pixels, from which they are an edge
PER_PIXEL = 4  # multiply-accumulates of a score of pixels, for each pixel and channel
FEWEST = 5  # rounds, whatever time they take


class Graph(NamedTuple):
    """A static graph: what it removes in which blocks."""

    method: str
    removed: dict[int, int]

    @property
    def whole_blocks(self) -> int:
        """Blocks before the first that reduces, which give what the dense model gives; -1 if the images differ."""
        return -1 if self.method == "resize" else min(self.removed, default=10**6)

    def variant(self, depth: int) -> Variant:
        schedule = lp.Schedule([self.removed.get(block, 0) for block in range(depth)])
        return Variant(self.method, schedule if self.removed else None)


GRAPHS = {  # for 12 blocks and 196 patches; at batch 1 each block that reduces costs, so they are few
    "exact": Graph("exact", {}),
    "resize, 169": Graph("resize", {0: 27}),
    "resize, 144": Graph("resize", {0: 52}),
    "resize, 100": Graph("resize", {0: 96}),
    "resize, 64": Graph("resize", {0: 132}),
    "pomt-nearest, 127": Graph("pomt-nearest", {2: 69}),
    "tome, 76, from block 2": Graph("tome", {2: 80, 4: 40}),
    "tome, 87": Graph("tome", {0: 53, 2: 40, 4: 16}),
    "tome, 23": Graph("tome", {0: 69, 1: 48, 2: 36, 5: 20}),
}
"""Name -> graph. Numbers are patch tokens that are left. `exact` is dense with the exact tail."""


def entering(model: nn.Module, images: Tensor, blocks: int) -> Tensor:
    """The tokens that enter a block of the dense model of timm: (B, N, C)."""
    x: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    for block in model.blocks[:blocks]:
        x = block(x)
    return x


def embedding_variance(patches: Tensor) -> Tensor:
    """(B, N, C) -> (B,): the variance of the patch tokens of an image, mean over channels."""
    return patches.var(dim=1, correction=0).mean(dim=1)


def merge_similarity(patches: Tensor) -> Tensor:
    """(B, N, C) -> (B,): the cosine similarity of each patch token to the most similar other one, mean over tokens."""
    unit = nn.functional.normalize(patches, dim=-1)
    similar = unit @ unit.mT
    same = torch.eye(similar.shape[-1], dtype=torch.bool, device=similar.device)
    return similar.masked_fill(same, -1).amax(dim=-1).mean(dim=-1)


def edge_density(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,): share of the pixels that differ from the one to the right or below by more than `EDGE`."""
    right = (images[..., :-1, 1:] - images[..., :-1, :-1]).abs().amax(dim=1)
    below = (images[..., 1:, :-1] - images[..., :-1, :-1]).abs().amax(dim=1)
    return (torch.maximum(right, below) > EDGE).float().mean(dim=(1, 2))


class Score(NamedTuple):
    """A score of an image.

    Attributes:
        blocks: Blocks of the dense model that run before it; 0 for the embedding alone, -1 if it is of the pixels.
        of: Of the patch tokens then, or of the images.
    """

    blocks: int
    of: Callable[[Tensor], Tensor]


SCORES = {
    "pixel variance": Score(-1, lambda images: patch_variances(images, 196).mean(dim=1)),
    "edge density": Score(-1, edge_density),
    "embedding variance": Score(0, embedding_variance),
    "merge similarity, block 0": Score(1, merge_similarity),
    "merge similarity, block 1": Score(2, merge_similarity),
}
"""Those that need no graph. The entropy of the smallest graph's output is the other one."""


def scored(model: nn.Module, images: Tensor, score: Score) -> Tensor:
    """(B,), alone: with the blocks that run before it."""
    if score.blocks < 0:
        return score.of(images)
    return score.of(entering(model, images, score.blocks)[:, model.num_prefix_tokens :])


class Outputs(NamedTuple):
    """What graphs and scores give for all images.

    Attributes:
        logits: Name of a graph -> (images, classes).
        scores: Name of a score -> (images,).
    """

    logits: dict[str, np.ndarray[Any, Any]]
    scores: dict[str, np.ndarray[Any, Any]]


def evaluate(
    model: nn.Module, images: Tensor, graphs: dict[str, Graph], batch: int, cache: Path | None = None
) -> Outputs:
    """Runs all graphs and scores on all images; what is in `cache` for these weights and images is not run again."""
    transformer = lp.patching.find_vision_transformer(model)
    of = f"{weights_digest(model)} {tensor_digest(images)} {lp.__version__}"
    switch, found = VariantSwitch(transformer), Outputs({}, {})

    def over_batches(run: Callable[[Tensor], Tensor]) -> np.ndarray[Any, Any]:
        return torch.cat([run(part) for part in images.split(batch)]).float().numpy()

    def kept(name: str, spec: object, run: Callable[[Tensor], Tensor]) -> np.ndarray[Any, Any]:
        key = tensor_digest(torch.tensor(list(f"{of} {spec}".encode())))
        path = None if cache is None else cache / f"adaptive_{key}.npz"
        if path is not None and path.exists():
            with np.load(path, allow_pickle=False) as file:
                values: np.ndarray[Any, Any] = file["values"]
                return values
        print(name, flush=True)
        values = over_batches(run)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, values=values)
        return values

    with ready_to_run(transformer):
        try:
            for name, score in SCORES.items():
                spec = (name, score.blocks, EDGE)
                found.scores[name] = kept(name, spec, lambda part, score=score: scored(model, part, score))
            for name, graph in graphs.items():

                def run(part: Tensor, graph: Graph = graph) -> Tensor:
                    switch.to(graph.variant(transformer.depth))
                    logits: Tensor = model(part)
                    return logits

                found.logits[name] = kept(name, graph, run)
        finally:
            switch.off()
    return found


def relative_operations(
    model: nn.Module, image: Tensor, graphs: dict[str, Graph], fixed: float = 0.0
) -> dict[str, float]:
    """Multiply-accumulates of each graph and score over those of the dense model.

    With `fixed`, a share of the dense latency that no graph saves, as the fixed costs of blocks at batch 1.
    """
    transformer = lp.patching.find_vision_transformer(model)
    switch, counted = VariantSwitch(transformer), {}
    with ready_to_run(transformer):
        try:
            for name, graph in graphs.items():
                switch.to(graph.variant(transformer.depth))
                counted[name] = count_model_cost(transformer, image).gmacs
            switch.to(DENSE)
            dense = count_model_cost(transformer, image).gmacs
        finally:
            switch.off()
        pixels = PER_PIXEL * image[0].numel() / 1e9
        for name, score in SCORES.items():
            patches = entering(model, image, max(score.blocks, 0))[:, model.num_prefix_tokens :]
            with FlopCounterMode(display=False) as alone:
                score.of(image if score.blocks < 0 else patches)
            with FlopCounterMode(display=False) as whole:
                scored(model, image, score)
            counted[f"{name}, alone"] = alone.get_total_flops() / 2e9 + pixels
            counted[name] = whole.get_total_flops() / 2e9 + pixels
    relative = {name: gmacs / dense for name, gmacs in counted.items()}
    return {name: fixed + (1 - fixed) * value if name in graphs else value for name, value in relative.items()}


def measured(
    model: nn.Module, image: Tensor, graphs: dict[str, Graph], rounds: int, seconds: float, clock: str = "wall"
) -> dict[str, tuple[float, float, float]]:
    """Milliseconds of each graph and score, ratio to dense and its standard error, of one interleaved run."""
    transformer = lp.patching.find_vision_transformer(model)
    switch = VariantSwitch(transformer)
    current: list[Callable[[], object]] = []

    def prepare(name: str) -> None:
        switch.to(graphs[name].variant(transformer.depth) if name in graphs else DENSE)
        run: Callable[[], object] = lambda: transformer.run(image)  # noqa: E731
        if name == "entropy":
            run = lambda: entropy(logits)  # noqa: E731
        elif name.removesuffix(", alone") in SCORES:
            score = SCORES[name.removesuffix(", alone")]
            run = (
                (lambda: score.of(before[score.blocks]))
                if name.endswith(", alone")
                else lambda: scored(model, image, score)
            )
        current[:] = [run]

    names = ["dense", *graphs, *SCORES, *(f"{name}, alone" for name in SCORES), "entropy"]
    with ready_to_run(transformer):
        before = {each.blocks: image for each in SCORES.values()}
        for blocks in filter(lambda blocks: blocks >= 0, before):
            before[blocks] = entering(model, image, blocks)[:, model.num_prefix_tokens :]
        logits = transformer.run(image)
        timer = InterleavedTimer[str](
            prepare, lambda: current[0](), between_runs(image.device), reference="dense", clock=CLOCKS[clock]
        )
        try:
            timer.measure(names, min(FEWEST, rounds))
            timer.measure(names, rounds - FEWEST, CLOCKS[clock]() + seconds)
        finally:
            switch.off()
    stats = {name: timer.result(name) for name in names}
    return {name: (each.milliseconds, each.ratio, each.ratio_stderr) for name, each in stats.items()}


def entropy(logits: Any) -> Any:
    """(..., classes) -> (...): of the softmax, in nats."""
    shares = torch.as_tensor(logits).float().log_softmax(dim=-1)
    return -(shares.exp() * shares).sum(dim=-1)


def cost_of_score(relative: dict[str, float], score: str, graphs: Sequence[Graph]) -> float:
    """What a score adds to any of some graphs: where all of them begin with the blocks that it needs, itself only."""
    shared = all(graph.whole_blocks >= SCORES[score].blocks for graph in graphs)
    return relative[f"{score}, alone" if shared else score]
