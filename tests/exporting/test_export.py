"""`export` and `load_exported`: the folder, the outputs of what is shipped, and everything that is refused."""

import errno
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from helpers.data import noise_images
from helpers.fresh import run_fresh
from helpers.models import tiny_hugging_face_vit, tiny_vit
from lightning_prune.exporting import ExportReport
from lightning_prune.exporting.exported_graph import graph_of
from lightning_prune.exporting.onnx_format import OnnxFormat
from lightning_prune.exporting.registry import FORMATS
from lightning_prune.exporting.torch_format import TorchExportFormat
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.runtimes import onnx_conversion
from lightning_prune.runtimes.graph_export import export_graph

IMAGES = noise_images(2)
CALIBRATION = noise_images(9, seed=1)
FILES = {"schedule.yaml", "sample.npz", "preprocessing.json", "run.py", "README.md", "report.json"}
SLOW = {  # compiles for a minute; needs a package that no extra installs
    name: [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore:AOTInductor compiles")]
    for name in ("aotinductor", "executorch")
}
QUICK: dict[str, Any] = {"format": "torch-export", "rounds": 0}
SCHEDULE = lp.Schedule([4, 0], "tome")


def tiny(depth: int = 2, **options: Any) -> Any:
    return tiny_vit(depth=depth, embed_dim=24, noise=0.3, **options)


def outputs(model: nn.Module, images: Tensor = CALIBRATION) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(images)
    return found


@pytest.fixture(scope="module")
def patched() -> Any:
    model = tiny()
    lp.patch(model, SCHEDULE)
    return model


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SLOW.get(name, ())) for name in FORMATS])
def report(request: Any, patched: Any, tmp_path_factory: Any) -> ExportReport:
    """Of the patched model in each format; the latency is measured in one of them."""
    if request.param == "executorch":
        pytest.importorskip("executorch")
    rounds = 3 if request.param == "torch-export" else 0
    folder = tmp_path_factory.mktemp("exports") / "deep" / request.param
    before = [dict(vars(module)) for module in patched.modules()]
    made: ExportReport = lp.export(
        patched, folder, IMAGES, format=request.param, calibration=CALIBRATION, rounds=rounds
    )
    assert [dict(vars(module)) for module in patched.modules()] == before
    return made


