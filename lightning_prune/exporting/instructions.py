"""What comes with an exported model for its user: `run.py`, a dozen lines, and `README.md`; also that of a bundle."""

from collections.abc import Sequence

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
        'session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])\n'
        '(outputs,) = session.run(None, {session.get_inputs()[0].name: sample["images"]})\n',
    ),
    "openvino": (
        "numpy and openvino",
        "import numpy as np\nimport openvino",
        "# Without the hint, OpenVINO computes in bfloat16 on processors that have it.\n"
        'settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}\n'
        'model = openvino.Core().compile_model(folder / "model.xml", "CPU", settings)\n'
        'outputs = model(sample["images"])[0]\n',
    ),
    "torch-export": (
        "numpy and torch",
        "import numpy as np\nimport torch",
        'model = torch.export.load(folder / "model.pt2").module()\n'
        'with torch.no_grad():\n    outputs = model(torch.from_numpy(sample["images"])).numpy()\n',
    ),
}


def runner(report: ExportReport) -> str:
    """The text of `run.py`, which ends with status 1 if outputs differ.

    It imports no torch, except for a file of `torch.export`.
    """
    needs, imports, body = _RUNNERS[report.format]
    tolerance = report.parity.tolerance
    return _HEAD.format(file=report.model.name, needs=needs, imports=imports, tolerance=tolerance) + body + _TAIL


def readme(report: ExportReport, input_name: str) -> str:
    """The text of `README.md`.

    Args:
        report: What was exported.
        input_name: Name of the model's input.
    """
    parity, latency = report.parity, report.latency
    shape = " x ".join(map(str, report.input_shape))
    batch = "any number of images" if report.batch == "dynamic" else "this number of images"
    removed = "no tokens are removed" if report.method is None else f"tokens are removed by {report.method}"
    agreement = "" if parity.top1_agreement is None else f"; {parity.top1_agreement:.2%} have the same class"
    lines = [
        f"# {report.model.name}",
        "",
        f"A Vision Transformer for images of {shape} (float32, prepared as `preprocessing.json` says; {batch}), in "
        f"{report.precision}; {removed}.",
        "",
        f"- Checked on {parity.images} images against PyTorch in float32: the largest relative error is "
        f"{parity.max_relative_error:.1e}; {parity.over_tolerance} images are more than {parity.tolerance:g} off, "
        f"{parity.token_flips} of them by token flips{agreement}.",
    ]
    if latency is not None:
        lines.append(
            f"- {latency.exported_ms:.2f} ms for a batch of {report.input_shape[0]} where it was exported, "
            f"{latency.dense_ms:.2f} ms dense ({latency.speedup:.2f}x), on {latency.context.get('threads')} threads."
        )
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


def _benchmarks(report: ExportReport, input_name: str) -> list[str]:
    """A section with commands that measure the model where it is deployed; none for formats without a common tool."""
    file = report.model.name
    batch, *size = report.input_shape
    shape = f"{input_name}:{'x'.join(map(str, (batch, *size)))}"
    dynamic, half = report.batch == "dynamic", report.precision == "float16"
    commands = []
    if report.format == "onnx":
        fixed = f" --shapes={shape}" if dynamic else ""
        typed = " --stronglyTyped" if half else ""
        commands.append(
            f"trtexec --onnx={file}{fixed}{typed} --useCudaGraph --useSpinWait --noDataTransfers --warmUp=500 "
            "--duration=10 --percentile=50,90,99 --exportTimes=times.json"
        )
    if report.format in ("onnx", "openvino"):
        fixed = f' -shape "[{",".join(map(str, report.input_shape))}]"' if dynamic else ""
        # The hint gives one stream; the tool refuses to be told the number beside it.
        computes = "" if half else " -infer_precision f32"
        commands.append(f"benchmark_app -m {file} -d CPU -hint latency{computes} -t 30 -pc{fixed}")
    if report.format == "onnx":
        free = f" -f {BATCH}:{batch}" if dynamic else ""
        commands.append(f"onnxruntime_perf_test -e cpu -I -m times -r 1000 -x 4{free} {file}")
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
