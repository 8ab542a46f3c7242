"""The moments of a run at which something can happen: calls to the operating system, and parts of a step."""

from __future__ import annotations

import builtins
import collections
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from otl.formats.files import destination
from otl.modules.training import Training

MARK = "FAULT "  # begins a line that says what was done
CALLS = ("open", "fsync", "replace", "unlink")  # of module os
FILES = {
    "cache": "a shard",
    "uses": "a record",
    "checkpoints": "a checkpoint",
    "samples": "a picture",
    "final": "a result",
}  # by what the name of a folder, or of the file, begins with
OTHER = "another file"
NAMES = {"metrics.csv": "the table", "manifest.json": "a record", "plan.json": "a record", "index.json": "a record"}
KILLS = (
    *(f"{when} {call}" for call in CALLS for when in ("before", "after")),
    *(
        "before backward",
        "within backward",
        "after backward",
        "after step",
        "within write",
        "between shards",
        "within validation",
    ),
)
REFUSALS = (*(f"before {call}" for call in CALLS), "within write")


class Fault:
    """Something that happens at a chosen moment, which is a call to the operating system or a part of a step.

    Args:
        name: of the moment, such as "after replace" or "after replace of a checkpoint"; "": nothing happens.
        number: which of the moments of that name, counted from 1.
        happen: what happens.
        lasting: whether it happens at every moment from then on.
    """

    def __init__(self, name: str, number: int, happen: Callable[[str], None], *, lasting: bool = False) -> None:
        self.name, self.number, self.happen, self.lasting = name, number, happen, lasting
        self.seen: collections.Counter[str] = collections.Counter()  # moments, by their names
        self.begun = False
        self.process = os.getpid()

    def moment(self, name: str) -> None:
        if os.getpid() != self.process:
            return  # a process that loads batches
        self.seen[name] += 1
        if name.startswith(self.name) and self.name:
            self.number -= 1
            self.begun = self.begun or self.number == 0
        if (self.begun and self.lasting) or (name.startswith(self.name) and self.number == 0):
            self.number = -1
            self.happen(name)

    def install(self) -> None:
        """Into this process, which is not to be used for anything else any more."""
        self.process = os.getpid()
        for call in CALLS:
            setattr(os, call, self.around(getattr(os, call), call))
        opened = io.open
        create = self.around(opened, "open")

        def open_(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+") or not isinstance(path, str | Path) or str(path).startswith("/dev/"):
                return opened(path, mode, *args, **options)
            return Half(create(path, mode, *args, **options), self, about(path))

        io.open = builtins.open = open_  # type: ignore[assignment]
        torch.Tensor.backward = self.within(torch.Tensor.backward)  # type: ignore[method-assign,assignment]
        register_optimizer_step_post_hook(lambda *_: self.moment("after step"))
        validate = Training.validation_step

        def validation_step(module: Training, *batch: Any) -> None:
            self.moment("within validation")
            validate(module, *batch)

        Training.validation_step = validation_step  # type: ignore[method-assign]

    def around(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A moment right before a call, and one right after it."""

        @functools.wraps(call)
        def watched(path: Any, *args: Any, **options: Any) -> Any:
            target = args[0] if name == "replace" else path
            self.moment(f"before {name} of {about(target)}")
            found = call(path, *args, **options)
            self.moment(f"after {name} of {about(target)}")
            if name == "replace" and about(target) == "a shard":
                self.moment("between shards")
            return found

        return watched

    def within(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(loss: torch.Tensor, *args: Any, **options: Any) -> None:
            self.moment("before backward")
            loss.register_hook(lambda _: self.moment("within backward"))
            backward(loss, *args, **options)
            self.moment("after backward")

        return watched


class Half:
    """A file of which half is written when something happens."""

    def __init__(self, file: Any, fault: Fault, name: str) -> None:
        self.file, self.fault, self.name = file, fault, name

    def write(self, content: Any) -> int:
        half = len(content) // 2
        if len(content) <= 100:
            return self.file.write(content)
        self.file.write(content[:half])
        self.file.flush()
        self.fault.moment(f"within write of {self.name}")
        return half + self.file.write(content[half:])

    def writelines(self, parts: Any) -> None:
        for part in parts:
            self.write(part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Half:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self.file.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.file)


def about(path: Any) -> str:
    """What a path, or an open file's number, is of: "a checkpoint", "a picture"."""
    path = destination(Path(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path))
    if path.name in NAMES:
        return NAMES[path.name]
    return next((kind for part in path.parts[::-1] for name, kind in FILES.items() if part.startswith(name)), OTHER)
