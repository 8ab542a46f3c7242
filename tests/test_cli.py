"""The command line: what it lists, what it refuses, and how it says so."""

import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from otl import cli, outcomes
from otl.check import check
from otl.config import SettingsError
from otl.mistakes import compose_settings
from otl.sweeps import jobs
from tests.commands import ROOT, Result, listed, run_otl, run_process, write_plugin

LIMIT = 3.0  # seconds of processor time for any refusal, the start of Python included

# what was typed, and what the message must hold: the key, the value or the file, the nearest valid name
MISTAKES = [
    ("optimizer.lrr=0.1", "optimizer.lrr", "0.1", "did you mean optimizer.lr?"),
    ("optimzer.lr=1", "optimzer.lr", "given: 1", "did you mean optimizer.lr?"),
    ("optimizer.lr=fast", "optimizer.lr", "fast", "a number"),
    ("optimizer.betas=[0.9]", "optimizer.betas", "[0.9]", "a list of 2"),
    ("optimizer.betas=[0.9,1.5]", "optimizer.betas[1]", "1.5", "below 1"),
    ("optimizer.params=[1]", "optimizer.params", "[1]", "leave it out"),
    ("optimizer._target_=os.system", "optimizer._target_", "os.system", "is refused"),
    ("optimizer._target_=torch.optim.AdmaW", "optimizer._target_", "AdmaW", "did you mean AdamW?"),
    ("optimizer=adamw8bits", "optimizer", "adamw8bits", "did you mean adamw8bit?"),
    ("model=sdxxl", "model", "sdxxl", "did you mean sdxl?"),
    ("model.chekpoint=x", "model.chekpoint", "given: x", "did you mean model.checkpoint?"),
    ("model.checkpoint=null", "model.checkpoint", "null", "text"),
    ("method.rank=16.5", "method.rank", "16.5", "a whole number"),
    ("method.rank=0", "method.rank", "0", "at least 1"),
    ("method.dropout=1.5", "method.dropout", "1.5", "below 1"),
    ("method.aplha=1", "method.aplha", "given: 1", "did you mean method.alpha?"),
    ("scheduler=cosin", "scheduler", "cosin", "did you mean cosine?"),
    ("scheduler.wramup=5", "scheduler.wramup", "given: 5", "did you mean scheduler.warmup?"),
    ("data.batch_size=abc", "data.batch_size", "abc", "a whole number"),
    ("data.batch_size=0", "data.batch_size", "0", "at least 1"),
    ("data.resolutoin=512", "data.resolutoin", "given: 512", "did you mean data.resolution?"),
    ("++data.resolutoin=512", "data.resolutoin", "given: 512", "did you mean data.resolution?"),
    ("data.resolution=500", "data.resolution", "500", "a multiple of 8"),
    ("data.partial_batches=dorp", "data.partial_batches", "dorp", "did you mean drop?"),
    ("data.caption_dropout=2", "data.caption_dropout", "2", "at most 1"),
    ("data.captions.sources=[fil]", "data.captions.sources", "[fil]", "a list of manifest, file, json, name, prompt"),
    ("data.concepts.a.captions.sources=[fil]", "data.concepts.a.captions.sources", "fil", "a list of manifest, file"),
    ("data.background=whiet", "data.background", "whiet", "did you mean white?"),
    (
        "data.concepts.dogs.rpeats=2",
        "data.concepts.dogs.rpeats",
        "given: 2",
        "did you mean data.concepts.dogs.repeats",
    ),
    ("data.concepts.dogs.repeats=2", "data.concepts.dogs.path", "must be given", "data.concepts.dogs.path=..."),
    ("data.concepts.dogs.augment=2", "data.concepts.dogs.augment", "2", "a mapping of its settings"),
    (
        "data.concepts.dogs.augment.filp=1",
        "data.concepts.dogs.augment.filp",
        "given: 1",
        "did you mean data.concepts.dogs.augment.flip?",
    ),
    ("data.concepts.dogs.augment.flip=no", "data.concepts.dogs.augment.flip", "no", "a number"),
    ("random_flip=1", "random_flip", "given: 1", "did you mean data.augment.flip?"),
    ("data.concepts.dogs.prompt.x=2", "data.concepts.dogs.prompt", "{'x': 2}", ""),
    ("data.path=no/such/folder", "data.path", "no/such/folder", "does not exist"),
    ("loss.type=hubert", "loss.type", "hubert", "did you mean huber?"),
    ("loss.gamma=0", "loss.gamma", "0", "above 0"),
    ("noise.min_timestep=1.0", "noise.min_timestep", "1.0", "noise.max_timestep"),
    ("output.dtype=fp8", "output.dtype", "fp8", "fp16"),
    ("output.format=koyha", "output.format", "koyha", "did you mean kohya?"),
    ("trainer.precision=bf16-mxied", "trainer.precision", "bf16-mxied", "did you mean bf16-mixed?"),
    ("trainer.max_step=10", "trainer.max_step", "given: 10", "did you mean trainer.max_steps?"),
    ("trainer.max_steps=0", "trainer.max_steps", "0", "at least 1"),
    ("trainer.devices=0", "trainer.devices", "0", "at least 1; auto or -1: all"),
    ("trainer.devices=[]", "trainer.devices", "[]", "a list: numbers of GPUs from 0"),
    ("trainer.devices=[0,-1]", "trainer.devices", "[0, -1]", "a list: numbers of GPUs from 0"),
    ("trainer.devices=al", "trainer.devices", "al", "at least 1; auto or -1: all"),
    ("trainer.accelerator=gpuu", "trainer.accelerator", "gpuu", "did you mean gpu?"),
    ("trainer.val_check_interval=-4", "trainer.val_check_interval", "-4", "a whole number, at least 1"),
    ("trainer.val_check_interval=0.5", "trainer.val_check_interval", "0.5", "a whole number, at least 1"),
    ("trainer.logger=true", "trainer.logger", "true", "leave it out"),
    ("callbacks.emma.decay=0.9", "callbacks.emma", "0.9", "did you mean callbacks.ema?"),
    ("callbacks.ema.decya=0.9", "callbacks.ema.decya", "0.9", "did you mean callbacks.ema.decay?"),
    ("callbacks.sampling.every=0", "callbacks.sampling.every", "0", "at least 1"),
    ("sample.prompts=cat", "sample.prompts", "cat", "a list"),
    ("seed=one", "seed", "one", "a whole number"),
    ("resume=no/such.ckpt", "resume", "no/such.ckpt", "auto"),
    ("output.name=../elsewhere", "output.name", "../elsewhere", "hydra.run.dir"),
    ("output.name=.hidden", "output.name", ".hidden", "hydra.run.dir"),
    ("manifest=no/such.json", "manifest", "no/such.json", "task=repeat"),
    ("output.title=hf_aaaaaaaaaaaaaaaaaaaaaaaa", "output.title", "token", "HF_TOKEN"),
    ("trainer.strategy._target_=os.system", "trainer.strategy._target_", "os.system", "is refused"),
    ("hydra.launcher._target_=os.system", "hydra.launcher._target_", "os.system", "is refused"),
    ("task=tarin", "task", "tarin", "did you mean train?"),
    ("captioner=wd", "captioner", "wd", "it needs task=caption"),
    ("captioner.checkpoint=x", "captioner.checkpoint", "x", "it needs task=caption"),
    ("task.folder=runs/", "task.folder", "runs/", "leave it out"),
    ("experiment=no_such_preset", "experiment", "no_such_preset", ""),
    ("learning_rate=1e-4", "learning_rate", "0.0001", "did you mean optimizer.lr?"),
    ("train_batch_size=4", "train_batch_size", "given: 4", "did you mean data.batch_size?"),
    ("max_train_steps=100", "max_train_steps", "given: 100", "did you mean trainer.max_steps?"),
    ("epochs=3", "epochs", "given: 3", "did you mean trainer.max_epochs?"),
    ("network_dim=8", "network_dim", "given: 8", "did you mean method.rank?"),
    ("network_alpha=8", "network_alpha", "given: 8", "did you mean method.alpha?"),
    ("resolution=512", "resolution", "given: 512", "did you mean data.resolution?"),
    ("pretrained_model_name_or_path=x", "pretrained_model_name_or_path", "x", "did you mean model.checkpoint?"),
    ("output_dir=x", "output_dir", "given: x", "did you mean hydra.run.dir?"),
    ("--learning_rate=1e-4", "--learning_rate=1e-4", "without dashes", "optimizer.lr=1e-4"),
    ("seed", "seed", "name=value", ""),
    ("steps=100", "steps", "given: 100", "did you mean trainer.max_steps?"),
    ("save_every_n_epochs=1", "save_every_n_epochs", "given: 1", "did you mean callbacks.checkpoint.every_epochs?"),
    ("enable_bucket=true", "enable_bucket", "given: True", "did you mean data.buckets?"),
    ("class_prompt=dog", "class_prompt", "given: dog", "did you mean data.concepts.NAME.prompt?"),
    ("guidance_scale=7", "guidance_scale", "given: 7", "did you mean sample.guidance?"),
    ("v_parameterization=true", "v_parameterization", "True", "did you mean model.prediction=v_prediction?"),
    ("optimizer.lr=0,0001", "optimizer.lr", "0,0001", "did you mean optimizer.lr=0.0001?"),
    ("data.prompt=[a]", "data.prompt", "[a]", "must be one text"),
    ("sample.prompts='a cat'", "sample.prompts", "a cat", "did you mean 'sample.prompts=[\"a cat\"]'?"),
    ("data.path=photos (1)", "data.path", "photos (1)", "'data.path=\"photos (1)\"'"),
    ("data.path=~photos", "data.path", "~photos", "'data.path=\"~photos\"'"),
    ("data.path=C:\\photos", "data.path", "C:\\photos", "/ stands between folders"),
    ("=", "=", "name=value", "without spaces around the ="),
    ("model=owner/name", "model", "owner/name", "model.checkpoint=owner/name"),
    ("method=textual_inversion", "method", "textual_inversion", "did you mean embedding?"),
    ("data.cache_dir=${oc.env:NO_SUCH_VARIABLE}", "data.cache_dir", "NO_SUCH_VARIABLE", "cannot be resolved"),
    ("method.alpha=${method.rnak}", "method.alpha", "${method.rnak}", "cannot be resolved"),
    ("data.prompt=a, b", "data.prompt", "a, b", "quote"),
    ("logger=null", "logger", "null", "there are: none, tensorboard"),
    ("~model", "model", "must be given", "model=..."),
    ("~trainer", "trainer", "must be given", "trainer=..."),
    ("callbacks.ema=3", "callbacks.ema", "3", "a mapping of its settings"),
    ("optimizer.lr=inf", "optimizer.lr", "inf", "at least 0"),
    ("trainer.max_steps=-1", "trainer.max_steps", "-1", "at least 1"),
    ("hydra.sweeper=x", "hydra.sweeper", "x", "hydra/sweeper=NAME"),
    ("hydra.verbose=3", "hydra.verbose", "3", "true, false or a list"),
    ("hydra.run.dir=", "hydra.run.dir", "nothing is given", "the run's folder"),
    ("hydra.rnu.dir=x", "hydra.rnu.dir", "given: x", "did you mean hydra.run.dir?"),
    ("data.concepts.a=x", "data.concepts.a", "x", "data.concepts.a.path=photos/"),
    ("data.concepts={a: {pth: x}}", "data.concepts.a.pth", "given: x", "did you mean data.concepts.a.path?"),
    # what only the code of family and method says
    ("method.targets=down_blocks", "method.targets", "down_blocks", "did you mean down-blocks?"),
    ("method.targets=['(x']", "method.targets", "(x", "no regular expression"),
    ("method.targets=file", "method.targets", "file", "method.from_file"),
    ("method.from_file=no/such.safetensors", "method.from_file", "no/such.safetensors", "no such file"),
    ("method.exclude=['(x']", "method.exclude", "(x", "no regular expression"),
    ("method.ranks={attn1: 0}", "method.ranks.attn1", "0", "at least 1"),
    ("method.parts.denoiser.lrr=1", "method.parts.denoiser.lrr", "1", "did you mean lr?"),
    ("method.parts.denoiser=null", "method.parts", "no part is chosen", "method.parts.denoiser={}"),
    ("method.parts.vae.lr=1e-4", "method.parts.vae", "vae", "unet, text_encoder"),
    ("method.parts.text_encoder_2.lr=1e-4", "method.parts.text_encoder_2", "StableDiffusion", "vae, text_encoder"),
    ("method.parts.unet.lr=1e-4", "method.parts.unet", "unet", "named twice"),
    ("method.templates=object", "method.templates", "object", "method.embeddings.NAME.init=WORD"),
    ("method.templates=objct", "method.templates", "objct", "did you mean object?"),
    ("method.bundle_embeddings=true", "method.bundle_embeddings", "true", "method.embeddings.NAME.init=WORD"),
    ("method=embedding", "method.embeddings", "no embeddings", "method.embeddings.NAME.init=WORD"),
    ("method.embeddings.cat.intt=cat", "method.embeddings.cat.intt", "cat", "did you mean init?"),
    ("method.embeddings.final.init=cat", "method.embeddings.final", "output.name=final", "rename"),
    ("method=dora method.reader=comfyiu", "method.reader", "comfyiu", "did you mean comfyui?"),
    ("method=oft method.parts.denoiser.rank=3", "method.parts.denoiser.rank", "3", "a part has lr, stop_after"),
    ("method=oft output.format=peft", "output.format", "peft", "output.format=kohya"),
    ("method=inpaint model=pixart_alpha", "method=inpaint", "PixArtAlpha", "no inpainting form"),
    (
        "method=finetune model=pixart_alpha output.checkpoint_format=single_file",
        "output.checkpoint_format",
        "single_file",
        "leave it at diffusers",
    ),
    ("model.dtype=bf61", "model.dtype", "bf61", "did you mean bf16?"),
    ("model=stable_cascade model.dtype=fp16", "model.dtype", "fp16", "auto, fp32 or bf16"),
    ("model.prediction=v", "model.prediction", "v", "epsilon, v_prediction, sample"),
    ("model.config=sdlx", "model.config", "sdlx", "did you mean sdxl?"),
    # what makes no sense beside another setting
    ("optimizer=prodigy optimizer.lr=1e-4", "optimizer.lr", "0.0001", "set optimizer.lr=1"),
    ("scheduler.warmup=500 trainer.max_steps=100", "scheduler.warmup", "500", "a share of the run"),
    ("trainer.val_check_interval=4", "trainer.val_check_interval", "4", "data.validation_share"),
    ("callbacks.checkpoint.best=true", "callbacks.checkpoint.best", "true", "data.validation_share"),
    ("trainer.strategy=dpp", "trainer.strategy", "dpp", "did you mean ddp?"),
    ("trainer.profiler=simpel", "trainer.profiler", "simpel", "did you mean simple?"),
    ("trainer.gradient_clip_algorithm=nrom", "trainer.gradient_clip_algorithm", "nrom", "did you mean norm?"),
    ("method._partial_=true", "method._partial_", "true", "arguments by their names"),
    ("data.buckets=2", "data.buckets", "2", "true or false"),
    ("model=sd15 model=sdxl", "model", "sd15 and sdxl", "leave one out"),
    ("+data.batch_size=2", "data.batch_size", "+data.batch_size", "leave the + out"),
    ("~loss", "loss", "cannot be taken away", "another value"),
    ("loss.weight=sigma", "loss.weight", "sigma", "min_snr"),
    ("model=stable_cascade model.decoder=null sample.prompts=[a]", "model.decoder", "null", "hub name or a folder"),
    ("data.bucket_sizes=[500x500]", "data.bucket_sizes", "500x500", "the nearest is 496x496"),
    ("~loss.type", "loss.type", "cannot be taken away", "another value"),
    ("data.concepts.a.path=", "data.concepts.a.path", "nothing is given", "a folder of images"),
    ("model.checkpoint=no/such.safetensors", "model.checkpoint", "no/such.safetensors", "does not exist"),
    ("trainer.fast_dev_run=true", "trainer.fast_dev_run", "true", "trainer.max_steps=2"),
    ("data.batch_size=1e3", "data.batch_size", "1000.0", "did you mean 1000?"),
    ("sample.prompts=[a] sample.seeds=[]", "sample.seeds", "empty", "at least one"),
    ("task=mask masker=text masker.prompts=[]", "masker.prompts", "there are none", "[a dog]"),
    ("task=mask masker=colour masker.colours=[liem]", "masker.colours[0]", "liem", "did you mean lime?"),
]
REFUSED = """
import contextlib, io, json, os, sys, time
from pathlib import Path
from otl import cli

def refused(arguments):
    sys.argv, told, code = ["otl", *arguments], io.StringIO(), 0
    os.environ.pop("HYDRA_FULL_ERROR", None)  # set by the line before
    began = time.process_time()
    try:
        with contextlib.redirect_stderr(told):
            cli.main()
    except SystemExit as stopped:
        code = stopped.code
    seconds = time.process_time() - began
    return {"code": code, "told": told.getvalue(), "seconds": seconds, "torch": "torch" in sys.modules,
            "left": os.listdir()}

lines = json.loads(Path(sys.argv[1]).read_text())
Path(sys.argv[2]).write_text(json.dumps([refused(line) for line in lines]))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Line -> its exit code, what is told, seconds of processor time, whether torch is imported by then, and what lies
    in the folder; all from one process, which begins without torch."""
    files, folder = tmp_path_factory.mktemp("lines"), tmp_path_factory.mktemp("empty")
    lines = [line for line, *_ in MISTAKES]
    images = f"data.path={folder}"
    typed = [[*typed_words(line), *([] if line.startswith("data.path") else [images])] for line in lines]
    (files / "lines.json").write_text(json.dumps(typed))
    done = run_process([sys.executable, "-c", REFUSED, files / "lines.json", files / "refusals.json"], folder, ROOT)
    assert done.code == 0, done.err
    return dict(zip(lines, json.loads((files / "refusals.json").read_text()), strict=True))


