"""The config: a YAML file becomes frozen, typed sections, and every key is checked once.

    config = load_config(find_config(argument), overrides=["train.epochs=5"])

Faults are collected, so that a ConfigError has a line for each. Relative paths count from the
folder of the file, those of a --set argument from the working directory.
"""

import json
import os
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic import model_validator as validator

from utils.key_faults import key_at, shown, unknown_key, wrong_value
from utils.key_rules import NEEDED_PATHS, SHARED, clashes, class_clashes, gaps
from utils.strict_yaml import ConfigError, Draft, Keys, dump, named, read_file

# ---- the keys ----


def expanded(text: object) -> object:
    """A written path with its `~` filled in; an empty one, or the home of nobody, is refused."""
    if text == "" or "\0" in str(text):
        raise ValueError("not a path")
    if not isinstance(text, str) or not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise ValueError("nobody's home") from error


def increasing(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers as they are, if there is one and each is above the one before."""
    if not numbers or list(numbers) != sorted(set(numbers)):
        raise ValueError("not increasing")
    return numbers


def distinct(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers as they are, if none is there twice."""
    if len(set(numbers)) < len(numbers):
        raise ValueError("twice")
    return numbers


def rising(pair: tuple[float, float]) -> tuple[float, float]:
    """The pair as it is, if its first number is the lower one."""
    if not pair[0] < pair[1]:
        raise ValueError("not rising")
    return pair


# A title is the key's rule in plain words; a rule without one is read off the key's schema.
Device = Annotated[
    str, Field(pattern=r"^(auto|cpu|cuda(:(0|[1-9][0-9]*))?)$", title="auto, cpu, cuda or cuda:N")
]
Compile = Annotated[Literal["auto"] | bool, Field(title="auto, true or false")]
TileSize = Annotated[
    int, Field(gt=0, multiple_of=16, title="a whole multiple of 16, the patch size of DINOv3")
]
FilePath = Annotated[Path, BeforeValidator(expanded), Field(strict=False)]
OptionalPath = FilePath | None
PATHS = "a path, a list of paths, or null"
FilePaths = Annotated[tuple[FilePath, ...], Field(strict=False, min_length=1)]
OptionalPaths = FilePath | FilePaths | None  # a file, a folder, a pattern, or a list of them
Count = Annotated[int, Field(ge=1)]
Workers = Annotated[int, Field(ge=1, le=1024)]
Weight = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Block = Annotated[int, Field(ge=0)]
Layers = Annotated[tuple[Block, ...], Field(strict=False), AfterValidator(increasing)]
Band = Annotated[int, Field(ge=1)]
Bands = Annotated[tuple[Band, ...], Field(strict=False, min_length=1), AfterValidator(distinct)]
Range = Annotated[tuple[float, float], Field(strict=False), AfterValidator(rising)]
Ranges = Annotated[tuple[Range, ...], Field(strict=False, min_length=1)]
Color = Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$", title="a color such as '#33aa55'")]
Share = Annotated[float, Field(ge=0, le=1)]
Means = Annotated[tuple[float, float, float], Field(strict=False)]
Deviations = Annotated[tuple[Rate, Rate, Rate], Field(strict=False)]


class Section(BaseModel):
    """Frozen, strict (true is no number, "4" neither) and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @validator(mode="before")
    @classmethod
    def empty(cls, data: object) -> object:
        """A section whose keys are all commented out is one of defaults."""
        return {} if data is None else data


class Resources(Section):
    """The machine, and what makes a run repeatable."""

    seed: int = Field(1337, ge=0, lt=2**32, description="seed of every random choice")
    omp_threads: Count = Field(4, description="CPU threads of one process")
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "high", description="float32 matrix products on CUDA: highest is exact, high is TF32"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of networks' products; auto: bf16 where the processor computes in it"
    )
    compile: Compile = Field(
        "auto",
        description="torch.compile the frozen networks, also where training runs the backbone; "
        "auto: on CUDA, where it pays",
    )
    distributed: bool = Field(False, description="run as one of several processes under torchrun")
    dist_backend: Literal["nccl", "gloo"] = Field("nccl", description="nccl: GPUs, gloo: CPUs")
    timeout_minutes: Annotated[float, Field(gt=0, le=10080)] = Field(
        30.0, description="without a sign of life of a process, after which the others end"
    )


class Logging(Section):
    """What a run says, and where."""

    level: Literal["error", "info", "debug"] = Field("info", description="how much is said")
    timestamps: bool = Field(True, description="begin each line with date and time")
    file: OptionalPath = Field(None, description="log file, written beside the terminal's lines")


class Paths(Section):
    """Shared by all phases; a phase's own key overrides."""

    raw_images_dir: OptionalPaths = Field(
        None, title=PATHS, description="scenes: a file, a folder, a pattern, or a list of these"
    )
    label_path: OptionalPaths = Field(
        None,
        title=PATHS,
        description="labels: rasters or polygons; a file, folder, pattern, or a list, first wins",
    )
    processed_dir: OptionalPath = Field(None, description="folder of the tile cache")


class Augmentations(Section):
    """Random changes to each training tile, alike for image, features and label."""

    enable: bool = Field(True, description="augment at all")
    hflip: bool = Field(True, description="mirror left to right, half of the time")
    vflip: bool = Field(True, description="mirror top to bottom, half of the time")
    rotate90: bool = Field(True, description="turn by 0, 90, 180 or 270 degrees")


class Splits(Section):
    """Which tiles train and which validate; by default train.val_fraction in blocks of ground."""

    train_list: OptionalPath = Field(
        None, description="file of tiles or scenes, one a line, or of polygons"
    )
    val_list: OptionalPath = Field(None, description="the same for validation")
    regions: OptionalPath = Field(
        None, description="file of polygons with a field split: train, val or test"
    )
    block: Rate | None = Field(
        None, description="side of the blocks to hold out, in metres; null: about four blocks"
    )
    buffer: Weight = Field(
        0.0, description="metres around validation tiles in which training tiles are dropped"
    )


class ClassSpec(Section):
    """One class: its name, the label values that mean it, its color on the map."""

    name: str = Field(min_length=1, description="as the map's legend has it")
    values: Annotated[tuple[int | str, ...], Field(strict=False)] = Field(
        (), description="raster values or attribute texts; none in any class: the ids themselves"
    )
    color: Color | None = Field(None, description="like '#33aa55'; null: one of ours")


class Labels(Section):
    """How label files are read."""

    attribute: str | None = Field(
        None, description="field of polygons with their class; null: every polygon is class 1"
    )
    layer: str | None = Field(None, description="layer of a GeoPackage; null: the only one")
    all_touched: bool = Field(
        False, description="burn every pixel a polygon touches, not those whose centre is inside"
    )
    background: Annotated[int, Field(ge=0)] | Literal["ignore"] = Field(
        0,
        title="a class id or ignore",
        description="class of pixels that no polygon covers, or ignore",
    )
    unlisted: Literal["error", "ignore", "background"] = Field(
        "error", description="what becomes of label values that are no class"
    )
    nodata: Literal["auto", "none"] | float = Field(
        "auto",
        title="auto, none or a number",
        description="label raster's value of unlabelled pixels; auto: as declared, unless a class",
    )
    erode_borders: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="pixels on each side of a class border to ignore"
    )


