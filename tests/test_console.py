"""What the work says may be lost; the work is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from otl.console import lasting
from tests.commands import ROOT, surroundings


def test_a_reader_that_goes_away_is_said_once_and_stops_nobody(capfd) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        console = lasting(file, "stdout")
        os.close(reader)
        for _ in range(3):
            print("step", file=console, flush=True)
    assert capfd.readouterr().err == "stdout: Broken pipe; a run goes on, and its otl.log has it all\n"


def test_what_can_be_written_comes_through_in_the_same_characters(tmp_path: Path) -> None:
    with (tmp_path / "said").open("w", encoding="utf-16") as file:
        print("8 Bilder, Größe", file=lasting(file, "stdout"), flush=True)
    assert (tmp_path / "said").read_text(encoding="utf-16") == "8 Bilder, Größe\n"


def test_what_is_not_to_wait_is_there_at_once(tmp_path: Path) -> None:
    """As with python -u, which people set on clusters."""
    with (tmp_path / "said").open("w") as file:
        file.reconfigure(write_through=True)
        console = lasting(file, "stdout")
        print("step", end="", file=console)
        assert (tmp_path / "said").read_text() == "step"


INTERRUPTED = """
import signal
class Seen:
    def find_spec(self, name, path=None, target=None):
        if name == "hydra":
            signal.raise_signal(signal.SIGINT)
import sys
sys.meta_path.insert(0, Seen())
from otl.__main__ import main
main()
"""


def test_ctrl_c_while_libraries_are_imported_ends_it_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "--help"],
        cwd=tmp_path,
        env=surroundings() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_full_disk_behind_stdout_ends_no_command(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "otl", "--help"],
            cwd=ROOT,
            env=surroundings(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert done.stderr.startswith("stdout: No space left on device")
