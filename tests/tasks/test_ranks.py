"""Two processes train one run as one would: on the CPU, as Lightning starts them from the command line."""

import csv
import functools
import json

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from otl.datamodules.cache import Cache
from otl.tasks import ranks
from otl.tasks.train import strategy
from tests.commands import fork_otl, run_otl


def trainer(**options):
    return OmegaConf.create({"accelerator": "cpu", "devices": 1, **options})


@pytest.mark.parametrize(
    ("devices", "nodes", "expected"),
    [(1, 1, 1), (2, 1, 2), ("2", 2, 4), ([1], 1, 1), ([0, 3], 1, 2), ("0,1,2", 1, 3), ("1,", 1, 1), ("auto", 1, 1)],
)
def test_ranks_are_devices_times_nodes(devices, nodes, expected):
    assert ranks.count(trainer(devices=devices, num_nodes=nodes)) == expected


def test_all_gpus_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [ranks.count(trainer(devices=d, accelerator="gpu")) for d in ("auto", -1, "-1")] == [8, 8, 8]


def test_layers_without_gradient_are_expected_where_a_text_encoder_trains_on_several_ranks():
    unused = "ddp_find_unused_parameters_true"
    assert strategy(trainer(devices=2), trains_text=True) == unused
    assert strategy(trainer(devices=2, strategy="ddp"), trains_text=True) == unused
    assert strategy(trainer(devices=2), trains_text=False) == "auto"
    assert strategy(trainer(), trains_text=True) == "auto"
    assert strategy(trainer(devices=2, strategy="fsdp"), trains_text=True) == "fsdp"