class Dataset(Section):
    """What is learnt from."""

    cache: Literal["features", "tiles", "auto"] = Field(
        "features",
        description="what prepare keeps: features, or tiles only, whose features are computed "
        "while training; auto: measured, the quicker of the two",
    )
    bands: Bands | None = Field(
        None,
        title="a list of different band numbers from 1, or null",
        description="bands that a head sees, from 1; null: the first three, or the only one",
    )
    rgb: Bands | None = Field(
        None,
        title="a list of one or three of the bands, or null",
        description="those of the bands that the backbone sees; null: the first three of them",
    )
    input_range: Literal["auto", "dtype"] | Range | Ranges = Field(
        "auto",
        title="auto, dtype, [low, high] or a list with such a pair for each band",
        description="pixel values that become 0 and 1; auto: 0..255 for uint8, otherwise the "
        "1st and 99th percentile of each band over the training scenes",
    )
    nodata: float | None = Field(
        None, description="value of pixels without data, beside what the scenes declare themselves"
    )
    gsd: Rate | None = Field(
        None, description="metres per pixel to read every scene at; null: each at its own"
    )
    ignore_index: int = Field(
        255, ge=0, le=65535, description="label value left out of loss and metrics; not a class id"
    )
    classes: Annotated[tuple[ClassSpec, ...], Field(strict=False, min_length=2)] | None = Field(
        None,
        title="a list of two or more of {name: NAME, values: [VALUE, ...], color: '#rrggbb'}",
        description="classes in the order of their ids; null: values 0 .. num_classes - 1",
    )
    labels: Labels = Field(default_factory=Labels)
    augmentations: Augmentations = Field(default_factory=Augmentations)
    splits: Splits = Field(default_factory=Splits)


