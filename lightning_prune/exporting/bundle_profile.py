"""Measures the latency profile of a bundle, on the device to which it was copied.

`lightning_prune.bundle` copies this file, and the files of this package that it imports, into the bundle. They need
numpy and the runtime, and nothing else.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from lightning_prune._utils.processor import processor_name, usable_cores
from lightning_prune.errors import ArgumentError, FileFormatError, PruneError
from lightning_prune.exporting.bundle_graphs import BundledGraphs, bundled_graphs
from lightning_prune.profiling.clocks import CLOCKS, read_clock
from lightning_prune.profiling.count_search import profile_builder, search_counts
from lightning_prune.profiling.interleaved_timer import LEAST_ROUNDS, OWN_MEMORY, InterleavedTimer
from lightning_prune.profiling.latency_profile import LatencyProfile, OverheadProbe
from lightning_prune.profiling.page_faults import fault_context

DESCRIPTION = "bundle.json"
FORMAT, VERSION = "lightning_prune.bundle", 1
_CURVE_SHARE = 0.6  # of the time limit, where the overheads of methods are measured, too
_PROBE_ROUNDS = 31
_DENSE, _COPY = "dense", "copy"
_SECONDS_BETWEEN_LINES = 10.0
_INTERRUPTED = 130  # exit status


def main(folder: Path, words: Sequence[str] | None = None) -> int:
    """Runs `profile.py`.

    Args:
        folder: The bundle.
        words: The command line after the name of the program; that of the process if None.

    Returns:
        Exit status: 0; 2 after an error, which is printed on one line; 130 after Ctrl-C.
    """
    asked = _options().parse_args(words)
    try:
        return _profile(folder, asked)
    except PruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted before anything was measured; nothing is written.", file=sys.stderr)
        return _INTERRUPTED


def read_bundle(folder: Path) -> dict[str, Any]:
    """The content of `bundle.json`; every other file of the bundle is as it was written.

    Args:
        folder: The bundle.

    Raises:
        FileFormatError: If it is no bundle, one of another version, or a file is missing or was changed; names it.
    """
    path = folder / DESCRIPTION
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = described["format"], described["version"], dict(described["files"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FileFormatError(f"{path} is not the description of a bundle: {type(error).__name__}: {error}.") from error
    if found[:2] != (FORMAT, VERSION):
        raise FileFormatError(f"{path} must be a {FORMAT} file of version {VERSION}, got {found[0]} {found[1]}.")
    for name, digest in found[2].items():
        if not (folder / name).is_file():
            raise FileFormatError(f"{folder / name} must be there, as it is a part of the bundle, got no such file.")
        if file_digest(folder / name) != digest:
            raise FileFormatError(f"{folder / name} was changed since the bundle was written; write the bundle again.")
    return described


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(
    described: Mapping[str, Any],
    graphs: BundledGraphs,
    clock: Callable[[], float],
    time_limit: float,
    on_step: Callable[[str], None],
) -> tuple[LatencyProfile, bool]:
    """Measures the latency of the token counts, and then the overheads of the methods.

    Args:
        described: The content of `bundle.json`.
        graphs: Of the bundle.
        clock: What runs are timed by.
        time_limit: Seconds in all; a few rounds are completed even after it.
        on_step: Called with what is measured, after every run.

    Returns:
        The profile, and whether it was interrupted by Ctrl-C and holds what was measured until then.

    Raises:
        KeyboardInterrupt: If there is no profile yet.
    """
    start = time.perf_counter()
    n, probed = described["tokens"], described["probes"]
    build = profile_builder(described["method"], 0, described["depth"], "deployed")
    timer = InterleavedTimer[int](
        lambda count: graphs.to(described["curve"], count), graphs.run, lambda: None, n, clock,
        settle_seconds=OWN_MEMORY,
    )  # fmt: skip
    seconds = _CURVE_SHARE * time_limit if probed["graphs"] else time_limit
    try:
        profile = search_counts(
            timer, build, None, described["lowest"], n, seconds, lambda: on_step("token counts"), described["shape"][0]
        )
    except KeyboardInterrupt:
        counts = [count for count in range(1, n + 1) if timer.has(count)]
        if len(counts) < 2:
            raise
        return replace(build(timer, counts), seconds=time.perf_counter() - start), True
    probes, interrupted = _measure_probes(described, graphs, clock, start + time_limit, on_step)
    return replace(profile, probes=probes, seconds=time.perf_counter() - start), interrupted


def _measure_probes(
    described: Mapping[str, Any],
    graphs: BundledGraphs,
    clock: Callable[[], float],
    deadline: float,
    on_step: Callable[[str], None],
) -> tuple[tuple[OverheadProbe, ...], bool]:
    """Times the schedules from which the overheads of the methods follow; also says whether it was interrupted."""
    copy, listed = described["probes"]["copy"], described["probes"]["graphs"]
    if not listed:
        return (), False
    files = {str(number): each["file"] for number, each in enumerate(listed)} | ({_COPY: copy} if copy else {})

    def prepare(name: str) -> None:
        if name == _DENSE:
            graphs.to(described["curve"], described["tokens"])
        else:
            graphs.to(files[name])

    timer = InterleavedTimer[str](
        prepare, graphs.run, lambda: None, _DENSE, clock,
        references=lambda name: (_COPY,) if copy and name not in (_DENSE, _COPY) else (),
        settle_seconds=OWN_MEMORY,
    )  # fmt: skip
    interrupted = False
    try:
        step = lambda: on_step("overheads of the methods")  # noqa: E731
        timer.measure(files, _PROBE_ROUNDS, deadline, step, min_rounds=LEAST_ROUNDS)
    except KeyboardInterrupt:
        interrupted = True
    if not timer.has(_DENSE):
        return (), interrupted
    share = timer.result(_COPY).ratio if copy else 1.0
    probes = []
    for number, each in enumerate(listed):
        found = timer.result(str(number))
        removed = tuple(each["removed"])
        probes.append(OverheadProbe(each["method"], removed, share, found.ratio, found.ratio_spread, found.rounds))
    return tuple(probes), interrupted


def _profile(folder: Path, asked: argparse.Namespace) -> int:
    described = read_bundle(folder)
    output = Path(asked.output)
    if output.suffix != ".json":
        raise ArgumentError(f"`output` must be a .json file, got {asked.output}.")
    threads = asked.threads or described["runtime"]["threads"] or usable_cores()
    graphs = bundled_graphs(folder, described, asked.provider, threads)
    clock = read_clock(asked.clock, graphs.device_type)
    begun = datetime.now().astimezone().isoformat(timespec="seconds")
    print(f"{graphs.device}, {threads} threads, {graphs.name}: at most about {asked.time_limit:g} s.", file=sys.stderr)
    progress = _Progress(asked.time_limit)
    try:
        profile, interrupted = measure(described, graphs, clock, asked.time_limit, progress)
    finally:
        progress.close()
    context = {
        **described["context"],
        "device": graphs.device,
        "device_type": graphs.device_type,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        **graphs.context(),
        "clock": asked.clock,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": platform.platform(),
        "bundle": file_digest(folder / DESCRIPTION)[:24],
        **fault_context(graphs.device_type),
        "measured": begun,
    }
    profile = replace(profile, context=context)
    profile.save(output)
    print(table(profile))
    if interrupted:
        print(f"Interrupted: {output} holds what was measured until then.", file=sys.stderr)
    print(f"Written: {output}. On the workstation: lightning-prune plan --config my.yaml --profile {output.name}")
    return _INTERRUPTED if interrupted else 0


def table(profile: LatencyProfile) -> str:
    """The latencies as text, the largest count first."""
    timed = "CPU time" if profile.context.get("clock") == "cpu" else "latency"
    rows = [f"{'tokens':>6}  {timed + ' in ms':>18}  {'p90':>8}  of dense"]
    columns = list(zip(profile.tokens, profile.milliseconds, profile.spread, profile.p90_ms, strict=True))
    for count, ms, spread, p90 in reversed(columns):
        rows.append(f"{count:6d}  {f'{ms:.3f} +- {spread:.3f}':>18}  {p90:8.3f}  {ms / profile.dense_ms:8.3f}")
    return "\n".join([*rows, *filter(None, [profile.fault_remark])])


class _Progress:
    """What is being measured and for how long, on standard error: one line on a terminal, elsewhere one now and then.

    Args:
        seconds: About how long it will take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._start = seconds, time.perf_counter()
        self._on_terminal = sys.stderr.isatty()
        self._last = self._start

    def __call__(self, what: str) -> None:
        """Shows what is being measured, unless that was done a moment ago."""
        now = time.perf_counter()
        if now - self._last < (0.2 if self._on_terminal else _SECONDS_BETWEEN_LINES):
            return
        self._last = now
        line = f"Measuring {what}: {now - self._start:.0f} s of about {self._seconds:.0f} s"
        print(f"\r{line:<78}" if self._on_terminal else line, end="" if self._on_terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """Clears the line of a terminal."""
        if self._on_terminal:
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="profile.py", description="Measures the latency profile of this bundle on this device."
    )
    parser.add_argument("--output", default="profile.json", metavar="FILE", help="the profile; %(default)s")
    parser.add_argument(
        "--time-limit", type=_positive(float), default=60.0, metavar="S", help="seconds in all; %(default)s"
    )
    parser.add_argument(
        "--threads", type=_positive(int), metavar="N", help="threads of the runtime; default: the usable cores"
    )
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="wall time, or CPU time of this process")
    parser.add_argument(
        "--provider",
        metavar="NAME",
        help="execution provider of ONNX Runtime, or device of OpenVINO",
    )
    return parser


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError(text)
        return value

    read.__name__ = "number > 0"  # as argparse calls it in its message
    return read
