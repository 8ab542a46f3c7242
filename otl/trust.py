"""Which code the settings may call, and what they must not hold. Presets come from strangers. Imports no torch."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from otl.config import Problem
from otl.registry import plugin_packages
from otl.wording import joined

OPTIMIZERS = ("torch.optim", "bitsandbytes.optim", "pytorch_optimizer", "transformers.optimization", "otl.optimizers")
TRAINER = (
    "lightning.pytorch.Trainer",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.plugins",
    "torch.distributed.fsdp",
)
# Group -> packages and names below which it may call. Not whole libraries: torch.hub.load would run a stranger's code.
CALLABLE: dict[str, tuple[str, ...]] = {
    "task": ("otl.tasks",),
    "model": ("otl.modules",),
    "method": ("otl.methods",),
    "optimizer": OPTIMIZERS,
    "scheduler": ("otl.schedules",),
    "data": ("otl.datamodules",),
    "trainer": TRAINER,
    "logger": ("lightning.pytorch.loggers",),
    "captioner": ("otl.tools",),
    "masker": ("otl.tools",),
    "callbacks": ("otl.callbacks", "lightning.pytorch.callbacks"),
    "hydra": ("otl.outcomes", "hydra._internal", "hydra.core", "hydra.experimental.callbacks", "hydra_plugins"),
}
LOGGING = ("logging", "rich.logging", "colorlog", "hydra")  # classes that Hydra's logging settings name
LOGGING_KEYS = {"class", "()", "factory"}  # of logging.config.dictConfig: called with what stands beside them
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
TOKEN_VARIABLES = """
HF_TOKEN HUGGING_FACE_HUB_TOKEN AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AZURE_STORAGE_ACCOUNT_KEY AZURE_STORAGE_KEY
AZURE_STORAGE_SAS_TOKEN AZURE_STORAGE_CONNECTION_STRING WANDB_API_KEY COMET_API_KEY NEPTUNE_API_TOKEN
MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN
""".split()
CREDENTIALS = re.compile(r"://[^/\s:@?#]*:[^/\s?#]+@")  # user:password in an address, which may hold an @ of its own
WEB_USER = re.compile(r"\bhttps?://[^/\s?#]+@")  # by which some servers take a token alone
USER = re.compile(r"://[^/\s?#]+@")
SECRET_VALUE = re.compile(  # of a query, as stores and their signed addresses name them
    r"([?&;#](?:(?:access|auth|id|private|refresh|session|security)?[_-]?token|x-amz-security-token|api[_-]?key|secret|"
    r"client[_-]secret|passw(?:or)?d|awsaccesskeyid|sig|(?:x-(?:amz|goog)-)?(?:signature|credential))=)[^&;#\s'\")>]+",
    re.IGNORECASE,
)
HIDDEN = "***"
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}  # errors of one that is full or breaks


def refused(key: str, target: str) -> Problem | None:
    """Why the settings may not call `target`, if they may not.

    Args:
        key: of the dict that names it, such as "optimizer" or "trainer.strategy".
        target: dotted name.
    """
    packages = (*CALLABLE.get(key.partition(".")[0], ("otl",)), *plugin_packages())
    if below(target, packages):
        return None
    allowed = ", ".join(packages)
    message = f"{target} is refused: here only what is in {allowed} is called; other code belongs in a plugin package"
    return Problem(f"{key}._target_", message)


def below(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the packages or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def hydra_calls(hydra: dict[str, Any]) -> Iterator[Problem]:
    """What of Hydra's own settings would call something strange: its callbacks run before any task.

    Args:
        hydra: the node `hydra` as plain dicts and lists.
    """
    for key, value in _leaves(hydra, "hydra"):
        parent, _, name = key.rpartition(".")
        if not isinstance(value, str):
            continue
        if name == "_target_":
            yield from filter(None, [refused(parent, value)])
        elif name in LOGGING_KEYS and "logging" in key and not below(value, LOGGING):
            yield Problem(key, f"{value} is refused: here only what is in {', '.join(LOGGING)} is called")


def secrets(settings: dict[str, Any]) -> Iterator[Problem]:
    """Tokens and passwords among the settings: these are written into the run's folder and into files."""
    known = known_tokens()
    for key, value in _leaves(settings, ""):
        if not isinstance(value, str):
            continue
        if HUB_TOKEN.search(value) or any(token in value for token in known):
            message = "holds an access token, which would be written into the run's folder: leave it out"
            yield Problem(key, f"{message}; the hub is asked with HF_TOKEN of the environment, or after hf auth login")
        elif CREDENTIALS.search(value) or WEB_USER.search(value) or ("://" in value and SECRET_VALUE.search(value)):
            message = "holds a password or signed address, which would be written into the run's folder: leave it out"
            way = "the environment or the configuration of the store's own library"
            yield Problem(key, f"{message}; give it by {way}, or put the address into a list of images (.csv)")


