"""How far outputs agree with those of the dense model, for each kind of output: classes, tags, numbers and features."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune._utils.validation import check, check_choice
from lightning_prune.errors import DataError
from lightning_prune.patching import VisionTransformer


def soft_agreement(dense: Tensor, pruned: Tensor) -> float:
    """Mean probability that the pruned model gives to the dense model's top-1 class, relative to dense.

    It needs no labels and followed true accuracy best of the proxies that were tried. 1 for the dense model itself.

    Args:
        dense: (B, K) logits of the dense model.
        pruned: (B, K) logits of the pruned model for the same images.
    """
    top1_class = dense.argmax(dim=-1, keepdim=True)
    pruned_probability = pruned.float().softmax(dim=-1).gather(1, top1_class).mean()
    dense_probability = dense.float().softmax(dim=-1).gather(1, top1_class).mean()
    return float(pruned_probability / dense_probability)


def tag_agreement(dense: Tensor, pruned: Tensor) -> float:
    """Mean probability that the pruned model gives to the dense model's decision about each tag, relative to dense.

    Tags are independent: each has a sigmoid of its own. A decision about which the pruned model is surer than dense
    counts as 1, so that it makes up for no other. Decisions for and against a tag have the same weight, as most tags
    are absent from most images. 1 for the dense model itself.
    """
    dense, pruned = dense.double(), pruned.double()
    ratios = []
    for decisions, sign in ((dense > 0, 1.0), (dense <= 0, -1.0)):
        if decisions.any():
            shares = (sign * pruned[decisions]).sigmoid() / (sign * dense[decisions]).sigmoid()
            ratios.append(float(shares.clamp(max=1).mean()))
    return sum(ratios) / len(ratios)


def r2(dense: Tensor, pruned: Tensor) -> float:
    """Coefficient of determination of the pruned model's numbers against those of the dense model; at least 0.

    The mean over the columns: 1 - (squared error) / (squared distance of the dense numbers from their mean). Columns in
    which the dense model gives every image the same number are left out.

    Args:
        dense: (B, K) numbers of the dense model.
        pruned: (B, K) numbers of the pruned model for the same images.

    Raises:
        DataError: If the dense model gives all images the same numbers.
    """
    dense, pruned = dense.double().flatten(1), pruned.double().flatten(1)
    variation = (dense - dense.mean(0)).square().sum(0)
    varies = variation > 1e-12 * dense.square().sum(0).clamp_min(1e-30)
    if not varies.any():
        raise DataError(
            f"The accuracy cannot be estimated: the dense model gives all {len(dense)} calibration images the same "
            "numbers. Pass other or more `calibration` images."
        )
    errors = (dense - pruned).square().sum(0)
    return max(float((1 - errors[varies] / variation[varies]).mean()), 0.0)


def feature_similarity(dense: Tensor, pruned: Tensor) -> float:
    """Mean cosine similarity of the features of the same images, without what all images have in common.

    The mean features of the dense model over the images are subtracted from both: often they are the larger part, and
    say nothing about an image.

    Args:
        dense: (B, ...) features of the dense model.
        pruned: (B, ...) features of the pruned model for the same images.
    """
    dense, pruned = dense.double().flatten(1), pruned.double().flatten(1)
    common = dense.mean(0) if len(dense) > 1 else torch.zeros_like(dense[0])
    if torch.equal(dense, pruned):
        return 1.0
    return float(F.cosine_similarity(dense - common, pruned - common, dim=1).mean())


def class_uncertainty(outputs: Tensor) -> Tensor:
    """(B,) how unsure a model is of the class: 1 minus the sum of the squared probabilities, 0 where it is sure.

    The Gini impurity. The divergence of the outputs of a pruned model is about proportional to it.

    Args:
        outputs: (B, K) logits of the dense model.

    Example:
        >>> import torch
        >>> from lightning_prune.profiling.output_kinds import class_uncertainty
        >>> class_uncertainty(torch.tensor([[0.0, 0.0], [20.0, 0.0]])).round(decimals=3).tolist()
        [0.5, 0.0]
    """
    return 1 - outputs.double().softmax(-1).square().sum(-1)


def _class_divergence(dense: Tensor, pruned: Tensor, scale: Tensor) -> float:
    return float(F.kl_div(pruned.log_softmax(-1), dense.log_softmax(-1), reduction="sum", log_target=True))


def _tag_divergence(dense: Tensor, pruned: Tensor, scale: Tensor) -> float:
    present = dense.sigmoid() * (F.logsigmoid(dense) - F.logsigmoid(pruned))
    absent = (-dense).sigmoid() * (F.logsigmoid(-dense) - F.logsigmoid(-pruned))
    return float((present + absent).sum())


def _number_divergence(dense: Tensor, pruned: Tensor, scale: Tensor) -> float:
    return float(((dense - pruned) / scale).square().mean(-1).sum() / 2)


def _feature_divergence(dense: Tensor, pruned: Tensor, scale: Tensor) -> float:
    dense, pruned = dense.flatten(1), pruned.flatten(1)
    return float(((dense - pruned).square().sum(1) / dense.square().sum(1).clamp_min(1e-12)).sum() / 2)


def patch_similarity(dense: Tensor, pruned: Tensor) -> float:
    """Mean cosine similarity of the features of dense models, over taps, positions and images.

    Args:
        dense: (B, D) of the dense model, as `lightning_prune.patching.models.dense_outputs.unit_features` makes them.
        pruned: (B, D) of the pruned model for the same images.
    """
    # 1 - cosine of vectors of length 1 is half of their squared distance, exactly 0 where they are the same.
    return float(1 - (dense.double() - pruned.double()).square().sum() / 2 / len(dense))


@dataclass(frozen=True)
class OutputKind:
    """A kind of output, and how outputs of that kind are compared.

    Attributes:
        label: What the agreement is called in tables and reasons.
        agreement: (dense, pruned) outputs -> the accuracy estimate, 1 where they are the same.
        divergence: (dense, pruned, scale) -> a distance that adds up over images, and nearly so over blocks; in nats
            for probabilities. `scale` (K,) is the typical size of each output.
        uncertainty: (B, K) outputs of the dense model -> (B,) what the divergence of an image is about proportional to;
            None where no such thing is known.
    """

    label: str
    agreement: Callable[[Tensor, Tensor], float]
    divergence: Callable[[Tensor, Tensor, Tensor], float]
    uncertainty: Callable[[Tensor], Tensor] | None = None


OUTPUT_KINDS = {
    "soft_agreement": OutputKind("soft agreement", soft_agreement, _class_divergence, class_uncertainty),
    "tag_agreement": OutputKind("tag agreement", tag_agreement, _tag_divergence),
    "r2": OutputKind("R2", r2, _number_divergence),
    "cosine": OutputKind("cosine similarity of features", feature_similarity, _feature_divergence),
    "patch_cosine": OutputKind("cosine similarity per patch", patch_similarity, _feature_divergence),
}
"""Proxy -> the outputs that it is for: exclusive classes, independent tags, numbers, features, those of each patch."""

PROXIES = ("auto", *OUTPUT_KINDS)

_PROBLEM_TYPES = {
    "single_label_classification": "soft_agreement",
    "multi_label_classification": "tag_agreement",
    "regression": "r2",
}
# Class names of losses and metrics, or their beginnings, since torchmetrics and timm need not be imported for them.
_EVIDENCE = {
    "soft_agreement": (
        "CrossEntropyLoss",
        "NLLLoss",
        "LabelSmoothingCrossEntropy",
        "SoftTargetCrossEntropy",
        "Multiclass",
    ),
    "tag_agreement": ("BCEWithLogitsLoss", "MultiLabel", "AsymmetricLossMultiLabel", "Multilabel"),
    "r2": ("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "MeanSquared", "MeanAbsolute", "R2Score"),
}


def choose_proxy(
    model: nn.Module, transformer: VisionTransformer, proxy: str = "auto", targets: Tensor | None = None
) -> str:
    """The proxy that fits the outputs of a model.

    Dense models, whose removed tokens are given back, have a proxy of their own. Of others, `"auto"` takes cosine
    similarity where there is no head. Otherwise it takes, in this order, what the configuration
    of a Hugging Face model calls its problem; what the losses and metrics among the modules are for, if they agree; R2
    for a single output; what the targets look like; soft agreement.

    Args:
        model: The module that contains the transformer.
        transformer: The Vision Transformer.
        proxy: `"auto"`, or one of `OUTPUT_KINDS`.
        targets: Of some images; see `proxy_of_targets`.

    Raises:
        ArgumentError: If there is no such proxy, or it does not fit the outputs.
    """
    check_choice("proxy", proxy, PROXIES)
    outputs, is_dense = transformer.num_classes, transformer.reader is not None and not transformer.reads_logits
    if is_dense:
        valid = proxy in ("auto", "patch_cosine", "cosine")
        check("proxy", proxy, "'auto', 'patch_cosine' or 'cosine' with `restore`", valid)
        return "patch_cosine" if proxy == "auto" else proxy
    check("proxy", proxy, "one for models without `restore`", proxy != "patch_cosine")
    if proxy != "auto":
        check("proxy", proxy, f"one that fits a model with {outputs or 'no'} logits", outputs >= _least_outputs(proxy))
        return proxy
    if not outputs:
        return "cosine"
    problem = getattr(getattr(transformer.root, "config", None), "problem_type", None)
    names = {type(module).__name__ for module in model.modules()}
    found = [kind for kind, known in _EVIDENCE.items() if any(name.startswith(known) for name in names)]
    said = _PROBLEM_TYPES.get(str(problem)) or (found[0] if len(found) == 1 else "")
    if said and outputs >= _least_outputs(said):
        return said
    return "r2" if outputs == 1 else proxy_of_targets(targets, outputs) or "soft_agreement"


def _least_outputs(proxy: str) -> int:
    return {"soft_agreement": 2, "tag_agreement": 1}.get(proxy, 0)


def proxy_of_targets(targets: Tensor | None, outputs: int) -> str:
    """The proxy for which the targets of a batch speak; empty where they do not say.

    Args:
        targets: (B,) class indices, or (B, K) tags, probabilities or numbers; None without.
        outputs: K, outputs of the model for an image.

    Example:
        >>> import torch
        >>> from lightning_prune.profiling.output_kinds import proxy_of_targets
        >>> proxy_of_targets(torch.tensor([3, 1]), 4), proxy_of_targets(torch.tensor([[1.0, 1, 0, 0]]), 4)
        ('soft_agreement', 'tag_agreement')
    """
    if targets is None or outputs < 2:
        return ""
    if targets.ndim == 1:
        if not targets.is_floating_point():
            return "soft_agreement"
        return "" if torch.equal(targets, targets.round()) else "r2"  # whole numbers may be classes in another dtype
    if targets.shape[1:] != (outputs,) or not len(targets):
        return ""
    values = targets.double()
    is_share = bool(((values >= 0) & (values <= 1)).all())
    if is_share and torch.allclose(
        values.sum(1), torch.ones(len(values), dtype=torch.float64, device=values.device), atol=1e-3
    ):
        return "soft_agreement"  # one-hot, smoothed or mixed labels
    is_binary = bool(((values == 0) | (values == 1)).all())
    return "tag_agreement" if is_binary else "r2"
