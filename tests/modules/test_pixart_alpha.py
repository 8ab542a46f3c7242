"""PixArt Alpha: prediction and loss against the stock parts, what it is told, its files, and a run from end to end."""

import io
import json
import math
import shutil

import pytest
import sentencepiece
import torch
from diffusers import DDPMScheduler, PixArtAlphaPipeline
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from otl.config import LoraFormat, Sampler, SettingsError
from otl.formats.folder import save_pipeline
from otl.methods.lora import Lora
from otl.methods.targets import layers, matching
from otl.modules import samplers
from otl.modules.pixart_alpha import PixArtAlpha
from otl.testing import CHECKS
from otl.types import Size
from tests import tiny
from tests.commands import ROOT, fork_otl
from tests.modules.test_families import SIZES, TARGETS, batch, u_of

CAPTIONS = ["a small red circle", "a photo of a cat"]  # those of `batch`
T = torch.tensor([0, 700])
PUBLISHED = [  # model, parameters of the transformer, resolution, told sizes
    ("pixart_alpha", 611_349_152, 1024, True),
    ("pixart_alpha_512", 610_856_096, 512, False),
    ("pixart_alpha_256", 610_856_096, 256, False),
]
T5_XXL, VAE = 4_762_310_656, 83_653_863


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.pixart_alpha(tmp_path_factory.mktemp("pixart_alpha"))


@pytest.fixture(scope="module")
def folder_512(tmp_path_factory):
    return tiny.pixart_alpha(tmp_path_factory.mktemp("pixart_alpha_512"), sample_size=64)


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
    return pixels, torch.randn(2, 4, 16, 24, generator=generator)


def loaded(folder, **options):
    module = PixArtAlpha(str(folder), **options)
    module.configure_model()
    return module


def bits_of_the_bound(pipe, predicted, latents, noisy):
    """[B] the bound as the papers define it, from diffusers' scheduler: at t = 0 the likelihood of the latents in 256
    levels, else the divergence of two Gaussians."""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False, variance_type="learned_range")
    bars, betas = scheduler.alphas_cumprod.double(), scheduler.betas.double()
    noise, fraction = predicted.double().chunk(2, dim=1)
    rows = []
    for row, t in enumerate(T.tolist()):
        guess = (noisy[row].double() - (1 - bars[t]).sqrt() * noise[row]) / bars[t].sqrt()
        past = max(t, 1)  # the first step takes the smallest variance of the second
        smallest = (betas[past] * (1 - bars[past - 1]) / (1 - bars[past])).log()
        if t == 0:
            share = (fraction[row] + 1) / 2
            spread = ((share * betas[0].log() + (1 - share) * smallest) / 2).exp()
            normal = torch.distributions.Normal(guess, spread)
            inside = normal.cdf(latents[row].double() + 1 / 255) - normal.cdf(latents[row].double() - 1 / 255)
            rows.append(-inside.clamp(min=1e-12).log().mean() / math.log(2))
            continue
        log_variance = scheduler._get_variance(t, predicted_variance=fraction[row])
        apart = bars[t - 1].sqrt() * betas[t] / (1 - bars[t]) * (latents[row].double() - guess)  # x[t] falls out
        nats = 0.5 * (log_variance - smallest - 1 + (smallest - log_variance).exp() + apart**2 / log_variance.exp())
        rows.append(nats.mean() / math.log(2))
    return torch.stack(rows)