class TestFolder:
    def test_files(self, report: ExportReport) -> None:
        assert {path.name for path in report.folder.iterdir()} == FILES | set(report.files)
        assert [path.name for path in report.folder.parent.iterdir()] == [report.folder.name]
        assert report.model == report.folder / FORMATS[report.format].files[0]
        assert lp.Schedule.load(report.folder / "schedule.yaml") == SCHEDULE
        assert json.loads((report.folder / "preprocessing.json").read_text())["mean"] is None

    def test_no_path_of_this_machine_is_in_it(self, report: ExportReport) -> None:
        root = str(Path(lp.__file__).parents[1])
        for path in report.folder.iterdir():
            if report.format == "aotinductor" and path == report.model:
                continue  # messages of assertions in PyTorch's headers name these
            content = path.read_bytes()
            assert root.encode() not in content, path.name
            assert b"site-packages" not in content, path.name

    def test_report(self, report: ExportReport) -> None:
        assert report.max_relative_error < 1e-5
        assert (report.parity.images, report.parity.top1_agreement, report.parity.over_tolerance) == (9, 1.0, 0)
        assert (report.method, report.tokens, report.classes) == ("tome", (13, 13), 5)
        assert (report.input_shape, report.batch, report.precision) == ((2, 3, 32, 32), "static", "float32")
        assert sum(report.operators.values()) > 30
        assert report.versions["torch"] == version("torch")
        assert ExportReport.read(report.folder) == report
        if report.format == "torch-export":
            assert report.latency is not None
            assert report.latency.speedup == pytest.approx(report.latency.dense_ms / report.latency.exported_ms)
            assert report.latency.context["runtime"] == "torch"
        if report.format == "onnx":
            assert report.opset == 20
            assert {"MatMul", "Softmax"} <= set(report.operators)
            assert not {"Loop", "If"} & set(report.operators)

    def test_outputs_of_the_shipped_file(self, report: ExportReport, patched: Any) -> None:
        exported = lp.load_exported(report.folder)
        torch.testing.assert_close(exported(CALIBRATION), outputs(patched), rtol=1e-4, atol=1e-4)
        assert exported.num_classes == 5
        with pytest.raises(lp.ArgumentError, match=r"`images` must be \(B, 3, 32, 32\).* got \(2, 3, 40, 32\)"):
            exported(torch.zeros(2, 3, 40, 32))

    def test_sample(self, report: ExportReport, patched: Any) -> None:
        sample = np.load(report.folder / "sample.npz")
        assert np.array_equal(sample["images"], CALIBRATION[:2].numpy())
        np.testing.assert_allclose(sample["expected"], outputs(patched, CALIBRATION[:2]).numpy(), rtol=1e-5)

    def test_runner_needs_no_torch(self, report: ExportReport) -> None:
        code = "import runpy, sys; sys.modules.update(dict.fromkeys({})); runpy.run_path(sys.argv[1])"
        path = str(report.folder / "run.py")
        if report.format in ("torch-export", *SLOW):
            done: Any = run_fresh(code.format(["lightning_prune", "timm"]), path)
        else:
            run = [sys.executable, "-c", code.format(["torch", "lightning_prune", "timm"]), path]
            done = subprocess.run(run, capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == 0, done.stderr
        assert "largest relative error" in done.stdout
        assert len((report.folder / "run.py").read_text().splitlines()) < 26

    def test_readme_has_the_commands(self, report: ExportReport) -> None:
        text = (report.folder / "README.md").read_text()
        expected = {
            "onnx": ["trtexec --onnx=model.onnx", "benchmark_app -m model.onnx", "onnxruntime_perf_test"],
            "openvino": ["benchmark_app -m model.xml"],
            "torch-export": [],
        }
        commands = [line for line in text.splitlines() if line.split(" ")[0].endswith(("exec", "app", "test"))]
        assert [command for command in commands if not command.startswith(tuple(expected.get(report.format, [])))] == []
        assert len(commands) == len(expected.get(report.format, []))
        for command in commands:  # benchmark_app ends with an error where both are given
            assert not ("-hint latency" in command and "-nstreams" in command)

    @pytest.mark.parametrize("change", ["changed", "gone"])
    def test_a_changed_file_is_refused(self, report: ExportReport, change: str) -> None:
        path = report.folder / list(report.files)[-1]
        content = path.read_bytes()
        try:
            path.write_bytes(content + b" ") if change == "changed" else path.unlink()
            with pytest.raises(lp.FileFormatError, match=rf"{path.name}.*(SHA-256|No such file)"):
                lp.load_exported(report.folder)
        finally:
            path.write_bytes(content)

    def test_an_existing_folder_is_kept(self, report: ExportReport, patched: Any) -> None:
        with pytest.raises(lp.ArgumentError, match="`output` must be a new or empty folder"):
            lp.export(patched, report.folder, IMAGES, **QUICK)
        assert ExportReport.read(report.folder) == report


@pytest.mark.long
def test_any_number_of_images(tmp_path: Path) -> None:
    model = tiny()
    plan = lp.Schedule([5, 0], "topk")
    report = lp.export(model, tmp_path / "any", IMAGES[:1], plan=plan, batch="dynamic", **QUICK)
    exported = lp.load_exported(tmp_path / "any")
    with lp.patch(model, "topk", [5, 0]):
        torch.testing.assert_close(exported(CALIBRATION), outputs(model), rtol=1e-4, atol=1e-4)
    assert (report.batch, report.opset) == ("dynamic", None)


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in FORMATS if n != "executorch"])
def test_a_file_for_any_number_of_images_is_loaded_for_each(name: str, tmp_path: Path) -> None:
    """ONNX Runtime makes a dimension static by its name; one that it does not know would change nothing."""
    model, format = nn.Conv2d(3, 2, 4).eval(), FORMATS[name]()
    converted = format.convert(graph_of(model, IMAGES, "dynamic"), None, True)
    format.write(converted, tmp_path)
    for count in (1, 5):
        (found,) = format.load(tmp_path, (count, 3, 32, 32))(CALIBRATION[:count])
        torch.testing.assert_close(found, outputs(model, CALIBRATION[:count]), rtol=1e-4, atol=1e-5)
    if name == "onnx":
        shapes = [each.type.tensor_type.shape.dim for each in (*converted.graph.input, *converted.graph.output)]
        assert [shape[0].dim_param for shape in shapes] == ["batch", "batch"]


