"""Programs in processes forked from one which has done the imports, seconds each: a test session pays them once.

`run` is for scripts and code what `subprocess.run` is, with the processor time that the process took, imports apart.
What is about the imports themselves, or about a program that is started by another one, needs a real `subprocess`.
"""
from __future__ import annotations

import atexit
import functools
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]

import kill_soak  # noqa: E402


class Done(NamedTuple):
    """What a process left; `seconds` of the processor, its own children's included."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


class Server(kill_soak.Runs):
    """`kill_soak.Runs`, whose processes run any program."""

    def __init__(self):
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True, env=env)

    def start(self, cfg: dict[str, Any], log: Path, prepare: list[Any] | None = None) -> int:
        """The pid of a new run, which takes STS files of as many rows as this process; see `kill_soak.fork_run`."""
        return self.ask(cfg=cfg, log=str(log), prepare=prepare, sts_rows=kill_soak.script.STS_ROWS)

    def run(self, program: str | Path, *arguments: Any, code: str | None = None, env: dict[str, str] | None = None,
            cwd: Path | None = None, text: str = "", timeout: float = 300) -> Done:
        """Run a script's file, or `code` in its place, as `__main__`; `text` is its input. TimeoutError if too slow."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("in", "out", "err")]
            files[0].write_text(text)
            pid = self.ask(program=str(program), code=code, arguments=[*map(str, arguments)], files=[*map(str, files)],
                           env=dict(os.environ) if env is None else env, cwd=str(cwd or Path.cwd()),
                           sts_rows=kill_soak.script.STS_ROWS)
            limit = time.time() + timeout
            while (status := self.poll(pid)) is None:
                if time.time() > limit:
                    os.kill(pid, signal.SIGKILL)
                    said = files[2].read_text()
                    raise TimeoutError(f"{program} {arguments}: still running after {timeout} s: {said}")
                time.sleep(0.01)
            return Done(status, files[1].read_text(), files[2].read_text(), self.ask(seconds=pid))


@functools.cache
def server() -> Server:
    """The server of this test session; its processes end with it."""
    found = Server()
    atexit.register(found.close)
    return found


def run(program: str | Path, *arguments: Any, **options: Any) -> Done:
    """`Server.run` of this session's server."""
    return server().run(program, *arguments, **options)


# The server's side


@functools.cache
def compiled(program: str, code: str | None) -> types.CodeType:
    return compile(Path(program).read_text() if code is None else code, program, "exec")


def fork_program(program: str, code: str | None, arguments: list[str], files: list[str], env: dict[str, str],
                 cwd: str) -> int:
    """The pid of a process that runs a program as Python's command line does, its streams connected to `files`."""
    body = compiled(program, code)
    if pid := os.fork():
        return pid
    status = 70
    try:
        for number, file in enumerate(files):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
        sys.stdin = open(0, closefd=False)
        os.chdir(cwd)
        os.environ.clear(), os.environ.update(env)
        sys.argv, sys.path[:0] = [program, *arguments], [cwd if code else str(Path(program).parent)]
        sys.modules["__main__"] = types.ModuleType("__main__")
        if code is None:
            sys.modules["__main__"].__file__ = program
        exec(body, sys.modules["__main__"].__dict__)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # the child must never go on as a second server
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()  # os._exit does not
        os._exit(status)


def serve() -> None:
    """Answer requests, one JSON object a line: start a program or a run, tell its exit status or its seconds.

    The status is null while it runs.
    """
    seconds = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, code, usage = os.wait4(request["poll"], os.WNOHANG)
            seconds[pid], answer = usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(code) if pid else None
        elif "seconds" in request:
            answer = seconds[request["seconds"]]
        else:
            kill_soak.script.STS_ROWS.update(request.pop("sts_rows"))
            answer = fork_program(**request) if "program" in request else kill_soak.fork_run(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    import common  # noqa: F401  what programs and the modules of injected faults import
    import matplotlib
    import pytest  # noqa: F401
    import save_best_checkpoint  # noqa: F401
    import torch
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = plt.figure()
    figure.add_subplot(xlabel="step")
    figure.savefig(io.BytesIO()), plt.close(figure)  # fonts are read
    kernel = kill_soak.script.kernel
    if "cpu" in kernel.DEVICES:
        with torch.no_grad():  # its machine code too; a backward pass here would forbid those of the forked processes
            kernel.hierarchical_mixer(*kill_soak.script.kernel.mixer_example(torch.device("cpu")))
            kernel.kernels("cpu").gelu(torch.randn(2, 16), torch.randn(16), torch.empty(2, 16))
    serve()
