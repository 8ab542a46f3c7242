"""BLIP, BLIP-2 and Florence-2: what they write is what transformers' own use of them gives, one image at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, Blip2ForConditionalGeneration, Florence2ForConditionalGeneration

from otl.config import SettingsError
from otl.tools.captioners import Captioner
from tests.tools import tiny

CPU = torch.device("cpu")


def load(folder: Path, **options: object) -> Captioner:
    captioner = Captioner(str(folder), **options)
    captioner.load(CPU, torch.float32)
    return captioner


def test_a_blip_names_the_colours_that_it_has_learned(blip: Path) -> None:
    pictures = [tiny.picture("blue"), tiny.picture("red", (30, 70)), tiny.picture("green")]
    assert load(blip).captions(pictures) == [f"a photo of a {colour} square" for colour in ("blue", "red", "green")]


def test_the_prompt_is_gone_on_from_and_is_no_part_of_the_caption(blip: Path) -> None:
    captioner = load(blip, prompt="a photo of a")
    assert captioner.captions([tiny.picture("blue"), tiny.picture("red")]) == ["blue square", "red square"]


def test_a_caption_has_at_most_so_many_tokens(blip: Path) -> None:
    assert load(blip, max_tokens=3).captions([tiny.picture("red")]) == ["a photo of"]


def test_blip_2_writes_what_transformers_documents(tmp_path: Path) -> None:
    folder = tiny.blip2(tmp_path)
    network, processor = Blip2ForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    pictures = [tiny.noise(seed) for seed in range(3)]
    for prompt in ("", "the photo of"):
        written = load(folder, prompt=prompt, max_tokens=6).captions(pictures)
        for picture, caption in zip(pictures, written, strict=True):
            inputs = processor(images=picture, text=prompt, return_tensors="pt")
            whole = processor.decode(network.generate(**inputs, max_new_tokens=6)[0], skip_special_tokens=True)
            assert f"{prompt} {caption}".strip() == whole
        assert len(set(written)) == 3


def test_florence_2_writes_what_transformers_documents(tmp_path: Path) -> None:
    folder = tiny.florence2(tmp_path)
    network = Florence2ForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    task, pictures = "<DETAILED_CAPTION>", [tiny.noise(seed) for seed in range(3)]
    written = load(folder, prompt=task, max_tokens=6, beams=3).captions(pictures)
    for picture, caption in zip(pictures, written, strict=True):
        inputs = processor(images=picture, text=task, return_tensors="pt")
        ids = network.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False)
        text = processor.batch_decode(ids, skip_special_tokens=False)[0]
        assert caption == processor.post_process_generation(text, task=task, image_size=picture.size)[task]
    assert len(set(written)) == 3


def test_a_task_of_florence_2_that_answers_with_boxes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"captioner.prompt=<OD>.*<MORE_DETAILED_CAPTION>"):
        load(tiny.florence2(tmp_path), prompt="<OD>")


def test_a_blip_2_without_a_place_for_the_image_is_refused(tmp_path: Path) -> None:
    config = tiny.blip2(tmp_path) / "config.json"
    settings = json.loads(config.read_text()) | {"image_token_index": None}
    config.write_text(json.dumps(settings))
    with pytest.raises(SettingsError, match="image_token_index"):
        load(tmp_path)


def test_an_older_copy_of_a_blip_2_is_shown_its_images(tmp_path: Path) -> None:
    config = tiny.blip2(tmp_path) / "processor_config.json"
    pictures = [tiny.noise(0), tiny.noise(1)]
    new = load(tmp_path).captions(pictures)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_query_tokens": None}))
    assert load(tmp_path).captions(pictures) == new


def test_a_checkpoint_of_another_kind_is_refused(clipseg: Path) -> None:
    with pytest.raises(SettingsError, match="it is a clipseg; accepted are blip, blip-2, florence2"):
        load(clipseg)