class Model(Section):
    """The frozen backbone and the head on it."""

    backbone: Annotated[str, BeforeValidator(expanded)] = Field(
        "facebook/dinov3-vitl16-pretrain-sat493m",
        description="Hugging Face hub id; a folder if it starts with '.', '/' or '~'",
    )
    layers: Layers | None = Field(
        None,
        title="a list of block numbers, 0 or more and increasing, or null",
        description="backbone blocks, 0-based; null: four even ones",
    )
    head: Literal["unet", "unet_v2", "maskformer", "linear"] = Field(
        "unet_v2", description="network that turns the backbone's features into classes"
    )
    num_classes: int = Field(2, ge=2, le=65535, description="classes; their ids count from 0")
    dino_channels: Count | None = Field(None, description="per block; null: the backbone's")
    image_mean: Means | None = Field(
        None,
        title="a list of three numbers or null",
        description="per channel, of pixels scaled to 0..1; null: the checkpoint's own",
    )
    image_std: Deviations | None = Field(
        None,
        title="a list of three numbers above 0 or null",
        description="per channel, of pixels scaled to 0..1; null: the checkpoint's own",
    )


class Prepare(Section):
    """Phase 1: scenes and labels become cached tiles."""

    enable: bool = Field(True, description="run this phase")
    raw_images_dir: OptionalPaths = Field(
        None, title=PATHS, description="null: paths.raw_images_dir"
    )
    label_path: OptionalPaths = Field(
        None, title=PATHS, description="null: paths.label_path"
    )
    processed_dir: OptionalPath = Field(None, description="null: paths.processed_dir")
    tile_size: TileSize = Field(512, description="side of a tile in pixels, a multiple of 16")
    batch_size: Count = Field(
        8, description="tiles per forward of the backbone, on a CPU at most 2"
    )
    readers: Workers = Field(2, description="threads that read tiles ahead of the backbone")
    feature_dtype: Literal["fp16", "bf16", "int8"] = Field(
        "fp16", description="of cached features; int8: half the size, a scale for each channel"
    )
    min_valid: Share = Field(
        0.0, description="share of valid pixels below which a tile is left out"
    )
    min_labeled: Share = Field(
        0.0, description="share of labelled pixels below which a tile is left out"
    )
    background_keep: Share = Field(
        1.0, description="share of the tiles with nothing but class 0 that is kept, seeded"
    )
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")


class Verify(Section):
    """Phase 2: every cached tile is checked."""

    enable: bool = Field(True, description="run this phase")
    processed_dir: OptionalPath = Field(None, description="null: paths.processed_dir")
    workers: Workers = Field(8, description="processes")


class Loss(Section):
    """Weights of the loss's parts."""

    ce_weight: Weight = Field(1.0, description="cross-entropy")
    dice_weight: Weight = Field(1.0, description="Dice")
    class_weights: Literal["none", "auto"] | Annotated[
        tuple[Weight, ...], Field(strict=False, min_length=2)
    ] = Field(
        "none",
        title="none, auto or a list of a number for each class",
        description="of cross-entropy; auto: from the classes' shares of the training tiles",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of a label spread over all classes, in cross-entropy"
    )
    focal_gamma: Weight = Field(0.0, description="focus on hard pixels, in cross-entropy; 0: none")
    aux_weight: Weight = Field(0.4, description="deep supervision, beside the main output's 1")


class Train(Section):
    """Phase 3: the head learns from the cached tiles."""

    enable: bool = Field(True, description="run this phase")
    processed_dir: OptionalPath = Field(None, description="null: paths.processed_dir")
    weights_dir: FilePath = Field(Path("weights"), description="of checkpoints and metrics.csv")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    batch_size: Count = Field(4, description="tiles per step and process")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: go on where an ended run came to; never: start anew"
    )
    checkpoint_minutes: Rate = Field(
        10.0, description="of training after which its state is kept, beside after each epoch"
    )
    epochs: Count = Field(30, description="passes over the training tiles, at most")
    muon_lr: Rate = Field(0.02, description="highest rate of Muon (hidden matrices and kernels)")
    adamw_lr: Rate = Field(0.001, description="highest rate of AdamW (all other parameters)")
    weight_decay: Weight = Field(0.01, description="decoupled; none on 1-D parameters")
    momentum: float = Field(0.95, ge=0, lt=1, description="of Muon")
    clip_grad: Weight = Field(1.0, description="largest gradient norm; 0: no clipping")
    patience: Count = Field(10, description="epochs without a better mIoU before training stops")
    val_fraction: float = Field(0.2, gt=0, lt=1, description="share of tiles that validate")
    num_workers: int = Field(4, ge=0, le=1024, description="threads that load batches; 0: none")
    sampler: Literal["uniform", "balanced"] = Field(
        "uniform", description="balanced: each class is met equally often"
    )
    grad_accum_steps: Count = Field(1, description="batches per optimizer step")
    compile: Compile = Field(
        False, description="torch.compile the head; auto: on CUDA, where it pays"
    )
    augment_views: Annotated[int, Field(ge=1, le=8)] = Field(
        1,
        description="flips and turns of each tile whose own features are cached; 1: the tile as it "
        "is, whose features are turned in its place",
    )
    ema_decay: float = Field(0.0, ge=0, lt=1, description="of averaged weights; 0: no averaging")
    loss: Loss = Field(default_factory=Loss)


