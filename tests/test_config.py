"""The config: defaults, strictness, faults and places, paths, overrides, example, schema."""

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

import config as module
from config import Config, ConfigError, find_config, json_schema, load_config, schema_text, to_yaml
from utils.limits import spelt_out

ROOT = Path(module.__file__).parent
REGENERATE = (
    'config.schema.json is stale; write it again with: python -c "import config, pathlib; '
    "pathlib.Path('config.schema.json').write_text(config.schema_text())\""
)
PATHS = "paths: {raw_images_dir: scenes, label_path: labels.tif, processed_dir: tiles}\n"

# The mission's reference, key by key; train.device and inference.device as prepare.device.
REFERENCE = """
resources: {seed: 1337, omp_threads: 4, matmul_precision: high, distributed: false,
            dist_backend: nccl}
logging: {level: info, timestamps: true, file: null}
paths: {raw_images_dir: null, label_path: null, processed_dir: null}
dataset:
  augmentations: {enable: true, hflip: true, vflip: true, rotate90: true}
  splits: {train_list: null, val_list: null}
model: {backbone: facebook/dinov3-vitl16-pretrain-sat493m, layers: null, head: unet_v2,
        num_classes: 2, dino_channels: null}
prepare: {enable: true, tile_size: 512, device: auto}
verify: {enable: true, workers: 8}
train:
  enable: true
  processed_dir: null
  weights_dir: weights
  batch_size: 4
  epochs: 30
  muon_lr: 0.02
  adamw_lr: 0.001
  momentum: 0.95
  patience: 10
  val_fraction: 0.2
  num_workers: 4
  grad_accum_steps: 1
  compile: false
  ema_decay: 0.0
  device: auto
  loss: {ce_weight: 1.0, dice_weight: 1.0, aux_weight: 0.4}
inference: {enable: false, input_tif: null, output_tif: null, checkpoint: null, tile_size: 512,
            overlap: 0.25, device: auto, tta: {horizontal_flip: false, vertical_flip: false}}
"""
OURS = {
    "resources.precision": "auto",
    "resources.compile": "auto",
    "resources.timeout_minutes": 30.0,
    "dataset.cache": "features",
    "dataset.bands": None,
    "dataset.rgb": None,
    "dataset.input_range": "auto",
    "dataset.nodata": None,
    "dataset.gsd": None,
    "dataset.ignore_index": 255,
    "dataset.classes": None,
    "dataset.labels.attribute": None,
    "dataset.labels.layer": None,
    "dataset.labels.all_touched": False,
    "dataset.labels.background": 0,
    "dataset.labels.unlisted": "error",
    "dataset.labels.nodata": "auto",
    "dataset.labels.erode_borders": 0,
    "dataset.splits.regions": None,
    "dataset.splits.block": None,
    "dataset.splits.buffer": 0.0,
    "model.image_mean": None,
    "model.image_std": None,
    "prepare.raw_images_dir": None,
    "prepare.label_path": None,
    "prepare.processed_dir": None,
    "prepare.batch_size": 8,
    "prepare.readers": 2,
    "prepare.feature_dtype": "fp16",
    "prepare.min_valid": 0.0,
    "prepare.min_labeled": 0.0,
    "prepare.background_keep": 1.0,
    "verify.processed_dir": None,
    "train.resume": "auto",
    "train.checkpoint_minutes": 10.0,
    "train.weight_decay": 0.01,
    "train.clip_grad": 1.0,
    "train.sampler": "uniform",
    "train.augment_views": 1,
    "train.loss.class_weights": "none",
    "train.loss.label_smoothing": 0.0,
    "train.loss.focal_gamma": 0.0,
    "inference.batch_size": 8,
    "inference.readers": 2,
    "inference.max_memory": 1024,
    "inference.blend": "hann",
    "inference.format": "cog",
    "inference.probabilities": None,
    "inference.confidence": None,
    "inference.polygons": None,
    "inference.min_area": 0.0,
    "inference.simplify": 0.0,
    "inference.tta.rotate90": False,
}
SAMPLES = {  # in the example only: what has no default
    "paths.raw_images_dir",
    "paths.label_path",
    "paths.processed_dir",
    "inference.input_tif",
    "inference.output_tif",
}


THREE = "[{name: field, values: [1, 2]}, {name: road}, {name: wood, values: [mixed, '7']}]"


def flat(data: dict, above: str = "") -> dict:
    """Every leaf by its dotted key."""
    leaves = {}
    for key, value in data.items():
        leaves |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return leaves


def value_of(section: BaseModel, dotted: str) -> object:
    for key in dotted.split("."):
        section = getattr(section, key)
    return section