def typed_words(line: str) -> list[str]:
    """The words of a line: a space begins another one where a setting follows."""
    return re.split(r" (?=[a-z_.]+=)", line)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    """Run a command line that is refused, in this process."""

    def run(*arguments: str) -> Result:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"})
        monkeypatch.setattr(sys, "argv", ["otl", *arguments])
        began = time.process_time()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        seconds = time.process_time() - began
        out, err = capsys.readouterr()
        return Result(int(stopped.value.code or 0), out, err, seconds)

    return run


@pytest.mark.parametrize(("line", "key", "value", "nearest"), MISTAKES, ids=[line for line, *_ in MISTAKES])
def test_a_mistake_is_refused(
    line: str, key: str, value: str, nearest: str, refusals: dict[str, dict[str, Any]]
) -> None:
    done = refusals[line]
    assert done["code"] == 2
    assert done["told"].startswith(key), done["told"]
    assert value in done["told"]
    assert nearest in done["told"]
    assert "Traceback" not in done["told"]
    assert len(done["told"].strip().splitlines()) <= 2, "one mistake, one message"
    assert done["seconds"] < LIMIT
    assert not done["torch"]
    assert done["left"] == [], "a refused run leaves no folder"


def test_a_callback_can_be_switched_off(settings: Callable[..., DictConfig], tmp_path: Path) -> None:
    assert check(settings("++callbacks.sampling=null", f"data.path={tmp_path}")) == []