def test_float16(tmp_path: Path) -> None:
    model = tiny()
    options = {**QUICK, "plan": lp.Schedule([5, 0], "topk"), "calibration": CALIBRATION}
    report = lp.export(model, tmp_path / "half", IMAGES, precision="float16", **options)
    assert 1e-5 < report.max_relative_error < 2e-2
    assert report.parity.top1_agreement == 1.0
    found = lp.load_exported(tmp_path / "half")(CALIBRATION)
    assert found.dtype == torch.float32
    assert model.head.weight.dtype == torch.float32
    program = torch.export.load(report.model)
    assert {each.dtype for each in program.state_dict.values()} == {torch.float16}


def test_a_plan_is_applied_to_a_copy(tmp_path: Path) -> None:
    model = tiny()
    path = SCHEDULE.save(tmp_path / "schedule.yaml")
    report = lp.export(model, tmp_path / "out", IMAGES, plan=path, **QUICK)
    assert report.tokens == (13, 13)
    assert not any(map(is_patched_module, model.modules()))
    lp.patch(model, SCHEDULE)
    with pytest.raises(lp.ArgumentError, match="`plan` must be left out for a patched model"):
        lp.export(model, tmp_path / "other", IMAGES, plan=path, **QUICK)


def test_a_portable_graph(tmp_path: Path) -> None:
    native = lp.export(tiny(), tmp_path / "native", IMAGES, plan=SCHEDULE, **QUICK)
    portable = lp.export(tiny(), tmp_path / "portable", IMAGES, plan=SCHEDULE, graph="portable", **QUICK)
    assert (native.graph, portable.graph) == ("native", "portable")
    refused = ("topk", "sort", "scatter", "cumsum")
    assert any(word in name for name in native.operators for word in refused)
    assert not any(word in name for name in portable.operators for word in refused)


def test_several_methods_are_mixed(tmp_path: Path) -> None:
    schedule = lp.Schedule([4, 3], ["tome", "topk"])
    report = lp.export(tiny(depth=2), tmp_path / "out", IMAGES, plan=schedule, **QUICK)
    assert report.method == "mixed"
    assert lp.Schedule.load(tmp_path / "out" / "schedule.yaml") == schedule


def test_keep_rates_become_the_tokens_of_the_image_size(tmp_path: Path) -> None:
    rates = lp.KeepRates([0.75, 1.0], "topk")
    report = lp.export(tiny(), tmp_path / "out", IMAGES, plan=rates, **QUICK)
    assert lp.Schedule.load(tmp_path / "out" / "schedule.yaml") == rates.schedule(17)
    assert report.tokens == rates.schedule(17).tokens(17)


def test_a_dense_model(tmp_path: Path) -> None:
    report = lp.export(tiny(), tmp_path / "out", IMAGES, format="torch-export", rounds=2)
    assert (report.method, report.tokens) == (None, None)
    assert report.latency is not None
    assert report.latency.speedup == 1
    assert not (tmp_path / "out" / "schedule.yaml").exists()