@pytest.mark.parametrize("told", [True, False])
def test_prediction_and_loss_agree_with_the_parts_of_the_stock_pipeline(told, folder, folder_512, drawn):
    pixels, noise = drawn
    where = folder if told else folder_512
    module = loaded(where)
    assert module.pipeline.transformer.use_additional_conditions is told
    ours = module.losses(batch(pixels, noise), u=u_of(T), stream="noise")

    pipe = PixArtAlphaPipeline.from_pretrained(where)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * 0.18215
        hidden, mask, _, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
        noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, T)
        ratio = TARGETS[:, 0].float() / TARGETS[:, 1]
        sizes = {"resolution": SIZES.float(), "aspect_ratio": ratio[:, None]}
        predicted = pipe.transformer(
            noisy,
            encoder_hidden_states=hidden,
            encoder_attention_mask=mask,
            timestep=T,
            added_cond_kwargs=sizes if told else {"resolution": None, "aspect_ratio": None},
        ).sample
        given = module.predict(noisy, T, module.encode_prompt(CAPTIONS), batch(pixels, noise))
        distance = F.mse_loss(predicted[:, :4], noise, reduction="none").mean((1, 2, 3))
        expected = (distance + bits_of_the_bound(pipe, predicted, latents, noisy)) * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(given, predicted, rtol=1e-5, atol=1e-6)
    assert hidden.shape[1] == 120
    torch.testing.assert_close(ours[1:], expected[1:].float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(ours[:1], expected[:1].float(), rtol=1e-2, atol=0)  # the cdf is within 2e-4


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("size", [128, 64])
def test_the_family_keeps_the_contract(size, check, folder, folder_512):
    check(lambda: PixArtAlpha(str(folder if size == 128 else folder_512)))


def test_the_bound_gives_the_noise_no_gradient_and_the_distance_the_variance_none(folder):
    module = loaded(folder)
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(2, 8, 4, 4, generator=generator, requires_grad=True)
    latents, noise = torch.randn(2, 2, 4, 4, 4, generator=generator)
    noisy = module.noise_schedule.add(latents, noise, T)
    module.objective(predicted, latents, noise, noisy, T).sum().backward()
    assert predicted.grad is not None
    expected = 2 * (predicted[:, :4] - noise) / noise[0].numel()
    torch.testing.assert_close(predicted.grad[:, :4], expected.detach())
    assert bool((predicted.grad[:, 4:] != 0).any())


def test_positions_without_weight_count_neither_in_the_distance_nor_in_the_bound(folder):
    module = loaded(folder)
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(2, 8, 4, 4, generator=generator)
    latents, noise = torch.randn(2, 2, 4, 4, 4, generator=generator)
    noisy = module.noise_schedule.add(latents, noise, T)
    weights = torch.zeros(2, 1, 4, 4)
    weights[..., :2] = 2.0
    left = [each[..., :2] for each in (predicted, latents, noise, noisy)]
    torch.testing.assert_close(
        module.objective(predicted, latents, noise, noisy, T, weights), module.objective(*left, T)
    )


def test_padding_is_not_looked_at(folder):
    module = loaded(folder)
    cond = module.encode_prompt(["one", "one two three"])
    counts = cond["mask"].sum(1).tolist()
    assert cond["mask"].dtype == torch.bool and counts[0] < counts[1] < 120
    assert bool(cond["mask"][0, : counts[0]].all())
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = batch(None, None)
    other = cond | {"hidden": torch.where(cond["mask"][..., None], cond["hidden"], 7.0)}
    with torch.no_grad():
        torch.testing.assert_close(module.predict(noisy, T, other, sizes), module.predict(noisy, T, cond, sizes))


def test_captions_are_read_in_lower_case(folder):
    module = loaded(folder)
    shouted, plain = (module.encode_prompt([text]) for text in ("  A Cat ", "a cat"))
    assert torch.equal(shouted["hidden"], plain["hidden"])


def test_the_size_of_the_file_changes_the_prediction_of_the_1024_alone(folder, folder_512):
    differences = []
    for where in (folder, folder_512):
        module = loaded(where)
        noisy, cond = torch.zeros(2, 4, 8, 8), module.encode_prompt(CAPTIONS)
        told = batch(None, None)
        with torch.no_grad():
            one = module.predict(noisy, T, cond, told)
            two = module.predict(noisy, T, cond, told._replace(original_size=told.original_size * 2))
        differences.append((one - two).abs().max().item())
    assert differences[0] > 1e-4 and differences[1] == 0


@pytest.mark.parametrize(("name", "count", "side", "told"), PUBLISHED)
def test_the_published_networks_by_their_yaml(name, count, side, told, settings):
    module = instantiate(settings(f"model={name}", "data.path=x").model)
    module.build_skeleton()
    counts = {part: sum(p.numel() for p in module.part(part).parameters()) for part in module.part_names}
    assert counts == {"transformer": count, "vae": VAE, "text_encoder": T5_XXL}
    assert module.pipeline.transformer.use_additional_conditions is told
    assert (module.resolution, module.data_resolution) == (side, side)
    betas = 1 - module.noise_schedule.alpha_bars[1:] / module.noise_schedule.alpha_bars[:-1]
    assert len(module.noise_schedule.alpha_bars) == 1000
    assert (1 - module.noise_schedule.alpha_bars[0]).item() == pytest.approx(0.0001)
    assert betas[-1].item() == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("preset", "transformer", "text"),
    [("attn-mlp", 280, 168), ("attn-only", 224, 96), ("blocks", 280, 168), ("full", 291, 168)],
)
def test_presets_find_the_published_number_of_layers(preset, transformer, text):
    module = PixArtAlpha("published/weights")
    module.build_skeleton()
    found = {
        part: len(matching({part: layers(module.part(part))}, preset, {part: presets})[part])
        for part, presets in module.lora_targets.items()
    }
    assert found == {"transformer": transformer, "text_encoder": text}


