"""Zero-shot classification as a LightningModule, with the accuracy of the worst group."""

from collections.abc import Sequence

from torch import nn

from lightning_prune._utils.validation import check
from lightning_prune.classification.image_classifier import ImageClassifier
from lightning_prune.classification.zero_shot_model import TEMPLATES, Tokenizer, zero_shot


class ZeroShotClassifier(ImageClassifier):
    """Classifies images by the names of their classes, with CLIP or SigLIP; no training.

    Text features are computed once. The image tower is what is pruned and measured, and logits, accuracy and all that
    `ImageClassifier` logs are those of the similarities, the accuracy of groups of images included.

    Args:
        model: `hf:` and a folder or a name of a CLIP or SigLIP model of Hugging Face, `openclip:NAME/WEIGHTS` of
            OpenCLIP, or such a model.
        class_names: What the classes are called, in the order of the labels.
        templates: Prompts with `{}` for the name of a class.
        tokenizer: As of `lightning_prune.classification.zero_shot`.
        group_names: What the groups are called, in the order of their numbers in a batch; None for those of the
            dataset, if it has any.
        warmup: Number of batches at the start that are left out of the times.

    Raises:
        ArgumentError, UnsupportedModelError, WeightsError: As `zero_shot`.
        DataError: In a run, if groups were named and a batch has none, or numbers that are no groups.

    Example:
        >>> from lightning_prune import ZeroShotClassifier
        >>> names, prompts = ["landbird", "waterbird"], ["a photo of a {}."]
        >>> # module = ZeroShotClassifier("hf:openai/clip-vit-base-patch16", names, prompts)
    """

    def __init__(
        self,
        model: str | nn.Module,
        class_names: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        tokenizer: Tokenizer | None = None,
        group_names: Sequence[str] | None = None,
        warmup: int = 2,
    ) -> None:
        names = list(group_names) if isinstance(group_names, Sequence) and not isinstance(group_names, str) else []
        usable = bool(names) and all(isinstance(name, str) and name for name in names)
        check("group_names", group_names, "a list of names or None", group_names is None or usable)
        super().__init__(zero_shot(model, class_names, templates, tokenizer), warmup=warmup)
        self.class_names = tuple(class_names)
        self.group_names = tuple(names) or None
