"""What a cell writes is read by others, and each of them sees a file that is not what was trained."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from otl.testing import METHODS, Cell, Names, readers
from otl.testing.proofs import exported
from otl.testing.runs import check_run


def cell_of(method, checkpoint, folder, **options):
    return Cell(["model=sd15", f"model.checkpoint={checkpoint}"], METHODS[method], folder, **options)


@pytest.fixture
def written(request, sd15_folder, tmp_path):
    """A cell of a method, its live module, and its result."""
    cell = cell_of(request.param, sd15_folder, tmp_path)
    return cell, *exported(cell)


def stronger(file):
    """The file with everything in it a tenth larger."""
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    save_file({key: 1.1 * tensor for key, tensor in load_file(file).items()}, file, header)
    return file


def nudge(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)


@pytest.mark.parametrize("written", ["lora"], indirect=True)
@pytest.mark.parametrize("check", [readers.check_again, readers.check_formula, readers.check_diffusers_adapter])
def test_an_adapter_s_file_of_another_strength_is_seen(written, check):
    check(*written)
    stronger(written[2])
    with pytest.raises(AssertionError, match="is off by"):
        check(*written)


@pytest.mark.parametrize("written", ["lora"], indirect=True)
def test_names_that_nobody_looks_up_are_seen(written):
    cell, *rest = written
    cell.names = Names("lora_other_{}".format, [])
    with pytest.raises(AssertionError, match="keys of the file belong to no layer"):
        readers.check_formula(cell, *rest)


@pytest.mark.parametrize("written", ["loha"], indirect=True)
def test_a_file_in_peft_s_names_of_another_strength_is_seen(written):
    cell, live, result = written
    readers.check_peft(cell, live, result)
    export = live.export
    live.export = lambda path: stronger(export(path))
    with pytest.raises(AssertionError, match="PEFT is off by"):
        readers.check_peft(cell, live, result)


@pytest.mark.parametrize("written", ["finetune"], indirect=True)
@pytest.mark.parametrize("check", [readers.check_again, readers.check_weights, readers.check_diffusers_model])
def test_a_folder_of_other_weights_is_seen(written, check):
    check(*written)
    nudge(written[1].part("denoiser").parameters())
    with pytest.raises(AssertionError, match=r"is off by|weights are others"):
        check(*written)


@pytest.mark.parametrize("written", ["embedding"], indirect=True)
@pytest.mark.parametrize("check", [readers.check_again, readers.check_keys, readers.check_diffusers_words])
def test_other_vectors_are_seen(written, check):
    check(*written)
    stronger(written[2])
    with pytest.raises(AssertionError, match=r"is off by|are not those that were trained|encodes .* otherwise"):
        check(*written)


@pytest.mark.parametrize("written", ["embedding"], indirect=True)
def test_keys_that_nobody_looks_up_are_seen(written):
    cell, *rest = written
    cell.names = Names(str, ["clip_x"])
    with pytest.raises(AssertionError, match="looked up are"):
        readers.check_keys(cell, *rest)


@pytest.mark.parametrize("words", [["seed=1", "allow_changes=true"], ["sample.guidance=3"]])
def test_a_run_that_goes_on_with_other_noise_or_other_pictures_is_seen(sd15_folder, tmp_path, words):
    class Forgets(Cell):
        def run(self, name, *more):
            return super().run(name, *more, *(words if name == "resumed" else []))

    cell = Forgets(["model=sd15", f"model.checkpoint={sd15_folder}"], METHODS["finetune"], tmp_path)
    with pytest.raises(AssertionError, match=r"the resumed run wrote \d+ tensors and pictures otherwise"):
        check_run(cell)