def test_the_cache_tells_mixed_precision_apart(folder):
    """Also with weights in fp32, T5 computes in bf16 then."""
    module = loaded(folder, dtype="fp32")
    before, plain = module.prompt_identity(), module.encode_prompt(CAPTIONS)
    module.autocast_dtype = torch.bfloat16
    assert not torch.equal(module.encode_prompt(CAPTIONS)["hidden"].float(), plain["hidden"])
    assert module.prompt_identity() != before


def test_t5_is_never_in_fp16(folder):
    module = loaded(folder, dtype="fp16")
    dtypes = {name: next(module.part(name).parameters()).dtype for name in module.part_names}
    assert dtypes == {"transformer": torch.float16, "vae": torch.float32, "text_encoder": torch.bfloat16}
    module.autocast_dtype = torch.float16
    seen = []
    layer = module.pipeline.text_encoder.encoder.block[0].layer[0].SelfAttention.q
    layer.register_forward_hook(lambda layer, given, made: seen.append(made.dtype))
    with torch.autocast("cpu", torch.float16):
        module.encode_prompt(CAPTIONS)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("name", ["PixArt-XL-2-1024-MS.pth", "pixart.safetensors"])
def test_a_single_file_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    for build in (PixArtAlpha.configure_model, PixArtAlpha.build_skeleton):
        with pytest.raises(SettingsError, match=r"model\.checkpoint=.*diffusers folder or the hub"):
            build(PixArtAlpha(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "v_prediction"}, r"model\.prediction=v_prediction: PixArtAlpha learns with epsilon only"),
        ({"zero_terminal_snr": True}, r"model\.zero_terminal_snr=true"),
    ],
)
def test_what_the_bound_cannot_do_is_refused(options, message, folder):
    with pytest.raises(SettingsError, match=message):
        loaded(folder, **options)


def test_a_transformer_without_variance_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"out_channels": 4}))
    with pytest.raises(SettingsError, match=r"its transformer has 4 output channels"):
        PixArtAlpha(str(tmp_path)).build_skeleton()


def test_drawing_is_the_stock_pipeline_at_the_size_asked_for(folder):
    module = loaded(folder)
    ours = module.draw(["a dog"], [4], steps=2, guidance=3.0, size=Size(32, 48))[0]
    pipe = PixArtAlphaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        "a dog",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(4),
        height=32,
        width=48,
        clean_caption=False,
        use_resolution_binning=False,
    ).images[0]
    assert ours.size == (48, 32)
    assert ours.tobytes() == stock.tobytes()


@pytest.fixture(scope="module")
def published(folder, tmp_path_factory):
    """The checkpoint with its tokenizer as the hub has it: spiece.model, which transformers 5 converts."""
    target = tmp_path_factory.mktemp("published")
    shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tokenizer.json"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 4), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", minloglevel=2,
    )  # fmt: skip
    (target / "tokenizer" / "spiece.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (target / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


def test_the_published_tokenizer_gives_sentencepiece_s_own_ids(published):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(published / "tokenizer" / "spiece.model"))
    tokenizer = loaded(published).pipeline.tokenizer
    for text in ("a small red circle", "a photo, a cat é", ""):
        assert tokenizer(text).input_ids == pieces.encode(text, add_eos=True)


def test_a_saved_folder_keeps_the_tokenizer_for_older_versions(published, tmp_path):
    saved = save_pipeline(loaded(published).pipeline, tmp_path / "saved", dtype="fp32")
    for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model"):
        assert (saved / "tokenizer" / name).is_file()
    one, two = (loaded(each).encode_prompt(CAPTIONS) for each in (published, saved))
    assert torch.equal(one["hidden"], two["hidden"])


def adapted(folder, **parts):
    """A module with a random adapter of rank 2 on the denoiser and on `parts`."""
    module = PixArtAlpha(str(folder))
    module.method = Lora(rank=2, alpha=1.0, targets="attn-mlp", parts={"denoiser": {}, **parts})
    module.configure_model()
    with torch.no_grad():
        for parameter in module.trained_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    module.output_options.dtype = "fp32"
    return module