def faults(*args) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(*args)
    return caught.value.faults


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes config.yml into the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DINOV3SEG_CONFIG", raising=False)

    def write(text: str | bytes, name: str = "config.yml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


# ---- defaults ----


def test_defaults_are_those_of_the_reference_and_our_own_keys():
    defaults = flat(Config().model_dump(mode="json"))
    assert defaults == flat(yaml.safe_load(REFERENCE)) | OURS


def test_a_file_with_exactly_the_reference_keys_loads(write):
    path = write(REFERENCE)
    paths = "{raw_images_dir: scenes, label_path: labels.tif, processed_dir: tiles}"
    config = load_config(path, [f"paths={paths}"])
    assert config == load_config(write(PATHS))


@pytest.mark.parametrize("text", [PATHS, PATHS + "train:\nresources:\ndataset: {splits: }\n"])
def test_absent_and_empty_sections_hold_defaults(write, text):
    config = load_config(write(text))
    assert (config.train.epochs, config.resources.seed) == (30, 1337)
    assert config.dataset.splits.train_list is None


def test_an_empty_file_is_one_of_defaults(write):
    phases = ["prepare", "verify", "train"]
    assert load_config(write(""), [f"{phase}.enable=false" for phase in phases]).train.epochs == 30


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("true", True), ("false", False)])
def test_compiling_is_a_switch_or_auto(write, text, value):
    path = write(PATHS + f"resources: {{compile: {text}}}\n")
    config = load_config(path, [f"train.compile={text}"])
    assert (config.resources.compile, config.train.compile) == (value, value)
    assert load_config(write(to_yaml(config))) == config


def test_config_is_frozen():
    with pytest.raises(ValidationError):
        Config().train.epochs = 5
    with pytest.raises(ValidationError):
        Config().train = None
    assert hash(Config()) == hash(Config())


# ---- faults ----


def test_all_faults_at_once_each_with_its_place(write):
    path = write(
        PATHS + "model:\n"
        "  num_clases: 3\n"
        "train:\n"
        "  epocs: 5\n"
        "  epochs: many\n"
        "  batch_size: true\n"
        "  loss: {ce_weight: 0, dice_weight: 0}\n"
        "prepare: {tile_size: 500}\n"
        "verify: 7\n"
        "epochs: 5\n"
    )
    assert faults(path, ["train.epocs=5", "inference.overlap=1"]) == [
        "config.yml:3:3: model.num_clases: unknown key, did you mean 'num_classes'?",
        "config.yml:6:11: train.epochs: found 'many', expected a whole number of at least 1",
        "config.yml:7:15: train.batch_size: found true, expected a whole number of at least 1",
        "config.yml:8:21: train.loss: ce_weight and dice_weight are both 0, expected one above 0",
        "config.yml:9:22: prepare.tile_size: found 500, "
        "expected a whole multiple of 16, the patch size of DINOv3",
        "config.yml:10:9: verify: found 7, expected a section of keys",
        "config.yml:11:1: epochs: unknown key, did you mean 'train.epochs'?",
        "--set train.epocs=5: train.epocs: unknown key, did you mean 'epochs'?",
        "--set inference.overlap=1: inference.overlap: found 1, "
        "expected a number of at least 0 and below 1",
    ]


def test_three_misspelt_keys_and_a_wrong_type_are_four_lines(write):
    path = write("model: {hed: unet}\ntrain: {epocs: 3, epochs: x}\npath: {}\n")
    assert len(faults(path)) == 4


def test_the_error_is_its_faults_joined_and_survives_pickling():
    error = pickle.loads(pickle.dumps(ConfigError(["a", "b"])))
    assert (str(error), error.faults, error.exit_code) == ("a\nb", ["a", "b"], 2)


def test_a_fault_is_one_line_without_control_characters(write):
    text = 'train: {"ep\\nochs\\e[31m": 1, epochs: "\\u0007\\n"}\n'
    lines = faults(write(text), ["train.x\ny=1", "train.\x1b=2"])
    assert len(lines) >= 4
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("model.num_clases=2", "did you mean 'num_classes'?"),
        ("trian.epochs=2", "did you mean 'train'?"),
        ("verify.num_workers=2", "did you mean 'workers'?"),
        ("train.num_classes=2", "did you mean 'model.num_classes'?"),
        ("train.tile_size=64", "did you mean 'prepare.tile_size' or 'inference.tile_size'?"),
        ("horizontal_flip=true", "did you mean 'inference.tta.horizontal_flip'?"),
        ("dataset.splits.zzz=1", "expected one of train_list, val_list, regions, block, buffer"),
    ],
)
def test_an_unknown_key_gets_the_one_that_was_meant(write, override, hint):
    key = override.split("=")[0]
    key = key.split(".")[0] if key.startswith("trian") else key
    assert faults(write(PATHS), [override]) == [f"--set {override}: {key}: unknown key, {hint}"]