def test_there_are_enough_mistakes() -> None:
    assert len(MISTAKES) >= 120


def test_all_mistakes_of_a_line_are_told_at_once(typed: Callable[..., Result]) -> None:
    done = typed("data.batch_size=abc", "optimizer.lrr=1", "model=sdxxl", "trainer.precision=bf61", "data.path=nowhere")
    for key in ("data.batch_size", "optimizer.lrr", "model", "trainer.precision", "data.path"):
        assert f"\n{key}: " in f"\n{done.err}"


def test_every_job_of_a_sweep_is_checked_before_the_first_starts(typed: Callable[..., Result], tmp_path: Path) -> None:
    done = typed("--multirun", "method.rank=8,16,x", f"data.path={tmp_path}")
    assert done.code == 2
    assert done.err.startswith("method.rank: x is not accepted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("swept", "wrong", "key"),
    [
        ("method.rank=choice(8,16)", "optimizer.lrr=1", "optimizer.lrr"),
        ("optimizer.lr=interval(1e-5,1e-4)", "data.batch_size=0", "data.batch_size"),
        ("optimizer.lr=interval(-1,1)", "seed=1", "optimizer.lr: -1.0"),
        ("optimizer.lr=interval(1e-5,1e-4)", "optimzer.lr=1", "optimzer.lr"),
        ("optimizer=glob(ad*)", "optimzer.lr=1", "optimzer.lr"),
    ],
)
def test_a_mistake_beside_or_inside_of_a_sweep_is_told_before_the_first_job(
    swept: str, wrong: str, key: str, typed: Callable[..., Result], tmp_path: Path
) -> None:
    done = typed("--multirun", swept, wrong, f"data.path={tmp_path}")
    assert done.code == 2
    assert f"\n{key}" in f"\n{done.err}"
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_the_options_of_an_own_folder_are_told_too(typed: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "my_portraits.yaml").write_text("# @package _global_\nseed: 1\n")
    done = typed("--config-dir", str(tmp_path), "experiment=my_portrait")
    assert done.code == 2
    assert "did you mean my_portraits?" in done.err
    assert "quickstart" in done.err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optimzer:\n  lr: 1\n", "experiment=mine: its optimzer: there is no such setting (given: {'lr': 1}); did you"),
        (
            "data:\n  pth: x\n",
            "experiment=mine: its data.pth: there is no such setting (given: x); did you mean data.path?",
        ),
        (
            "defaults:\n  - override /model: sdxxl\n",
            "experiment=mine: its model is sdxxl, which is none of the options; did",
        ),
        (
            "method:\n  target: full\n",
            "method.target: there is no such setting (given: full); did you mean method.targets?",
        ),
    ],
)
def test_a_mistake_in_a_preset_is_told_as_one_in_the_line(
    text: str, told: str, typed: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    done = typed("--config-dir", str(tmp_path), "experiment=mine", f"data.path={tmp_path}")
    assert done.code == 2
    assert done.err.startswith(told), done.err


def test_a_file_that_is_no_yaml_is_named_with_its_line(typed: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("checkpoint: [1\nother: 2\n")
    done = typed("--config-dir", str(tmp_path), "model=mine")
    assert done.code == 2
    assert "model/mine.yaml, line 2" in done.err


def test_settings_may_stand_before_flags() -> None:
    line = ["optimizer.lr=1", "--cfg", "job", "seed=1"]
    assert cli.spelled_out(line) == [
        "--cfg",
        "job",
        "++optimizer.lr=1",
        "seed=1",
    ]


def test_a_sweep_keeps_every_field_of_every_concept() -> None:
    fields = ["data.concepts.a.path=x", "data.concepts.b.path=y", "data.concepts.a.repeats=2"]
    *rest, concepts = cli.spelled_out(["--multirun", *fields, "seed=1,2"])
    assert rest == ["--multirun", "seed=1,2"]
    composed = compose_settings([concepts], name="config").data.concepts
    assert (composed.a.path, composed.a.repeats, composed.b.path) == ("x", 2, "y")


def test_fields_of_concepts_are_swept_over() -> None:
    fields = ["data.concepts.a.path=x", "data.concepts.a.repeats=2,3", "data.concepts.a.prompt='one, two'"]
    *_, concepts = cli.spelled_out(["--multirun", *fields])
    composed = [compose_settings(job, name="config").data.concepts.a for job in jobs([concepts])]
    assert [(one.path, one.repeats, one.prompt) for one in composed] == [("x", 2, "one, two"), ("x", 3, "one, two")]


@pytest.mark.parametrize("flags", [[], ["--multirun"]])
def test_groups_of_fields_of_concepts_are_as_deep_as_their_names(flags: list[str]) -> None:
    fields = ["data.concepts.a.b.c=1", "data.concepts.a.b.d.e=2", "data.concepts.a.b.d.f='x, y'"]
    overrides = OverridesParser.create().parse_overrides(cli.spelled_out([*flags, *fields])[len(flags) :])
    merged = OmegaConf.merge(*(OmegaConf.create(override.value()) for override in overrides))
    assert merged == {"a": {"b": {"c": 1, "d": {"e": 2, "f": "x, y"}}}}


def test_in_a_sweep_a_group_of_fields_is_not_given_whole_and_in_parts() -> None:
    with pytest.raises(SettingsError, match=r"data\.concepts\.a\.b: given whole and in parts"):
        cli.spelled_out(["--multirun", "data.concepts.a.b={c: 1}", "data.concepts.a.b.d=2"])


@pytest.mark.parametrize("line", ["optimizer.lrr=1", "optimzer.lr=1", "model=sdxxl", "data.batch_size=0", "seed=x"])
def test_a_refusal_takes_less_than_three_seconds_as_a_process(line: str, tmp_path: Path) -> None:
    done = run_otl(line, cwd=tmp_path)
    assert done.code == 2
    assert line.partition("=")[0] in done.err
    assert "Traceback" not in done.err + done.out
    assert done.seconds < LIMIT


def test_help_lists_groups_and_options_without_torch(tmp_path: Path) -> None:
    done = run_otl("--help", cwd=tmp_path)
    assert done.code == 0
    assert listed("model") in done.out and "sd15, " in listed("model")
    assert "optimizer: adafactor, adamw, adamw8bit, lion, prodigy" in done.out
    assert done.seconds < 2.0


def test_help_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    assert run_otl("--help", cwd=tmp_path, path=(tmp_path, ROOT)).code == 0
    assert run_otl("--cfg", "job", cwd=tmp_path, path=(tmp_path, ROOT)).code == 0


def test_settings_that_no_yaml_lists_need_no_plus(tmp_path: Path) -> None:
    done = run_otl("--cfg", "job", "optimizer.amsgrad=true", "data.concepts.a-b.path=x", cwd=tmp_path)
    assert "amsgrad: true" in done.out
    assert "a-b:" in done.out


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("otl model=", "model=sd15 model=sd15_inpaint"),
        ("otl optimizer.l", "optimizer.lr="),
        ("otl data.ba", "data.batch_size="),
    ],
)
def test_the_shell_completes(line: str, offered: str, tmp_path: Path) -> None:
    done = run_otl("-sc", "query=bash", cwd=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)))
    assert offered in done.out