def comfyui_keys(transformer):
    """Key -> layer, as ComfyUI's `model_lora_keys_unet` has them for PixArt."""
    paths = [name for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)]
    return {f"{start}{path}": path for start in ("transformer.", "base_model.model.") for path in paths}


def test_the_lora_file_says_what_comfyui_reads(folder, tmp_path):
    module = adapted(folder, text_encoder={})
    tensors = load_file(module.export(tmp_path / "adapter"))

    plain = PixArtTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    with torch.no_grad():
        for key, path in comfyui_keys(plain).items():
            if f"{key}.lora_up.weight" in tensors:
                up, down, alpha = (
                    tensors.pop(f"{key}.{end}") for end in ("lora_up.weight", "lora_down.weight", "alpha")
                )
                plain.get_submodule(path).weight += alpha / len(down) * up @ down
    rest = {key.split(".")[0] for key in tensors}
    assert len(rest) == 2 * 7 and all(key.startswith("lora_te1_encoder_block_") for key in rest)
    cond, told = module.encode_prompt(CAPTIONS), batch(None, None)
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        live = module.predict(noisy, T, cond, told)
        module.pipeline.transformer = plain
        torch.testing.assert_close(live, module.predict(noisy, T, cond, told), rtol=1e-4, atol=1e-4)


def test_the_page_s_lines_read_the_file_in_peft_s_format(folder, tmp_path, monkeypatch):
    module = adapted(folder)
    module.output_options.format = LoraFormat.peft
    module.export(tmp_path / "final")
    page = (ROOT / "docs" / "families" / "pixart_alpha.md").read_text()
    lines = page.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(lines.replace("PixArt-alpha/PixArt-XL-2-1024-MS", str(folder)), names)
    cond, told = module.encode_prompt(CAPTIONS), batch(None, None)
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        live = module.predict(noisy, T, cond, told)
        module.pipeline.transformer = names["pipe"].transformer
        torch.testing.assert_close(live, module.predict(noisy, T, cond, told), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_from_the_command_line(folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        Image.new("RGB", (96, 64), (60 * number, 100, 200)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"picture {number}\n")
    line = [
        *("model=pixart_alpha", f"model.checkpoint={folder}", "method=lora", "optimizer.lr=1e-2"),
        *(f"data.path={photos}", f"data.cache_dir={tmp_path / 'cache'}", "data.resolution=64", "data.workers=1"),
        *("trainer.max_steps=3", 'sample.prompts=["picture 1"]', "sample.steps=2", "hydra.run.dir=OUT"),
    ]
    done = fork_otl(*line, cwd=tmp_path)
    assert done.code == 0, done.err
    out = tmp_path / "OUT"
    assert list((out / "samples").rglob("*.png"))
    tensors = load_file(out / "final.safetensors")
    plain = PixArtTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    keys = comfyui_keys(plain)
    found = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    assert len(found) == 20 and found <= set(keys)
    assert any(bool(tensor.any()) for key, tensor in tensors.items() if "lora_up" in key)


def test_a_plan_needs_no_weights(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a picture")
    line = ["task=plan", "model=pixart_alpha", "trainer.precision=bf16-mixed", f"data.path={tmp_path}"]
    done = fork_otl(*line, "hydra.run.dir=OUT", cwd=tmp_path)
    assert done.code == 0, done.err
    plan = json.loads((tmp_path / "OUT" / "plan.json").read_text())
    rows = {row["part"]: row for row in plan["weights"]}
    assert rows["transformer"]["parameters"] == PUBLISHED[0][1]
    assert rows["text_encoder"]["bytes"] == 2 * T5_XXL
    assert plan["buckets"][0]["height"] % 16 == plan["buckets"][0]["width"] % 16 == 0


@pytest.mark.parametrize("sampler", [None, *Sampler])
def test_a_single_step_is_refused_where_the_stock_pipeline_fails(folder, sampler):
    module = loaded(folder)
    try:
        samplers.refuse_steps(module, 1, sampler)
    except SettingsError:
        with pytest.raises(IndexError):
            module.draw(["a"], [0], steps=1, size=Size(32, 32), sampler=sampler)
    else:
        module.draw(["a"], [0], steps=1, size=Size(32, 32), sampler=sampler)
