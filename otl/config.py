"""The settings that OTL alone owns, typed, each with its unit; and where `conf/` is. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, TypeVar, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

PACKAGE = Path(__file__).resolve().parent
ARCHIVES = (".tar", ".zip")  # what data.path may be besides a folder
TABLES = (".parquet", ".arrow")
MANIFESTS = (".jsonl", ".ndjson", ".csv", ".tsv")
PICTURES = tuple(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .avif .avifs .gif .bmp .dib .tif .tiff .jp2 .j2k .j2c .jpc .jpf .jpx "
    ".tga .psd .dds .qoi .pcx .sgi .ico .ppm .pgm .pbm .pnm .pfm".split()
)
Options = TypeVar("Options")


class SettingsError(ValueError):
    """Something the person who ran it can mend: a setting, a file, a combination. Shown without a traceback."""


@dataclass
class Problem:
    """One thing wrong with the settings or the dataset, for the person who ran it."""

    key: str  # the setting or the file
    message: str  # what is wrong and what to do
    fatal: bool = True
    details: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)  # files that are not trained on for it, and why


def as_problem(error: SettingsError) -> Problem:
    """Of an error that names one setting first: `key: what is wrong`, or `key=value: what is wrong`."""
    key, _, message = str(error).partition(": ")
    key, _, value = key.partition("=")
    return Problem(key, f"{value}: {message}" if value else message)


class RunEnded(RuntimeError):
    """A run that ended before its time and says why; shown without a traceback."""

    exit_code = 1
    on_all_ranks = True  # whether every process of the run raises it; else the others have to be ended


def conf_dir() -> Path:
    """The folder of the YAML groups: beside the package in a clone, inside it in a wheel."""
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise SettingsError(
        f"no conf/config.yaml in or beside {PACKAGE}: the installation is incomplete, install otl again"
    )


def assets_dir() -> Path:
    """The folder of the files that ship with OTL: model configs, the small checkpoint, the quickstart's pictures."""
    return PACKAGE / "assets"


class ConceptType(Enum):
    """What the images of a concept are for."""

    train = "train"
    validation = "validation"
    regularisation = "regularisation"  # class images, called by the class prompt alone, so that the class is not lost
    prior = "prior"  # the target is what the model predicts without its adapters, so that it is not forgotten


class PartialBatches(Enum):
    """What happens to the last images of a bucket that do not fill a batch."""

    keep = "keep"  # a smaller batch
    pad = "pad"  # images of the same bucket are repeated
    drop = "drop"  # left out of this epoch; a different choice every epoch


class Missing(Enum):
    """What happens to an image without a caption."""

    error = "error"
    warn = "warn"  # trained with the empty caption, and named in a warning
    skip = "skip"  # left out, and named in a warning
    allow = "allow"  # trained with the empty caption, and counted


class CaptionSource(Enum):
    """Where an image's captions may come from."""

    manifest = "manifest"  # what a manifest or table says beside the image's path
    file = "file"  # a text file beside it, one caption a line
    json = "json"  # a JSON file beside it
    name = "name"  # its own name
    prompt = "prompt"  # the concept's prompt, one caption a line


class Broken(Enum):
    """What happens to a file that cannot be read."""

    error = "error"
    skip = "skip"  # left out, and reported


class LossType(Enum):
    """The distance between prediction and target."""

    mse = "mse"
    mae = "mae"
    huber = "huber"
    log_cosh = "log_cosh"


class HuberSchedule(Enum):
    """How huber's delta depends on the timestep: docs/objective.md has the formulas."""

    constant = "constant"
    exponential = "exponential"  # from 1 at the picture to huber_delta at noise, by the share of the schedule
    snr = "snr"  # from 1 at the picture to huber_delta at noise, by the size of the noise


class LossWeight(Enum):
    """How timesteps are weighted."""

    constant = "constant"
    min_snr = "min_snr"  # https://arxiv.org/abs/2303.09556
    debiased = "debiased"  # https://arxiv.org/abs/2310.08442
    p2 = "p2"  # https://arxiv.org/abs/2204.00227
    sigma = "sigma"  # the share of noise: for models that predict a flow


class TimestepDistribution(Enum):
    """Which timesteps are trained how often."""

    uniform = "uniform"
    logit_normal = "logit_normal"  # the sigmoid of a normal number
    heavy_tail = "heavy_tail"  # the middle more often, the ends never rare
    beta = "beta"