class TTA(Section):
    """Further views of each tile, whose probabilities are averaged."""

    horizontal_flip: bool = Field(False, description="mirror left to right")
    vertical_flip: bool = Field(False, description="mirror top to bottom")
    rotate90: bool = Field(False, description="quarter turns")


class Inference(Section):
    """Phase 4: a scene becomes a map."""

    enable: bool = Field(False, description="run this phase")
    input_tif: OptionalPaths = Field(
        None, title=PATHS, description="scenes to map: a file, folder, pattern, or a list of these"
    )
    output_tif: OptionalPath = Field(
        None, description="map to write; for several scenes a folder of maps"
    )
    checkpoint: OptionalPath = Field(None, description="null: the best one in train.weights_dir")
    tile_size: TileSize = Field(512, description="side of a tile in pixels, a multiple of 16")
    blend: Literal["hann", "gaussian", "linear", "constant"] = Field(
        "hann", description="weight of a tile's pixels where tiles overlap"
    )
    format: Literal["cog", "gtiff"] = Field(
        "cog", description="Cloud Optimized GeoTIFF with overviews, or plain GeoTIFF"
    )
    probabilities: OptionalPath = Field(
        None, description="raster of each class's probability, 0..250; for several scenes a folder"
    )
    confidence: OptionalPath = Field(
        None, description="raster of the winning probability, 0..250; for several scenes a folder"
    )
    polygons: OptionalPath = Field(
        None, description=".gpkg or .geojson of the map; for several scenes a folder"
    )
    min_area: Weight = Field(0.0, description="polygons below join a neighbour, in square metres")
    simplify: Weight = Field(0.0, description="tolerance of the polygons' outlines, in metres")
    overlap: float = Field(0.25, ge=0, lt=1, description="share of a tile, repeated by the next")
    batch_size: Count = Field(
        8, description="tiles per forward, each in all its views, on a CPU at most 2 views"
    )
    readers: Workers = Field(2, description="threads that read tiles ahead of the networks")
    max_memory: Annotated[int, Field(ge=64)] = Field(
        1024, description="MB of probabilities to hold; wider scenes are mapped in strips"
    )
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    tta: TTA = Field(default_factory=TTA)


class Config(Section):
    """Config of DINOv3Seg: prepare, verify, train, inference."""

    resources: Resources = Field(default_factory=Resources)
    logging: Logging = Field(default_factory=Logging)
    paths: Paths = Field(default_factory=Paths)
    dataset: Dataset = Field(default_factory=Dataset)
    model: Model = Field(default_factory=Model)
    prepare: Prepare = Field(default_factory=Prepare)
    verify: Verify = Field(default_factory=Verify)
    train: Train = Field(default_factory=Train)
    inference: Inference = Field(default_factory=Inference)


# ---- the public functions ----


def find_config(argument: str | None) -> Path:
    """The argument, else $DINOV3SEG_CONFIG, else config.yml here or in a folder above.

    >>> find_config("fields.yml").name
    'fields.yml'
    """
    chosen = argument or os.environ.get("DINOV3SEG_CONFIG")
    if chosen:
        return Path(chosen)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "config.yml").is_file():
            return folder / "config.yml"
    raise ConfigError(
        [
            "no config found: name one on the command line, set $DINOV3SEG_CONFIG, "
            f"or put config.yml into {here} or a folder above it"
        ]
    )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The checked config of a file; overrides are `section.key=value` and replace its values.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "config.yml")
    ...     _ = path.write_text("paths: {raw_images_dir: in, label_path: l, processed_dir: c}")
    ...     load_config(path, ["train.epochs=5"]).train.epochs
    5
    """
    draft = read_file(path)
    if not isinstance(draft.data, dict | None):
        raise ConfigError([f"{draft.origin}: found {shown(draft.data)}, expected sections of keys"])
    draft.data = draft.data or {}
    for number, override in enumerate(overrides):
        draft.override(override, number)
    config = with_classes(with_shared_paths(anchored(checked(draft), draft)), draft)
    check_together(draft, config)
    if draft.faults:
        raise draft.error()
    return config


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, which loads to an equal one.

    >>> to_yaml(Config()).splitlines()[:2]
    ['resources:', '  seed: 1337']
    """
    return dump(config.model_dump(mode="json"))


