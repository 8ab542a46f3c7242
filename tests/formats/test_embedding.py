"""Embedding files: the keys of each tool, and what is refused."""

import math
import pickle
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from otl.config import SettingsError
from otl.formats.embedding import (
    bundle_keys,
    compare,
    from_bundle,
    from_file,
    metadata,
    read,
    to_bundle,
    to_file,
    write,
)
from otl.types import Size

ONE = {"text_encoder": "emb_params"}
TWO = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
T5 = {"text_encoder": "t5xxl"}
ROWS = torch.arange(12.0).reshape(3, 4)
HEADER = {
    "architecture": "stable-diffusion-v1",
    "title": "cat",
    "resolution": Size(512, 768),
    "prediction": "v_prediction",
    "placeholder": "<cat>",
    "vectors": 3,
}


def taken(tensors, keys=ONE, widths=None, *, output=False):
    return from_file(tensors, keys=keys, widths=widths or dict.fromkeys(keys, 4), output=output)


@pytest.mark.parametrize("keys", [ONE, TWO, T5])
@pytest.mark.parametrize("output", [False, True])
def test_what_is_written_is_what_is_read(keys, output):
    vectors = {encoder: ROWS + number for number, encoder in enumerate(keys)}
    tensors = to_file(vectors, keys=keys, output=output)
    assert set(tensors) == {key + ("_out" if output else "") for key in keys.values()}
    found = taken(tensors, keys, output=output)
    assert all(torch.equal(found[encoder], vectors[encoder]) for encoder in keys)


@pytest.mark.parametrize("key", ["emb_params", "emp_params", "<cat>", "clip_l", "*"])
def test_a_single_tensor_may_have_any_key(key):
    assert torch.equal(taken({key: ROWS})["text_encoder"], ROWS)


def test_one_vector_may_lie_flat_as_diffusers_writes_it():
    assert torch.equal(taken({"<cat>": ROWS[0]})["text_encoder"], ROWS[:1])


def test_onetrainers_name_of_t5_is_known():
    assert torch.equal(taken({"t5": ROWS, "t5_out": ROWS + 1}, T5)["text_encoder"], ROWS)
    assert torch.equal(taken({"t5": ROWS, "t5_out": ROWS + 1}, T5, output=True)["text_encoder"], ROWS + 1)


def test_bigg_of_sdxl_is_bigg_of_cascade():
    keys = {"text_encoder": "clip_g"}
    assert torch.equal(taken({"clip_l": ROWS[:, :2], "clip_g": ROWS}, keys)["text_encoder"], ROWS)


REFUSED = [
    ({"clip_l": ROWS}, TWO, {}, r"no vectors under clip_g for text_encoder_2; the file holds clip_l \[3, 4\]"),
    ({"emb_params": ROWS}, ONE, {"widths": {"text_encoder": 8}}, "takes vectors of 8 numbers"),
    ({"emb_params": ROWS}, ONE, {"output": True}, "no output vectors under emb_params"),
    ({"clip_l": ROWS, "clip_g": ROWS[:2]}, TWO, {}, "different numbers of vectors"),
    ({"emb_params": ROWS[:0]}, ONE, {}, r"no vectors: emb_params \[0, 4\]"),
    ({"emb_params": ROWS / 0}, ONE, {}, "emb_params holds NaN or infinity"),
    ({"emb_params": ROWS.int()}, ONE, {}, "emb_params holds int32, not real numbers"),
    ({"emb_params": ROWS.to(torch.complex64)}, ONE, {}, "emb_params holds complex64, not real numbers"),
    ({"x": ROWS, "y": ROWS}, ONE, {}, r"the file holds x \[3, 4\], y \[3, 4\]"),
]


@pytest.mark.parametrize(("tensors", "keys", "options", "message"), REFUSED)
def test_vectors_that_do_not_fit_are_refused(tensors, keys, options, message):
    with pytest.raises(SettingsError, match=message):
        taken(tensors, keys, **options)


# Files of other tools


def test_a1111s_file_is_read(tmp_path):
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, "name": "cat", "step": 10}
    torch.save(content, tmp_path / "cat.pt")
    assert torch.equal(taken(read(tmp_path / "cat.pt"))["text_encoder"], ROWS)


def test_the_file_of_the_methods_authors_is_read(tmp_path):
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": ROWS})}
    torch.save(content, tmp_path / "embeddings.pt")
    assert torch.equal(taken(read(tmp_path / "embeddings.pt"))["text_encoder"], ROWS)


def test_diffusers_file_is_read(tmp_path):
    torch.save({"<cat>": ROWS[1]}, tmp_path / "learned_embeds.bin")
    assert torch.equal(taken(read(tmp_path / "learned_embeds.bin"))["text_encoder"], ROWS[1:2])


class Evil:
    """Would run a command where it is unpickled."""

    def __reduce__(self):
        return (eval, ("1 + 1",))