def test_the_completion_of_the_script_installs(tmp_path: Path) -> None:
    script = tmp_path / "otl"
    script.write_text("from otl.cli import main\nmain()\n")
    done = run_process([sys.executable, script, "-sc", "install=bash"], tmp_path, ROOT)
    assert done.out.rstrip().endswith("-F hydra_bash_completion otl")


TASKS = """
import os, signal, sys
from hydra.core.hydra_config import HydraConfig
from otl.config import RunEnded, SettingsError
def show(cfg, *, words: list[str] = (), times: int = 1):
    print("rank", cfg.method.rank, "lr", cfg.optimizer.lr, "torch" in sys.modules)
    print(*words * times)
    open(HydraConfig.get().runtime.output_dir + "/done", "w").close()
def refuse(cfg):
    raise SettingsError("photos/: no images in it")
def fail(cfg):
    cfg.no_such_setting
def some(cfg):
    if cfg.method.rank == 8:
        raise SettingsError("photos/: no images in it")
    if cfg.method.rank == 9:
        raise MemoryError("no room")
    if cfg.method.rank == 10:
        raise Interrupted("stopped by SIGINT")
    if cfg.method.rank == 22:
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.method.rank == 13:
        sys.exit(3)
    if cfg.method.rank == 14:  # as a terminal's Ctrl-C: to whoever was started, who passes it on
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        os.kill(os.getppid(), signal.SIGINT)
        print("asked by", signal.Signals(signal.sigwait({signal.SIGINT})).name, signal.sigpending())
        print("by the terminal itself:", os.getpgrp() != os.getpid())
    show(cfg)
class Interrupted(RunEnded):
    exit_code = 130
"""


