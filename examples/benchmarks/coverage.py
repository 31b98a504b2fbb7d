"""Checks pruning on a small model of every isotropic transformer of timm, and writes the results as CSV.

    python examples/benchmarks/coverage.py --output examples/results/coverage_timm.csv
    python examples/benchmarks/coverage.py --names 'vit_*dinov3*' 'beit*'

Every name is built by timm itself, with its own blocks, attention, positions, prefix tokens and pooling, but narrow (64
channels), shallow (4 blocks) and for small images, with weights that are far from a fresh model's. Checked are:

- `parity`: with a schedule that removes nothing the output has the same bits;
- `removal`: after `remove()` the output has the same bits, the state dict the same keys and values, and no module
  another class;
- `oracle`: pruning random tokens, in one block and in two, gives the output of the unpatched model in which no later
  block attends to the pruned tokens and nothing after the blocks reads them: their keys are masked to -inf.
  The figure is the largest relative error, in float64. Of models that need their removed tokens back, the tokens that
  were kept are compared, as they leave the last block;
- `pomt`: two reductions in a row with a fused token leave the right counts, a finite output, and for an image alone the
  same as in a batch.
"""

import argparse
import csv
import fnmatch
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lightning_prune as lp
from lightning_prune.patching import VisionTransformer, find_vision_transformer
from lightning_prune.patching.models.support import isotropic_names, support_of
from lightning_prune.reduction import RandomDrop
from lightning_prune.reduction.base import TokenSequence

DEPTH = 4
COLUMNS = ("name", "model", "block", "attention", "positions", "prefix", "pooling", "reducible", "parity", "removal")
COLUMNS += ("oracle", "pomt", "note")


def build_small(name: str, **more: Any) -> nn.Module:
    """The model of that name in small: the same classes and options, fewer channels, blocks and tokens.

    Options that a model does not have are dropped; a model whose parts fit only its own width keeps it.
    """
    entry = timm.model_entrypoint(name)
    patch = re.search(r"patch(\d+)", name)
    size = 5 * int(patch.group(1)) if patch else 96
    if "resnet" in name or "_s32" in name or "_r_s16" in name:
        size = 160
    if "deepseek_vit" in name:
        size = 84  # six patches of 14 pixels, as others have six of 16
    if "sapiens2" in name:
        more = {"num_kv_heads": None, **more}  # theirs is a list with one entry for each of their blocks
    options: dict[str, Any] = {"embed_dim": 64, "num_heads": 2, "depth": DEPTH, "img_size": size, "num_classes": 5}
    options |= more
    while True:
        try:
            return entry(pretrained=False, **options)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown.group(1) not in options:
                raise
            del options[unknown.group(1)]
        except AssertionError:
            if "embed_dim" not in options:
                raise
            del options["embed_dim"], options["num_heads"]


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives a model weights whose attention is far from uniform, and no parameter the value of a fresh one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "token" not in name and "patch_embed" not in name and "pos_embed" not in name:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
            elif parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width that a model takes."""
    encoder: Any = getattr(model, "encoder", None)
    embed: Any = getattr(model if encoder is None else encoder, "patch_embed", None)
    size = getattr(embed, "img_size", None) or ((96, 96) if "Gemma4" in type(model).__name__ else (80, 80))
    return int(size[0]), int(size[1])


class MaskedKeys(TorchFunctionMode):
    """Keeps all queries of a block from attending to some keys.

    In fused attention, in softmax over (B, H, N, N), and in the weights of the values, as talking heads add a bias.
    """

    def __init__(self, dropped: Tensor) -> None:
        super().__init__()
        self.dropped = dropped  # (N,) bool

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            mask = torch.zeros(1, 1, 1, len(self.dropped), dtype=args[0].dtype).masked_fill(self.dropped, float("-inf"))
            given = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            kwargs["attn_mask"] = mask if given is None else given + mask
            return func(*args[:3], **kwargs)
        if func is Tensor.softmax and args[0].ndim == 4 and args[0].shape[-1] == len(self.dropped):
            return func(args[0].masked_fill(self.dropped, float("-inf")), *args[1:], **kwargs)
        if func is F.dropout and args[0].ndim == 4 and args[0].shape[-1] == len(self.dropped):
            return func(args[0].masked_fill(self.dropped, 0.0), *args[1:], **kwargs)
        return func(*args, **kwargs)


@contextmanager
def masked(
    transformer: VisionTransformer, images: Tensor, removed: list[int], seed: int, slices: bool = True
) -> Iterator[Tensor]:
    """Makes an unpatched model compute the result of random pruning without shortening the sequence in its blocks.

    Yields:
        Indices of the tokens that are kept. Only they leave the last block if it `slices`.
    """
    counts: list[int] = []
    hook = transformer.blocks[transformer.first_prunable_block].register_forward_pre_hook(
        lambda _, args: counts.append(args[0].shape[1])
    )
    with torch.no_grad():
        transformer.root(images)
    hook.remove()
    left = torch.arange(counts[0])
    dropped = torch.zeros(counts[0], dtype=torch.bool)
    hooks = []
    for index, block in enumerate(transformer.blocks):
        if dropped.any():
            mode = MaskedKeys(dropped.clone())
            hooks.append(block.register_forward_pre_hook(lambda *_, mode=mode: mode.__enter__() and None))
            hooks.append(block.register_forward_hook(lambda *_, mode=mode: mode.__exit__(None, None, None)))
        if removed[index]:
            tokens = left[None, :, None].float()
            kept = (
                RandomDrop(seed)
                .reduce(TokenSequence(tokens, transformer.num_prefix_tokens, False), removed[index])
                .positions[0]
            )
            left = left[kept]
            dropped = torch.ones(counts[0], dtype=torch.bool)
            dropped[left] = False
    if slices:
        hooks.append(transformer.blocks[-1].register_forward_hook(lambda _, args, out: out[:, left]))
    try:
        yield left
    finally:
        for hook in hooks:
            hook.remove()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest value."""
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs().max() / expected.abs().max()).item()