class LoraFormat(Enum):
    """Whose names a LoRA file carries."""

    kohya = "kohya"  # read by ComfyUI, A1111, Forge, kohya, diffusers; the true alpha is written
    peft = "peft"  # diffusers' own; alpha folded into the weights


class MaskSource(Enum):
    """Where an inpainting model's masks come from."""

    both = "both"  # a file where there is one, else generated
    files = "files"  # every image has one
    generated = "generated"  # files are not looked at


class MaskResize(Enum):
    """How a mask is brought to the latents' size."""

    nearest = "nearest"  # one pixel decides, as in diffusers' pipelines
    area = "area"  # the share of masked pixels, 0..1


class Sampler(Enum):
    """How pictures are denoised, by the names that other programs have for it."""

    ddim = "ddim"
    ddpm = "ddpm"
    euler = "euler"
    euler_a = "euler_a"
    dpmpp_2m = "dpmpp_2m"
    dpmpp_2m_karras = "dpmpp_2m_karras"
    dpmpp_2m_sde = "dpmpp_2m_sde"
    unipc = "unipc"


class TimestepSpacing(Enum):
    """Which of the schedule's timesteps the steps of a picture are."""

    leading = "leading"  # evenly from 0: never the last one
    trailing = "trailing"  # evenly to the last one: for few steps, and for zero-terminal-SNR
    linspace = "linspace"  # evenly from the first to the last one


class CheckpointFormat(Enum):
    """How a whole model is written."""

    diffusers = "diffusers"  # a folder
    single_file = "single_file"  # one .safetensors under the original code's names: ComfyUI, A1111, Forge


class TagDropout(Enum):
    """Which tags are dropped together."""

    whole = "whole"  # all that may be, or none
    each = "each"  # each by itself
    weighted = "weighted"  # each by itself, later ones more often: the i-th of n with i / n of the probability


class Capitals(Enum):
    """Which letters of a tag become capitals."""

    upper = "upper"  # all
    title = "title"  # the first of each word
    first = "first"  # the first
    random = "random"  # each with a probability of a half, the others become small


@dataclass
class CaptionOptions:
    """Where captions come from, and how they vary: docs/data.md has examples."""

    sources: list[CaptionSource] = field(  # the first that has a caption counts: manifest, file, json, name, prompt
        default_factory=lambda: [CaptionSource.manifest, CaptionSource.file, CaptionSource.prompt]
    )
    suffix: str = ".txt"  # of the text file, behind the image's name without or with its own suffix
    json_suffix: str = ".json"  # of the JSON file, likewise
    json_keys: list[str] = field(default_factory=lambda: ["caption", "tags"])  # joined; a.b is the b inside of a
    json_separator: str = ""  # between the tags in a string, such as " " in booru's; empty: the string as it is
    name_spaces: bool = True  # underscores in the image's name become spaces
    name_cut_numbers: bool = True  # numbers at the end of the image's name are cut off
    spaces: bool = False  # underscores become spaces, but in tags of up to three letters: ^_^
    separator: str = ","  # between the tags of a caption
    shuffle: bool = False  # tags in another order each time
    keep: int = 0  # first tags that stay where and as they are
    keep_separator: str = ""  # such as |||: what stands before it stays, and what follows a second one; empty: none
    tag_dropout: float = 0.0  # probability, 0..1, that tags are left out
    tag_dropout_mode: TagDropout = TagDropout.each  # whole, each or weighted
    tag_dropout_never: list[str] = field(default_factory=list)  # tags that are never left out; file:PATH for a list
    tag_dropout_only: list[str] = field(default_factory=list)  # the only tags that may be left out; none: all may
    tag_dropout_patterns: bool = False  # the two lists are of regular expressions, each for a whole tag
    capitals: float = 0.0  # share of tags, 0..1, whose letters change
    capitals_kinds: list[Capitals] = field(default_factory=lambda: list(Capitals))  # each as likely
    lowercase: bool = False  # all letters small, before `capitals`
    wildcards: bool = False  # {a|b}, {2::a|b}, {2$$a|b|c} and __name__ are choices
    wildcard_folder: str = ""  # folder of the files that __name__ means: NAME.txt, one choice a line
    trigger: str = ""  # words put before captions that do not have them
    prefix: str = ""  # text before every caption, the trigger too
    postfix: str = ""  # text behind every caption


