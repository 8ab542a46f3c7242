"""What makes no sense together is refused or said, before any weight is loaded."""

import pytest
import torch

from otl.tasks import plan
from otl.tasks.advice import advise, of_class_images, of_resolutions, of_weights
from otl.tasks.run import build_skeleton
from otl.types import Sample, Size

CAT = "method.embeddings.cat.init=cat"


@pytest.fixture
def advised(settings, sd15_folder, tmp_path):
    """Overrides -> key -> (message, whether fatal), for three images and a hundred steps of three batches an epoch."""

    def _advised(*overrides, images=3, held_out=0, batches=3, steps=100, autocast=None):
        cfg = settings(f"model.checkpoint={sd15_folder}", f"data.path={tmp_path}", "logger=none", *overrides)
        samples = [Sample(tmp_path / f"{n}.png", Size(64, 64), ["x"], validation=n < held_out) for n in range(images)]
        module = build_skeleton(cfg)
        module.autocast_dtype = autocast
        found = advise(cfg, module, samples, batches=batches, steps=steps)
        return {problem.key: (problem.message, problem.fatal) for problem in found}

    return _advised


def test_the_defaults_make_sense(advised):
    assert advised() == {}


@pytest.mark.parametrize(
    "lines",
    [
        ["output.title=mine"],
        ["method=finetune", "output.checkpoint_format=single_file", "output.title=mine"],
        ["sample.prompts=[a]", "sample.steps=9", "sample.negative_prompt=b"],
    ],
)
def test_what_is_read_is_not_warned_of(advised, lines):
    assert advised(*lines) == {}


def test_the_weight_of_the_original_training_gives_way_to_another(settings):
    def of(*lines):
        return [problem.key for problem in of_weights(settings("model=wuerstchen", *lines))]

    assert of("model.p2_gamma=2") == of("loss.weight=min_snr") == []
    assert of("model.p2_gamma=2", "loss.weight=min_snr") == ["model.p2_gamma"]


@pytest.mark.parametrize(
    ("line", "options", "key", "said", "fatal"),
    [
        (["scheduler.warmup=100"], {}, "scheduler.warmup", "the run has 100", True),
        (["optimizer=prodigy", "optimizer.lr=1e-4"], {}, "optimizer.lr", "set optimizer.lr=1", True),
        (["optimizer.lr=1"], {}, "optimizer.lr", "diverge", False),
        (["+optimizer.fused=true"], {"autocast": torch.float16}, "optimizer.fused", "thousands of times", True),
        (["data.augment.rotation=5"], {}, "data.image_variations", "data are augmented by chance", False),
        (["data.batch_size=8"], {}, "data.batch_size", "there are 3", False),
        (["trainer.accumulate_grad_batches=8"], {}, "trainer.accumulate_grad_batches", "an epoch has 3", False),
        (["callbacks.ema.decay=0.999"], {}, "callbacks.ema.decay", "at most 0.99 fits", False),
        (["trainer.val_check_interval=10"], {}, "trainer.val_check_interval", "no image is held out", True),
        (["method.rank=64"], {}, "method.rank", "above the width of", False),
        (["+method.parts.denoiser.stop_after=33 epochs"], {}, "stop_after", "after step 99 of 100", True),
        (["+method.parts.denoiser.stop_after=50 epochs"], {}, "stop_after of unet", "has no effect", False),
        (["output.checkpoint_format=single_file"], {}, "output.checkpoint_format", "for whole models, and Lora", False),
        (["method=finetune", "output.title=mine"], {}, "output.title", "mine would have no effect", False),
        (["method=embedding", CAT, "output.title=mine"], {}, "output.title", "mine would have no effect", False),
        (["sample.steps=9"], {}, "sample.steps", "9 would have no effect: sample.prompts is empty", False),
        (["sample.prompts=[a]", "callbacks.sampling=null"], {}, "sample.prompts", "switched off", False),
        (
            ["sample.prompts=[a]", "sample.negative_prompt=b", "sample.guidance=1"],
            {},
            "sample.negative_prompt",
            "nothing is guided",
            False,
        ),
        (["method=finetune", "output.format=peft"], {}, "output.format", "peft would have no effect", False),
        (["method=inpaint", "output.trigger=sks"], {}, "output.trigger", "headers of adapters, and Inpaint", False),
    ],
)
def test_what_makes_no_sense_is_said(line, options, key, said, fatal, advised):
    found = advised(*line, **options)
    assert list(found) == [key]
    assert said in found[key][0]
    assert found[key][1] is fatal