def read(transformer: VisionTransformer, images: Tensor, tokens: Tensor | None) -> Tensor:
    """The output of a transformer, or some of the tokens that leave its last block."""
    seen: list[Tensor] = []
    hook = transformer.blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    output = transformer.root(images) if tokens is not None else None
    hook.remove()
    return transformer.root(images) if output is None or tokens is None else seen[0][:, tokens]


def schedules(transformer: VisionTransformer) -> list[list[int]]:
    """One reduction and two, in blocks that can reduce."""
    once, twice = [0] * transformer.depth, [0] * transformer.depth
    first = max(transformer.first_prunable_block, min(1, transformer.depth - 2))
    once[first] = twice[first] = 6
    twice[min(first + 2, transformer.depth - 1)] += 5
    return [once, twice]


@torch.no_grad()
def check(model: nn.Module, images: Tensor, restore: Any = None) -> dict[str, Any]:
    """All checks on one model; the model is left as it was.

    Args:
        model: The model.
        images: (B, channels, height, width).
        restore: As of `lightning_prune.patch`, for models that need it.
    """
    transformer = find_vision_transformer(model, restore=restore)
    model, images = model.double(), images.double()
    before = model(images)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with lp.patch(model, "pomt", [0] * transformer.depth, restore=restore):
        parity = torch.equal(model(images), before)
    worst = 0.0
    for removed in schedules(transformer):
        with masked(transformer, images, removed, seed=3, slices=restore is None) as left:
            expected = read(transformer, images, left if restore else None)
        with lp.patch(model, RandomDrop(seed=3), removed, restore=restore):
            worst = max(worst, relative_error(read(transformer, images, left if restore else None), expected))
        if relative_error(read(transformer, images, left if restore else None), expected) < 1e-6:
            raise AssertionError("removing tokens changes nothing, so the oracle proves nothing")
    counts: list[int] = []
    with lp.patch(model, "pomt", schedules(transformer)[1], restore=restore) as handle:
        hook = transformer.blocks[-1].register_forward_hook(lambda _, args, out: counts.append(out.shape[1]))
        pruned = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        hook.remove()
        halved = all(split is not None for split in handle._splits.values())
    after = model.state_dict()
    with transformer_tokens(transformer) as entered:
        removal = torch.equal(model(images), before)
    removal &= classes == [type(module) for module in model.modules()] and list(after) == list(weights)
    removal &= all(torch.equal(after[key], value) for key, value in weights.items())
    leaving = entered[0] if restore else entered[0] - 11
    pomt = bool(pruned.isfinite().all()) and counts[0] == leaving and relative_error(alone, pruned) < 1e-9
    reducible = "yes" if transformer.first_prunable_block == 0 else f"from block {transformer.first_prunable_block}"
    reducible = "with restore" if restore else reducible
    return {
        "reducible": reducible if halved else "after the block",
        "parity": parity,
        "removal": removal,
        "oracle": worst,
        "pomt": pomt,
    }