def test_a_model_of_hugging_face_gives_its_features(tmp_path: Path) -> None:
    model = tiny_hugging_face_vit(num_hidden_layers=1)
    report = lp.export(model, tmp_path / "out", IMAGES, plan=lp.Schedule([5], "topk"), **QUICK)
    assert report.parity.top1_agreement is None
    with lp.patch(model, "topk", [5]), torch.no_grad():
        expected = model(CALIBRATION)
    found = lp.load_exported(tmp_path / "out")(CALIBRATION)
    assert any(
        each.shape == found.shape and torch.allclose(each, found, atol=1e-4)
        for each in (expected.pooler_output, expected.last_hidden_state[:, 0])
    )


def test_preprocessing(tmp_path: Path) -> None:
    model = tiny(kind="vit_tiny_patch16_224")
    given = {"mean": (0.1, 0.2, 0.3)}
    lp.export(model, tmp_path / "out", IMAGES, preprocessing=given, **QUICK)
    found = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert (found["input_size"], found["mean"], found["std"]) == ([3, 32, 32], [0.1, 0.2, 0.3], [0.5] * 3)
    assert (found["interpolation"], found["crop_pct"], found["remark"]) == ("bicubic", 0.9, "")
    module = lp.ImageClassifier(lp.load_exported(tmp_path / "out"))
    assert module.num_classes == 5
    assert module.data_config is not None
    assert (module.data_config["input_size"], module.data_config["mean"]) == ((3, 32, 32), (0.1, 0.2, 0.3))
    with pytest.raises(lp.ArgumentError, match=r"`preprocessing` must be .*interpolation.* got \{'means'"):
        lp.export(model, tmp_path / "other", IMAGES, preprocessing={"means": 0}, **QUICK)


def full_disk(name: str) -> Any:
    """`open`, for a disk on which a file cannot be written; it can be created, as on a disk that is full."""
    usual = open

    def opening(file: Any, mode: str = "r", *args: Any, **keywords: Any) -> Any:
        opened = usual(file, mode, *args, **keywords)
        if name in Path(str(file)).name and set(mode) & set("wax+"):
            opened.close()
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return opened

    return opening