WHOLE = "expected a whole number of at least 1"
UP_TO = " and at most 1024"  # threads and processes
SHARE = "expected a number of at least 0 and below 1"
PATCH = "expected a whole multiple of 16, the patch size of DINOv3"
PATHS_RULE = "expected a path, a list of paths, or null"
BANDS = "expected a list of different band numbers from 1, or null"
RANGES = "expected auto, dtype, [low, high] or a list with such a pair for each band"
CLASSES = (
    "expected a list of two or more of {name: NAME, values: [VALUE, ...], color: '#rrggbb'}"
)
WEIGHTS = "expected none, auto or a list of a number for each class"
LAYERS = "expected a list of block numbers, 0 or more and increasing, or null"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.epochs", "0", WHOLE),
        ("train.epochs", "4.0", WHOLE),
        ("train.epochs", "'4'", WHOLE),
        ("train.epochs", "null", WHOLE),
        ("train.epochs", "[4]", WHOLE),
        ("train.epochs", "{a: 4}", WHOLE),
        ("train.epochs", "1_000", WHOLE),
        ("train.epochs", "9" * 5000, WHOLE),
        ("train.patience", "0", WHOLE),
        ("train.grad_accum_steps", "0", WHOLE),
        ("prepare.batch_size", "true", WHOLE),
        ("train.batch_size", "-1", WHOLE),
        ("inference.batch_size", "0", WHOLE),
        ("verify.workers", "0", WHOLE + UP_TO),
        ("prepare.readers", "1025", WHOLE + UP_TO),
        ("inference.readers", "1000000", WHOLE + UP_TO),
        ("resources.omp_threads", "0", WHOLE),
        ("model.dino_channels", "0", WHOLE + " or null"),
        ("train.num_workers", "-1", "expected a whole number of at least 0" + UP_TO),
        ("resources.seed", "-1", "expected a whole number of at least 0 and below 4294967296"),
        ("model.num_classes", "1", "expected a whole number of at least 2 and at most 65535"),
        ("model.num_classes", "65536", "expected a whole number of at least 2 and at most 65535"),
        ("dataset.ignore_index", "-1", "expected a whole number of at least 0 and at most 65535"),
        ("prepare.tile_size", "0", PATCH),
        ("prepare.tile_size", "-16", PATCH),
        ("inference.tile_size", "100", PATCH),
        ("inference.overlap", "1", SHARE),
        ("inference.overlap", "-0.1", SHARE),
        ("train.momentum", "1.0", SHARE),
        ("train.ema_decay", "1", SHARE),
        ("train.val_fraction", "0", "expected a number above 0 and below 1"),
        ("train.val_fraction", "1", "expected a number above 0 and below 1"),
        ("train.muon_lr", "0", "expected a number above 0"),
        ("train.muon_lr", "true", "expected a number above 0"),
        ("train.adamw_lr", ".inf", "expected a number above 0"),
        ("train.adamw_lr", "1e999", "expected a number above 0"),
        ("train.adamw_lr", ".nan", "expected a number above 0"),
        ("train.weight_decay", "-1", "expected a number of at least 0"),
        ("train.clip_grad", "-1", "expected a number of at least 0"),
        ("train.loss.ce_weight", "-1", "expected a number of at least 0"),
        ("train.compile", "1", "expected auto, true or false"),
        ("train.compile", "'true'", "expected auto, true or false"),
        ("resources.compile", "cuda", "expected auto, true or false"),
        ("resources.compile", "null", "expected auto, true or false"),
        ("train.enable", "1", "expected true or false"),
        ("train.enable", "'true'", "expected true or false"),
        ("train.device", "gpu", "expected auto, cpu, cuda or cuda:N"),
        ("prepare.device", "'cuda:'", "expected auto, cpu, cuda or cuda:N"),
        ("inference.device", "cuda:x", "expected auto, cpu, cuda or cuda:N"),
        ("logging.level", "loud", "expected one of error, info, debug"),
        ("resources.dist_backend", "mpi", "expected one of nccl, gloo"),
        ("resources.matmul_precision", "low", "expected one of highest, high, medium"),
        ("model.head", "unet_v3", "expected one of unet, unet_v2, maskformer, linear"),
        ("model.layers", "[]", LAYERS),
        ("model.layers", "[2, 1]", LAYERS),
        ("model.layers", "[1, 1]", LAYERS),
        ("model.layers", "[-1, 1]", LAYERS),
        ("model.layers", "[1, x]", LAYERS),
        ("model.layers", "5", LAYERS),
        ("model.backbone", "5", "expected text"),
        ("model.backbone", "''", "expected text"),
        ("train.weights_dir", "null", "expected a path"),
        ("verify.processed_dir", "''", "expected a path or null"),
        ("verify.processed_dir", "12", "expected a path or null"),
        ("verify.processed_dir", "[a]", "expected a path or null"),
        ("verify.processed_dir", "~nobody-of-this-name/x", "expected a path or null"),
        ("model.image_mean", "[0.1, 0.2]", "expected a list of three numbers or null"),
        ("model.image_std", "[1, 0, 1]", "expected a list of three numbers above 0 or null"),
        ("train.loss", "5", "expected a section of keys"),
        ("prepare.label_path", "[]", PATHS_RULE),
        ("prepare.label_path", "[a, 3]", PATHS_RULE),
        ("prepare.raw_images_dir", "['']", PATHS_RULE),
        ("inference.input_tif", "{a: b}", PATHS_RULE),
        ("dataset.bands", "[]", BANDS),
        ("dataset.bands", "[0, 1]", BANDS),
        ("dataset.bands", "[2, 2]", BANDS),
        ("dataset.bands", "3", BANDS),
        ("dataset.input_range", "full", RANGES),
        ("dataset.input_range", "[5, 1]", RANGES),
        ("dataset.input_range", "[5, 5]", RANGES),
        ("dataset.input_range", "[[1, 2], [3]]", RANGES),
        ("dataset.input_range", "[]", RANGES),
        ("dataset.nodata", ".nan", "expected a number or null"),
        ("dataset.gsd", "0", "expected a number above 0 or null"),
        ("dataset.classes", "[]", CLASSES),
        ("dataset.classes", "[{name: wood}]", CLASSES),
        ("dataset.classes", "{name: wood}", CLASSES),
        ("dataset.labels.background", "none", "expected a class id or ignore"),
        ("dataset.labels.background", "-1", "expected a class id or ignore"),
        ("dataset.labels.unlisted", "drop", "expected one of error, ignore, background"),
        ("dataset.labels.nodata", "null", "expected auto, none or a number"),
        ("dataset.labels.erode_borders", "65",
         "expected a whole number of at least 0 and at most 64"),
        ("dataset.splits.block", "0", "expected a number above 0 or null"),
        ("dataset.splits.buffer", "-1", "expected a number of at least 0"),
        ("prepare.min_valid", "1.1", "expected a number of at least 0 and at most 1"),
        ("prepare.background_keep", "-0.1", "expected a number of at least 0 and at most 1"),
        ("train.sampler", "random", "expected one of uniform, balanced"),
        ("train.loss.class_weights", "[1]", WEIGHTS),
        ("train.loss.class_weights", "[1, -1]", WEIGHTS),
        ("train.loss.class_weights", "even", WEIGHTS),
        ("train.loss.label_smoothing", "1", SHARE),
        ("train.loss.focal_gamma", "-1", "expected a number of at least 0"),
        ("inference.blend", "cosine", "expected one of hann, gaussian, linear, constant"),
        ("inference.format", "png", "expected one of cog, gtiff"),
        ("inference.min_area", "-1", "expected a number of at least 0"),
    ],
)  # fmt: skip
def test_an_unfit_value_is_one_line_with_the_rule(write, key, value, expected):
    section, name = key.rsplit(".", 1)
    opened = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(section.split(".")))
    indent = "  " * (1 + section.count("."))
    shared = "" if section == "paths" else PATHS
    (line,) = faults(write(f"{shared}{opened}{indent}{name}: {value}\n"))
    row = (shared + opened).count("\n") + 1
    start = f"config.yml:{row}:"
    assert line.startswith(start)
    assert f": {key}: found " in line
    assert line.endswith(f", {expected}")
    assert len(line) < 220