@contextmanager
def transformer_tokens(transformer: VisionTransformer) -> Iterator[list[int]]:
    """Records how many tokens enter the first block that can reduce."""
    seen: list[int] = []
    block = transformer.blocks[transformer.first_prunable_block]
    hook = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    try:
        yield seen
    finally:
        hook.remove()


def positions(model: nn.Module) -> str:
    """The form of positions, from the classes of the model's modules."""
    names = {type(module).__name__ for module in model.modules()}
    parts = [n for n in sorted(names) if re.search(r"rot|rope|relpos|relative|gpsa", n.lower()) and "Block" not in n]
    parts = [n for n in parts if "Attention" not in n and n != type(model).__name__]
    if getattr(model, "rope_mixed", False) or getattr(model, "rope_is_mixed", False):
        parts.append("mixed")
    if any(getattr(m, "relative_position_bias_table", None) is not None for m in model.modules()):
        parts.append("bias table")
    return " ".join(parts) or "added"


def describe(model: nn.Module) -> dict[str, Any]:
    """The properties in which models of one class differ."""
    block = next(iter(model.blocks)) if isinstance(getattr(model, "blocks", None), nn.Module) else nn.Identity()
    if hasattr(model, "local_up_to_layer"):
        block = model.blocks[-1]
    attentions = {type(m).__name__ for m in block.modules() if "Att" in type(m).__name__ or "SA" in type(m).__name__}
    return {
        "model": type(model).__name__,
        "block": type(block).__name__,
        "attention": " ".join(sorted(attentions)) or "in the block",
        "positions": positions(model),
        "prefix": getattr(model, "num_prefix_tokens", ""),
        "pooling": getattr(model, "global_pool", ""),
    }


def row(name: str) -> dict[str, Any]:
    """Builds and checks one name."""
    support = support_of(name)
    if support.reducible == "no":
        return {"name": name, "model": support.model, "reducible": "no", "note": support.reason}
    more = {"local_up_to_layer": 2} if support.model == "ConVit" else {}
    model = stir(build_small(name, **more))
    images = torch.randn(2, 3, *image_size(model), generator=torch.Generator().manual_seed(0))
    restore = "auto" if support.reducible == "with restore" else None
    found = {"name": name, **describe(model), **check(model, images, restore)}
    expected = {"pruning only": "yes", "from block 10": "from block 2"}  # of the small model
    agree = found["reducible"] == expected.get(support.reducible, support.reducible)
    if not agree:
        raise AssertionError(f"`reducible` must be {support.reducible!r}, got {found['reducible']!r}")
    return {**found, "reducible": support.reducible, "note": support.reason}


def passed(result: dict[str, Any]) -> bool:
    """Whether all checks of a row passed. The norms of DeepSeek's blocks compute in float32."""
    if result["reducible"] == "no":
        return True
    allowed = 1e-6 if result.get("model", "").startswith("Deepseek") else 1e-10
    return result.get("parity") is result.get("removal") is result.get("pomt") is True and result["oracle"] < allowed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=["*"], help="patterns of timm names")
    parser.add_argument("--output", type=Path, help="CSV file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    names = [n for n in isotropic_names() if any(fnmatch.fnmatch(n, pattern) for pattern in arguments.names)]
    rows, start = [], time.perf_counter()
    for name in names:
        try:
            rows.append(row(name))
        except Exception as error:
            rows.append({"name": name, "reducible": "error", "oracle": 1.0, "note": f"{type(error).__name__}: {error}"})
        if not passed(rows[-1]):
            print("WRONG:", rows[-1], flush=True)
    if arguments.output:
        with arguments.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for each in rows:
                error = each.get("oracle")
                writer.writerow(each if error is None else {**each, "oracle": f"{error:.1e}"})
    kinds = {kind: sum(each["reducible"] == kind for each in rows) for kind in sorted({e["reducible"] for e in rows})}
    worst = max((each["oracle"] for each in rows if "oracle" in each), default=0.0)
    wrong = sum(not passed(each) for each in rows)
    print(f"timm {timm.__version__}, {len(rows)} names in {time.perf_counter() - start:.0f} s: {kinds}")
    print(f"worst relative error of the oracle {worst:.1e}; wrong: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