@dataclass
class Augment:
    """How images are varied, and their masks with them; nothing is, by default. docs/data.md has more."""

    flip: float = 0.0  # share of the times that an image is mirrored left to right, 0..1; 1 is always
    rotation: float = 0.0  # degrees, 0..180: turned by up to so much to either side, enlarged until no corner is empty
    brightness: float = 0.0  # strength, 0..1: times a factor between 1 - strength and 1 + strength
    contrast: float = 0.0  # strength, 0..1, likewise
    saturation: float = 0.0  # strength, 0..1, likewise
    hue: float = 0.0  # degrees, 0..180: turned by up to so much to either side
    crop_jitter: float = 0.0  # share of the way from the middle to the edges that the crop may move, 0..1
    resize_jitter: float = 0.0  # share by which an image may be enlarged before it is cropped, 0..1
    fixed_rotation: float = 0.0  # degrees, counterclockwise, -180..180: every time, as all that follows
    fixed_brightness: float = 1.0  # factor
    fixed_contrast: float = 1.0  # factor
    fixed_saturation: float = 1.0  # factor
    fixed_hue: float = 0.0  # degrees, from red towards yellow, -180..180


def overridable(kind: type) -> type:
    """The same fields, each null where it is not given."""
    optional: list[Any] = [(name, Optional[hint], None) for name, hint in get_type_hints(kind).items()]
    return make_dataclass(f"Own{kind.__name__}", optional, namespace={"__module__": __name__})


def overridden(common: Options, own: Any) -> Options:
    """`common` with what `own`, its `overridable` form, gives."""
    given = {each.name: getattr(own, each.name) for each in fields(own)}
    return replace(common, **{name: value for name, value in given.items() if value is not None})  # type: ignore[type-var]


def shared_captions(kind: ConceptType, common: CaptionOptions) -> CaptionOptions:
    """What the captions of a concept are where it says nothing itself: class images are called by its prompt alone."""
    return CaptionOptions(sources=[CaptionSource.prompt]) if kind == ConceptType.regularisation else common


if TYPE_CHECKING:
    OwnCaptionOptions = CaptionOptions
    OwnAugment = Augment
else:
    OwnCaptionOptions = overridable(CaptionOptions)
    OwnAugment = overridable(Augment)


@dataclass
class Concept:
    """Images of one kind."""

    path: str = MISSING  # folder, archive, table, manifest, or a URL of one: docs/datasets.md
    enabled: bool = True  # false: as if it were not there
    recursive: bool = True  # whether the subfolders of a folder are searched
    image_column: Optional[str] = None  # of a table or manifest; null: by its name or content
    caption_column: Optional[str] = None  # of a table or manifest; null: by its name
    mask_column: Optional[str] = None  # of a table or manifest; null: by its name
    validation_share: Optional[float] = None  # share of images held out, 0..1; null: data.validation_share
    type: ConceptType = ConceptType.train  # train, validation, regularisation (class images) or prior
    repeats: float = 1.0  # times each image is seen in an epoch; 2.5: twice or three times, by turns
    samples: Optional[int] = None  # instead of repeats: images of it that are seen in an epoch, by turns
    resolution: Any = None  # pixels per side of the square with a bucket's area, or a list; null: data.resolution
    seed: Optional[int] = None  # of its order, captions and noise; null: the run's
    prompt: Optional[str] = None  # captions, one a line, of images without any of their own
    captions: OwnCaptionOptions = field(default_factory=OwnCaptionOptions)  # each field: null is that of data.captions
    mask_folder: Optional[str] = None  # folder of masks named as the images; null: data.mask_folder
    mask_alpha: Optional[bool] = None  # whether alpha channels are masks where there is no file; null: data.mask_alpha
    augment: OwnAugment = field(default_factory=OwnAugment)  # each field: null is that of data.augment
    loss_weight: float = 1.0  # multiplier of the loss of its images; of class images: of prior preservation
    generate: int = 0  # images: where the folder has fewer, the model draws the rest from `prompt` before the run


