"""What settings from a stranger may call, and what they must not hold."""

import logging

import pytest

from otl.check import check
from otl.trust import CALLABLE, WithoutTokens, hide, hydra_calls, refused, secrets
from tests.commands import run_otl

TOKEN = "hf_" + "aB3" * 11
HOSTILE = [
    ("optimizer", "os.system"),
    ("optimizer", "torch.hub.load"),
    ("optimizer", "torch.load"),
    ("model", "torch.hub.load"),
    ("model", "diffusers.DiffusionPipeline.from_pretrained"),
    ("method", "subprocess.run"),
    ("trainer", "lightning.pytorch.cli.LightningCLI"),
    ("trainer.strategy", "torch.distributed.run.main"),
    ("callbacks.x", "hydra.utils.instantiate"),
    ("callbacks.x.argument", "builtins.exec"),
    ("logger", "otl.callbacks.ema.EMA"),
    ("optimizer", "torch.optimism.AdamW"),
    ("task", "otl.cli.main"),
]


@pytest.mark.parametrize(("key", "target"), HOSTILE)
def test_what_would_run_a_strangers_code_is_refused(key, target):
    problem = refused(key, target)
    assert problem is not None
    assert problem.fatal
    assert problem.key == f"{key}._target_"
    assert target in problem.message


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("optimizer", "torch.optim.SGD"),
        ("optimizer", "transformers.optimization.Adafactor"),
        ("trainer.strategy", "lightning.pytorch.strategies.FSDPStrategy"),
        ("callbacks.x", "lightning.pytorch.callbacks.EarlyStopping"),
        ("logger", "lightning.pytorch.loggers.WandbLogger"),
    ],
)
def test_what_people_swap_in_is_called(key, target):
    assert refused(key, target) is None


@pytest.mark.parametrize(
    "hydra",
    [
        {"callbacks": {"x": {"_target_": "os.system", "command": "id"}}},
        {"callbacks": {"x": {"_target_": "${oc.env:X}"}}},
        {"launcher": {"_target_": "subprocess.run"}},
        {"job_logging": {"handlers": {"x": {"class": "subprocess.Popen", "args": ["id"]}}}},
        {"hydra_logging": {"filters": {"x": {"()": "os.system", "command": "id"}}}},
    ],
)
def test_hydras_own_settings_call_nothing_strange(hydra):
    (problem,) = hydra_calls(hydra)
    assert problem.fatal
    assert problem.key.startswith("hydra.")


def test_a_preset_cannot_run_code_by_hydras_callbacks(tmp_path):
    (tmp_path / "my" / "experiment").mkdir(parents=True)
    preset = "# @package _global_\nhydra:\n  callbacks:\n    x: {_target_: pathlib.Path.touch, self: RAN}\n"
    (tmp_path / "my" / "experiment" / "gift.yaml").write_text(preset)
    done = run_otl("--config-dir", "my", "experiment=gift", f"data.path={tmp_path}", cwd=tmp_path)
    assert done.code == 2
    assert "hydra.callbacks.x._target_: pathlib.Path.touch is refused" in done.err
    assert not (tmp_path / "RAN").exists()


def test_the_shipped_settings_pass(settings, tmp_path):
    composed = settings(f"data.path={tmp_path}")
    assert {key for key in CALLABLE if key in composed} >= {"task", "model", "method", "optimizer", "trainer"}
    assert check(composed) == []


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY"])
def test_a_token_among_the_settings_is_refused_without_being_shown(name, settings, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "0123456789abcdef")
    (problem,) = check(settings(f"data.path={tmp_path}", "output.title=${oc.env:" + name + "}"))
    assert problem.key == "output.title"
    assert "0123456789abcdef" not in problem.message


def test_what_looks_like_a_token_or_a_password_is_refused():
    found = list(secrets({"a": TOKEN, "b": {"c": ["s3://me:secret@bucket/x"]}, "d": "s3://bucket/x", "e": "hf_short"}))
    assert [problem.key for problem in found] == ["a", "b.c[0]"]


def test_a_token_in_the_hubs_own_file_is_known(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("not-like-the-others\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert len(list(secrets({"a": "x not-like-the-others"}))) == 1


def test_no_token_is_logged(monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "0123456789abcdef")
    caplog.handler.addFilter(WithoutTokens())
    logging.getLogger("somewhere").warning("asked %s with %s", "https://me:secret@hub/x", "0123456789abcdef")
    assert caplog.messages[-1] == "asked https://***@hub/x with ***"


def test_tokens_are_hidden_wherever_they_stand():
    assert hide(f"401 for {TOKEN}!", []) == "401 for ***!"
    assert hide("nothing to hide at https://host:80/x", []) == "nothing to hide at https://host:80/x"