@pytest.mark.parametrize(
    ("item", "found", "column"),
    [
        ("{name: b, color: red}", "color: 'red'", 22),
        ("{name: b, colour: '#112233'}", "colour: '#112233'", 23),
        ("{name: b, values: [1, 1.5]}", "1.5", 27),
        ("{name: b, values: [true]}", "true", 24),
        ("{name: b, values: 4}", "values: 4", 23),
        ("{name: ''}", "name: ''", 12),
        ("{values: [1]}", "[{'values': [1]}]", 5),
        ("wood", "['a long list'...", 5),
    ],
)
def test_an_unfit_class_is_told_at_its_own_place(write, item, found, column):
    text = f"{PATHS}dataset:\n  classes:\n  - {{name: a, values: [0]}}\n  - {item}\n"
    text += "train: {loss: {class_weights: [1, 2, 3]}}\n"  # of how many classes nobody knows
    (line,) = faults(write(text))
    assert line.startswith(f"config.yml:5:{column}: dataset.classes: found ")
    assert line.endswith(f", {CLASSES}")
    assert found in line or item == "wood"


@pytest.mark.parametrize("value", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices(write, value):
    assert load_config(write(PATHS), [f"train.device={value}"]).train.device == value


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["train.loss={ce_weight: 0, dice_weight: 0}"], "train.loss: ce_weight and dice_weight"),
        (["model.num_classes=300"], "dataset.ignore_index: 255 is a class id"),
        (["dataset.ignore_index=1"], "dataset.ignore_index: 1 is a class id"),
        (["dataset.splits.val_list=a"], "dataset.splits.val_list: train_list is missing"),
        (["dataset.splits.train_list=a"], "dataset.splits.train_list: val_list is missing"),
        (["model.image_mean=[0, 0, 0]"], "model.image_mean: image_std is missing"),
        (["model.image_std=[1, 1, 1]"], "model.image_std: image_mean is missing"),
        (["inference={input_tif: a, output_tif: ./a}"], "inference.output_tif: found the path of"),
        (["inference={input_tif: [b, a], output_tif: a}"], "inference.output_tif: found the path"),
        (["inference.polygons=roofs.shp"], "inference.polygons: found .shp, expected .gpkg or"),
        (["dataset={rgb: [1, 2]}"], "dataset.rgb: found [1, 2], expected one or three of"),
        (["dataset={bands: [1, 2, 3], rgb: [2, 3, 4]}"], "dataset.rgb: found [2, 3, 4]"),
        (
            ["dataset={bands: [1, 2, 3], input_range: [[0, 1], [0, 2]]}"],
            "dataset.input_range: 2 pairs, expected one or 3, as many as dataset.bands",
        ),
        (["dataset.labels.background=2"], "dataset.labels.background: found 2, expected a class"),
        (["train.loss.class_weights=[1, 2, 3]"], "train.loss.class_weights: 3 numbers, expected 2"),
        (
            ["dataset.splits={regions: a, train_list: b, val_list: c}"],
            "dataset.splits: regions and train_list are given, expected one of them",
        ),
        (["dataset.classes=[{name: a}, {name: a}]"], "dataset.classes: name a is given twice"),
        (
            ["dataset.classes=[{name: a, values: [4]}, {name: b, values: [5, '4']}]"],
            "dataset.classes: value 4 is given twice",
        ),
        (
            ["model.num_classes=3", f"dataset.classes={THREE.replace('{name: road}, ', '')}"],
            "model.num_classes: 3, but dataset.classes has 2; leave it out",
        ),
    ],
)
def test_keys_that_do_not_go_together(write, overrides, fault):
    (line,) = faults(write(PATHS), overrides)
    assert line.startswith(f"--set {overrides[0]}: {fault}")