@dataclass
class Data:
    """The dataset: which images, how they are cut, in which batches."""

    path: Optional[str] = None  # folder, archive, table, manifest or a URL of one; the short form of one concept
    concepts: dict[str, Concept] = field(default_factory=dict)  # by name; beside or instead of `path`
    prompt: Optional[str] = None  # captions, one a line, of images of `path` without any of their own
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    resolution: Any = None  # pixels per side of the square with a bucket's area, or a list; null: the family's own
    each_resolution: bool = True  # of several: every image at each; false: every image at one of them, by `seed`
    batch_size: int = 1  # images
    buckets: bool = True  # aspect buckets; false: one square, cropped
    bucket_sizes: list[str] = field(default_factory=list)  # instead: buckets such as 768x1344, height x width, pixels
    min_bucket_side: Optional[int] = None  # pixels: buckets with a shorter side are not made
    max_bucket_side: Optional[int] = None  # pixels: buckets with a longer side are not made
    no_upscale: bool = False  # no image is enlarged: it goes to a smaller bucket, or is left out where there is none
    min_side: Optional[int] = None  # pixels: images with a shorter side are left out
    max_aspect: Optional[float] = None  # long side / short side: images above it are left out
    warn_crop: float = 0.15  # share of an image's area, 0..1: the plan warns of what loses more to the crop
    warn_upscale: float = 1.5  # factor: the plan warns of what is enlarged more
    partial_batches: PartialBatches = PartialBatches.keep  # keep, pad or drop
    augment: Augment = field(default_factory=Augment)
    image_variations: int = 1  # variations of each image in the cache, where something is random; all come by turns
    mask_folder: Optional[str] = None  # folder of masks named as the images; null: NAME-masklabel.png beside each image
    mask_alpha: bool = False  # the mask of an image without a mask file is its alpha channel: opaque is white
    background: str = "white"  # the colour under transparent pixels, a name or #rrggbb
    missing_captions: Missing = Missing.error  # error, warn, skip or allow
    broken_images: Broken = Broken.error  # error, or skip: left out and reported
    max_megapixels: float = 200.0  # millions of pixels; larger images count as broken: they may fill the memory
    verify_images: Optional[bool] = None  # decode every image once, not its header alone; null: where they are skipped
    caption_variants: int = 16  # texts of each caption in the cache, where captions vary
    caption_dropout: float = 0.0  # share of captions replaced by the empty one, 0..1
    validation_share: float = 0.0  # share of images held out, 0..1, chosen by content
    cache: bool = True  # encode every image and caption once and keep the result on disk
    cache_dir: str = "~/.cache/otl"  # folder, shared between runs
    encode_batch_size: int = 4  # images encoded at once while the cache is filled
    workers: int = 2  # processes that load batches


@dataclass
class LossMix:
    """Several distances at once: the factor of each."""

    mse: float = 0.0  # factor
    mae: float = 0.0  # factor
    huber: float = 0.0  # factor
    log_cosh: float = 0.0  # factor


@dataclass
class Loss:
    """The loss: docs/objective.md has the formulas."""

    type: LossType = LossType.mse  # mse, mae, huber or log_cosh
    mix: LossMix = field(default_factory=LossMix)  # instead of `type`: the sum of several, each times its factor
    huber_schedule: HuberSchedule = HuberSchedule.constant  # constant, exponential or snr
    huber_delta: Optional[float] = None  # where huber turns straight, in units of the noise; null: 1, scheduled 0.1
    weight: LossWeight = LossWeight.constant  # constant, min_snr, debiased, p2 or sigma
    gamma: Optional[float] = None  # of min_snr (the cap; null: 5) and p2 (the exponent; null: 1)
    masked: bool = False  # count each position by the image's mask
    unmasked_weight: float = 0.1  # weight at least given to every position where masked, 0..1
    unmasked_probability: float = 0.0  # share of the times that an image is trained without its mask, 0..1
    normalize_masked_area: bool = False  # divide by the mask's mean, so that small masks count as much as large ones


@dataclass
class NoiseOptions:
    """The noise that is added, and at which timesteps."""

    offset: float = 0.0  # strength of the noise shared by all pixels of a channel; 0.05..0.1 is usual
    offset_random_strength: bool = False  # a strength of its own for each image, uniform between 0 and `offset`
    offset_generalized: bool = False  # weaker at small timesteps: https://arxiv.org/abs/2412.03134
    multires_iterations: int = 0  # noise of so many coarser and coarser resolutions; 0: none, 6..10 is usual
    multires_discount: float = 0.3  # strength of each resolution relative to the finer one, 0..1; 0.1..0.4 is usual
    perturbation: float = 0.0  # strength of the extra noise on the input only; 0.1 is usual
    timesteps: TimestepDistribution = TimestepDistribution.uniform  # uniform, logit_normal, heavy_tail or beta
    logit_mean: float = 0.0  # of logit_normal: above 0 more noise
    logit_std: float = 1.0  # of logit_normal: the larger, the more at both ends
    mode_scale: float = 1.29  # of heavy_tail, -1..1.75: the larger, the more in the middle
    beta_alpha: float = 2.0  # of beta: the larger, the more noise
    beta_beta: float = 2.0  # of beta: the larger, the less noise
    shift: float = 1.0  # moves timesteps to noise above 1: side in pixels over the side that the weights are made for
    min_timestep: float = 0.0  # share of the schedule, 0..1: below it nothing is trained
    max_timestep: float = 1.0  # share of the schedule, 0..1: above it nothing is trained


