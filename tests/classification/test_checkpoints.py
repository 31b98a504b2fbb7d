from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from helpers.models import disturb, tiny_hugging_face_vit
from lightning_prune.classification.checkpoints import load_weights, read_weights
from lightning_prune.errors import FileFormatError, WeightsError


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("holder", [None, "state_dict", "model", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.", "model._orig_mod.", "module.model."])
def test_reads_files_of_training_scripts(tmp_path: Path, holder: str | None, prefix: str) -> None:
    source, target = net(), net()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save({holder: state, "epoch": 3} if holder else state, path)
    load_weights(target, path)
    assert same(source, target)


def test_reads_safetensors(tmp_path: Path) -> None:
    source, target = net(), net()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_weights(target, tmp_path / "weights.safetensors")
    assert same(source, target)


def test_other_parts_of_a_lightning_module_are_left_out(tmp_path: Path) -> None:
    source, target = net(), net()
    state = {f"model.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "teacher.weight": torch.ones(1)}}, tmp_path / "last.ckpt")
    load_weights(target, tmp_path / "last.ckpt")
    assert same(source, target)


def test_a_submodule_called_model_keeps_its_prefix(tmp_path: Path) -> None:
    source, target = (nn.ModuleDict({"model": net()}) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    load_weights(target, tmp_path / "weights.pth")
    assert same(source, target)


def test_mismatch_names_keys_and_shapes_and_keeps_the_model(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "weights.pth"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = net(width=5).state_dict()
    del state["1.bias"]
    state["extra"] = torch.ones(1)
    torch.save(state, path)
    with pytest.raises(WeightsError) as error:
        load_weights(model, path)
    message = str(error.value)
    assert message.startswith("`weights` ")
    assert str(path) in message
    counts = [part.split(":")[0] for part in message.partition(" with ")[2].split("; ")]
    assert counts == ["1 missing", "1 unexpected", "3 with another shape"]
    for key in ("missing: 1.bias", "unexpected: extra", "0.weight (model (4, 3), file (5, 3))"):
        assert key in message
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_many_mismatched_keys_are_counted(tmp_path: Path) -> None:
    torch.save({f"layer{number}": torch.ones(1) for number in range(9)}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"4 missing: 0.weight, 0.bias, 1.weight and 1 more; 9 unexpected: layer0,"):
        load_weights(net(), tmp_path / "weights.pth")


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileFormatError, match=rf"`weights`.*got {path}\.$"):
            read_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_rejected(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    state = net().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match=rf"`weights`.*got {path}: "):
        read_weights(path)


def test_pickled_objects_are_not_executed(tmp_path: Path) -> None:
    torch.save({"state_dict": net().state_dict(), "path": tmp_path}, tmp_path / "weights.pth")
    with pytest.raises(FileFormatError, match=r"`weights`.*weights\.pth: "):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {"state_dict": {}}])
def test_a_file_without_tensors_is_rejected(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(FileFormatError, match=r"`weights`.*tensors by name.*weights\.pth"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("prefix", ["net.", "model.vit.", "module."])
def test_a_prefix_of_all_keys_is_removed_and_said(tmp_path: Path, prefix: str) -> None:
    source, target, path = net(), net(), tmp_path / "mine.ckpt"
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(2)}}, path)
    with pytest.warns(UserWarning, match=rf"'{prefix}' of 4 keys in {path}.*1 without.*loss\.weight"):
        load_weights(target, path)
    assert same(source, target)


def test_a_checkpoint_of_an_image_classifier_is_loaded_without_a_word(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    source, target = net(), net()
    torch.save({"state_dict": {f"model.{key}": value for key, value in source.state_dict().items()}}, tmp_path / "a")
    load_weights(target, tmp_path / "a")
    assert same(source, target)
    assert not recwarn.list


def test_a_file_of_two_models_that_fit_is_rejected(tmp_path: Path) -> None:
    state = {f"{prefix}.{key}": value for prefix in ("student", "teacher") for key, value in net().state_dict().items()}
    torch.save(state, tmp_path / "both.pth")
    with pytest.raises(WeightsError, match=r"`weights`.*both\.pth with 2.*student\., teacher\."):
        load_weights(net(), tmp_path / "both.pth")
    source, target = net(), net()
    state |= {f"model.{key}": value for key, value in source.state_dict().items()}
    torch.save(state, tmp_path / "both.pth")
    with pytest.warns(UserWarning, match=r"'model\.'"):
        load_weights(target, tmp_path / "both.pth")
    assert same(source, target)


def test_mismatched_keys_are_named_without_the_prefix(tmp_path: Path) -> None:
    state = {f"net.{key}": value for key, value in net(width=5).state_dict().items() if key != "1.bias"}
    torch.save(state, tmp_path / "weights.pth")
    with (
        pytest.warns(UserWarning, match=r"'net\.'"),
        pytest.raises(WeightsError, match=r"with 1 missing: 1\.bias; 3 with another shape: 0\.weight \(model \(4, 3\)"),
    ):
        load_weights(net(), tmp_path / "weights.pth")


def saved_vit(folder: Path, labels: int = 3, **options: object) -> nn.Module:
    """A classifier of Hugging Face whose `save_pretrained` wrote the folder, with the keys of older versions."""
    source = disturb(tiny_hugging_face_vit("ViTForImageClassification", num_labels=labels, num_hidden_layers=2))
    assert isinstance(source, transformers.PreTrainedModel)
    source.save_pretrained(folder, **options)
    return source


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_folders_and_files_of_hugging_face(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved_vit(tmp_path)
    capsys.readouterr()
    target = tiny_hugging_face_vit("ViTForImageClassification", num_labels=3, num_hidden_layers=2)
    assert set(read_weights(tmp_path)) != set(target.state_dict())  # renamed while loading
    load_weights(target, tmp_path / name)
    assert same(source, target)
    assert capsys.readouterr() == ("", "")


def test_a_folder_with_several_files(tmp_path: Path) -> None:
    source = saved_vit(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    target = tiny_hugging_face_vit("ViTForImageClassification", num_labels=3, num_hidden_layers=2)
    load_weights(target, tmp_path)
    assert same(source, target)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(FileFormatError, match=r"`weights`.*got .*index\.json"):
        load_weights(target, tmp_path)


def test_mismatches_with_a_model_of_hugging_face_are_named_by_its_keys(tmp_path: Path) -> None:
    saved_vit(tmp_path, labels=5)
    target = tiny_hugging_face_vit("ViTForImageClassification", num_labels=3, num_hidden_layers=3)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(target, tmp_path)
    message = str(error.value)
    assert "16 missing: vit.layers.2." in message
    assert "2 with another shape: classifier.bias (model (3,), file (5,)), classifier.weight (" in message
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_a_folder_without_weights_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=rf"`weights`.*got {tmp_path}\."):
        read_weights(tmp_path)


def test_a_missing_file_says_where_relative_paths_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileFormatError, match=r"`weights` .* got examples/none\.pth") as relative:
        read_weights("examples/none.pth")
    assert str(tmp_path) in str(relative.value)
    with pytest.raises(FileFormatError, match=r"`weights` .*none\.pth\.$"):
        read_weights(tmp_path / "none.pth")