@pytest.fixture
def photos(tmp_path):
    """Three pictures of one size: a batch of two and one of one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 100, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture
def train(tmp_path, photos, sd15_folder):
    def _train(*overrides, **environment):
        alone = not environment and not any("trainer.devices" in word for word in overrides)  # no process is started
        return (fork_otl if alone else functools.partial(run_otl, OMP_NUM_THREADS="1", **environment))(
            f"model.checkpoint={sd15_folder}",
            f"data.path={photos}",
            f"data.cache_dir={tmp_path / 'cache'}",
            "data.resolution=64",
            "data.workers=0",
            "logger=none",
            "trainer.accelerator=cpu",
            "trainer.max_steps=3",
            "output.dtype=fp32",
            *overrides,
            cwd=tmp_path,
        )

    return _train


TWO = ("trainer.devices=2", "data.batch_size=2")


@pytest.mark.slow
def test_two_ranks_train_as_one_does_with_their_batches_together(train, tmp_path, photos):
    """Of two jobs, since Lightning repeats the command line: a sweep of sweeps. The batches have 2 and 1 images."""
    shared = [f"data.concepts.held.path={photos}", "data.concepts.held.type=validation", "optimizer.lr=1e-3"]
    sampling = ["sample.prompts=[a cat]", "sample.steps=1"]
    sweep = ["--multirun", "method.rank=2,4", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    two = train(*sweep, *TWO, *shared, *sampling)
    assert two.code == 0, two.err
    one = train("method.rank=4", "data.batch_size=3", f"hydra.run.dir={tmp_path / 'one'}", *shared)
    assert one.code == 0, one.err
    both = tmp_path / "sweep" / "1"

    a, b = load_file(tmp_path / "one" / "final.safetensors"), load_file(both / "final.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
    rows = [list(csv.DictReader((folder / "metrics.csv").open())) for folder in (tmp_path / "one", both)]
    for name in ("step", "loss", "val_loss"):
        for x, y in zip(*rows, strict=True):
            assert (x[name] == y[name]) if not x[name] else float(x[name]) == pytest.approx(float(y[name]), rel=1e-4)

    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["0", "1", "multirun.yaml"]
    assert not (tmp_path / "runs").exists()
    assert {path.name for path in (both / "checkpoints").iterdir()} == {"index.json", "step-00000003.ckpt"}
    assert (both / "samples" / "before-after.png").is_file()
    plan = json.loads((both / "plan.json").read_text())
    assert (plan["ranks"], plan["steps_per_epoch"]) == (2, 1)
    assert json.loads((both / "manifest.json").read_text())["outcome"] == "finished"
    for line in ("precision 32-true", "3 steps in all", "step 2/3", "exported"):
        assert two.out.count(line) == 2, line  # once a job
        assert (both / "otl.log").read_text().count(line) == 1, line


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_the_same_images(train, tmp_path, photos):
    """Two steps an epoch, of two images and of one: on two ranks, of which one then has a batch that does not count,
    accumulated on one, and on two again. It stops within an epoch, and a validation of three batches counts each once.
    """
    line = ["trainer.max_steps=5", "callbacks.checkpoint.every=1", "callbacks.checkpoint.keep=9", "optimizer.lr=1e-3"]
    line += [f"data.concepts.held.path={photos}", "data.concepts.held.type=validation"]
    two = train(*line, "trainer.devices=2", f"hydra.run.dir={tmp_path / 'two'}")
    assert two.code == 0, two.err
    resume = f"resume={tmp_path / 'two' / 'checkpoints' / 'step-00000003.ckpt'}"
    one = train(*line, resume, "trainer.accumulate_grad_batches=2", f"hydra.run.dir={tmp_path / 'one'}")
    assert one.code == 0, one.err

    a, b = (load_file(tmp_path / name / "final.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in b)
    rows = [list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("one", "two")]
    assert [row["step"] for row in rows[0]] == ["4", "5"]
    for x, y in zip(rows[0], rows[1][3:]):
        assert float(x["loss"]) == pytest.approx(float(y["loss"]), rel=1e-4)
    assert float(rows[0][0]["val_loss"]) == pytest.approx(float(rows[1][3]["val_loss"]), rel=1e-4)

    resume_one = f"resume={tmp_path / 'one' / 'checkpoints' / 'step-00000004.ckpt'}"
    again = train(*line, resume_one, "trainer.devices=2", f"hydra.run.dir={tmp_path / 'again'}")
    assert again.code == 0, again.err
    c = load_file(tmp_path / "again" / "final.safetensors")
    assert all(torch.allclose(c[key], b[key], atol=1e-5) for key in b)
    (row,) = csv.DictReader((tmp_path / "again" / "metrics.csv").open())
    assert (row["step"], float(row["loss"])) == ("5", pytest.approx(float(rows[1][4]["loss"]), rel=1e-4))

    half = train(*line, resume, f"hydra.run.dir={tmp_path / 'half'}")
    assert half.code == 2
    assert "batches of an optimizer step: 2 -> 1" in half.err


@pytest.mark.slow
@pytest.mark.long
def test_text_encoders_train_on_two_ranks(train, tmp_path, sdxl_folder):
    """SDXL reads the last layer but one: the adapters of the last get no gradient."""
    parts = "method.parts={denoiser: {}, text_encoder: {}, text_encoder_2: {}}"
    run = f"hydra.run.dir={tmp_path / 'run'}"
    done = train("model=sdxl", f"model.checkpoint={sdxl_folder}", *TWO, parts, "model.gradient_checkpointing=true", run)
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "final.safetensors").is_file()


@pytest.mark.slow
def test_a_nan_on_one_rank_ends_all_and_is_named_once(train, tmp_path):
    """One of three images is broken, and comes to the second rank, of which the first one tells."""
    assert train("data.batch_size=1", "trainer.max_steps=1", f"hydra.run.dir={tmp_path / 'fill'}").code == 0
    cache = Cache(tmp_path / "cache")
    cache.refresh()
    for shard in cache.shards:
        if shard.origin.kind == "image":
            entries = load_file(shard.path)
            shard.path.unlink()
            entries["latents"][2] = torch.nan
            for key, latents in zip(entries["otl.key"], entries["latents"]):
                cache.put(bytes(key.tolist()).hex(), {"latents": latents}, shard.origin)
    cache.flush()
    done = train(
        "data.batch_size=1", "trainer.devices=2", "callbacks.guard.skips=0", f"hydra.run.dir={tmp_path / 'run'}"
    )
    assert done.code == 1
    assert done.err.count("the loss is NaN or infinite, in ") == 1
    assert done.err.count("made by the latents that came from the data") == 1
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["outcome"] == "NonFinite"
    assert not (tmp_path / "run" / "final.safetensors").exists()
