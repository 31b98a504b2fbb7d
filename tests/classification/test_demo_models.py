import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

from helpers.fresh import run_fresh
from lightning_prune.classification.demo_models import DIGITS_MODEL, DIGITS_WEIGHTS
from lightning_prune.classification.digits import ClutteredDigits


def test_timm_loads_the_weights_in_the_package() -> None:
    model = timm.create_model(DIGITS_MODEL, pretrained=True)
    weights = load_file(DIGITS_WEIGHTS)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert DIGITS_WEIGHTS.stat().st_size <= 6_000_000


def test_has_the_tokens_of_a_deit() -> None:
    model = timm.create_model(DIGITS_MODEL)
    assert model.pos_embed.shape == (1, 197, 96)
    assert len(model.blocks) == 12
    assert model.blocks[0].attn.head_dim == 32


def test_stored_accuracy_is_reproduced() -> None:
    figures = json.loads(DIGITS_WEIGHTS.with_suffix(".json").read_text())
    assert figures["held_out_top1"] >= 97.0
    assert figures["held_out_images"] == 2000
    model = timm.create_model(DIGITS_MODEL, pretrained=True).eval()
    samples = [ClutteredDigits("held_out")[index] for index in range(200)]
    with torch.inference_mode():
        predicted = model(torch.stack([image for image, _ in samples])).argmax(1)
    right = (predicted == torch.tensor([label for _, label in samples])).float().mean().item()
    assert abs(100 * right - figures["held_out_top1"]) < 4  # 200 images: about three standard errors


HEAVY = {"lightning", "pytorch_lightning", "torchmetrics", "jsonargparse", "sklearn", "matplotlib", "transformers"}


REGISTERED = f"""
import sys
names = ("vit_digits_patch4_56", "vit_cifar_patch4_56")
print([timm.create_model(name).num_classes for name in names], sorted({HEAVY!r} & set(sys.modules)))
"""


def test_names_are_registered_by_importing_the_package_after_timm() -> None:
    code = "import warnings; warnings.simplefilter('error'); import timm, lightning_prune\n"
    done = run_fresh(code + REGISTERED)
    assert done.returncode == 0, done.stderr  # and timm has not warned that a name is registered twice
    assert done.stdout.strip() == "[10, 10] []"


@pytest.mark.long
def test_names_are_registered_by_importing_the_package_before_timm() -> None:
    command = [sys.executable, "-W", "error", "-c", "import lightning_prune, timm\n" + REGISTERED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[10, 10] []"


def test_the_command_registers_when_a_command_runs() -> None:
    """That the command needs no torch before is tested with its other ones."""
    code = """
import sys
sys.argv = ["bin/lightning-prune", "--version"]
from lightning_prune.__main__ import main
main(["--version"])
import timm
assert not timm.is_model("vit_digits_patch4_56")
from lightning_prune.classification.image_classifier import ImageClassifier
assert timm.is_model("vit_digits_patch4_56")
"""
    done = run_fresh(code, lightning=True)
    assert done.returncode == 0, done.stderr