def json_schema() -> dict:
    """The JSON schema (draft 2020-12) of a config file.

    >>> json_schema()["$defs"]["Train"]["properties"]["epochs"]["minimum"]
    1
    """
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect} | Config.model_json_schema() | {"title": "DINOv3Seg config"}


def schema_text() -> str:
    """The text of config.schema.json.

    >>> schema_text().endswith("}\\n")
    True
    """
    return json.dumps(json_schema(), indent=2) + "\n"


# ---- paths, and rules that join keys ----


def anchored(section: Section, draft: Draft, above: Keys = ()) -> Section:
    """The section with every path absolute, counted from where it was written."""
    changes = {}
    for name, value in section:
        folder = draft.values.get((*above, name), draft.origin).folder
        if isinstance(value, Section):
            changes[name] = anchored(value, draft, (*above, name))
        elif isinstance(value, Path):
            changes[name] = Path(os.path.normpath(folder / value))
        elif isinstance(value, tuple) and isinstance(value[0], Path):
            changes[name] = tuple(Path(os.path.normpath(folder / path)) for path in value)
        elif name == "backbone" and value.startswith((".", "/")):
            changes[name] = os.path.normpath(folder / value)
    return section.model_copy(update=changes)


def with_shared_paths(config: Config) -> Config:
    """The config whose phases hold the shared paths where they have none of their own."""
    sections = {}
    for phase, names in NEEDED_PATHS.items():
        section, shared = getattr(config, phase), [name for name in names if name in SHARED]
        paths = {name: getattr(section, name) or getattr(config.paths, name) for name in shared}
        sections[phase] = section.model_copy(update=paths)
    return config.model_copy(update=sections)


def with_classes(config: Config, draft: Draft) -> Config:
    """The config whose num_classes is the length of dataset.classes, where that is given."""
    classes = config.dataset.classes
    if classes is None:
        return config
    written, found = draft.values.get(("model", "num_classes")), config.model.num_classes
    if written and found != len(classes):
        fault = f"model.num_classes: {found}, but dataset.classes has {len(classes)}; leave it out"
        draft.faults.append((written, fault))
    model = config.model.model_copy(update={"num_classes": len(classes)})
    return config.model_copy(update={"model": model})


def checked(draft: Draft) -> Config:
    """The config of the keys that are right in themselves; faults of the others are noted."""
    try:
        return Config.model_validate(draft.data)
    except ValidationError as error:
        problems = error.errors()
    for problem in problems:
        keys = key_at(Config, problem["loc"])
        value = reduce(dict.__getitem__, keys[:-1], draft.data).pop(keys[-1], None)
        if problem["type"] == "extra_forbidden" and keys == problem["loc"]:
            draft.unknown.add(named(keys))
            draft.faults.append((draft.keys[keys], unknown_key(Config, keys)))
        elif named(keys) not in draft.faulty:
            draft.faulty.add(named(keys))
            loc = problem["loc"]
            depth = next((n for n in range(len(loc), 0, -1) if loc[:n] in draft.values), 0)
            place = draft.values[loc[:depth]] if depth >= len(keys) else draft.keys[keys]
            fault = wrong_value(Config, keys, value, loc[len(keys) : depth])
            draft.faults.append((place, fault))
    return Config.model_validate(draft.data)


def check_together(draft: Draft, config: Config) -> None:
    """Note what is wrong between keys, but for keys that are already at fault."""
    clashing = [*clashes(config), *class_clashes(config)]
    told = [(draft.values, clash) for clash in clashing]
    if not draft.unknown:  # a misspelt key may be the very one that seems to be missing
        told += [(draft.keys, gap) for gap in gaps(config)]
    for places, (fault, *involved) in told:
        if draft.faulty.isdisjoint(involved):
            written = (places.get(tuple(key.split("."))) for key in involved)
            draft.faults.append((next(filter(None, written), draft.origin), fault))