def test_a_key_that_is_at_fault_itself_is_told_once(write):
    text = PATHS.replace("tiles", "''") + "train: {loss: {ce_weight: x, dice_weight: 0}}\n"
    text += "dataset: {splits: {train_list: 5, val_list: a}}\n"
    assert [line.split(": ")[1] for line in faults(write(text))] == [
        "paths.processed_dir",
        "train.loss.ce_weight",
        "dataset.splits.train_list",
    ]


def test_keys_that_do_go_together(write):
    overrides = ["model.image_mean=[0, 0.5, 1]", "model.image_std=[1, 1e-1, 1]"]
    overrides += ["model.num_classes=300", "dataset.ignore_index=300", "train.loss.ce_weight=0"]
    overrides += ["dataset.splits={train_list: a, val_list: b}", "model.layers=[0, 3]"]
    config = load_config(write(PATHS), overrides)
    assert config.model.image_mean == (0, 0.5, 1)
    assert config.model.image_std == (1, 0.1, 1)
    assert config.model.layers == (0, 3)


def test_the_number_of_classes_follows_from_their_list(write):
    config = load_config(write(PATHS), [f"dataset.classes={THREE}"])
    assert config.model.num_classes == 3
    assert [each.values for each in config.dataset.classes] == [(1, 2), (), ("mixed", "7")]
    same = load_config(write(PATHS + "model: {num_classes: 3}\n"), [f"dataset.classes={THREE}"])
    assert same == config
    weighted = [f"dataset.classes={THREE}", "train.loss.class_weights=[1, 2, 0.5]"]
    weighted += ["dataset.labels.background=2"]
    assert load_config(write(PATHS), weighted).train.loss.class_weights == (1, 2, 0.5)


def test_keys_of_imagery_that_do_go_together(write):
    overrides = ["dataset.bands=[3, 2, 1, 4]", "dataset.rgb=[4]", "dataset.nodata=-9999"]
    for given, kept in (
        ("dtype", "dtype"),
        ("[0, 1]", (0, 1)),
        ("[[0, 1], [0, 1], [0, 1], [-3.5, 9]]", ((0, 1),) * 3 + ((-3.5, 9),)),
    ):
        data = load_config(write(PATHS), [*overrides, f"dataset.input_range={given}"]).dataset
        assert data.input_range == kept
        assert (data.bands, data.rgb, data.nodata) == ((3, 2, 1, 4), (4,), -9999)


@pytest.mark.parametrize("polygons", ["a.gpkg", "b.geojson", "folder"])
def test_polygons_end_as_a_file_or_a_folder(write, tmp_path, polygons):
    config = load_config(write(PATHS), [f"inference.polygons={polygons}"])
    assert config.inference.polygons == tmp_path / polygons


# ---- strict YAML ----

ALIASES_OF_ALIASES = "a: &a [1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 6)}]\n"
    for last, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("train:\n  a: 1\n  a: 2\n", "3:3: train.a: given twice, first at config.yml:2:3"),
        ("train: {}\ntrain: {}\n", "2:1: train: given twice, first at config.yml:1:1"),
        ("5: 6\n", "1:1: top level: found the key 5, expected text"),
        ("train: {on: 1}\n", "1:9: train: found the key on, expected text"),
        ("? [a]\n: 1\n", "1:3: top level: found the key a list or section, expected text"),
        ("!!str [a]: 1\n", "1:1: top level: found the key a list or section, expected text"),
        ("a: &a {}\ntrain: {<<: *a}\n", "2:9: train.<<: unknown key"),
        ("- 1\n", "1:1: found [1], expected sections of keys"),
        ("text\n", "1:1: found 'text', expected sections of keys"),
        ("a: 1\n---\nb: 1\n", "2:1: not valid YAML: expected a single document"),
        ("a:\n\tb: 1\n", "2:1: not valid YAML: while scanning"),
        ("train:\n  a: b: c\n", "2:7: not valid YAML: mapping values are not allowed here"),
        ("a: 1\nb: \x07\n", "2:4: not valid YAML: found '\\x07'"),
        ("a: *b\n", "1:4: not valid YAML: found undefined alias 'b'"),
        ("[" * 3000, "1:17: nested over 16 deep"),
        ("train: &a [*a]\n", "nested over 16 deep"),
        ("a: [" + "b, " * 12000 + "]\n", "over 5000 values"),
        ("a: [" + "b," * 2**20 + "]\n", ": larger than 1 MiB"),
        (ALIASES_OF_ALIASES, "over 5000 values"),
        ("train: !!python/object/apply:os.getcwd []\n", "1:8: train: found the tag tag:yaml.org"),
        ("train: {epochs: !!int x}\n", "1:17: train.epochs: found the tag"),
        (b"a: \xff\n", "1:1: not UTF-8"),
        (b"a: 1\nb: \xff\n", "2:1: not UTF-8"),
        ("a: 1\n".encode("utf-16"), "1:1: not UTF-8"),
    ],
)  # fmt: skip
def test_yaml_is_read_strictly(write, text, fault):
    lines = faults(write(text))
    assert any(line.startswith(f"config.yml:{fault}") or fault in line for line in lines)
    assert all(line.isprintable() for line in lines)


