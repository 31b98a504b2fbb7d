"""What comes with an exported model for its user: `run.py`, a dozen lines, and `README.md`; also that of a bundle."""

from collections.abc import Sequence

from lightning_prune._utils.formatting import with_tail
from lightning_prune.exporting.export_report import ExportReport
from lightning_prune.exporting.formats import BATCH

_HEAD = '''\
"""Runs {file} on the images of sample.npz and compares the outputs with those of PyTorch. Needs {needs}."""

import sys
from pathlib import Path

{imports}

TOLERANCE = {tolerance:g}
folder = Path(__file__).resolve().parent
sample = np.load(folder / "sample.npz")
'''
UNFUSED = ["MatMulAddFusion"]
"""As of `lightning_prune.runtimes.onnx_quantization`, which needs ONNX Runtime to be imported."""
_TAIL = """\
error = np.abs(outputs - sample["expected"]).max() / np.abs(sample["expected"]).max()
print("class of each image:", outputs.argmax(-1).tolist())
print(f"largest relative error: {error:.1e}")
sys.exit(int(error > TOLERANCE))
"""
_RUNNERS = {
    "onnx": (
        "numpy and onnxruntime",
        "import numpy as np\nimport onnxruntime",
        'providers = ["CPUExecutionProvider"]\n'
        'session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=providers{optimizers})\n'
        '(outputs,) = session.run(None, {{session.get_inputs()[0].name: sample["images"]}})\n',
    ),
    "openvino": (
        "numpy and openvino",
        "import numpy as np\nimport openvino",
        "# Without the hint, OpenVINO computes in bfloat16 on processors that have it, whatever the file is.\n"
        'settings = {{"INFERENCE_PRECISION_HINT": "{hint}", "PERFORMANCE_HINT": "LATENCY"}}\n'
        'model = openvino.Core().compile_model(folder / "model.xml", "CPU", settings)\n'
        'outputs = model(sample["images"])[0]\n',
    ),
    "torch-export": (
        "numpy and torch",
        "import numpy as np\nimport torch",
        'model = torch.export.load(folder / "model.pt2").module()\n'
        'with torch.no_grad():\n    outputs = model(torch.from_numpy(sample["images"])).numpy()\n',
    ),
    "aotinductor": (
        "numpy and torch",
        "import numpy as np\nimport torch",
        'model = torch._inductor.aoti_load_package(folder / "model.pt2")\n'
        'with torch.no_grad():\n    outputs = model(torch.from_numpy(sample["images"])).numpy()\n',
    ),
    "executorch": (
        "numpy, torch and executorch",
        "import numpy as np\nimport torch\nfrom executorch.runtime import Runtime",
        'program = Runtime.get().load_program(folder / "model.pte")\n'
        'outputs = program.load_method("forward").execute([torch.from_numpy(sample["images"])])[0].numpy()\n',
    ),
}
_ELSEWHERE = {
    "openvino": "a reference implementation",
    "aotinductor": "kernels of PyTorch's own instead of compiled code",
    "executorch": "ExecuTorch's own kernels instead of XNNPACK",
}


def runner(report: ExportReport) -> str:
    """The text of `run.py`, which ends with status 1 if outputs differ.

    It imports no torch, except for files that PyTorch loads, and for ExecuTorch.
    """
    needs, imports, body = _RUNNERS[report.format]
    # In lower precisions single images may be off by more than the tolerance, and so may those of the sample.
    tolerance = max(report.parity.tolerance, 1.1 * report.max_relative_error)
    optimizers = f", disabled_optimizers={UNFUSED}" if report.precision == "int8" else ""
    body = body.format(optimizers=optimizers, hint=_hint(report))
    return _HEAD.format(file=report.model.name, needs=needs, imports=imports, tolerance=tolerance) + body + _TAIL


def _hint(report: ExportReport) -> str:
    """What OpenVINO is to compute in."""
    return "bf16" if report.precision == "bfloat16" else "f32"


