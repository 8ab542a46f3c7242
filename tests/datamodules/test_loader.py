import atexit
import itertools
import multiprocessing
import os
import pickle
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor, nn

from otl import rng
from otl.config import CaptionOptions, Concept, ConceptType, SettingsError
from otl.datamodules.bucketed import BucketedDataModule
from otl.datamodules.loader import AHEAD, WorkerDied, in_turn
from otl.types import Batch
from tests.datamodules.fakes import CountingEncoder, data, folder, module, picture, same

WORKERS = pytest.mark.parametrize("workers", [0, 2])


def filled(path: Path, *, images: bool = True, prompts: bool = True, **settings: Any) -> BucketedDataModule:
    """Seven images in batches of two and one, cached."""
    if not path.exists():
        folder(path, 7)
    made = module(data(path, **({"batch_size": 2} | settings)))
    made.fill_cache(CountingEncoder(), images=images, prompts=prompts)
    return made


def plain(path: Path, **settings: Any) -> BucketedDataModule:
    """The same without a cache."""
    return module(data(path, **settings))


def epoch(loader: Any, number: int) -> list[Batch]:
    loader.load_state_dict({"epoch": number, "delivered": 0})
    return list(loader)


def all_same(some: list[Batch], others: list[Batch]) -> bool:
    return len(some) == len(others) and all(map(same, some, others))


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Path:
    """A folder whose cache is filled."""
    path = tmp_path_factory.mktemp("loader") / "photos"
    filled(path)
    return path