def test_tabs_are_answered_with_a_remedy(write):
    assert faults(write("a:\n\tb: 1\n"))[0].endswith("indent with spaces")


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "y", "n", "No", "YES", "On"])
def test_a_word_that_might_be_a_switch_is_named(write, word):
    (line,) = faults(write(PATHS + f"train:\n  compile: {word}\n"))
    assert line == (
        f"config.yml:3:12: train.compile: found {word}, on which YAML readers differ: "
        "write true or false, or quote it"
    )


@pytest.mark.parametrize(
    ("text", "remedy"),
    [("12:30", "quote it"), ("1:30:00", "quote it"), ("010", "drop the leading 0, or quote it")],
)
def test_numbers_that_readers_take_differently_are_named(write, text, remedy):
    (line,) = faults(write(PATHS), [f"logging.file={text}"])
    assert line.endswith(f"logging.file: found {text}, on which YAML readers differ: {remedy}")
    assert load_config(Path("config.yml"), [f"logging.file='{text}'"]).logging.file.name == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("+2.5e+3", 2500.0), ("3", 3.0)],
)
def test_numbers_are_numbers(write, text, value):
    assert load_config(write(PATHS + f"train:\n  muon_lr: {text}\n")).train.muon_lr == value


def test_anchors_and_a_byte_order_mark_are_fine(write):
    text = "\ufeff" + PATHS + "train: {muon_lr: &rate 1e-3, adamw_lr: *rate}\n"
    assert load_config(write(text)).train.adamw_lr == 1e-3


# ---- paths ----


def test_shared_paths_fill_phases_and_a_phase_overrides(write):
    config = load_config(write(PATHS + "verify: {processed_dir: other}\n"))
    here = Path.cwd()
    assert config.prepare.raw_images_dir == config.paths.raw_images_dir == here / "scenes"
    assert config.prepare.label_path == here / "labels.tif"
    assert config.prepare.processed_dir == config.train.processed_dir == here / "tiles"
    assert config.verify.processed_dir == here / "other"


def test_a_missing_path_names_both_places_at_its_phase(write):
    text = "paths: {raw_images_dir: a}\nprepare:\n  label_path: b\ntrain: {enable: false}\n"
    assert faults(write(text), ["inference.enable=true"]) == [
        "config.yml:1:1: verify needs processed_dir: "
        "set paths.processed_dir or verify.processed_dir",
        "config.yml:2:1: prepare needs processed_dir: "
        "set paths.processed_dir or prepare.processed_dir",
        "--set inference.enable=true: inference needs input_tif: set inference.input_tif",
        "--set inference.enable=true: inference needs output_tif: set inference.output_tif",
    ]