@pytest.fixture
def tasks(tmp_path: Path) -> tuple[Path, ...]:
    """A plugin with tasks."""
    names = ("show", "refuse", "fail", "some")
    files = {f"conf/task/{name}.yaml": f"_target_: otl_toy.tasks.{name}\n" for name in names}
    return ROOT, write_plugin(
        tmp_path / "site", "otl_toy", models="toy = otl_toy.m:M", files={"tasks.py": TASKS} | files
    )


def test_a_run_calls_its_task_in_its_folder(tasks: tuple[Path, ...], tmp_path: Path) -> None:
    line = ["task=show", "optimizer.lr=1e-3", "task.words=[a, b]", "task.times=2", "hydra.run.dir=out"]
    done = run_otl(*line, cwd=tmp_path, path=tasks)
    assert done.out.splitlines() == ["rank 16 lr 0.001 False", "a b a b"]
    assert (tmp_path / "out" / "done").is_file()
    assert (tmp_path / "out" / ".hydra" / "config.yaml").is_file()


def test_each_job_of_a_sweep_has_its_own_folder(tasks: tuple[Path, ...], tmp_path: Path) -> None:
    line = ["task=show", "method.rank=8,16", "optimizer.lr=1e-4,5e-5", "--multirun", "hydra.sweep.dir=out"]
    done = run_otl(*line, cwd=tmp_path, path=tasks)
    assert done.out.count("rank 8 lr 0.0001") == 1
    assert len(list((tmp_path / "out").glob("*/done"))) == 4


