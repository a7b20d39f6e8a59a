"""Who may import whom: a module imports only from lower floors, and each library has its door."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"utils.records", "utils.tiling", "utils.limits", "utils.formats", "utils.direct"},
    {"utils.claims", "utils.artefacts"},
    {"utils.manifest", "utils.archives", "utils.grids", "utils.vrt"},
    {
        "utils.strict_yaml", "utils.key_rules", "utils.cache", "utils.sampling",
        "utils.losses", "utils.metrics", "utils.optim", "utils.logging", "utils.landscape",
        "utils.turns", "utils.streaming", "utils.quantize", "utils.locks", "utils.opening",
        "utils.space", "models.blocks",
    },
    {
        "utils.key_faults", "utils.journal", "utils.raster", "utils.footprints", "utils.blending",
        "models.base",
    },
    {
        "config", "utils.scenes", "utils.vectors", "utils.maps", "utils.ground", "utils.blocks",
        "utils.warping", "models.linear", "models.unet", "models.unet_v2", "models.maskformer",
    },
    {"utils.process", "utils.status", "utils.devices", "models.hub"},
    {
        "utils.distributed", "utils.burning", "utils.label_values",
        "utils.splits", "utils.regions", "utils.block_cache", "models.backbone", "models",
    },
    {
        "utils.label_rasters", "utils.data", "utils.checkpoint", "utils.polygons",
        "utils.products", "utils.pace", "utils.resume", "models.segmenter",
    },
    {"utils.labels", "utils.divergence", "utils.loading", "utils.agreement", "utils.outputs"},
    {"utils.sources", "utils.step"},
    {"utils.keeping"},
    {"utils.prepare", "utils.engine", "utils.inference"},
    {"utils.preflight"},
    {"utils.phases"},
    {"main", "utils.demo"},
]  # fmt: skip
JOINING = {"main", "utils.phases", "utils.demo"}  # the programs: they know models and utils
DOORS = {
    "rasterio": {
        "utils.grids", "utils.opening", "utils.raster", "utils.label_rasters", "utils.vectors",
        "utils.burning", "utils.footprints", "utils.maps", "utils.ground", "utils.polygons",
        "utils.warping",
    },
    "shapely": {
        "utils.grids", "utils.label_rasters", "utils.vectors", "utils.burning", "utils.footprints",
        "utils.blocks", "utils.splits", "utils.ground", "utils.polygons",
    },
    "pyogrio": {"utils.vectors", "utils.polygons"},
    "tifffile": {"utils.opening"},
    "transformers": {"models.backbone", "models.hub"},
    "safetensors": {"models.hub"},
    "torch.distributed": {"utils.distributed"},
    "yaml": {"utils.strict_yaml"},
    "filelock": {"utils.locks"},
    "pydantic": {"config"},
    "tqdm": {"utils.logging"},
}  # fmt: skip
CALLS = {
    "torch.save": {"utils.cache", "utils.checkpoint", "utils.resume"},
    "torch.load": {"utils.cache", "utils.archives"},
    "print": {"utils.logging"},
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in (ROOT, ROOT / "models", ROOT / "utils")
    for path in sorted(folder.glob("*.py"))
}
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules(name: str) -> set[str]:
    """The project's modules that a module imports."""
    found = set()
    for imported in imports(name):
        longest = max((own for own in FILES if f"{imported}.".startswith(f"{own}.")), default="")
        found.add(longest)
    return found - {""}


def test_every_module_has_a_floor():
    assert set(FILES) - {"utils"} == set(FLOOR_OF)


@pytest.mark.parametrize("name", sorted(FLOOR_OF))
def test_a_module_imports_only_from_lower_floors(name):
    wrong = {other for other in own_modules(name) if FLOOR_OF[other] >= FLOOR_OF[name]}
    assert not wrong, f"{name} imports {wrong} of its own floor or above"


@pytest.mark.parametrize("name", sorted(FLOOR_OF))
def test_the_two_wings_do_not_know_each_other(name):
    if name in JOINING:
        return
    wing, other = name.partition(".")[0], {"models": "utils", "utils": "models"}
    reached = {module.partition(".")[0] for module in own_modules(name)}
    assert other.get(wing) not in reached


@pytest.mark.parametrize("library", sorted(DOORS))
def test_a_library_is_known_behind_its_door_only(library):
    users = {
        name
        for name in FILES
        if any(f"{imported}.".startswith(f"{library}.") for imported in imports(name))
    }
    assert users == DOORS[library]


@pytest.mark.parametrize("call", sorted(CALLS))
def test_a_call_is_made_behind_its_door_only(call):
    users = {
        name
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == call
    }
    assert users == CALLS[call]


def test_only_the_config_reads_its_environment_variable():
    users = {name for name, path in FILES.items() if 'environ.get("DINOV3SEG' in path.read_text()}
    assert users == {"config"}