@dataclass
class Inpaint:
    """The masks of an inpainting model: which part of each picture it learns to paint."""

    masks: MaskSource = MaskSource.both  # both (a file where there is one, else generated), files or generated
    boxes: float = 0.25  # share of generated masks; the four are divided by their sum
    brushes: float = 0.25  # share of generated masks
    ellipses: float = 0.25  # share of generated masks
    whole: float = 0.25  # share of generated masks: the whole picture
    min_area: float = 0.1  # share of the picture that boxes, brushes and ellipses cover at least, 0..1
    max_area: float = 0.5  # share of the picture that they cover at most, 0..1
    resize: MaskResize = MaskResize.nearest  # nearest or area: how a mask is brought to the latents' size
    fill: float = 0.0  # what the model sees in the place of masked pixels, -1..1; 0 is grey, as in diffusers


@dataclass
class SampleOptions:
    """The pictures that are drawn during training and at its end."""

    prompts: list[str] = field(default_factory=list)  # none: no pictures
    negative_prompt: str = ""  # what pictures are kept away from, by guidance
    seeds: list[int] = field(default_factory=lambda: [0])  # one picture for each prompt and seed
    steps: int = 25  # denoising steps
    guidance: Optional[float] = None  # classifier-free guidance scale, 1 is none; null: the family's usual
    sampler: Optional[Sampler] = None  # ddim, ddpm, euler, euler_a, dpmpp_2m, ...; null: the checkpoint's own
    timestep_spacing: Optional[TimestepSpacing] = None  # leading, trailing or linspace; null: the checkpoint's own
    height: Optional[int] = None  # pixels; null: data.resolution
    width: Optional[int] = None  # pixels; null: data.resolution
    batch_size: int = 4  # pictures drawn at once
    image: Any = None  # inpainting models: path of the picture to paint in, or a list with one for each prompt
    mask: Any = None  # inpainting models: path of its mask, white is painted, or a list with one for each prompt


@dataclass
class Output:
    """The file that comes out."""

    format: LoraFormat = LoraFormat.kohya  # of adapters: kohya or peft
    checkpoint_format: CheckpointFormat = CheckpointFormat.diffusers  # of whole models: diffusers or single_file
    dtype: str = "fp16"  # of the tensors in the file: fp32, fp16 or bf16
    name: str = "final"  # file name without suffix, in the run's folder
    title: Optional[str] = None  # shown by tools that read the header; null: output.name
    trigger: Optional[str] = None  # words that call the concept, written into the header
    overwrite: bool = False  # replace the results of an earlier run in the same folder


@dataclass
class Settings:
    """The root. Groups that plugins add to are YAML with a `_target_`: otl/check.py holds them to its signature."""

    task: Any = MISSING
    model: Any = MISSING
    method: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    data: Data = field(default_factory=Data)
    trainer: Any = MISSING
    logger: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    captioner: Any = None  # of task=caption
    masker: Any = None  # of task=mask
    experiment: Any = None  # a preset: a YAML of conf/experiment or of the folder --config-dir
    loss: Loss = field(default_factory=Loss)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    inpaint: Inpaint = field(default_factory=Inpaint)
    sample: SampleOptions = field(default_factory=SampleOptions)
    output: Output = field(default_factory=Output)
    seed: int = 0  # of noise, timesteps, order, dropout and the adapter's start
    resume: Optional[str] = None  # null, auto (the newest checkpoint of the run's folder) or a path
    manifest: Optional[str] = None  # of task=repeat: path of the manifest.json of the run to repeat
    allow_changes: bool = False  # go on although settings, data or versions are not what they were


def register() -> None:
    """Make `settings_schema`, the base of conf/config.yaml, and `${otl.assets:NAME}` known to YAML."""
    OmegaConf.register_new_resolver("otl.assets", lambda name: str(assets_dir() / name), replace=True)
    ConfigStore.instance().store(name="settings_schema", node=Settings)