def test_a_sweep_goes_on_when_a_job_fails_and_ends_with_all_outcomes(tasks: tuple[Path, ...], tmp_path: Path) -> None:
    """Also when one is killed, or exits; what an earlier sweep left in the folder does not count."""
    line = ["task=some", "method.rank=8,9,22,13,11", "--multirun", "hydra.sweep.dir=out"]
    (tmp_path / "out" / "2").mkdir(parents=True)
    outcomes.write(outcomes.Outcome(2, [], "finished", "", 1.0), tmp_path / "out" / "2")
    done = run_otl(*line, cwd=tmp_path, path=tasks)
    assert done.code == 1
    assert "rank 11" in done.out
    assert "1 of 5 jobs finished" in done.out
    ended = [outcome for _, outcome in outcomes.read(tmp_path / "out")]
    assert [outcome.outcome for outcome in ended] == ["refused", "failed", "failed", "failed", "finished"]
    assert [outcome.message for outcome in ended] == [
        "photos/: no images in it",
        "MemoryError: no room",
        "killed by SIGKILL; was the machine out of memory?",
        "it ended by itself with exit code 3, before it was done",
        "",
    ]
    assert ended[1].line == ["task=some", "++method.rank=9"] and ended[2].line == ["task=some", "++method.rank=22"]
    assert "Traceback" in (tmp_path / "out" / "1" / "otl.log").read_text()
    assert "killed by SIGKILL" in (tmp_path / "out" / "2" / "otl.log").read_text()


