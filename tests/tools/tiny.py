"""Tiny networks of the real classes, saved as folders that transformers and onnxruntime read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

SPECIALS = ["<pad>", "<s>", "<unk>", "</s>", "<image>"]
WORDS = "a the photo of red green blue circle square on ground ? What does image describe".split()
PAD, BEGIN, END, IMAGE = 0, 1, 3, 4
IDS = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD, "vocab_size": len(SPECIALS + WORDS)}
SIDE = 32  # pixels of what the networks are shown
SIZE = {"height": SIDE, "width": SIDE}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
EYES = {**SMALL, "image_size": SIDE, "patch_size": 8}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def picture(colour: str, size: tuple[int, int] = (40, 32)) -> Image.Image:
    return Image.new("RGB", size, COLOURS[colour])


def noise(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels)


def words(template: str, **tokens: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that knows a few words.

    Args:
        template: what is put around a text, as `tokenizers` writes it.
    """
    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(template, None, [("<s>", BEGIN), ("</s>", END)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names, **tokens)


def blip(folder: Path) -> Path:
    text = {**SMALL, **IDS, "encoder_hidden_size": 32, "sep_token_id": END}
    config = BlipConfig(text_config=text, vision_config={**EYES, "initializer_range": 0.02}, projection_dim=32)
    eyes = BlipImageProcessorPil(size=SIZE)
    return saved(folder, random(BlipForConditionalGeneration, config), BlipProcessor(eyes, words("<s> $A </s>")))


def blip2(folder: Path) -> Path:
    config = Blip2Config(
        vision_config=EYES,
        qformer_config={**SMALL, **IDS, "encoder_hidden_size": 32, "cross_attention_frequency": 1},
        text_config={**SMALL, **IDS, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    network = spread(random(Blip2ForConditionalGeneration, config))
    processor = Blip2Processor(BlipImageProcessorPil(size=SIZE), words("<s> $A"), num_query_tokens=4)
    return saved(folder, network, processor)


def florence2(folder: Path) -> Path:
    bart = {"model_type": "bart", "d_model": 32, "decoder_start_token_id": END, "forced_eos_token_id": END, **IDS}
    for part in ("encoder", "decoder"):
        bart |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 64}
    heads = {"num_heads": (1, 1, 2, 2), "num_groups": (1, 1, 2, 2), "window_size": 4}
    davit = {"depths": (1, 1, 1, 1), "embed_dim": (8, 8, 16, 32), "projection_dim": 32, **heads}
    config = Florence2Config(text_config=bart, vision_config=davit, image_token_id=IMAGE)
    eyes = CLIPImageProcessorPil(size=SIZE, do_center_crop=False, image_seq_length=2)
    reader = words("$A", extra_special_tokens={"image_token": "<image>"})
    processor = Florence2Processor(eyes, reader, post_processor_config={"pure_text": {}})
    return saved(folder, spread(random(Florence2ForConditionalGeneration, config)), processor)


def clipseg(folder: Path) -> Path:
    config = CLIPSegConfig(
        text_config={**SMALL, **IDS, "max_position_embeddings": 8},
        vision_config=EYES,
        projection_dim=32,
        extract_layers=[0, 1],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    processor = CLIPSegProcessor(ViTImageProcessorPil(size=SIZE), words("<s> $A </s>"))
    return saved(folder, spread(random(CLIPSegForImageSegmentation, config)), processor)


def random(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()


def spread(network: Any) -> Any:
    """Weights so large that what comes out depends on all that goes in."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def saved(folder: Path, network: Any, processor: Any) -> Path:
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def teach_colours(folder: Path, steps: int = 60) -> None:
    """Let a BLIP learn to write "a photo of a red square", and of the other colours."""
    network, processor = BlipForConditionalGeneration.from_pretrained(folder), BlipProcessor.from_pretrained(folder)
    texts = [f"a photo of a {colour} square" for colour in COLOURS]
    inputs = processor(images=[picture(colour) for colour in COLOURS], text=texts, return_tensors="pt")
    optimizer = torch.optim.AdamW(network.train().parameters(), 3e-3)
    for _ in range(steps):
        network(**inputs, labels=inputs["input_ids"].clone()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)


def tagger(folder: Path, *, count: int | str = "N", tags: str | None = None) -> Path:
    """A tagger whose probabilities are the means of blue, green and red, and whose rating is always the same."""
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["levels"], keepdims=0),
        helper.make_node("MatMul", ["levels", "weights"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["tags"]),
    ]
    weights = np.zeros((3, 6), np.float32)
    for channel, tag in enumerate((2, 3, 4)):  # blue, green, red
        weights[channel, tag] = 1 / 255
    weights[0, 5] = 1 / 255  # of the character
    constants = {"axes": np.array([1, 2]), "weights": weights, "bias": np.float32([0.7, 0.3, 0, 0, 0, 0])}
    onnx_file(folder / "model.onnx", nodes, constants, ("image", [count, 8, 8, 3]), ("tags", [count, 6]))
    rows = ["1,general,9,5", "2,sensitive,9,5", "3,blue_sky,0,5", "4,o_o,0,5", "5,red,0,5", "6,gle_(otl),4,5"]
    table = tags or "\n".join(["tag_id,name,category,count", *rows]) + "\n"
    (folder / "selected_tags.csv").write_text(table)
    return folder


def subject(folder: Path, *, side: int | str = 16) -> Path:
    """A network that takes for the subject what is red."""
    nodes = [helper.make_node("Conv", ["image", "weights"], ["mask"])]
    weights = np.float32([1, 0, 0]).reshape(1, 3, 1, 1)
    shape = ["N", 3, side, side]
    onnx_file(folder / "model.onnx", nodes, {"weights": weights}, ("image", shape), ("mask", ["N", 1, side, side]))
    return folder


def onnx_file(file: Path, nodes: Any, constants: dict[str, np.ndarray], takes: Any, gives: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(takes[0], TensorProto.FLOAT, takes[1])],
        [helper.make_tensor_value_info(gives[0], TensorProto.FLOAT, gives[1])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
