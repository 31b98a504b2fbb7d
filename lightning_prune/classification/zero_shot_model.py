"""Zero-shot classification: an image tower of CLIP or SigLIP, and the text features of class names, as one model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_prune._utils.validation import check
from lightning_prune.classification.hugging_face import image_config, is_hugging_face_name, quiet_transformers
from lightning_prune.errors import ArgumentError, UnsupportedModelError, WeightsError

Tokenizer = Callable[[list[str]], Any]

TEMPLATES = ("a photo of a {}.",)


class ImageTower(nn.Module):
    """The image part of a CLIP or SigLIP model of Hugging Face.

    Args:
        vision_model: Returns an output with `pooler_output`.
        projection: From that to the space of texts and images; None where it is that already.
    """

    def __init__(self, vision_model: nn.Module, projection: nn.Module | None) -> None:
        super().__init__()
        self.vision_model = vision_model
        self.projection = nn.Identity() if projection is None else projection

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, channels, height, width), not normalised."""
        found: Tensor = self.projection(self.vision_model(pixel_values=images).pooler_output)
        return found


class ZeroShotModel(nn.Module):
    """A classifier whose head is the text features of its classes.

    It holds the image part of a model only. What runs and is measured is the whole of it, and what is judged are its
    logits, as those of any classifier.

    Args:
        tower: Returns features (B, D) of images.
        texts: (classes, D), the features of each class; they are normalised here.
        scale: By which cosine similarities are multiplied.
        bias: Added to them; that of SigLIP, whose logits are independent of each other.
        pretrained_cfg: How images are prepared, as timm's data config; empty if that is not known.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune.classification.zero_shot_model import ZeroShotModel
        >>> model = ZeroShotModel(nn.Flatten(), texts=torch.eye(4)[:3], scale=10.0)
        >>> model(torch.tensor([[[[3.0, 0.0], [4.0, 0.0]]]])).tolist()
        [[6.0, 0.0, 8.0]]
    """

    classifies_by_tower: ClassVar[bool] = True  # it, and not the transformer in it, is measured and judged

    texts: Tensor

    def __init__(
        self,
        tower: nn.Module,
        texts: Tensor,
        scale: float = 100.0,
        bias: float = 0.0,
        pretrained_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        valid = isinstance(texts, Tensor) and texts.ndim == 2 and len(texts) > 0 and bool(texts.isfinite().all())
        check("texts", texts, "finite features (classes, D)", valid)
        self.tower, self.scale, self.bias = tower, scale, bias
        self.num_classes = len(texts)
        self.pretrained_cfg = dict(pretrained_cfg or {})
        self.register_buffer("texts", nn.functional.normalize(texts.detach().clone(), dim=1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, height, width)."""
        found = self.tower(images)  # some towers of OpenCLIP also return their tokens
        features = nn.functional.normalize(found[0] if isinstance(found, tuple) else found, dim=1)
        return self.scale * features @ self.texts.T + self.bias


def zero_shot(
    model: str | nn.Module,
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    tokenizer: Tokenizer | None = None,
) -> ZeroShotModel:
    """Makes a classifier of a model of images and texts.

    Args:
        model: `hf:` and a folder that `save_pretrained` wrote, or a name on Hugging Face's Hub, of CLIP or SigLIP;
            `openclip:` and a name of OpenCLIP with the tag or file of its weights, as in
            `openclip:ViT-B-16/laion2b_s34b_b88k`; or such a model.
        class_names: What the classes are called, in the order of the labels.
        templates: Prompts with `{}` for the name. The features of a class are the normalised mean over its prompts.
        tokenizer: From a list of texts to the arguments of the text tower, or their ids (texts, length); that of the
            folder or name by default. Needed if `model` is a module.

    Returns:
        The classifier, in evaluation mode, on the device of the model.

    Raises:
        ArgumentError: If names or templates are missing or unusable, or there is no tokenizer.
        UnsupportedModelError: If the model has no image tower and text tower, as a single tower.
        WeightsError: If it cannot be loaded.
    """
    names = list(class_names) if isinstance(class_names, Sequence) and not isinstance(class_names, str) else []
    usable = bool(names) and all(isinstance(name, str) and name.strip() for name in names)
    check("class_names", class_names, "a list of names, one for each class", usable)
    check("class_names", class_names, "names that differ from each other", len(set(names)) == len(names))
    prompts = list(templates) if isinstance(templates, Sequence) and not isinstance(templates, str) else []
    usable = bool(prompts) and all(isinstance(prompt, str) and "{}" in prompt for prompt in prompts)
    check("templates", templates, "a list of prompts with {} for the name of a class", usable)
    whole: Any = model
    if isinstance(model, str):
        whole, own = _loaded(model, tokenizer is None)
        tokenizer = own if tokenizer is None else tokenizer
    is_openclip = all(hasattr(whole, part) for part in ("visual", "encode_text"))
    is_hugging_face = all(hasattr(whole, part) for part in ("vision_model", "text_model", "get_text_features"))
    if not (is_openclip or is_hugging_face):
        raise UnsupportedModelError(
            "`model` must have an image tower and a text tower, as CLIPModel and SiglipModel of Hugging Face, or CLIP "
            f"of OpenCLIP, got {type(whole).__name__}."
        )
    check("tokenizer", tokenizer, "a function from texts to tokens, if `model` is a module", callable(tokenizer))
    assert tokenizer is not None
    texts = text_features(whole, names, prompts, tokenizer)
    bias = getattr(whole, "logit_bias", None)
    scale, shift = float(whole.logit_scale.detach().exp()), 0.0 if bias is None else float(bias.detach())
    if is_openclip:
        return ZeroShotModel(whole.visual, texts, scale, shift, _openclip_config(whole.visual)).eval()
    tower = ImageTower(whole.vision_model, getattr(whole, "visual_projection", None))
    return ZeroShotModel(tower, texts, scale, shift, image_config(whole)).eval()


@torch.no_grad()
def text_features(model: Any, names: Sequence[str], templates: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """The features (classes, D) of class names: the normalised mean of the normalised features of their prompts.

    Args:
        model: With `get_text_features`, or `encode_text` of OpenCLIP.
        names: Of the classes.
        templates: With `{}` for the name.
        tokenizer: As of `zero_shot`.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        total = []
        for template in templates:
            tokens = tokenizer([template.replace("{}", name) for name in names])
            arguments = tokens if isinstance(tokens, Mapping) else {"input_ids": tokens}
            given = {key: torch.as_tensor(value).to(device) for key, value in arguments.items()}
            if hasattr(model, "encode_text"):  # of OpenCLIP
                output = model.encode_text(given["input_ids"])
            else:
                output = model.get_text_features(**given)
            features = output if isinstance(output, Tensor) else output.pooler_output
            total.append(nn.functional.normalize(features, dim=1))
    finally:
        model.train(was_training)
    return nn.functional.normalize(torch.stack(total).mean(dim=0), dim=1)


def _loaded(name: str, needs_tokenizer: bool) -> tuple[Any, Tokenizer | None]:
    """The model of a folder or name with both towers, and its tokenizer."""
    if name.startswith("openclip:"):
        return _from_openclip(name, needs_tokenizer)
    if not is_hugging_face_name(name):
        raise ArgumentError(f"`model` must be hf:NAME_OR_FOLDER, openclip:NAME/WEIGHTS or a module, got {name!r}.")
    source = str(Path(name.removeprefix("hf:")).expanduser())
    try:
        import transformers
    except ImportError as error:
        raise ArgumentError(
            f"`model` must be a module where transformers is not installed, got {name!r}. To install it: pip install "
            "'lightning-prune[huggingface]'."
        ) from error
    try:
        with quiet_transformers():
            model, report = transformers.AutoModel.from_pretrained(source, output_loading_info=True)
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source) if needs_tokenizer else None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(
            f"`model` must be hf: and a folder that `save_pretrained` wrote, with its tokenizer, or a name on Hugging "
            f"Face's Hub, got {name!r}: {line}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise WeightsError(f"`model` must name files with all keys, got {name!r}; missing: {', '.join(missing[:3])}.")
    if tokenizer is None:
        return model, None
    length = getattr(getattr(model.config, "text_config", None), "max_position_embeddings", 77)

    def tokens(texts: list[str]) -> Any:
        return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")

    return model, tokens


def _from_openclip(name: str, needs_tokenizer: bool) -> tuple[Any, Tokenizer | None]:
    """A model of OpenCLIP by its name and its weights, which may be downloaded, and its tokenizer."""
    try:
        import open_clip
    except ImportError as error:
        raise ArgumentError(
            f"`model` must be of Hugging Face, or a module, where OpenCLIP is not installed, got {name!r}. To install "
            "it: pip install 'lightning-prune[openclip]'."
        ) from error
    kind, _, weights = name.removeprefix("openclip:").partition("/")
    if kind not in open_clip.list_models():
        raise ArgumentError(f"`model` must name a model of OpenCLIP, such as openclip:ViT-B-16/openai, got {name!r}.")
    if not weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(kind)[:4]) or "a file"
        raise ArgumentError(f"`model` must say its weights after a slash: {tags}, ...; got {name!r}.")
    try:
        known = open_clip.get_pretrained_cfg(kind, weights) or {}  # what weights were trained with, names do not say
        model = open_clip.create_model(kind, pretrained=weights, force_quick_gelu=bool(known.get("quick_gelu")))
        tokenizer = open_clip.get_tokenizer(kind) if needs_tokenizer else None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(f"`model` must name weights of OpenCLIP that can be loaded, got {name!r}: {line}") from error
    return model, tokenizer


def _openclip_config(visual: Any) -> dict[str, Any]:
    """How images are prepared for a tower of OpenCLIP, as timm's data config."""
    found = getattr(visual, "preprocess_cfg", None) or {}
    size = found.get("size") or getattr(visual, "image_size", None)
    if size is None:
        return {}
    height, width = (size, size) if isinstance(size, int) else size
    config = {"input_size": (3, int(height), int(width)), "crop_pct": 1.0, "crop_mode": "center"}
    config["interpolation"] = found.get("interpolation", "bicubic")
    if found.get("resize_mode") == "squash":
        config["crop_mode"] = "squash"
    return config | {name: tuple(found[name]) for name in ("mean", "std") if name in found}
