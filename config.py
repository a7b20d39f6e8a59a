"""The config: a YAML file becomes frozen, typed sections, and every key is checked once.

    config = load_config(find_config(argument), overrides=["train.epochs=5"])

Faults are collected, so that a ConfigError has a line for each. Relative paths count from the
folder of the file, those of a --set argument from the working directory.
"""

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic import model_validator as validator

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


# A title is the key's rule in plain words; a rule without one is read off the key's schema.
Device = Annotated[
    str, Field(pattern=r"^(auto|cpu|cuda(:(0|[1-9][0-9]*))?)$", title="auto, cpu, cuda or cuda:N")
]
TileSize = Annotated[
    int, Field(gt=0, multiple_of=16, title="a whole multiple of 16, the patch size of DINOv3")
]
FilePath = Annotated[Path, BeforeValidator(expanded), Field(strict=False)]
OptionalPath = FilePath | None
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Block = Annotated[int, Field(ge=0)]
Layers = Annotated[tuple[Block, ...], Field(strict=False), AfterValidator(increasing)]
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
    distributed: bool = Field(False, description="run as one of several processes under torchrun")
    dist_backend: Literal["nccl", "gloo"] = Field("nccl", description="nccl: GPUs, gloo: CPUs")


class Logging(Section):
    """What a run says, and where."""

    level: Literal["error", "info", "debug"] = Field("info", description="how much is said")
    timestamps: bool = Field(True, description="begin each line with date and time")
    file: OptionalPath = Field(None, description="log file, written beside the terminal's lines")


class Paths(Section):
    """Shared by all phases; a phase's own key overrides."""

    raw_images_dir: OptionalPath = Field(None, description="folder of scenes")
    label_path: OptionalPath = Field(None, description="label raster")
    processed_dir: OptionalPath = Field(None, description="folder of the tile cache")


class Augmentations(Section):
    """Random changes to each training tile, alike for image, features and label."""

    enable: bool = Field(True, description="augment at all")
    hflip: bool = Field(True, description="mirror left to right, half of the time")
    vflip: bool = Field(True, description="mirror top to bottom, half of the time")
    rotate90: bool = Field(True, description="turn by 0, 90, 180 or 270 degrees")


class Splits(Section):
    """Which tiles train and which validate; without lists train.val_fraction decides."""

    train_list: OptionalPath = Field(None, description="file of tiles or scenes, one a line")
    val_list: OptionalPath = Field(None, description="file of tiles or scenes, one a line")


class Dataset(Section):
    """What is learnt from."""

    ignore_index: int = Field(
        255, ge=0, le=65535, description="label value left out of loss and metrics; not a class id"
    )
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
    raw_images_dir: OptionalPath = Field(None, description="null: paths.raw_images_dir")
    label_path: OptionalPath = Field(None, description="null: paths.label_path")
    processed_dir: OptionalPath = Field(None, description="null: paths.processed_dir")
    tile_size: TileSize = Field(512, description="side of a tile in pixels, a multiple of 16")
    batch_size: Count = Field(8, description="tiles per forward of the backbone")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")


class Verify(Section):
    """Phase 2: every cached tile is checked."""

    enable: bool = Field(True, description="run this phase")
    processed_dir: OptionalPath = Field(None, description="null: paths.processed_dir")
    workers: Count = Field(8, description="processes")


class Loss(Section):
    """Weights of the loss's parts."""

    ce_weight: Weight = Field(1.0, description="cross-entropy")
    dice_weight: Weight = Field(1.0, description="Dice")
    aux_weight: Weight = Field(0.4, description="deep supervision, beside the main output's 1")


