"""Versions and optional features, with made packages."""

from importlib.metadata import PackageNotFoundError

import pytest

from lightning_prune._utils import installed_packages as module
from lightning_prune._utils.installed_packages import library_versions, missing_features
from lightning_prune._utils.readings import NotReadable

DECLARED = [
    "torch>=2.12",
    "winonly>=1; sys_platform == 'no-such-system'",
    'onnx>=1.20; extra == "onnx"',
    'onnxruntime>=1.24; extra == "onnx"',
    'zeus>=0.16; extra == "energy"',
    'torchao>=0.18; extra == "int8"',
    'pytest>=8; extra == "dev"',
    'mkdocs>=1.6; extra == "docs"',
    'lightning_prune[energy,onnx]; extra == "all"',
    'lightning-prune[all]; extra == "dev"',
    'brandnew; extra == "later"',
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    packages = {"torch": "2.14.1+cu130", "onnx": "1.19", "zeus": "0.16.0", "onnxruntime-gpu": "1.30"}

    def version(name: str) -> str:
        if name not in packages:
            raise PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(module, "version", version)
    monkeypatch.setattr(module, "requires", lambda name: DECLARED)
    return packages


@pytest.mark.usefixtures("installed")
def test_what_is_missing_for_what() -> None:
    found = missing_features()
    assert found["required packages"] == "ready"
    assert found["joules per image"] == "ready"
    onnx = str(found["ONNX and ONNX Runtime"])
    assert "pip install 'lightning-prune[onnx]'" in onnx
    assert "onnx must be >=1.20, got 1.19" in onnx
    assert "onnxruntime is not installed" in onnx
    assert "lightning-prune[int8]" in str(found["int8 in PyTorch"])
    assert "brandnew" in str(found["later"])
    assert "pip install executorch" in str(found["ExecuTorch"])
    assert "pytest" not in str(found)
    assert not {"all", "dev", "docs"} & set(found)


def test_required_packages_that_are_too_old_are_named(installed: dict[str, str]) -> None:
    installed["torch"] = "2.3"
    assert missing_features()["required packages"] == "torch must be >=2.12, got 2.3"


def test_a_source_tree_that_is_not_installed(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "requires", requires)
    assert isinstance(missing_features()["required packages"], NotReadable)


@pytest.mark.usefixtures("installed")
def test_versions() -> None:
    found = library_versions()
    assert (found["torch"], found["onnx"], found["openvino"]) == ("2.14.1+cu130", "1.19", "not installed")
    assert found["onnxruntime-gpu"] == "1.30"
    assert "onnxruntime-openvino" not in found
