"""Going on from a checkpoint: what has changed since is listed, and what changes nothing is not."""

import copy
import functools
import os
import pickle
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from otl import schedules
from otl.callbacks import randomness
from otl.callbacks.backups import Backups
from otl.config import SettingsError
from otl.tasks import manifest, resuming
from otl.tasks.folder import alone, refuse_overwrite
from otl.tasks.run import plain
from otl.types import Sample, Size

IMAGES = [["a.png", "1"], ["b.png", "2"], ["c.png", "3"]]


@pytest.fixture
def module(settings, tmp_path):
    """(overrides) -> what `differences` reads of a module."""

    def _module(*overrides, total_steps=100, dataset=IMAGES, schedule=schedules.constant, precision="32-true"):
        return SimpleNamespace(
            settings=plain(settings(f"data.path={tmp_path}", "logger=none", *overrides)),
            total_steps=total_steps,
            dataset=dataset,
            lr_schedule=schedule,
            precision_name=precision,
        )

    return _module


def earlier(module, *, step=10, ranks=1):
    """The checkpoint of a module."""
    return {
        "settings": copy.deepcopy(module.settings),
        "precision": module.precision_name,
        "dataset": copy.deepcopy(module.dataset),
        "total_steps": module.total_steps,
        "world_size": ranks,
        "global_step": step,
    }


def differences(then, now, *, ranks=1):
    return list(resuming.differences(then, now, ranks=ranks))


@pytest.mark.parametrize(
    "overrides",
    [
        ["resume=auto", "output.dtype=fp32", "output.overwrite=true", "sample.prompts=[a cat]", "sample.steps=3"],
        ["data.workers=0", "data.cache_dir=elsewhere", "data.encode_batch_size=9", "data.path=elsewhere"],
        ["callbacks.checkpoint.every=3", "callbacks.sampling=null"],
        ["trainer.max_epochs=9", "trainer.val_check_interval=3"],
    ],
)
def test_what_leaves_the_training_as_it_is_may_change(module, overrides):
    assert differences(earlier(module()), module(*overrides)) == []


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["optimizer.lr=5e-5", "seed=1"], ["optimizer.lr: 0.0001 -> 5e-05", "seed: 0 -> 1"]),
        (["method.dropout=0.1"], ["method.dropout: 0.0 -> 0.1"]),
        (["data.batch_size=2"], ["data.batch_size: 1 -> 2"]),
        (["callbacks.ema.decay=0.9"], ["callbacks.ema.decay: null -> 0.9"]),
        (["loss.weight=min_snr", "noise.offset=0.1"], ["loss.weight: constant -> min_snr", "noise.offset: 0.0 -> 0.1"]),
    ],
)
def test_what_would_alter_the_result_is_listed(module, overrides, lines):
    assert differences(earlier(module()), module(*overrides)) == lines


def test_a_change_needs_to_be_allowed_and_is_then_said(module, caplog):
    then, now = earlier(module()), module("optimizer.lr=5e-5")
    with pytest.raises(SettingsError, match=r"(?s)another:\n  optimizer\.lr: 0\.0001 -> 5e-05\n.*allow_changes=true"):
        resuming.require_same(then, now, ranks=1, allowed=False)
    resuming.require_same(then, now, ranks=1, allowed=True)
    assert "other than before step 10: optimizer.lr: 0.0001 -> 5e-05" in caplog.text


def test_the_precision_that_was_chosen_counts(module):
    then = earlier(module("trainer.precision=auto", precision="bf16-mixed"))
    assert differences(then, module("trainer.precision=bf16", precision="bf16-mixed")) == []
    assert differences(then, module("trainer.precision=auto")) == ["trainer.precision: bf16-mixed -> 32-true"]


@pytest.mark.parametrize(
    ("then", "now", "same"), [((1, 4), (2, 2), True), ((2, 1), (1, 2), True), ((1, 1), (2, 1), False)]
)
def test_ranks_and_accumulation_may_change_together(module, then, now, same):
    """(ranks, batches accumulated)."""
    before = earlier(module(f"trainer.accumulate_grad_batches={then[1]}"), ranks=then[0])
    found = differences(before, module(f"trainer.accumulate_grad_batches={now[1]}"), ranks=now[0])
    assert bool(found) is not same
    if found:
        assert found[0].startswith("batches of an optimizer step: 1 -> 2")