class Train(Section):
    """Phase 3: the head learns from the cached tiles."""

    enable: bool = Field(True, description="run this phase")
    processed_dir: OptionalPath = Field(None, description="null: paths.processed_dir")
    weights_dir: FilePath = Field(Path("weights"), description="of checkpoints and metrics.csv")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    batch_size: Count = Field(4, description="tiles per step and process")
    epochs: Count = Field(30, description="passes over the training tiles, at most")
    muon_lr: Rate = Field(0.02, description="highest rate of Muon (hidden matrices and kernels)")
    adamw_lr: Rate = Field(0.001, description="highest rate of AdamW (all other parameters)")
    weight_decay: Weight = Field(0.01, description="decoupled; none on 1-D parameters")
    momentum: float = Field(0.95, ge=0, lt=1, description="of Muon")
    clip_grad: Weight = Field(1.0, description="largest gradient norm; 0: no clipping")
    patience: Count = Field(10, description="epochs without a better mIoU before training stops")
    val_fraction: float = Field(0.2, gt=0, lt=1, description="share of tiles that validate")
    num_workers: int = Field(4, ge=0, description="loader processes; 0: none")
    grad_accum_steps: Count = Field(1, description="batches per optimizer step")
    compile: bool = Field(False, description="torch.compile the head")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="of averaged weights; 0: no averaging")
    loss: Loss = Field(default_factory=Loss)


class TTA(Section):
    """Further views of each tile, whose probabilities are averaged."""

    horizontal_flip: bool = Field(False, description="mirror left to right")
    vertical_flip: bool = Field(False, description="mirror top to bottom")


class Inference(Section):
    """Phase 4: a scene becomes a map."""

    enable: bool = Field(False, description="run this phase")
    input_tif: OptionalPath = Field(None, description="scene to map")
    output_tif: OptionalPath = Field(None, description="map to write")
    checkpoint: OptionalPath = Field(None, description="null: the best one in train.weights_dir")
    tile_size: TileSize = Field(512, description="side of a tile in pixels, a multiple of 16")
    overlap: float = Field(0.25, ge=0, lt=1, description="share of a tile, repeated by the next")
    batch_size: Count = Field(8, description="tiles per forward")
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


SHARED = Paths.model_fields
NEEDED_PATHS = {
    "prepare": ("raw_images_dir", "label_path", "processed_dir"),
    "verify": ("processed_dir",),
    "train": ("processed_dir",),
    "inference": ("input_tif", "output_tif"),
}


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
    config = with_shared_paths(anchored(checked(draft), draft))
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


def clashes(config: Config) -> Iterator[tuple[str, ...]]:
    """Values that do not go together: the fault, then the keys that take part, to blame first."""
    ignore, classes = config.dataset.ignore_index, config.model.num_classes
    if ignore < classes:
        fault = f"dataset.ignore_index: {ignore} is a class id, expected model.num_classes or more"
        yield f"{fault} (at least {classes})", "dataset.ignore_index", "model.num_classes"
    if config.train.loss.ce_weight + config.train.loss.dice_weight == 0:
        fault = "train.loss: ce_weight and dice_weight are both 0, expected one above 0"
        yield fault, "train.loss.ce_weight", "train.loss.dice_weight"
    scene, result = config.inference.input_tif, config.inference.output_tif
    if scene and scene == result:
        fault = "inference.output_tif: found the path of inference.input_tif, expected another file"
        yield fault, "inference.output_tif", "inference.input_tif"


def gaps(config: Config) -> Iterator[tuple[str, ...]]:
    """What other keys ask for and nobody gave; told like a clash."""
    splits, model = config.dataset.splits, config.model
    for above, section, *names in (
        ("dataset.splits", splits, "train_list", "val_list"),
        ("model", model, "image_mean", "image_std"),
    ):
        absent = [name for name in names if getattr(section, name) is None]
        if len(absent) == 1:
            given = next(name for name in names if name not in absent)
            fault = f"{above}.{given}: {absent[0]} is missing, expected both or neither"
            yield fault, f"{above}.{given}", f"{above}.{absent[0]}"
    for phase, names in NEEDED_PATHS.items():
        section = getattr(config, phase)
        for name in names if section.enable else ():
            if getattr(section, name) is None:
                keys = [f"paths.{name}"] * (name in SHARED) + [f"{phase}.{name}"]
                fault = f"{phase} needs {name}: set {' or '.join(keys)}"
                yield fault, phase, f"{phase}.enable", *keys


