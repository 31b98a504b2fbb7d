"""Runs programs in an interpreter that has imported nothing of this package, without importing torch for each."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.plugins.environments.lightning import find_free_network_port

from . import ROOT, TESTS, python_path

SECONDS = 120  # after which a program is ended
# Imports torch and what stands above it, and forks for each program: a child has the modules and nothing else. For
# programs that need Lightning it forks once, into a server that has imported that as well, and passes them on. Where
# one of the processes of a program fails, the others are ended: they may wait for it.
_SERVER = """
import json, os, signal, sys, traceback

def run(request, number):
    status = 0
    try:
        signal.alarm(request["seconds"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for target, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{request[name]}.{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), target)
        os.environ.clear()
        os.environ.update(request["environments"][number])
        os.chdir(request["folder"])
        sys.argv = ["-c", *request["arguments"]]
        exec(request["code"], {"__name__": "__main__"})
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if leaving.code is not None and not isinstance(leaving.code, int):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

def statuses_of(request):
    children, statuses = {}, {}
    for number in range(len(request["environments"])):
        child = os.fork()
        if not child:
            run(request, number)
        children[child] = number
    while len(statuses) < len(children):
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        if statuses[child]:
            for other in children.keys() - statuses.keys():
                os.kill(other, signal.SIGKILL)
    return [statuses[child] for child in children]

def serve(requests, answers, modules, more):
    for name in modules:
        __import__(name)
    server = None
    for line in requests:
        request = json.loads(line)
        if more and request["lightning"]:
            server = server or forked(more)
            server[0].write(line)
            answers.write(server[1].readline())
        else:
            answers.write(json.dumps(statuses_of(request)) + "\\n")
        answers.flush()
    if server:
        server[0].close()
        os.wait()

def forked(modules):
    (reading, asking), (answering, writing) = os.pipe(), os.pipe()
    if not os.fork():
        os.close(asking)
        os.close(answering)
        serve(os.fdopen(reading), os.fdopen(writing, "w"), modules, ())
        os._exit(0)
    os.close(reading)
    os.close(writing)
    return os.fdopen(asking, "w", buffering=1), os.fdopen(answering)

serve(sys.stdin, sys.stdout, sys.argv[1].split(), sys.argv[2].split())
"""
_LIBRARIES = ("torch", "torchvision", "timm")
_LIGHTNING = ("lightning.pytorch.cli", "sklearn.datasets")


class FreshRun(NamedTuple):
    """How a program ended: its exit status, or the negative number of the signal, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@cache
def _server() -> Any:
    command = [sys.executable, "-c", _SERVER, " ".join(_LIBRARIES), " ".join(_LIGHTNING)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    server = subprocess.Popen(command, cwd=ROOT, **pipes)
    atexit.register(server.wait)
    assert server.stdin is not None
    atexit.register(server.stdin.close)  # its input ends, so it does; called first
    return server


def _run(
    code: str, arguments: tuple[str, ...], lightning: bool, folder: Path, environments: list[dict[str, str]]
) -> list[FreshRun]:
    """Runs a program in a process for each of these additions to the environment, all at the same time."""
    with tempfile.TemporaryDirectory() as printed:
        stdout, stderr = Path(printed) / "stdout", Path(printed) / "stderr"
        # A fixture of a module runs before that of each test which says where profiles are kept.
        shared = {"LIGHTNING_PRUNE_CACHE": str(Path(printed) / "profiles"), **os.environ}
        request = {"code": code, "arguments": arguments, "stdout": str(stdout), "stderr": str(stderr)}
        request |= {"environments": [shared | each for each in environments], "lightning": lightning}
        request |= {"folder": str(folder), "seconds": SECONDS}
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        return [
            FreshRun(status, Path(f"{stdout}.{number}").read_text(), Path(f"{stderr}.{number}").read_text())
            for number, status in enumerate(json.loads(server.stdout.readline()))
        ]


def run_fresh(code: str, *arguments: str, lightning: bool = False, folder: Path = ROOT) -> FreshRun:
    """Runs a program as `python -c code arguments` would, with torch, torchvision and timm imported.

    Not for a program whose order of imports matters.

    Args:
        code: The program.
        arguments: Its words.
        lightning: Whether Lightning and what comes with it is imported as well, for a program that needs it anyway.
        folder: In which it runs.
    """
    (done,) = _run(code, arguments, lightning, folder, [{}])
    return done


def run_ranks(program: Path, *arguments: str, folder: Path) -> list[FreshRun]:
    """Runs `python program arguments` as each of two ranks, which a launcher has started: Lightning starts no others.

    Args:
        program: The file. It finds the modules in its folder, the package and these helpers.
        arguments: Its words.
        folder: In which it runs.
    """
    paths = [str(program.parent), str(ROOT), str(TESTS)]
    code = f"import runpy, sys; sys.path[:0] = {paths}; runpy.run_path({str(program)!r}, run_name='__main__')"
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "NODE_RANK": "0"}
    shared["PYTHONPATH"] = python_path()
    return _run(code, arguments, True, folder, [{**shared, "LOCAL_RANK": str(rank)} for rank in range(2)])