def test_a_folder_of_presets_is_a_queue(tasks: tuple[Path, ...], tmp_path: Path) -> None:
    (tmp_path / "my" / "experiment" / "night").mkdir(parents=True)
    for name, rank in (("first", 11), ("second", 12)):
        preset = f"# @package _global_\nmethod:\n  rank: {rank}\n"
        (tmp_path / "my" / "experiment" / "night" / f"{name}.yaml").write_text(preset)
    line = ["--config-dir", "my", "-m", "task=some", "experiment=night/", "hydra.sweep.dir=out"]
    done = run_otl(*line, cwd=tmp_path, path=tasks)
    assert done.code == 0, done.err
    assert done.out.index("rank 11") < done.out.index("rank 12")
    assert "2 of 2 jobs finished" in done.out


def test_a_folder_without_presets_is_refused(typed: Callable[..., Result], tmp_path: Path) -> None:
    done = typed("-m", "experiment=no/such/", f"data.path={tmp_path}")
    assert done.code == 2
    assert done.err.startswith("experiment: no/such/ holds no presets")


def test_a_sweep_of_nothing_is_refused(tmp_path: Path) -> None:
    done = run_otl("-m", "experiment=glob(nothing*)", f"data.path={tmp_path}", cwd=tmp_path)
    assert done.code == 2
    assert "the sweep has no jobs" in done.err