def readme(report: ExportReport, input_name: str) -> str:
    """The text of `README.md`.

    Args:
        report: What was exported.
        input_name: Name of the model's input.
    """
    shape = " x ".join(map(str, report.input_shape))
    batch = "any number of images" if report.batch == "dynamic" else "this number of images"
    removed = "no tokens are removed" if report.method is None else f"tokens are removed by {report.method}"
    precision = report.precision + (f" ({report.quantization})" if report.quantization else "")
    tail = ["`tail: true`: patch tokens, which the head does not read, leave the last block before its MLP (exact)."]
    lines = [
        f"# {report.model.name}",
        "",
        f"A Vision Transformer for images of {shape} ({_images(report)}; {batch}), in {precision}; {removed}.",
        "",
        *(f"- {each}" for each in (*figures(report), *(tail if report.tail else []))),
    ]
    lines += ["", "## Run it", "", "```bash", "python run.py", "```", "", *_benchmarks(report, input_name)]
    lines += [
        "## Files",
        "",
        "| file | content |",
        "|---|---|",
        f"| {', '.join(f'`{name}`' for name in report.files)} | the model |",
        "| `schedule.yaml` | tokens that each block removes; not there for a dense model |",
        "| `sample.npz` | `images` and the `expected` outputs of PyTorch in float32 |",
        "| `preprocessing.json` | how images are prepared; null where it is not known |",
        "| `report.json` | figures, operators, versions, and the SHA-256 of the model |",
        "",
    ]
    return "\n".join(lines)


def figures(report: ExportReport) -> list[str]:
    """How far an exported model agrees with PyTorch, how fast it is, and what its runtime makes of it, in sentences."""
    parity, latency, choice = report.parity, report.latency, report.graph_choice
    same = "" if parity.top1_agreement is None else f"{parity.top1_agreement:.2%} of the same class, "
    flips = "" if parity.token_flips is None else f", {parity.token_flips} of them by token flips"
    least = "" if parity.min_agreement is None else f"; at least {parity.min_agreement:.1%} had to agree"
    found = [
        f"Against PyTorch in float32 on {parity.images} images: {same}largest relative error "
        f"{parity.max_relative_error:.1e} (half of the images up to {parity.typical_relative_error:.1e}), "
        f"{parity.over_tolerance} more than {parity.tolerance:g} off{flips}{least}."
    ]
    if latency is not None:
        count = report.input_shape[0]
        found.append(
            f"{with_tail(latency.exported_ms, latency.exported_p90_ms)} for {count} image{'s' * (count > 1)}, "
            f"{with_tail(latency.dense_ms, latency.dense_p90_ms)} dense in "
            f"{report.precision}: {latency.speedup:.2f}x in {latency.context['runtime']} where it was exported, on "
            f"{latency.context.get('threads')} threads."
        )
    if choice is not None:
        times = [("native", choice.native_ms), ("portable", choice.portable_ms)]
        both = ", ".join(f"{name} {'not accepted' if ms is None else f'{ms:.2f} ms'}" for name, ms in times)
        found.append(f"Graph: {choice.form}, chosen of {both}: {choice.reason}.")
    if report.format == "aotinductor":
        found.append("Compiled for processors like the one where it was exported, and for its number of threads.")
    return found + _in_runtime(report)


def _in_runtime(report: ExportReport) -> list[str]:
    """What the runtime makes of the file, in sentences."""
    graph = report.in_runtime
    if graph is None:
        return ["What the runtime fuses, and what falls back, is not known."]
    named = {"attention": graph.attention, "layer norm": graph.layer_norm, "GELU": graph.gelu}
    parts = []
    for name, fusion in named.items():
        unfused = "not known how many are not" if fusion.unfused is None else f"{fusion.unfused} not"
        parts.append(f"{name} {fusion.fused} fused, {unfused}")
    found = [f"In the runtime, {sum(graph.operators.values())} operators after optimisation: {'; '.join(parts)}."]
    if graph.elsewhere is None:
        found.append("Which operators fall back is not known.")
    elif graph.elsewhere:
        listed = ", ".join(f"{name} {count}" for name, count in graph.elsewhere.items())
        where = _ELSEWHERE.get(report.format, "the CPU instead of the provider")
        found.append(f"Run by {where}: {listed}.")
    else:
        found.append("No operator falls back.")
    if graph.precisions:
        listed = ", ".join(f"{name} {count}" for name, count in graph.precisions.items())
        found.append(f"Precisions of its operators: {listed}.")
    return found