def known_tokens() -> list[str]:
    """The access tokens of this machine that are known: of the environment, and of the hub's own file."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    file = Path(os.environ.get("HF_TOKEN_PATH", home / "token"))
    found = [os.environ.get(name, "") for name in TOKEN_VARIABLES]
    if file.is_file():
        found.append(file.read_text(encoding="utf-8", errors="replace"))
    return [token.strip() for token in found if len(token.strip()) >= 8]


def hide_logged() -> None:
    """No access token is in what is logged or warned of, by whomever: libraries have handlers of their own."""
    make, tell, known = logging.getLogRecordFactory(), warnings.formatwarning, known_tokens()

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        return without_tokens(make(*args, **options), known)

    def formatted(*args: Any, **options: Any) -> str:
        return hide(tell(*args, **options), known)

    logging.setLogRecordFactory(record)
    warnings.formatwarning = formatted


def without_tokens(record: logging.LogRecord, known: list[str]) -> logging.LogRecord:
    """The record, tokens hidden in its traceback too: an error of a library may quote the address that it asked."""
    try:
        text = record.getMessage()
    except (TypeError, ValueError, KeyError):  # arguments that do not fit are no reason to stop whoever logs
        text = f"{record.msg} {record.args}"
    hidden = hide(text, known)
    if hidden != text:
        record.msg, record.args = hidden, None
    if record.exc_info:
        record.exc_text = record.exc_text or logging.Formatter().formatException(record.exc_info)
        record.exc_info = None  # else it is written out once more
    if record.exc_text:
        record.exc_text = hide(record.exc_text, known)
    return record


def hide_uncaught() -> None:
    """No access token is in the traceback of what nobody catches, in this process and its threads."""
    sys.excepthook = _tell
    threading.excepthook = _tell_of_thread


def _tell(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if not issubclass(kind, SystemExit):  # ends a thread without a word
        sys.stderr.write(hide("".join(traceback.format_exception(kind, error, trace)), known_tokens()))


def _tell_of_thread(each: threading.ExceptHookArgs) -> None:
    """A disk that a thread cannot write to is no mistake in a program: one line. Who asked the thread ends for it."""
    if isinstance(each.exc_value, OSError) and each.exc_value.errno in DISK:
        sys.stderr.write(hide(f"{each.thread and each.thread.name}: {each.exc_value}\n", known_tokens()))
    else:
        _tell(each.exc_type, each.exc_value, each.exc_traceback)


def hide(text: str, tokens: list[str]) -> str:
    """The text with every token and password replaced by stars."""
    for token in tokens:
        text = text.replace(token, HIDDEN)
    text = CREDENTIALS.sub(f"://{HIDDEN}@", HUB_TOKEN.sub(HIDDEN, text))
    return SECRET_VALUE.sub(rf"\g<1>{HIDDEN}", text)


def public(url: str) -> str:
    """The name of what lies at a URL, for people and files: without the user, and with stars for secret values."""
    return hide(USER.sub("://", url), [])


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, joined(key, name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{key}[{index}]")
    else:
        yield key, node
