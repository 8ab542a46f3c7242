"""`python -m otl` again and again, each time forked off one process that has imported the libraries: five seconds less.

Each command has its own process, folder, environment and files of output, as if it were typed. What it imports, and
what is said meanwhile, is proven by the commands of other tests, which start from nothing.

Stdin: a line of JSON for each command. Stdout: one for each, when it has ended.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
from typing import NoReturn

from otl.quiet import quiet_libraries

IMPORTED = ("otl.tasks.train", "otl.tasks.plan", "otl.tasks.repeat", "diffusers", "transformers", "peft")


def main() -> None:
    quiet_libraries()
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become(**json.loads(line))
        _, status, used = os.wait4(child, 0)
        code, seconds = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        print(json.dumps([code, seconds, used.ru_maxrss * 1024]), flush=True)


def become(
    words: list[str], cwd: str, path: list[str], environment: dict[str, str], files: list[str], timeout: int
) -> NoReturn:
    """This process is `python -m otl` from here on.

    Args:
        files: of stdout and stderr.
        timeout: seconds after which it is ended.
    """
    signal.alarm(timeout)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = path
    for descriptor, name in enumerate([os.devnull, *files]):
        os.dup2(os.open(name, os.O_RDWR), descriptor)
    sys.argv[1:] = words
    runpy.run_module("otl", run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    main()
