"""A SLURM job that is asked to stop goes back into the queue, where it would go on by itself."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

from otl.callbacks.stops import Stopped
from otl.tasks import slurm
from otl.tasks.train import train
from tests.datamodules.fakes import picture

SAVED = Path("runs/dog/checkpoints/step-00000003.ckpt")


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A program of that name that writes down what it is called with, and ends with what the file `code` says."""
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho no such job >&2\nexit $(cat {tmp_path}/code)\n')
    program.chmod(0o755)
    (tmp_path / "code").write_text("0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "815")
    return lambda: (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""


def stopped(number=signal.SIGUSR1, path=SAVED):
    return Stopped(number, path)


def test_it_goes_back_after_a_checkpoint(scontrol, settings):
    slurm.requeue(settings("resume=auto"), stopped())
    assert scontrol() == "requeue 815\n"


def test_one_of_an_array_goes_back_alone(scontrol, settings, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "800")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    slurm.requeue(settings("resume=auto"), stopped())
    assert scontrol() == "requeue 800_3\n"


@pytest.mark.parametrize(
    ("line", "number", "back"),
    [
        ([], signal.SIGTERM, True),
        ([], signal.SIGINT, False),
        (["callbacks.checkpoint.requeue=[SIGUSR1]"], signal.SIGUSR1, True),
        (["callbacks.checkpoint.requeue=[SIGUSR1]"], signal.SIGTERM, False),
        (["callbacks.checkpoint.requeue=null"], signal.SIGUSR1, False),
        (["callbacks.checkpoint=null"], signal.SIGUSR1, False),
    ],
)
def test_the_setting_says_which_signals_send_it_back(scontrol, settings, line, number, back):
    slurm.requeue(settings("resume=auto", *line), stopped(number))
    assert bool(scontrol()) is back


def test_other_ranks_do_not(scontrol, settings, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    slurm.requeue(settings("resume=auto"), stopped())
    assert scontrol() == ""


def test_a_run_that_would_begin_anew_is_not_sent_back_and_says_so(scontrol, settings, caplog):
    slurm.requeue(settings(), stopped())
    assert scontrol() == ""
    assert "add resume=auto" in caplog.text


def test_what_goes_wrong_is_said(scontrol, settings, caplog, tmp_path, monkeypatch):
    (tmp_path / "code").write_text("1")
    slurm.requeue(settings("resume=auto"), stopped())
    monkeypatch.setenv("PATH", "")
    slurm.requeue(settings("resume=auto"), stopped())
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "no such job" in errors[0] and "scontrol cannot be called" in errors[1]


def test_outside_of_slurm_nothing_is_called(scontrol, settings, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    slurm.requeue(settings("resume=auto"), stopped())
    assert scontrol() == ""


class Preempted(Callback):
    """The cluster asks for a stop: within the first step, or while the run is still being set up."""

    def __init__(self, moment):
        self.moment = moment

    def setup(self, trainer, pl_module, stage):
        self.ask("setup")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ask("step")

    def ask(self, moment):
        if moment == self.moment:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("moment", ["setup", "step"])
def test_a_run_that_is_asked_to_stop_puts_its_job_back(scontrol, settings, sd15_folder, tmp_path, moment):
    """Also before the first step: what it has put into its cache is kept."""
    picture(tmp_path / "photos" / "a.png")
    line = [f"model.checkpoint={sd15_folder}", f"data.path={tmp_path / 'photos'}", f"data.cache_dir={tmp_path}/cache"]
    line += ["data.resolution=64", "data.workers=0", "logger=none", "trainer.max_steps=3", "resume=auto"]
    asked = [f"callbacks.preempted._target_={__name__}.Preempted", f"callbacks.preempted.moment={moment}"]
    with pytest.raises(Stopped):
        train(settings(*line, *asked), tmp_path)
    assert scontrol() == "requeue 815\n"
    assert json.loads((tmp_path / "manifest.json").read_text())["outcome"] == "interrupted"