WARM = functools.partial(schedules.constant, warmup=5)
WARM_SHARE = functools.partial(schedules.constant, warmup=0.5)


@pytest.mark.parametrize(
    ("schedule", "same"), [(schedules.constant, True), (WARM, True), (WARM_SHARE, False), (schedules.cosine, False)]
)
def test_a_run_may_get_longer_unless_its_beginning_would_have_been_another(module, schedule, same):
    found = differences(earlier(module(schedule=schedule)), module(schedule=schedule, total_steps=200))
    assert bool(found) is not same
    if found:
        assert found == ["trainer.max_steps: 100 -> 200 steps, which the learning rate so far depends on"]


def test_a_step_far_beyond_the_end_costs_no_more_than_the_end(module):
    """Only a forged checkpoint says one."""
    asked = []

    def schedule(step, total):
        asked.append(step)
        return 1.0

    differences(earlier(module(total_steps=50), step=10**5), module(schedule=schedule))
    assert max(asked) == 100 and len(asked) == 2 * 101


def test_a_share_of_the_run_depends_on_its_length_too(module):
    share = ["++method.parts.text_encoder.stop_after=0.5"]
    found = differences(earlier(module(*share)), module(*share, total_steps=200))
    assert "method.parts.text_encoder.stop_after depends on" in found[0]


@pytest.mark.parametrize("stop", ["7", "3 epochs"])
def test_steps_and_epochs_do_not_depend_on_the_length_of_the_run(module, stop):
    stops = [f"++method.parts.text_encoder.stop_after={stop}"]
    assert differences(earlier(module(*stops)), module(*stops, total_steps=200)) == []


def test_another_number_of_epochs_is_another_run(module):
    then, now = ([f"++method.parts.text_encoder.stop_after={stop}"] for stop in ("3 epochs", "4 epochs"))
    line = "method.parts.text_encoder.stop_after: 3 epochs -> 4 epochs"
    assert differences(earlier(module(*then)), module(*now)) == [line]


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        (IMAGES, []),
        ([["x/a.png", "1"], ["x/b.png", "2"], ["x/c.png", "3"]], []),  # the same images elsewhere
        ([*IMAGES, ["d.png", "4"]], ["1 images are new: d.png"]),
        (IMAGES[:2], ["1 images are gone: c.png"]),
        ([IMAGES[0], ["b.png", "9"], IMAGES[2]], ["1 images are changed, or their captions, masks or concept: b.png"]),
        (IMAGES[::-1], ["the images come in another order or number"]),
    ],
)
def test_images_that_changed_are_named(now, lines):
    assert list(resuming.images(IMAGES, now)) == [f"data: {line}" for line in lines]


def test_all_that_is_trained_on_is_in_an_images_digest(tmp_path):
    path, mask = tmp_path / "a.png", tmp_path / "a-masklabel.png"
    sample = Sample(path, Size(64, 64), ["a cat"], mask=mask)
    contents = {"images": {str(path): "1"}, "masks": {str(mask): "2"}}

    def digest(one, contents=contents):
        return resuming.dataset(SimpleNamespace(samples=[one]), contents)[0][1]

    others = [
        digest(replace(sample, captions=["a dog"])),
        digest(replace(sample, prior=True)),
        digest(replace(sample, weight=0.5)),
        digest(replace(sample, mask=None)),
        digest(sample, {"images": {str(path): "9"}, "masks": {str(mask): "2"}}),
        digest(sample, {"images": {str(path): "1"}, "masks": {str(mask): "9"}}),
    ]
    assert len({digest(sample), *others}) == 7
    moved = replace(sample, path=tmp_path / "elsewhere" / "a.png", bytes=7)
    assert digest(moved, {"images": {str(moved.path): "1"}, "masks": {str(mask): "2"}}) == digest(sample)