def test_a_signal_ends_the_whole_sweep(tasks: tuple[Path, ...], tmp_path: Path) -> None:
    done = run_otl("task=some", "method.rank=10,11", "-m", "hydra.sweep.dir=out", cwd=tmp_path, path=tasks)
    assert done.code == 130
    assert "rank 11" not in done.out


def test_a_signal_to_the_sweep_reaches_the_job_once_and_ends_both(tasks: tuple[Path, ...], tmp_path: Path) -> None:
    done = run_otl("task=some", "method.rank=14,11", "-m", "hydra.sweep.dir=out", cwd=tmp_path, path=tasks)
    assert done.code == 130
    assert "asked by SIGINT set()" in done.out and "by the terminal itself: False" in done.out
    assert "rank 11" not in done.out and done.err.endswith("the rest of the sweep was not started\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_without_room_for_the_runs_folder_is_told(number: int) -> None:
    """Before the task is called: Hydra makes the folder, and writes the settings down."""
    told = cli.explained(OSError(number, os.strerror(number), "/disk/run"), ["hydra.run.dir=/disk/run"])
    assert told is not None and told.startswith("the run's folder cannot be made: ") and "/disk/run" in told


@pytest.mark.parametrize(
    ("number", "path", "key"),
    [
        (errno.EACCES, "/home/other/photos/a.png", "data.path"),
        (errno.EACCES, "/root/model/model_index.json", "model.checkpoint"),
        (errno.ENAMETOOLONG, "/runs/aaa.safetensors", "output.name"),
        (errno.EACCES, "/elsewhere", "settings"),  # which a preset names
    ],
)
def test_a_path_that_the_system_does_not_look_at_is_told(number: int, path: str, key: str) -> None:
    line = ["data.path=/home/other/photos/", "model.checkpoint=~/model", "output.name=aaa", "trainer.max_steps=1"]
    error = OSError(number, os.strerror(number), path)
    assert cli.explained(error, line) == f"{key}: {path}: {os.strerror(number)}; give another path"


def test_a_task_that_refuses_is_a_message(tasks: tuple[Path, ...], tmp_path: Path) -> None:
    done = run_otl("task=refuse", cwd=tmp_path, path=tasks)
    assert done.code == 2
    assert done.err.strip() == "photos/: no images in it"


def test_a_task_that_fails_keeps_its_traceback(tasks: tuple[Path, ...], tmp_path: Path) -> None:
    done = run_otl("task=fail", cwd=tmp_path, path=tasks)
    assert done.code == 1
    assert "Traceback" in done.err
    assert "no_such_setting" in done.err


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("data: {batch_size: 2}", "experiment: data would have no effect: the first line of a preset is '# @package"),
        ("# @package _global_\nmodel: sdxl", "model: sdxl is no mapping of its settings; .* override /model: sdxl'"),
    ],
)
def test_a_preset_that_changes_nothing_or_too_much_is_refused(
    typed: Callable[..., Result], tmp_path: Path, preset: str, said: str
) -> None:
    (tmp_path / "my" / "experiment").mkdir(parents=True)
    (tmp_path / "my" / "experiment" / "mine.yaml").write_text(preset)
    done = typed("--config-dir", str(tmp_path / "my"), "experiment=mine", f"data.path={tmp_path}")
    assert done.code == 2 and re.match(said, done.err), done.err


def test_a_config_that_is_not_there_is_told(typed: Callable[..., Result]) -> None:
    assert typed("--config-name", "mine").err.startswith("--config-name: mine: there is no mine.yaml")