class TestRefused:
    """A refused export leaves nothing behind, not even the folders above."""

    @pytest.fixture(autouse=True)
    def nothing_is_left(self, tmp_path: Path) -> Any:
        yield
        assert list(tmp_path.iterdir()) == []

    def export(self, tmp_path: Path, model: Any = None, images: Tensor = IMAGES, **options: Any) -> ExportReport:
        return lp.export(tiny() if model is None else model, tmp_path / "deep" / "out", images, **{**QUICK, **options})

    def test_other_outputs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        load = TorchExportFormat.load
        monkeypatch.setattr(TorchExportFormat, "load", lambda *args: lambda images: [1.01 * load(*args)(images)[0]])
        with pytest.raises(lp.ExportError, match=r"2 of 2 images are more than 0\.001 off .* is 0\.01\), 0 of them"):
            self.export(tmp_path)

    @pytest.mark.parametrize("full", ["model.pt2", "sample.npz", "run.py", ".report."])
    def test_no_space_left(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
        """Files are opened by `io.open`, by all of the libraries; a disk is full from one of them on."""
        monkeypatch.setattr("io.open", full_disk(full))
        with pytest.raises(lp.FileWriteError, match=r"Cannot write .*deep/out.*No space left on device"):
            self.export(tmp_path)

    def test_no_space_left_for_a_second_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(onnx_conversion, "MESSAGE_BYTES", 10_000)
        monkeypatch.setattr("onnx.external_data_helper.os.fdopen", full_disk(""))
        with pytest.raises(lp.FileWriteError, match=r"Cannot write .*deep/out.*No space left on device"):
            self.export(tmp_path, format="onnx")

    def test_a_schedule_of_another_model(self, tmp_path: Path) -> None:
        with pytest.raises(lp.ScheduleError, match="12"):
            self.export(tmp_path, plan=lp.Schedule.single(12, 3, 56, "topk"))
        with pytest.raises(lp.ScheduleError, match="17"):
            self.export(tmp_path, plan=lp.Schedule([56, 0], "topk"))

    def test_a_method_that_cannot_be_exported(self, tmp_path: Path) -> None:
        words = lp.learn_vocabulary([noise_images(8)], patch_size=8, words=4, progress=False)
        model = tiny()
        lp.patch(model, lp.reduction.VWTInter(words, pad_to="batch"))
        with pytest.raises(lp.PruneError, match="`pad_to` must be 'image'"):
            self.export(tmp_path, model)

    def test_a_missing_runtime(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, extra in (("onnxruntime", "onnx"), ("openvino", "openvino")):
            monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.delitem(sys.modules, "lightning_prune.runtimes.onnx_runtime", raising=False)
            monkeypatch.delitem(sys.modules, "lightning_prune.runtimes.openvino_runtime", raising=False)
            with pytest.raises(lp.RuntimeUnavailableError, match=rf"lightning-prune\[{extra}\]"):
                self.export(tmp_path, format=extra)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"format": "onxx"}, r"`format` must be one of .*'onnx'.* Did you mean 'onnx'\?"),
            ({"opset": 17}, "`opset` must be left out with format='torch-export'"),
            ({"batch": "any"}, "`batch` must be 'static' or 'dynamic', got 'any'"),
            ({"graph": "any"}, "`graph` must be 'native', 'portable' or 'auto', got 'any'"),
            ({"graph": "auto"}, "`rounds` must be at least 1 with graph='auto'"),
            (
                {"precision": "int8"},
                "`precision` must be 'float32' or 'float16' or 'bfloat16' with format='torch-export'",
            ),
            ({"min_agreement": 0.9}, "`min_agreement` must be left out with precision='float32'"),
            ({"inputs": "int8"}, "`inputs` must be 'float32' or 'uint8', got 'int8'"),
            (
                {"images": (255 * IMAGES.abs()).byte()},
                "`example_inputs` must be normalised images, or `inputs` 'uint8'",
            ),
            ({"precision": "int4"}, "`precision` must be 'float32', .* or 'int8-dynamic', got 'int4'"),
            ({"calibration": noise_images(2, size=40)}, r"`calibration` must be images \(N, 3, 32, 32\)"),
            ({"images": IMAGES[0]}, "`example_inputs` must be images"),
            ({"tolerance": 0}, "`tolerance` must be a number > 0, got 0"),
            ({"rounds": -1}, "`rounds` must be a number of measurements >= 0"),
        ],
    )
    def test_arguments(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(lp.ArgumentError, match=message):
            self.export(tmp_path, **options)

    def test_a_compiled_model(self, tmp_path: Path) -> None:
        with pytest.raises(lp.ArgumentError, match=r"`model` must be one that onnxruntime can run.* compiled already"):
            self.export(tmp_path, torch.compile(tiny()), format="onnx")


def test_overwrite_replaces_all_files(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    lp.export(tiny(), folder, IMAGES, **QUICK)
    (folder / "old.txt").touch()
    report = lp.export(tiny(), folder, IMAGES, plan=lp.Schedule([5, 0], "topk"), overwrite=True, **QUICK)
    assert {path.name for path in folder.iterdir()} == FILES | set(report.files)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Unsupported(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(images)


def test_operators_without_a_form_and_old_opsets_are_named() -> None:
    format = OnnxFormat()
    with pytest.raises(lp.ExportError, match="linalg_matrix_exp"):
        format.convert(export_graph(Unsupported(), (IMAGES,)), None, False)
    graph = export_graph(nn.LayerNorm(32), (IMAGES,))
    with pytest.raises(lp.ExportError, match=r"`opset` must be .*, got 9: .* LayerNormalization .* newer one"):
        format.convert(graph, 9, False)


class OfOldAndNew(nn.Module):
    """Operators whose form differs between opsets 17 and 18: Split, and reductions whose axes are an input."""

    def forward(self, images: Tensor) -> Tensor:
        first, others = torch.split(images, [1, 2], 1)
        second, third = others.chunk(2, 1)
        return first.amax((1, 2)) + torch.linalg.vector_norm(second, dim=(1, 2)) * third.mean((1, 2))


@pytest.mark.parametrize("opset", [17, 18, 23])
def test_the_opset_that_is_asked_for_is_that_of_the_file(opset: int, tmp_path: Path) -> None:
    model, format = OfOldAndNew(), OnnxFormat()
    converted = format.convert(graph_of(model, IMAGES, "dynamic"), opset, True)
    format.write(converted, tmp_path)
    assert format.opset(onnx.load(tmp_path / "model.onnx")) == opset
    assert {each.domain for each in converted.opset_import} == {""}
    (found,) = format.load(tmp_path, tuple(CALIBRATION.shape))(CALIBRATION)
    torch.testing.assert_close(found, model(CALIBRATION))


@pytest.mark.long
def test_weights_that_no_file_of_onnx_can_hold_are_in_a_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_conversion, "MESSAGE_BYTES", 10_000)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx.data").touch()  # of another export; names are those of the folder of each
    model, folder = tiny(), tmp_path / "out"
    report = lp.export(model, folder, IMAGES, plan=SCHEDULE, calibration=CALIBRATION, opset=17, rounds=1)
    assert list(report.files) == ["model.onnx", "model.onnx.data"]
    assert (report.opset, onnx.load(report.model).opset_import[0].version) == (17, 17)
    sizes = [(folder / name).stat().st_size for name in report.files]
    assert sizes[1] > 10_000
    with torch.no_grad(), lp.patch(model, SCHEDULE):
        torch.testing.assert_close(lp.load_exported(folder)(CALIBRATION), model(CALIBRATION), rtol=1e-4, atol=1e-4)
    done = subprocess.run([sys.executable, folder / "run.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path = folder / "model.onnx.data"
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    with pytest.raises(lp.FileFormatError, match=r"model\.onnx\.data was changed"):
        lp.load_exported(folder)


def test_a_batch_size_in_the_model_is_static() -> None:
    class OfTwo(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.reshape(2, -1)

    with pytest.raises(lp.ExportError, match=r"`batch` must be 'static' for this model, got 'dynamic': OfTwo"):
        graph_of(OfTwo(), IMAGES, "dynamic")


def test_files_of_one_format_are_not_run_by_the_runtime_of_another(tmp_path: Path) -> None:
    lp.export(tiny(), tmp_path / "out", IMAGES, **QUICK)
    with pytest.raises(lp.ArgumentError, match=r"`runtime` must be 'torch' for a torch-export file, got 'openvino'"):
        lp.load_exported(tmp_path / "out", runtime="openvino")
    with pytest.raises(lp.FileFormatError, match=r"report\.json"):
        lp.load_exported(tmp_path)


class Reading(nn.Module):
    """Reads all tokens of the transformer in it, or calls it."""

    def __init__(self, model: nn.Module, every: bool) -> None:
        super().__init__()
        self.model, self.every = model, every

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.model.forward_features(images).mean(1) if self.every else self.model(images)
        return found


def test_a_report_says_whether_the_exact_tail_runs(tmp_path: Path) -> None:
    found = {}
    for name, every in (("exact", False), ("reads", True)):
        model = Reading(tiny(depth=2), every)
        dense = outputs(model)
        lp.patch(model, "exact")
        report = lp.export(model, tmp_path / name, IMAGES, **QUICK)
        found[name] = report.tail
        assert (report.method, report.tokens) == (None, None)
        assert ExportReport.read(report.folder).tail is report.tail
        assert ("tail: true" in (report.folder / "README.md").read_text()) is report.tail
        torch.testing.assert_close(lp.load_exported(report.folder)(CALIBRATION), dense, rtol=1e-4, atol=1e-4)
    assert found == {"exact": True, "reads": False}
    planned = lp.export(tiny(depth=2), tmp_path / "plan", IMAGES, plan=lp.Schedule([3, 2], "topk"), **QUICK)
    assert (planned.tail, planned.method, planned.tokens) == (True, "topk", (14, 12))