@pytest.fixture
def checkpoints(tmp_path):
    """A folder of a run with two checkpoints."""
    folder = tmp_path / "checkpoints"
    made = Backups(folder, keep=9, wait=0)
    made.begin(None)
    for step in (1, 2):
        made.save({"x": torch.zeros(99)}, f"step-{step:08d}.ckpt", val_loss=None, give_up=lambda: True)
    return folder


def damage(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_auto_takes_the_newest_whole_one_and_says_so(checkpoints, tmp_path, caplog):
    caplog.set_level("INFO")
    assert resuming.find("auto", tmp_path) == checkpoints / "step-00000002.ckpt"
    damage(checkpoints / "step-00000002.ckpt")
    assert resuming.find("auto", tmp_path) == checkpoints / "step-00000001.ckpt"
    assert "step-00000002.ckpt is damaged and passed over" in caplog.text
    assert f"resume=auto: from {checkpoints / 'step-00000001.ckpt'}" in caplog.text


def test_auto_does_not_begin_anew_over_damaged_ones(checkpoints, tmp_path):
    for path in checkpoints.glob("*.ckpt"):
        damage(path)
    with pytest.raises(SettingsError, match=r"no whole checkpoint in .*step-0000000\d\.ckpt, step-.*overwrite=true"):
        resuming.find("auto", tmp_path)


def test_auto_begins_anew_where_a_run_was_killed_before_its_first_one(tmp_path, settings):
    Backups(tmp_path / "checkpoints", keep=1, wait=0).begin(None)
    assert resuming.find("auto", tmp_path) is None
    refuse_overwrite(settings(), tmp_path, None)


def test_auto_begins_anew_only_over_the_same_run(tmp_path, settings):
    """Killed before its first checkpoint it has left a record, a table and pictures."""
    (tmp_path / "samples").mkdir()
    for name in ("metrics.csv", "samples/step-000000.png"):
        (tmp_path / name).touch()
    line = [f"data.path={tmp_path}", "logger=none", "resume=auto"]
    manifest.write({"settings": plain(settings(*line)), "outcome": "running"}, tmp_path)
    refuse_overwrite(settings(*line, "data.workers=1"), tmp_path, None)
    for other in ("seed=3", "resume=null"):
        with pytest.raises(SettingsError, match=r"metrics\.csv is an earlier run's result"):
            refuse_overwrite(settings(*line, other), tmp_path, None)


def test_what_a_plan_leaves_is_no_result(tmp_path, settings):
    (tmp_path / "plan.json").write_text("{}")
    refuse_overwrite(settings(), tmp_path, None)


def test_a_damaged_one_that_is_asked_for_is_refused_with_what_is_whole(checkpoints, tmp_path):
    damage(checkpoints / "step-00000002.ckpt")
    with pytest.raises(SettingsError, match=r"damaged; .*step-00000001\.ckpt is whole"):
        resuming.find(str(checkpoints / "step-00000002.ckpt"), tmp_path)


def test_what_is_no_checkpoint_of_otl_is_refused(checkpoints, tmp_path):
    with pytest.raises(SettingsError, match="not a checkpoint of a run of OTL: settings, precision"):
        resuming.read(checkpoints / "step-00000001.ckpt")


def test_a_checkpoint_that_could_run_code_is_not_loaded(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"settings": Harm()}, tmp_path / "a.ckpt", pickle_module=pickle)
    with pytest.raises(SettingsError, match=r"resume=.*a\.ckpt: not a whole file of tensors alone; others could run"):
        resuming.read(tmp_path / "a.ckpt")
    assert not (tmp_path / "harm").exists()


CHECKPOINT = {
    "settings": {"trainer": {"accumulate_grad_batches": 1}},
    "precision": "32-true",
    "dataset": [["0.png", "7842132517eb91a9"]],
    "total_steps": 3,
    "world_size": 1,
    "global_step": 2,
    "state_dict": {},
    "optimizer_states": [],
    "lr_schedulers": [],
    "loops": {},
    "callbacks": {},
    "randomness": [{}],
}


