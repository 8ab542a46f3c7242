"""What settings from a stranger may call, and what they must not hold."""

import io
import json
import logging
import re
import warnings

import fsspec
import pytest
from PIL import Image

from otl.check import check
from otl.cli import check_line
from otl.config import Data, SettingsError
from otl.datamodules.files import patiently
from otl.datamodules.scan import scan
from otl.trust import CALLABLE, hide, hide_logged, hydra_calls, public, refused, secrets
from tests.commands import ROOT, run_otl, write_plugin

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


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_SAS_TOKEN", "WANDB_API_KEY"])
def test_a_token_among_the_settings_is_refused_without_being_shown(name, settings, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "0123456789abcdef")
    (problem,) = check(settings(f"data.path={tmp_path}", "output.title=${oc.env:" + name + "}"))
    assert problem.key == "output.title"
    assert "0123456789abcdef" not in problem.message


def test_what_looks_like_a_token_or_a_password_is_refused():
    found = list(secrets({"a": TOKEN, "b": {"c": ["s3://me:secret@bucket/x"]}, "d": "s3://bucket/x", "e": "hf_short"}))
    assert [problem.key for problem in found] == ["a", "b.c[0]"]


SIGNED = [
    "X-Amz-Signature=0f",
    "X-Amz-Security-Token=0f",
    "sv=2&sig=0f",
    "X-Goog-Signature=0f",
    "token=0f",
    "Signature=0f",
]


@pytest.mark.parametrize("key", ["data.path", "model.checkpoint", "output.title"])
@pytest.mark.parametrize("address", [*(f"https://host/a.zip?{each}" for each in SIGNED), "https://0f@host/a.zip"])
def test_signed_addresses_are_refused_among_the_settings(key, address):
    """Hydra, manifest, checkpoints and headers would have them."""
    (problem,) = secrets({key: address})
    assert problem.key == key and "signed address" in problem.message and "0f" not in problem.message


@pytest.mark.parametrize(
    "harmless", ["hf://datasets/me/cats@main", "https://host/a.zip?width=3", "a cat & sig=nature", "s3://bucket/a@b/c"]
)
def test_addresses_without_secrets_are_accepted(harmless):
    assert list(secrets({"data.path": harmless})) == []