def test_latents_come_from_the_cache_with_noise_of_their_keys(cached):
    for batch in filled(cached).train_dataloader():
        assert batch.pixels is None and batch.latents.dtype == torch.float32
        assert batch.latents.shape[2:] == tuple((batch.target_size[0] // 4).tolist())
        assert torch.equal(batch.noise, rng.normals(batch.key, tuple(batch.latents.shape[1:]), "noise"))
        assert batch.cond["hidden"][:, 0].tolist() == [len(caption) for caption in batch.captions]


def test_latents_are_those_of_the_image(cached):
    pixels = {int(i): p for b in plain(cached).train_dataloader() for i, p in zip(b.index, b.pixels)}
    for batch in filled(cached).train_dataloader():
        for index, latents in zip(batch.index, batch.latents):
            assert torch.equal(latents, nn.functional.avg_pool2d(pixels[int(index)][None], 4)[0])


def test_without_a_cache_pixels_are_served(cached):
    batch = next(iter(plain(cached, batch_size=2).train_dataloader()))
    assert tuple(batch.pixels.shape[1:]) == (3, *batch.target_size[0].tolist())
    assert batch.latents is None and batch.noise is None and batch.cond is None


@pytest.mark.parametrize(("encoded", "ahead"), [(True, AHEAD), (False, 1)])
def test_without_workers_batches_from_the_cache_are_made_a_few_at_a_time(cached, encoded, ahead):
    loader = (filled if encoded else plain)(cached, batch_size=1).train_dataloader()
    requests = iter(loader.sampler)
    assert same(next(in_turn(loader.dataset, requests)), next(iter(loader)))
    assert len(list(requests)) == len(loader) - ahead > 0


def test_prompts_are_not_cached_where_text_encoders_train(cached):
    batch = next(iter(filled(cached, prompts=False).train_dataloader()))
    assert batch.latents is not None and batch.cond is None and batch.captions


def test_keys_depend_on_seed_epoch_sample_and_repeat(cached):
    made = filled(cached)
    assert [int(k) for b in epoch(made.train_dataloader(), 3) for k in b.key] == [
        rng.key(7, 3, int(i), 0) for b in epoch(made.train_dataloader(), 3) for i in b.index
    ]


def test_a_concepts_own_seed_changes_its_keys_alone(cached, tmp_path):
    folder(tmp_path / "more", 2)

    def keys(seed: int | None) -> list[int]:
        made = module(data(cached, concepts={"more": Concept(path=str(tmp_path / "more"), seed=seed)}))
        return [key for _, key in sorted((int(b.index), int(b.key)) for b in made.train_dataloader())]

    assert keys(None)[:7] == keys(3)[:7]
    assert keys(3)[7:] == [rng.key(3, 0, index, 0) for index in (7, 8)] != keys(None)[7:]


@WORKERS
def test_epochs_differ_and_come_back(cached, workers):
    loader = filled(cached, workers=workers).train_dataloader()
    zero, one, again = epoch(loader, 0), epoch(loader, 1), epoch(loader, 0)
    assert all_same(zero, again) and not all_same(zero, one)
    assert not set(torch.cat([b.key for b in zero]).tolist()) & set(torch.cat([b.key for b in one]).tolist())


def test_workers_change_nothing(cached):
    """Nor do they draw from the generator that dropout draws from."""
    none, two = (filled(cached, workers=workers).train_dataloader() for workers in (0, 2))
    before = torch.get_rng_state()
    assert all(all_same(epoch(none, number), epoch(two, number)) for number in range(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_leave_it_to_the_main_process_what_a_signal_means(cached):
    """Clusters and terminals send one to every process, and the step that is being made still needs its batches."""
    loader = filled(cached, workers=2).train_dataloader()
    batches = iter(loader)
    first = [next(batches) for _ in range(2)]  # both workers are past their start
    for worker in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(worker.pid, number)
    assert all_same([*first, *batches], epoch(filled(cached).train_dataloader(), 0))


def test_workers_end_with_a_process_that_exits_in_the_middle_of_an_epoch(cached):
    """Where an error's traceback still holds the iterator; by SIGTERM they would end a minute later."""
    child = os.fork()
    if child == 0:
        atexit._clear()
        signal.alarm(30)
        batches = iter(filled(cached, workers=1).train_dataloader())
        next(batches)
        atexit._run_exitfuncs()
        os._exit(len(multiprocessing.active_children()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("seen", [1, 4])  # of the 4 batches of an epoch, when it dies
def test_a_worker_that_is_killed_is_told_between_two_batches(cached, seen):
    whole = filled(cached).train_dataloader()
    batches = [batch for number in range(2) for batch in epoch(whole, number)]
    loader = filled(cached, workers=1).train_dataloader()
    running = iter(loader)
    had = list(itertools.islice(running, seen))
    (worker,) = multiprocessing.active_children()
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # the main process has its signal from here on
    with pytest.raises(WorkerDied, match=r"data\.workers=1 processes that load batches was killed.*resume=auto"):
        had += itertools.chain(running, loader)
    resumed = filled(cached).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    had += resumed
    assert all_same(had, batches[: 4 if seen < 4 else 8])


def test_workers_that_are_not_forked_can_have_the_dataset(cached):
    loader = filled(cached).train_dataloader()
    request = next(iter(loader.sampler))
    assert same(pickle.loads(pickle.dumps(loader.dataset))[request], loader.dataset[request])


def test_the_length_is_known(cached):
    made = filled(cached)
    loader = made.train_dataloader()
    assert len(loader) == len(list(loader)) == made.batches_per_epoch() == 4


def test_captions_are_dropped_in_training_and_never_in_validation(tmp_path):
    folder(tmp_path / "photos", 30)
    made = filled(tmp_path / "photos", caption_dropout=1.0, validation_share=0.3)
    assert {c for b in made.train_dataloader() for c in b.captions} == {""}
    assert all(c for b in made.val_dataloader() for c in b.captions)
    assert all(torch.equal(b.cond["hidden"], torch.zeros_like(b.cond["hidden"])) for b in made.train_dataloader())


@pytest.fixture
def tagged(tmp_path) -> Path:
    """Four pictures with six tags each."""
    for number in range(4):
        picture(tmp_path / "photos" / f"{number}.png", shade=number, caption=f"{number}, a, b, c, d, e")
    return tmp_path / "photos"


def texts_of(made: BucketedDataModule, epochs: int) -> set[str]:
    return {
        text for number in range(epochs) for batch in epoch(made.train_dataloader(), number) for text in batch.captions
    }


def test_a_caption_varies_over_the_epochs_with_the_cache_and_without(tagged):
    options = {"captions": CaptionOptions(shuffle=True), "caption_variants": 3}
    cached, prompts_alone = filled(tagged, **options), filled(tagged, **options, prompts=False)
    assert len(texts_of(cached, 20)) == 4 * 3
    for made in (prompts_alone, module(data(tagged, **options))):
        assert len(texts_of(made, 20)) > 60  # of 80 draws, 720 orders


def test_a_varied_caption_comes_with_its_own_conditioning(tagged):
    for batch in filled(tagged, captions=CaptionOptions(tag_dropout=0.5), batch_size=4).train_dataloader():
        assert len(set(map(len, batch.captions))) > 1
        assert batch.cond["hidden"][:, 0].tolist() == [len(caption) for caption in batch.captions]


def test_held_out_captions_do_not_vary(tagged):
    picture(tagged.parent / "held" / "0.png", shade=99, caption="c, b, a")
    concept = Concept(path=str(tagged.parent / "held"), type=ConceptType.validation)
    varied = CaptionOptions(shuffle=True, tag_dropout=0.5, capitals=0.5, prefix="x")
    made = filled(tagged, captions=varied, concepts={"held": concept}, caption_dropout=1.0)
    assert [text for batch in made.val_dataloader() for text in batch.captions] == ["x c, b, a"]


def test_validation_is_the_same_every_time(tmp_path):
    folder(tmp_path / "photos", 30)
    made = filled(tmp_path / "photos", validation_share=0.3)
    loader = made.val_dataloader()
    once = list(loader)
    assert all_same(once, list(loader)) and all_same(once, list(made.val_dataloader()))
    assert sum(len(b.index) for b in once) == len(made.validation_samples) > 0


def test_without_held_out_images_there_is_no_validation(cached):
    assert filled(cached).val_dataloader() == []


def test_a_cache_entry_lost_during_the_run_is_named(cached, tmp_path):
    made = filled(cached, cache_dir=str(tmp_path))
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(SettingsError, match=r"data\.cache_dir=.*: entry [0-9a-f]{40} is gone or damaged"):
        next(iter(made.train_dataloader()))


# Resuming


@WORKERS
@pytest.mark.parametrize(("number", "delivered"), [(0, 1), (1, 3), (1, 0)])
def test_a_loader_goes_on_within_an_epoch(cached, workers, number, delivered):
    unbroken = filled(cached, workers=workers).train_dataloader()
    for _ in range(number):
        list(unbroken)
    batches = iter(unbroken)
    list(itertools.islice(batches, delivered))
    state = unbroken.state_dict()
    resumed = filled(cached, workers=workers).train_dataloader()
    resumed.load_state_dict(state)
    assert len(resumed) == 4
    assert all_same(list(resumed), list(batches))
    assert all_same(list(resumed), list(unbroken))


@WORKERS
def test_a_loader_goes_on_after_an_epoch(cached, workers):
    unbroken = filled(cached, workers=workers).train_dataloader()
    epoch(unbroken, 0)
    resumed = filled(cached, workers=workers).train_dataloader()
    resumed.load_state_dict(unbroken.state_dict())
    assert all_same(list(resumed), list(unbroken))


def test_nobody_else_counts_epochs(cached):
    """Lightning tells its own count to every sampler that has `set_epoch`; after some stops it is another one."""
    assert not hasattr(filled(cached).train_dataloader().sampler, "set_epoch")


def test_a_loader_can_be_saved_right_after_it_was_restored(cached):
    loader = filled(cached).train_dataloader()
    loader.load_state_dict({"epoch": 2, "delivered": 1})
    assert loader.state_dict() == {"epoch": 2, "delivered": 1}
    assert len(list(loader)) == 3 and loader.state_dict() == {"epoch": 2, "delivered": 4}


class Recorder(LightningModule):
    """One weight, and a list of what it was shown."""

    def __init__(self, encoder: CountingEncoder) -> None:
        super().__init__()
        self.weight, self.encoder, self.shown = nn.Parameter(torch.zeros(1)), encoder, []

    def on_fit_start(self) -> None:
        self.trainer.datamodule.fill_cache(self.encoder, images=True, prompts=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.shown.append((batch.key.tolist(), float(batch.noise.sum())))
        return (self.weight * batch.noise.mean() + batch.latents.mean()).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(Callback):
    """Writes a checkpoint wherever one could be written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path / f"{trainer.global_step}-batch.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path / f"{trainer.global_step}-epoch.ckpt")

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path / f"{trainer.global_step}-end.ckpt")


def fit(path: Path, steps: int, *, workers: int, checkpoint: Path | None = None, saved: Path | None = None) -> Recorder:
    recorder = Recorder(CountingEncoder())
    settings = data(path, batch_size=2, workers=workers)
    made = BucketedDataModule(settings, resolution=64, step=8, seed=7)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Save(saved)] if saved is not None else [],
    )
    trainer.fit(recorder, datamodule=made, ckpt_path=checkpoint, weights_only=False if checkpoint else None)
    return recorder


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@WORKERS
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(cached, tmp_path, workers):
    """Four batches an epoch: within the first and second, at the last batch of one, and after the end of one."""
    unbroken = fit(cached, 10, workers=workers, saved=tmp_path)
    assert unbroken.encoder.images == 0
    keys = [key for keys, _ in unbroken.shown for key in keys]
    assert len(unbroken.shown) == 10 and keys == expected_keys(cached, epochs=3)[: len(keys)]
    for name in ("1-batch", "4-batch", "4-epoch", "6-batch"):
        resumed = fit(cached, 10, workers=workers, checkpoint=tmp_path / f"{name}.ckpt")
        assert resumed.shown == unbroken.shown[int(name[0]) :], name
        assert torch.equal(resumed.weight, unbroken.weight), name


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("steps", [6, 8])
def test_a_finished_run_can_be_made_longer(cached, tmp_path, steps):
    unbroken = fit(cached, 14, workers=0)
    fit(cached, steps, workers=0, saved=tmp_path)
    longer = fit(cached, 14, workers=0, checkpoint=tmp_path / f"{steps}-end.ckpt")
    assert longer.shown == unbroken.shown[steps:]
    assert torch.equal(longer.weight, unbroken.weight)


def expected_keys(path: Path, *, epochs: int) -> list[int]:
    """The random keys of whole epochs, in their order."""
    made = module(data(path, batch_size=2))
    orders = [made.rounds.epoch(number) for number in range(epochs)]
    return [rng.key(7, number, *draw) for order in orders for number, draws in order for draw in draws]


def test_a_pass_draws_nothing_from_the_numbers_that_dropout_draws_from(tmp_path: Path) -> None:
    """Else a run that goes on at an epoch's end, where the pass begins anew, has other ones."""
    made = filled(folder(tmp_path, 4))
    before = torch.random.get_rng_state()
    for loader in (made.train_dataloader(), made.val_dataloader()):
        list(loader)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_concept_of_type_prior_is_marked_and_others_are_not(tmp_path: Path) -> None:
    picture(tmp_path / "dogs" / "a.png")
    picture(tmp_path / "dog" / "a.png", shade=9)
    concepts = {"dogs": Concept(path=str(tmp_path / "dogs"), type=ConceptType.prior)}
    made = module(data(tmp_path / "dog", concepts=concepts, batch_size=2))
    (batch,) = made.train_dataloader()
    assert batch.prior is not None
    assert {made.samples[n].concept: p for n, p in zip(batch.index.tolist(), batch.prior.tolist())} == {
        "data": False,
        "dogs": True,
    }


def test_a_concept_s_weight_is_that_of_its_images(tmp_path: Path) -> None:
    picture(tmp_path / "dogs" / "a.png")
    picture(tmp_path / "dog" / "a.png", shade=9)
    concepts = {"dogs": Concept(path=str(tmp_path / "dogs"), loss_weight=0.25)}
    made = module(data(tmp_path / "dog", concepts=concepts, batch_size=2))
    (batch,) = made.train_dataloader()
    weights = {made.samples[n].concept: w for n, w in zip(batch.index.tolist(), batch.weight.tolist())}
    assert weights == {"data": 1.0, "dogs": 0.25}


@pytest.mark.parametrize(("colour", "level"), [("white", 1.0), ("black", -1.0)])
@pytest.mark.parametrize("cached", [False, True])
def test_the_background_lies_under_what_is_transparent(tmp_path: Path, colour: str, level: float, cached: bool) -> None:
    picture(tmp_path / "clear" / "a.png")
    Image.new("RGBA", (64, 64), (90, 90, 90, 0)).save(tmp_path / "clear" / "a.png")
    made = module(data(tmp_path / "clear", background=colour))
    if cached:
        made.fill_cache(CountingEncoder(), images=True, prompts=True)
    (batch,) = made.train_dataloader()
    shown = batch.latents if cached else batch.pixels
    assert shown is not None
    assert torch.allclose(shown, torch.full_like(shown, level), atol=1e-3)


def test_batches_are_pinned_for_a_gpu_that_is_used_and_not_for_one_beside(cached, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = filled(cached)
    assert not made.train_dataloader().pin_memory
    for kind, pinned in (("cuda", True), ("cpu", False)):
        strategy = SimpleNamespace(root_device=torch.device(kind, 0))
        made.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1)
        assert made.train_dataloader().pin_memory is pinned