def test_a_phase_that_is_off_needs_no_path(write):
    text = "prepare: {enable: false}\nverify: {enable: false}\ntrain: {enable: false}\n"
    assert load_config(write(text)).train.processed_dir is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a/b", "{file}/a/b"), ("./a", "{file}/a"), ("../a", "{here}/a"), ("/x/../y", "/y"),
     ("~/a", "{home}/a")],
)  # fmt: skip
def test_relative_paths_count_from_the_file(write, tmp_path, monkeypatch, value, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    path = write(
        f"paths: {{raw_images_dir: {value}, label_path: l, processed_dir: p}}\n", "sub/c.yml"
    )
    wanted = expected.format(file=tmp_path / "sub", here=tmp_path, home="/home/someone")
    assert load_config(path).prepare.raw_images_dir == Path(wanted)


def test_relative_paths_of_overrides_count_from_the_working_directory(write, tmp_path):
    path = write(PATHS, "sub/c.yml")
    config = load_config(path, ["paths.label_path=l.tif", "verify={processed_dir: v}"])
    assert config.prepare.label_path == tmp_path / "l.tif"
    assert config.verify.processed_dir == tmp_path / "v"
    assert config.prepare.raw_images_dir == tmp_path / "sub" / "scenes"
    assert config.train.weights_dir == tmp_path / "sub" / "weights"


def test_each_path_of_a_list_counts_from_where_the_list_is_written(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    text = "paths: {raw_images_dir: [a, ../b/*.tif, /c, ~/d], label_path: [l], processed_dir: p}\n"
    path = write(text, "sub/c.yml")
    config = load_config(path, ["inference.input_tif=[x, 'y/**/*.tif']", "prepare.label_path=[m]"])
    inside = tmp_path / "sub" / "a", tmp_path / "b" / "*.tif", Path("/c"), Path("/home/someone/d")
    assert config.prepare.raw_images_dir == inside
    assert config.paths.label_path == (tmp_path / "sub" / "l",)
    assert config.prepare.label_path == (tmp_path / "m",)
    assert config.inference.input_tif == (tmp_path / "x", tmp_path / "y/**/*.tif")
    assert hash(config) == hash(load_config(write(to_yaml(config), "elsewhere/c.yml")))


def test_every_path_is_absolute_once_loaded(write):
    text = PATHS + "logging: {file: l}\ninference: {input_tif: i, output_tif: o, checkpoint: c}\n"
    text += "dataset: {splits: {train_list: t, val_list: v}}\ntrain: {weights_dir: w}\n"
    leaves = flat(load_config(write(text)).model_dump())
    found = {key: value for key, value in leaves.items() if isinstance(value, Path)}
    assert len(found) == 15
    assert all(path.is_absolute() for path in found.values())


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [("facebook/some-vit", "facebook/some-vit"), ("./vit", "{file}/vit"), ("../vit", "{here}/vit"),
     ("/vit", "/vit"), ("~/vit", "/home/someone/vit")],
)  # fmt: skip
def test_a_backbone_is_a_hub_id_or_a_folder(write, tmp_path, monkeypatch, backbone, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    path = write(PATHS + f"model: {{backbone: {backbone}}}\n", "sub/c.yml")
    assert load_config(path).model.backbone == expected.format(file=tmp_path / "sub", here=tmp_path)


# ---- --set ----


def test_overrides_replace_the_file_and_the_last_wins(write):
    path = write(PATHS + "train: {epochs: many, patience: 3}\nmodel: {layers: [1, 2]}\n")
    overrides = ["train.epochs=5", "train.epochs=6", "model.layers=[3, 4]", "logging.file="]
    config = load_config(path, [*overrides, "train.muon_lr=1e-3", "train.loss.aux_weight=0"])
    assert (config.train.epochs, config.train.patience) == (6, 3)
    assert config.model.layers == (3, 4)
    assert config.logging.file is None
    assert config.train.muon_lr == 1e-3
    assert config.train.loss.aux_weight == 0


def test_an_override_can_empty_a_path(write):
    (line,) = faults(write(PATHS), ["paths.label_path="])
    assert line.endswith("prepare needs label_path: set paths.label_path or prepare.label_path")


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("train.epochs", "expected section.key=value"),
        ("=5", "expected section.key=value"),
        ("train..epochs=5", "expected section.key=value"),
        ("train.epochs.x=5", "train.epochs: found a section of keys, expected a whole number"),
        ("train.epochs=[1", "not valid YAML: while parsing a flow sequence"),
        ("train.epochs=\udcff", "not valid YAML: found '\\udcff'"),
        ("train=5", "train: found 5, expected a section of keys"),
        ("train.compile=on", "train.compile: found on, on which YAML readers differ"),
    ],
)
def test_a_faulty_override_is_told_with_its_argument(write, override, fault):
    (line,) = faults(write(PATHS), [override])
    assert line.startswith(f"--set {spelt_out(override)}: {fault}")


def test_a_fault_of_a_replaced_list_is_not_told(write):
    text = PATHS + "dataset:\n  classes: [{name: a, color: red, x: 1}, {name: b}]\n"
    assert load_config(write(text), [f"dataset.classes={THREE}"]).model.num_classes == 3
    (line,) = faults(write(text), ["dataset.classes=[{name: a}, {values: [1]}]"])
    assert ": dataset.classes: found [{'values': [1]}], expected" in line


def test_a_key_below_a_value_of_the_file_is_refused(write):
    path = write(PATHS + "train: {epochs: 5}\n")
    assert faults(path, ["train.epochs.x=5"]) == [
        "--set train.epochs.x=5: train.epochs is a value and has no keys"
    ]


# ---- finding, reading, writing ----


def test_search_order(write, tmp_path, monkeypatch):
    write(PATHS)
    write(PATHS, "a/b/other.yml")
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert find_config(None) == tmp_path / "config.yml"
    monkeypatch.setenv("DINOV3SEG_CONFIG", "env.yml")
    assert find_config(None) == Path("env.yml")
    assert find_config("given.yml") == Path("given.yml")
    monkeypatch.setenv("DINOV3SEG_CONFIG", "")
    (tmp_path / "a" / "b" / "config.yml").write_text(PATHS)
    assert find_config(None) == tmp_path / "a" / "b" / "config.yml"


