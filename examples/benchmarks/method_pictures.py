"""The pictures of the documentation: what each method does to two images, a simulated profile, and those of results.

For each method the embedded digits model removes the same numbers of tokens from the same two images, each method in
its usual form: in block 3, before block 0, or a few in every block. `vwt-inter` has thresholds instead of numbers, as
the image decides. The profile is of a simulated device, so it is the same everywhere. The pictures of committed results
are made small.

    python examples/benchmarks/method_pictures.py --output docs/pictures
    python examples/benchmarks/method_pictures.py --output docs/pictures --only tome pomt
"""

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.classification.digits import MEAN, STD, ClutteredDigits
from lightning_prune.profiling import SimulatedDevice, simulate_latency
from lightning_prune.reduction import VWTInter
from lightning_prune.report.token_maps import plot_tokens

RESULTS = Path(__file__).resolve().parents[1] / "results"
METHODS = [
    *("pomt", "pomt-nearest", "tome", "pitome", "diffrate-merge", "soft-merge", "topk", "evit"),
    *("shift", "resize", "random", "vwt-intra", "vwt-inter"),
]
REMOVED = (52, 96, 132)  # of 196: what is left is a grid for `resize`, 12 x 12, 10 x 10 and 8 x 8
THRESHOLDS = (0.02, 0.1, 0.3)
WORDS, LEARNED_FROM = 100, 256  # visual words, and the number of training images that they are learned from
IMAGES = (1, 5)  # of the held-out digits, a 3 and a 5
COPIES = {
    "digits_profile": "digits_cpu/profile.png",
    "cifar10_batch_1": "cifar10_cpu/batch_1/pareto.png",
    "cifar10_batch_16": "cifar10_cpu/batch_16/pareto.png",
    "floor": "benchmarks_cpu/floor/floor.png",
    "scaling": "benchmarks_cpu/scaling/scaling.png",
    "segment_digits": "segment_digits/pareto.png",
    "runtime_curves": "runtimes/curves.png",
}
_COLOURS, _WIDTH, _DPI = 128, 900, 110


def made_small(source: Path, target: Path) -> Path:
    """Writes a picture with few colours, and narrower if need be, which a page loads quickly."""
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    if picture.width > _WIDTH:
        size = (_WIDTH, round(picture.height * _WIDTH / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    picture.quantize(_COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(target, optimize=True)
    return target


def traces_of(model: nn.Module, images: Tensor, method: str) -> dict[str, lp.patching.TokenTrace]:
    """The traces of one method by the title of their column."""
    if method != "vwt-inter":
        return {f"{count} removed": lp.trace_tokens(model, images, method, count) for count in REMOVED}
    digits = ClutteredDigits("train")
    known = torch.stack([digits[index][0] for index in range(LEARNED_FROM)])
    words = lp.learn_vocabulary([known], patch_size=4, words=WORDS, mean=[MEAN], std=[STD], progress=False)
    found = {}
    for threshold in THRESHOLDS:
        found[f"threshold {threshold}"] = lp.trace_tokens(model, images, VWTInter(words, threshold))
    return found


def draw_method(model: nn.Module, images: Tensor, method: str, folder: Path) -> Path:
    """Draws the picture of one method."""
    path = folder / f"method_{method}.png"
    plot_tokens(images, traces_of(model, images, method), MEAN, STD).savefig(path, dpi=_DPI)
    return made_small(path, path)


def draw_simulated_profile(model: nn.Module, images: Tensor, folder: Path) -> Path:
    """Draws the latency of a device that works in tiles and waves, at batch 4."""
    device = SimulatedDevice(multiprocessors=9, tile=64)
    profile = simulate_latency(model, images[:1].expand(4, -1, -1, -1), device)
    path = folder / "simulated_profile.png"
    lp.report.plot(profile, path)
    return made_small(path, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--only", nargs="+", choices=METHODS, help="these methods, and nothing else")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    model = timm.create_model("vit_digits_patch4_56", pretrained=True).eval()
    digits = ClutteredDigits("held_out")
    images = torch.stack([digits[index][0] for index in IMAGES])
    for method in args.only or METHODS:
        print(draw_method(model, images, method, args.output))
    if args.only is None:
        print(draw_simulated_profile(model, images, args.output))
        for name, source in COPIES.items():
            print(made_small(RESULTS / source, args.output / f"{name}.png"))


if __name__ == "__main__":
    main()