def test_a_token_in_the_hubs_own_file_is_known(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("not-like-the-others\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert len(list(secrets({"a": "x not-like-the-others"}))) == 1


@pytest.fixture
def hidden(monkeypatch):
    """What `main` does, for a test; a library's logger, with a handler of its own, and what that writes."""
    monkeypatch.setenv("HF_TOKEN", "0123456789abcdef")
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    hide_logged()
    written, library = io.StringIO(), logging.Logger("library")
    library.addHandler(logging.StreamHandler(written))
    return library, written


def test_no_token_is_logged(hidden):
    library, written = hidden
    library.warning("asked %s with %s", "https://me:secret@hub/x", "0123456789abcdef")
    try:
        raise OSError("401 for 0123456789abcdef")
    except OSError:
        library.exception("again")
    assert written.getvalue().startswith("asked https://***@hub/x with ***\nagain\n")
    assert written.getvalue().endswith("OSError: 401 for ***\n")


def test_nor_one_that_came_to_be_known_later(hidden, monkeypatch):
    library, written = hidden
    monkeypatch.setenv("HF_TOKEN", "fedcba9876543210")
    hide_logged()
    try:
        raise OSError("401 for fedcba9876543210")
    except OSError:
        library.exception("again")
    assert written.getvalue().endswith("OSError: 401 for ***\n")


def test_nor_by_arguments_that_do_not_fit(hidden, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    library, written = hidden
    library.warning("asked %d times", "0123456789abcdef")
    assert written.getvalue() == "asked %d times ('***',)\n"


def test_nor_in_a_warning(hidden):
    assert "with ***" in warnings.formatwarning("asked with 0123456789abcdef", UserWarning, "file.py", 1, line="")


LEAK = """
import logging, os, threading
def ask():
    raise RuntimeError("401 for " + os.environ["HF_TOKEN"])
def leak(cfg):
    logging.getLogger("somewhere").warning("asked with %s", os.environ["HF_TOKEN"])
    own = logging.getLogger("own")
    own.propagate = False
    own.addHandler(logging.StreamHandler(open("own.log", "w")))
    own.warning("asked with %s", os.environ["HF_TOKEN"])
    try:
        ask()
    except RuntimeError:
        logging.getLogger("somewhere").exception("again")
    asking = threading.Thread(target=ask)
    asking.start(), asking.join()
    ask()
"""


@pytest.mark.parametrize("more", [[], ["-m", "seed=1,2"]])
def test_no_token_gets_out_of_a_run(more, tmp_path):
    """Neither what is logged nor a traceback, of a thread or of an error that nobody catches; nor a file."""
    files = {"tasks.py": LEAK, "conf/task/leak.yaml": "_target_: otl_leak.tasks.leak\n"}
    plugin = write_plugin(tmp_path / "site", "otl_leak", models="leak = otl_leak.m:M", files=files)
    out = ["hydra.run.dir=out", "hydra.sweep.dir=out"]
    done = run_otl("task=leak", *out, *more, cwd=tmp_path, path=(ROOT, plugin), HF_TOKEN="0123456789abcdef")
    assert done.code == 1
    assert done.err.count("401 for ***") >= 2 and "asked with ***" in done.out
    assert (tmp_path / "own.log").read_text().startswith("asked with ***\n")
    written = [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any("asked with ***" in text and "RuntimeError: 401 for ***" in text for text in written)
    assert not any("0123456789abcdef" in text for text in [done.out, done.err, *written])


def test_a_token_in_hydras_own_settings_is_refused_before_a_folder_is_made(tmp_path):
    line = [f"+hydra.job.env_set.HF_TOKEN={TOKEN}", "hydra.run.dir=out", f"data.path={tmp_path}"]
    done = run_otl(*line, cwd=tmp_path)
    assert done.code == 2
    assert "hydra.job.env_set.HF_TOKEN: holds an access token" in done.err
    assert TOKEN not in done.out + done.err and list(tmp_path.iterdir()) == []


PRESET = f"# @package _global_\nhydra:\n  job:\n    env_set:\n      HF_TOKEN: {TOKEN}\n"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (["optimizer.lr=interval(1e-5,1e-4)", f"+hydra.job.env_set.HF_TOKEN={TOKEN}"], "hydra.job.env_set.HF_TOKEN"),
        (["optimizer.lr=interval(1e-5,1e-4)", f"data.prompt={TOKEN}"], "data.prompt"),
        (["optimizer.lr=interval(1e-5,1e-4)", f"data.prompt={TOKEN},b"], "data.prompt"),
        (["experiment=glob(leak*)"], "hydra.job.env_set.HF_TOKEN"),
        (["experiment=glob(no*)", f"+hydra.job.env_set.HF_TOKEN={TOKEN}"], "hydra.job.env_set.HF_TOKEN"),
    ],
)
def test_so_is_one_in_a_sweep_whose_values_only_the_sweeper_knows(line, key, tmp_path):
    """Hydra writes multirun.yaml before it asks the sweeper."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "leaking.yaml").write_text(PRESET)
    with pytest.raises(SettingsError, match=rf"(?m)^{re.escape(key)}: holds an access token"):
        check_line(["-m", f"--config-dir={tmp_path}", f"data.path={tmp_path}", *line])


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (f"https://me:p@ss@host/a.png?w=3&token={TOKEN}&h=4", "https://host/a.png?w=3&token=***&h=4"),
        (f"https://{TOKEN}@host/{TOKEN}/a.png", "https://host/***/a.png"),
        (
            "https://host/a.png?X-Amz-Signature=0f&X-Amz-Expires=9",
            "https://host/a.png?X-Amz-Signature=***&X-Amz-Expires=9",
        ),
        ("https://host/a.png?Key=b@c.png&width=3", "https://host/a.png?Key=b@c.png&width=3"),
        ("hf://datasets/me/cats@main/a.png", "hf://datasets/me/cats@main/a.png"),
    ],
)
def test_a_url_is_named_without_user_and_secrets(url, name):
    assert public(url) == name


def test_a_table_with_secret_addresses_gives_images_that_are_named_without(tmp_path):
    url = f"memory://me:secret@host/a.png?token={TOKEN}"
    (tmp_path / "images.jsonl").write_text(json.dumps({"file_name": url, "text": "a cat"}))
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    fsspec.filesystem("memory").pipe(url, buffer.getvalue())
    cache = tmp_path / "cache"
    (sample,), problems = scan(Data(path=str(tmp_path / "images.jsonl"), cache_dir=str(cache)))
    assert problems == [] and sample.path.read_bytes() == buffer.getvalue()
    assert str(sample.path) == "memory://host/a.png?token=***"
    for text in (str(sample.name), sample.path.identity(), *(path.read_text() for path in cache.rglob("*.jsonl"))):
        assert "secret" not in text and TOKEN not in text


def test_nor_in_what_is_said_of_one_that_cannot_be_read(tmp_path):
    """The plan has it, and an error of fsspec's quotes the address."""
    (tmp_path / "images.csv").write_text(f"file_name\nmemory://me:secret@host/gone.png?token={TOKEN}&sig=secret\n")
    _, problems = scan(Data(path=str(tmp_path / "images.csv"), cache_dir=str(tmp_path / "cache")))
    assert "gone.png?token=***&sig=***: there is no such file" in str(problems)
    assert "secret" not in str(problems) and TOKEN not in str(problems)


def test_nor_in_what_a_store_said_that_refused_one():
    url = "https://me:secret@host/a.png?sig=secret"

    def refuse():
        raise PermissionError(f"403, url={url!r}")

    with pytest.raises(SettingsError, match=r"a\.png\?sig=\*\*\*: cannot be read \(PermissionError: 403") as raised:
        patiently(url, refuse)
    assert "secret" not in str(raised.value)


def test_tokens_are_hidden_wherever_they_stand():
    assert hide(f"401 for {TOKEN}!", []) == "401 for ***!"
    assert (
        hide("no host://me:p@ss:w@host/a@b, nor redis://:pw@host", []) == "no host://***@host/a@b, nor redis://***@host"
    )
    assert hide("nothing to hide at https://host:80/x", []) == "nothing to hide at https://host:80/x"
