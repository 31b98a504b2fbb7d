"""Runs programs in an interpreter that has imported nothing of this package, without importing torch for each."""

import atexit
import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from . import ROOT

SECONDS = 120  # after which a program is ended
# Imports torch and what stands above it, and forks for each program: a child has the modules and nothing else.
_SERVER = """
import json, os, signal, sys, traceback
import timm, torch, torchvision
for request in map(json.loads, sys.stdin):
    child = os.fork()
    if child:
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
        continue
    status = 0
    try:
        signal.alarm(request["seconds"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), number)
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
"""


class FreshRun(NamedTuple):
    """How a program ended: its exit status, or the negative number of the signal, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@cache
def _server() -> Any:
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    atexit.register(server.wait)
    assert server.stdin is not None
    atexit.register(server.stdin.close)  # its input ends, so it does; called first
    return server


def run_fresh(code: str, *arguments: str) -> FreshRun:
    """Runs a program as `python -c code arguments` would in the root folder, with torch, torchvision and timm imported.

    Not for a program whose order of imports matters.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        request = {"code": code, "arguments": arguments, "stdout": str(stdout), "stderr": str(stderr)}
        _server().stdin.write(json.dumps({**request, "seconds": SECONDS}) + "\n")
        status = json.loads(_server().stdout.readline())
        return FreshRun(status, stdout.read_text(), stderr.read_text())