def test_a_file_that_could_run_code_is_refused(tmp_path):
    torch.save({"string_to_param": {"*": Evil()}}, tmp_path / "evil.pt")
    with pytest.raises(SettingsError, match="others could run code"):
        read(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SettingsError, match="others could run code"):
        read(tmp_path / "plain.pt")


def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path):
    torch.save({"<cat>": torch.zeros(1000, 1000)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        for info in whole.infolist():
            packed.writestr(info.filename, whole.read(info), zipfile.ZIP_DEFLATED)
    torch.save({"<cat>": torch.zeros(1).expand(1000, 1000)}, tmp_path / "expanded.pt")
    assert read(tmp_path / "whole.pt")["<cat>"].shape == (1000, 1000)
    for name in ("packed.pt", "expanded.pt"):
        assert (tmp_path / name).stat().st_size < 10**5
        with pytest.raises(SettingsError, match=rf"{name}: says it holds 4\d{{6}} bytes, and the file has"):
            read(tmp_path / name)


OTHERS = [
    [ROWS],
    {},
    {"step": 3},
    {"string_to_param": {"*": 1}},
    {"string_to_param": ROWS},
    {"string_to_param": None},
    {"*": ROWS.to_sparse()},
    {"*": torch.empty(3, 4, device="meta")},
]


@pytest.mark.parametrize("content", OTHERS)
def test_a_file_of_something_else_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(SettingsError, match="not an embedding"):
        read(tmp_path / "x.pt")


def test_a_file_that_is_not_there_or_cut_off_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="there is no such file"):
        read(tmp_path / "x.safetensors")
    save_file({"emb_params": ROWS}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-4])
    with pytest.raises(SettingsError, match="not a whole safetensors file"):
        read(tmp_path / "x.safetensors")


# Inside a LoRA


def test_a_single_tensor_is_carried_under_a1111s_key():
    tensors = to_bundle({"emb_params": ROWS}, "cat")
    assert list(tensors) == ["bundle_emb.cat.string_to_param.*"]
    assert torch.equal(taken(from_bundle(tensors, "cat"))["text_encoder"], ROWS)


def test_two_embeddings_are_told_apart_by_name():
    tensors = to_bundle({"clip_l": ROWS, "clip_g": ROWS}, "cat") | to_bundle({"clip_l": -ROWS, "clip_g": -ROWS}, "dog")
    lora = tensors | {"lora_unet_x.alpha": torch.tensor(1.0)}
    assert sorted(bundle_keys(lora)) == sorted(tensors)
    assert torch.equal(taken(from_bundle(lora, "dog"), TWO)["text_encoder_2"], -ROWS)
    with pytest.raises(SettingsError, match="carries the embeddings cat, dog, none of them called bird"):
        from_bundle(lora, "bird")


def test_the_only_embedding_of_a_lora_needs_no_name():
    assert torch.equal(from_bundle(to_bundle({"t5xxl": ROWS}, "cat"), "dog")["t5xxl"], ROWS)


# Writing


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_the_file_holds_the_vectors_in_the_dtype_asked_for(dtype, expected, tmp_path):
    write(tmp_path / "cat.safetensors", {"emb_params": ROWS / 7}, metadata(**HEADER), dtype=dtype)
    found = load_file(tmp_path / "cat.safetensors")["emb_params"]
    assert found.dtype == expected
    assert torch.equal(found, (ROWS / 7).to(expected))


def test_the_header_says_what_it_is(tmp_path):
    write(tmp_path / "cat.safetensors", {"emb_params": ROWS}, metadata(**HEADER), dtype="fp32")
    with safe_open(tmp_path / "cat.safetensors", "pt") as file:
        header = file.metadata()
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/textual-inversion",
        "modelspec.title": "cat",
        "modelspec.resolution": "768x512",
        "modelspec.prediction_type": "v",
        "modelspec.trigger_phrase": "<cat>",
    }
    assert header.items() >= expected.items()
    assert len(header["modelspec.hash_sha256"]) == 66


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_vectors_that_are_no_numbers_are_never_written(value, tmp_path):
    with pytest.raises(SettingsError, match="NaN or infinity"):
        write(tmp_path / "cat.safetensors", {"emb_params": ROWS + value}, metadata(**HEADER), dtype="fp32")
    assert list(tmp_path.iterdir()) == []


def test_vectors_that_the_dtype_loses_are_not_left_in_a_file(tmp_path):
    with pytest.raises(RuntimeError, match="differed from the trained vectors"):
        write(tmp_path / "cat.safetensors", {"emb_params": ROWS * 1e-9}, metadata(**HEADER), dtype="fp16")
    assert list(tmp_path.iterdir()) == []


def test_files_are_compared_by_keys_shapes_and_values():
    assert compare({"a": ROWS}, {"a": ROWS}) == 0
    assert compare({"a": ROWS}, {"a": ROWS * 1.5}) == pytest.approx(0.5)
    assert compare({"a": ROWS}, {"b": ROWS}) == compare({"a": ROWS}, {"a": ROWS[:2]}) == math.inf
    assert compare({"a": ROWS}, {"a": ROWS * math.nan}) == math.inf
    assert compare({}, {}) == 0