def checked(draft: Draft) -> Config:
    """The config of the keys that are right in themselves; faults of the others are noted."""
    try:
        return Config.model_validate(draft.data)
    except ValidationError as error:
        problems = error.errors()
    for problem in problems:
        keys = tuple(takewhile(lambda key: isinstance(key, str), problem["loc"]))
        value = reduce(dict.__getitem__, keys[:-1], draft.data).pop(keys[-1], None)
        if problem["type"] == "extra_forbidden":
            draft.unknown.add(named(keys))
            draft.faults.append((draft.keys[keys], unknown_key(keys)))
        elif named(keys) not in draft.faulty:
            draft.faulty.add(named(keys))
            places = draft.values.get(problem["loc"]), draft.values.get(keys), draft.keys.get(keys)
            draft.faults.append((next(filter(None, places)), wrong_value(keys, value)))
    return Config.model_validate(draft.data)


def check_together(draft: Draft, config: Config) -> None:
    """Note what is wrong between keys, but for keys that are already at fault."""
    told = [(draft.values, clash) for clash in clashes(config)]
    if not draft.unknown:  # a misspelt key may be the very one that seems to be missing
        told += [(draft.keys, gap) for gap in gaps(config)]
    for places, (fault, *involved) in told:
        if draft.faulty.isdisjoint(involved):
            written = (places.get(tuple(key.split("."))) for key in involved)
            draft.faults.append((next(filter(None, written), draft.origin), fault))


# ---- faults in plain words ----

NOUNS = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}
BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def rule(schema: dict) -> str:
    """What a key's schema asks for.

    >>> rule({"type": "number", "minimum": 0, "exclusiveMaximum": 1})
    'a number of at least 0 and below 1'
    """
    if "anyOf" in schema:
        return f"{rule(schema['anyOf'][0])} or null"
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if schema.get("type") == "string":
        return "a path" if schema.get("format") == "path" else "text"
    bounds = [f"{word} {schema[bound]}" for bound, word in BOUNDS.items() if bound in schema]
    noun = NOUNS.get(schema.get("type"), "a section of keys")
    return f"{noun} {' and '.join(bounds)}".strip()


def shown(value: object) -> str:
    """A value as a fault names it: in YAML's words, and cut where it is long."""
    if isinstance(value, dict):
        return "a section of keys"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def section_class(keys: Keys) -> type[Section]:
    """The class of the section that these keys lead to."""
    section = Config
    for key in keys:
        section = section.model_fields[key].annotation
    return section


def key_paths(section: type[Section] = Config, above: str = "") -> Iterator[str]:
    """Every section and key there is, dotted."""
    for name, info in section.model_fields.items():
        yield above + name
        if info.default_factory:
            yield from key_paths(info.annotation, f"{above}{name}.")


def wrong_value(keys: Keys, value: object) -> str:
    """The fault of a key whose value is unfit."""
    section = section_class(keys[:-1])
    schema = section.model_json_schema()["properties"][keys[-1]]
    expected = section.model_fields[keys[-1]].title or rule(schema)
    return f"{named(keys)}: found {shown(value)}, expected {expected}"


def unknown_key(keys: Keys) -> str:
    """The fault of a key that does not exist, with the one that was probably meant."""
    siblings = list(section_class(keys[:-1]).model_fields)
    elsewhere = [path for path in key_paths() if path.split(".")[-1] == keys[-1]]
    near = difflib.get_close_matches(keys[-1], siblings, 1, 0.75)
    guesses = near or elsewhere or difflib.get_close_matches(keys[-1], siblings, 1)
    hint = f"expected one of {', '.join(siblings)}"
    if guesses:
        hint = f"did you mean {' or '.join(map(repr, guesses))}?"
    return f"{named(keys)}: unknown key, {hint}"