@pytest.mark.parametrize(
    "odd",
    [
        *({name: None} for name in CHECKPOINT),
        {"settings": {}},
        {"settings": {"trainer": {"accumulate_grad_batches": "x"}}},
        {"dataset": [["0.png"]]},
        {"dataset": [1]},
        {"global_step": -1},
        {"world_size": 0},
        {"randomness": []},
    ],
)
def test_a_checkpoint_with_something_else_in_the_place_of_what_it_says_is_refused(tmp_path, odd):
    torch.save(CHECKPOINT | odd, tmp_path / "odd.ckpt")
    with pytest.raises(
        SettingsError, match=rf"resume=.*odd\.ckpt: not a checkpoint of a run of OTL: {next(iter(odd))} "
    ):
        resuming.read(tmp_path / "odd.ckpt")


def test_what_cannot_be_put_back_is_told_with_the_checkpoint(tmp_path):
    path, message = tmp_path / "odd.ckpt", r"resume=.*odd\.ckpt: what it holds cannot be put back "
    torch.save({"state_dict": {"layer.weight": torch.zeros(1)}, "pytorch-lightning_version": "2.5.0"}, path)
    with pytest.raises(SettingsError, match=message + r"\(RuntimeError: "), resuming.put_back(path):
        bare_trainer(tmp_path).fit(BoringModel(), ckpt_path=path, weights_only=True)
    with pytest.raises(SettingsError, match=message + r"\(KeyError: 'python'"), resuming.put_back(path):
        randomness.restore({})


def test_an_error_of_the_training_itself_stays_what_it_is(tmp_path):
    with pytest.raises(KeyError), resuming.put_back(tmp_path / "whole.ckpt"):
        {}["x"]


def bare_trainer(folder):
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", default_root_dir=folder, max_steps=1, **options)


def test_a_checkpoint_that_would_take_more_memory_than_it_has_bytes_is_not_loaded(tmp_path):
    """One that is packed, and one whose tensor is one number again and again: torch itself takes both."""
    content = CHECKPOINT | {"optimizer_states": [{"state": {0: torch.zeros(10**5)}}]}
    torch.save(content, tmp_path / "plain.ckpt")
    assert resuming.read(tmp_path / "plain.ckpt").keys() == content.keys()

    plain = zipfile.ZipFile(tmp_path / "plain.ckpt")
    with plain, zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for info in plain.infolist():
            packed.writestr(info.filename, plain.read(info))
    with pytest.raises(SettingsError, match=r"resume=.*packed.ckpt: says it holds \d+ bytes, and the file has \d+"):
        resuming.read(tmp_path / "packed.ckpt")

    torch.save(content | {"optimizer_states": [{"state": {0: torch.zeros(1).expand(10**9)}}]}, tmp_path / "long.ckpt")
    with pytest.raises(SettingsError, match=r"resume=.*long.ckpt: a tensor of it is larger than what it has"):
        resuming.read(tmp_path / "long.ckpt")


def test_results_of_a_run_are_not_written_over_by_one_that_goes_on_from_elsewhere(checkpoints, tmp_path, settings):
    refuse_overwrite(settings(), tmp_path, checkpoints / "step-00000001.ckpt")
    with pytest.raises(SettingsError, match="earlier run's result"):
        refuse_overwrite(settings(), tmp_path, tmp_path / "other" / "checkpoints" / "step-00000001.ckpt")
    refuse_overwrite(settings("output.overwrite=true"), tmp_path, None)


def test_two_runs_do_not_share_a_folder(tmp_path):
    """The other process is a child of this one; killed, it leaves the folder free."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with alone(tmp_path):
            os.write(writing, b"x")
            os.read(os.pipe()[0], 1)  # for ever
    os.read(reading, 1)
    with pytest.raises(SettingsError, match=f"in use by process {child}"), alone(tmp_path):
        pass
    os.kill(child, 9)
    os.waitpid(child, 0)
    with alone(tmp_path):
        pass


def test_what_a_killed_run_left_half_written_is_swept_away(tmp_path):
    (tmp_path / "samples" / "step-000001").mkdir(parents=True)
    left = [tmp_path / ".final.safetensors.12.writing", tmp_path / "samples" / "step-000001" / ".a.png.12.writing"]
    for path in left:
        path.write_text("half")
    with alone(tmp_path):
        assert not any(path.exists() for path in left)