@pytest.mark.parametrize(
    ("line", "options"),
    [
        (["scheduler.warmup=99"], {}),
        (["scheduler.warmup=0.99"], {}),
        (["optimizer=prodigy"], {}),
        (["+optimizer.fused=true"], {"autocast": torch.bfloat16}),
        (["data.augment.rotation=5", "data.image_variations=4"], {}),
        (["data.augment.rotation=5", "data.cache=false"], {}),
        (["data.augment.fixed_rotation=5", "data.augment.flip=1"], {}),
        (["data.batch_size=3"], {}),
        (["trainer.accumulate_grad_batches=3"], {}),
        (["callbacks.ema.decay=0.99"], {}),
        (["trainer.val_check_interval=10"], {"held_out": 1}),
        (["method.rank=8"], {}),
    ],
)
def test_what_just_fits_is_not_said(line, options, advised):
    assert advised(*line, **options) == {}


def shown(**seen: float) -> list[dict]:
    """As plan.json has them; `dogs` are class images."""
    total = sum(seen.values())
    kinds = {name: "regularisation" if name == "dogs" else "train" for name in seen}
    return [{"name": name, "type": kinds[name], "seen": n, "share": n / total} for name, n in seen.items()]


def test_class_images_that_outnumber_the_others_are_said(settings, tmp_path):
    cfg = settings(f"data.path={tmp_path}")
    (said,) = of_class_images(cfg, shown(data=10, dogs=190))
    assert not said.fatal and said.key == "data.concepts.dogs"
    assert "95% of what an epoch shows" in said.message and "data.concepts.dogs.samples=10 " in said.message
    assert list(of_class_images(cfg, shown(data=10, dogs=10))) == []


def test_class_images_that_are_trained_on_like_others_are_said(settings, tmp_path):
    line = [f"data.path={tmp_path}", f"data.concepts.dogs.path={tmp_path}", "data.concepts.dogs.prompt=a dog"]
    (said,) = of_class_images(settings(*line, "data.concepts.dogs.generate=9"), [])
    assert not said.fatal and "data.concepts.dogs.type=regularisation" in said.message
    kept = settings(*line, "data.concepts.dogs.generate=9", "data.concepts.dogs.type=regularisation")
    assert list(of_class_images(kept, [])) == []


def test_a_resolution_that_is_rounded_is_said(settings):
    lines = ["data.resolution=[512,1000]", "data.concepts.cat.path=.", "data.concepts.cat.resolution=776"]
    data = settings(*lines).data
    found = {problem.key: problem.message for problem in of_resolutions(data, 64)}
    assert list(found) == ["data.resolution", "data.concepts.cat.resolution"]
    assert found["data.resolution"].endswith("1000 becomes 1024x1024")
    assert not list(of_resolutions(data, 8))


def test_a_plan_warns_and_a_run_is_refused(settings, sd15_folder, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    line = ["data.prompt=x", "data.resolution=64", "trainer.max_steps=10", "scheduler.warmup=10", "method.rank=64"]
    made, problems = plan.make(
        settings(f"model.checkpoint={sd15_folder}", f"data.path={tmp_path}", "logger=none", *line)
    )
    assert {warning["about"] for warning in made["warnings"]} >= {"scheduler.warmup", "method.rank"}
    assert [problem.key for problem in problems if problem.fatal] == ["scheduler.warmup"]