def _images(report: ExportReport) -> str:
    """The images that the file takes."""
    if report.inputs.form == "float32":
        return "float32, prepared as `preprocessing.json` says"
    order = ", in RGB" if report.input_shape[1] == 3 else ""
    return f"uint8, 0 to 255{order}; scaled and normalised inside"


def _benchmarks(report: ExportReport, input_name: str) -> list[str]:
    """A section with commands that measure the model where it is deployed; none for formats without a common tool."""
    file = report.model.name
    batch, *size = report.input_shape
    shape = f"{input_name}:{'x'.join(map(str, (batch, *size)))}"
    dynamic = report.batch == "dynamic"
    commands = []
    if report.format == "onnx":
        fixed = f" --shapes={shape}" if dynamic else ""
        typed = "" if report.precision == "float32" else " --stronglyTyped"
        commands.append(
            f"trtexec --onnx={file}{fixed}{typed} --useCudaGraph --useSpinWait --noDataTransfers --warmUp=500 "
            "--duration=10 --percentile=50,90,99 --exportTimes=times.json"
        )
    if report.format in ("onnx", "openvino"):
        fixed = f' -shape "[{",".join(map(str, report.input_shape))}]"' if dynamic else ""
        # The hint gives one stream; the tool refuses the number next to it.
        computes = f" -infer_precision {_hint(report)}"
        commands.append(f"benchmark_app -m {file} -d CPU -hint latency{computes} -t 30 -pc{fixed}")
    if report.format == "onnx":
        free = f" -f {BATCH}:{batch}" if dynamic else ""
        entry = f'"optimization.disable_specified_optimizers|{";".join(UNFUSED)}"'
        unfused = f" -C {entry}" if report.precision == "int8" else ""
        commands.append(f"onnxruntime_perf_test -e cpu -I -m times -r 1000 -x 4{free}{unfused} {file}")
    if not commands:
        return []
    return ["## Measure it where it will run", "", "```bash", *commands, "```", ""]


def bundle_readme(model: str, package: str, shape: Sequence[int], methods: Sequence[str]) -> str:
    """The text of `README.md` in a bundle.

    Args:
        model: Class of the model.
        package: The runtime, as pip installs it.
        shape: (B, C, H, W) of the images.
        methods: The methods whose overhead is measured.
    """
    form = {"onnxruntime": "onnx", "openvino": "openvino"}[package]
    return f"""\
# Latency profile of {model}

Measures, on the device that this folder is copied to, how long {model} takes with fewer and fewer tokens, for images of
{" x ".join(map(str, shape))}, and the overhead of the methods {", ".join(methods)}. It needs Python 3.11 or newer,
numpy and {package}; no torch.

On the device:

```bash
pip install numpy {package}
python profile.py --time-limit 60   # writes profile.json; Ctrl-C keeps what is measured
```

`--threads N` sets the threads of the runtime, `--clock cpu` measures CPU time of the process instead of wall time, and
`--provider NAME` names another execution provider (ONNX Runtime) or device (OpenVINO). Run nothing else meanwhile.

On the workstation, with `profile.json` from the device and the configuration that the bundle was written with:

```bash
lightning-prune plan --config my.yaml --profile profile.json --output plan/
lightning-prune export --config my.yaml --schedule plan/schedule.yaml --format {form} --batch-size {shape[0]} \\
    --output out/
```

Then copy `out/` to the device: `python run.py` in it runs the model there.

| file | content |
|---|---|
| `profile.py`, `measuring/` | what measures: files of lightning_prune (Apache License 2.0), as they are |
| `graphs/` | the model for any number of tokens, and schedules of the methods in its first blocks, with the weights |
| `bundle.json` | what the graphs are, versions, and the SHA-256 of every file |
"""