def test_no_config_found_names_the_three_places(write, monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    with pytest.raises(ConfigError) as caught:
        find_config(None)
    (line,) = caught.value.faults
    for place in ("command line", "$DINOV3SEG_CONFIG", "config.yml"):
        assert place in line


def test_unreadable_files_are_one_line(write, tmp_path, monkeypatch):
    write(PATHS, "sub/config.yml")
    assert faults(Path("sub")) == ["sub: cannot read the config: not a plain file"]
    assert faults(tmp_path / "no.yml") == [
        "no.yml: cannot read the config: No such file or directory"
    ]
    monkeypatch.chdir("sub")
    assert faults(Path("../no.yml")) == [
        "../no.yml: cannot read the config: No such file or directory"
    ]


def test_a_place_is_told_from_the_working_directory(write, tmp_path, monkeypatch):
    path = write(PATHS + "x: 1\n", "sub/config.yml").absolute()
    assert faults(path)[0].startswith("sub/config.yml:2:1: ")
    monkeypatch.chdir("sub")
    assert faults(path)[0].startswith("config.yml:2:1: ")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "model.backbone=./no",
            "logging.file='12:30'",
            "train.adamw_lr=1e-7",
            "model.layers=[0, 9]",
        ],
        ["model.backbone='1e-3'", "paths.label_path='a: b # c'", "train.muon_lr=1e20"],
        ["model.backbone='no'", "paths.label_path=\"é \\u263a 'x'\""],
        ["model.backbone='y'", "paths.label_path=" + "long folder/" * 40],
        ["model.backbone='010'"],
        ["model.backbone='null'"],
        ["paths.label_path=[a.tif, 'b: c.gpkg', 'no']"],
        [f"dataset.classes={THREE}", "dataset.labels.attribute='on'"],
        ["dataset.classes=[{name: 'no', values: ['010', -1, é]}, {name: b, color: '#00fF00'}]"],
        ["dataset.input_range=[[0, 1e4], [-1, 1], [0.5, 2]]", "dataset.bands=[3, 2, 1]"],
        ["dataset.labels={nodata: -1, background: ignore}", "dataset.splits.regions=r.gpkg"],
    ],
)
def test_the_printed_config_loads_to_an_equal_one(write, tmp_path, overrides):
    config = load_config(write(PATHS), overrides)
    assert load_config(write(to_yaml(config), "elsewhere/c.yml")) == config


def test_damaged_files_give_faults_and_nothing_else(write):
    text, damage = (ROOT / "config.example.yml").read_text(), random.Random(1)
    for _ in range(150):
        characters = list(text)
        for _ in range(damage.randint(1, 6)):
            spot = damage.randrange(len(text))
            characters[spot] = damage.choice(":-[]{}#&*!|>'\"%@`\t\n\0 ~0.,?é")
        try:
            load_config(write("".join(characters)))
        except ConfigError as error:
            assert error.faults and all(line.isprintable() for line in error.faults)


# ---- schema, example, import ----


def test_schema_file_is_up_to_date():
    assert (ROOT / "config.schema.json").read_text() == schema_text(), REGENERATE


def test_schema_describes_every_key_with_type_and_range():
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    assert json.loads(schema_text()) == schema
    for section in schema["$defs"].values():
        assert section["description"] and section["additionalProperties"] is False
        for key, entry in section["properties"].items():
            assert "$ref" in entry or entry["description"], key
    overlap = schema["$defs"]["Inference"]["properties"]["overlap"]
    assert (overlap["minimum"], overlap["exclusiveMaximum"]) == (0, 1)


def test_example_names_its_schema_and_loads():
    path = ROOT / "config.example.yml"
    first = path.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=config.schema.json"
    assert load_config(path).paths.processed_dir == ROOT / "data" / "tiles"


def test_example_holds_every_key_with_its_default_and_a_comment():
    text = (ROOT / "config.example.yml").read_text()
    example, defaults = flat(yaml.safe_load(text)), flat(Config().model_dump(mode="json"))
    assert list(example) == list(defaults)
    wrong = {key for key, value in example.items() if value != defaults[key]}
    assert wrong == SAMPLES
    bare = [line for line in text.splitlines() if ": " in line and "#" not in line]
    assert {line.strip() for line in bare} == {"enable: true", "enable: false"}


def test_schema_and_example_agree_on_the_choices():
    text = (ROOT / "config.example.yml").read_text()
    sections = json_schema()["$defs"]
    parts = sections.pop("ClassSpec")["properties"]
    assert all(f"{key}: " in text.partition("classes: null")[2][:300] for key in parts)
    for section in sections.values():
        for key, entry in section["properties"].items():
            words = [words for _, words in commented(text) if words.startswith(f"{key}:")]
            assert any(all(word in each for word in choices(entry)) for each in words), key


def commented(text: str) -> list[tuple[int, str]]:
    """Each key's line number and text, with the comment lines that go on below it."""
    found: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines()):
        if line.strip().startswith("#") and found and line.startswith("   "):
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        elif line.strip():
            found.append((number, line.strip()))
    return found


def choices(entry: dict) -> set[str]:
    """The words that a key's schema allows."""
    inner = [choices(each) for each in entry.get("anyOf", ())]
    own = {*entry.get("enum", ()), *([entry["const"]] if "const" in entry else [])}
    return own.union(*inner)


def test_import_needs_no_torch():
    code = "import sys, config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
