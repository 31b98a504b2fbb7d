"""Installed packages: versions, and what optional features of this package still need. No library is imported."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lightning_prune._utils.readings import NotReadable

NOT_INSTALLED = "not installed"
PACKAGE = "lightning-prune"

_LIBRARIES: tuple[str, ...] = (
    "torch",
    "torchvision",
    "lightning",
    "pytorch-lightning",
    "timm",
    "torchmetrics",
    "numpy",
    "transformers",
)
_LIBRARIES += ("open_clip_torch", "torchao", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "executorch")
_LIBRARIES += ("tensorrt", "zeus")
# Builds of the same library under another name: named only where they are installed.
_OTHER_BUILDS: tuple[str, ...] = (
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-training",
)
_OTHER_BUILDS += ("tensorrt-cu12", "tensorrt-cu13", "torch-tensorrt", "triton", "intel-extension-for-pytorch")
_FEATURES = {
    "onnx": "ONNX and ONNX Runtime",
    "openvino": "OpenVINO",
    "int8": "int8 in PyTorch",
    "huggingface": "models of Hugging Face",
    "openclip": "models of OpenCLIP",
    "energy": "joules per image",
}
_FOR_DEVELOPERS = ("dev", "docs", "notebooks")
_IN_NO_EXTRA = {"ExecuTorch": "executorch"}


def package_version(name: str) -> str | None:
    """The version of an installed package; None if it is not installed.

    Args:
        name: Of the distribution.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def library_versions() -> dict[str, str]:
    """Name -> version of the libraries that latencies and outputs may depend on, or that it is not installed."""
    found = {name: package_version(name) or NOT_INSTALLED for name in _LIBRARIES}
    others = {name: package_version(name) for name in _OTHER_BUILDS}
    return found | {name: number for name, number in others.items() if number is not None}


def missing_features() -> dict[str, str | NotReadable]:
    """For each optional feature, that it is ready, or what is missing and how to install it."""
    try:
        declared = [Requirement(each) for each in requires(PACKAGE) or ()]
    except PackageNotFoundError:
        reason = NotReadable(f"{PACKAGE} is not installed as a package, so its requirements are not known")
        return {"required packages": reason}
    extras = _by_extra(declared)
    found: dict[str, str | NotReadable] = {}
    unmet = list(_unmet(extras.pop("", [])))
    found["required packages"] = "ready" if not unmet else f"{'; '.join(unmet)}"
    for extra, requirements in extras.items():
        if extra not in _FOR_DEVELOPERS:
            unmet = list(_unmet(requirements))
            needed = f"needs pip install '{PACKAGE}[{extra}]': {'; '.join(unmet)}"
            found[_FEATURES.get(extra, extra)] = needed if unmet else "ready"
    for feature, package in _IN_NO_EXTRA.items():
        installed = package_version(package) is not None
        found[feature] = "ready" if installed else f"needs pip install {package}: {package} is not installed"
    return found


def _by_extra(declared: list[Requirement]) -> dict[str, list[Requirement]]:
    """Extra -> its requirements on this system; the empty name has those of all.

    An extra that only joins other extras of this package is left out.
    """
    extras: dict[str, list[Requirement]] = {"": []}
    names = [*_FEATURES, *_FOR_DEVELOPERS]
    for each in declared:
        if canonicalize_name(each.name) == PACKAGE:
            continue
        if each.marker is None or each.marker.evaluate({"extra": ""}):
            extras[""].append(each)
            continue
        for name in [*names, *_extras_in(str(each.marker), names)]:
            if each.marker.evaluate({"extra": name}):
                extras.setdefault(name, []).append(each)
    return extras


def _extras_in(marker: str, known: list[str]) -> list[str]:
    """An extra that a marker names and that is not known here, in the form `extra == "name"`."""
    name = marker.partition('extra == "')[2].partition('"')[0]
    return [name] if name and name not in known else []


def _unmet(requirements: list[Requirement]) -> Iterator[str]:
    for each in requirements:
        installed = package_version(each.name)
        if installed is None:
            yield f"{each.name} is {NOT_INSTALLED}"
        elif not each.specifier.contains(installed, prereleases=True):
            yield f"{each.name} must be {each.specifier}, got {installed}"
