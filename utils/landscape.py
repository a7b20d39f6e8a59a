"""Countryside that never was: a seeded 0.5 m aerial view together with its exact class map.

Geometry first (parcels and roads, river, buildings, trees), then one map of heights, and last the
light: shadows and relief come from one sun. Each class grows until it holds its share, so that no
seed lacks river or hamlet. Sizes are metres unless they say pixels; rows run south, columns east.
"""

import heapq
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy import ndarray
from numpy.random import Generator

Pair = tuple[ndarray, ndarray]
Window = tuple[slice, slice]

CLASSES: tuple[str, ...] = ("field", "wood", "road", "building", "water")
FIELD, WOOD, ROAD, BUILDING, WATER = range(len(CLASSES))

GSD = 0.5  # metres per pixel
SMALLEST_PLACE = 256  # pixels; what is smaller is a window of a place of this size
LARGEST_PARCEL = 15_000  # square metres
ROAD_WIDTHS = (9.0, 7.5, 7.5, 5.5)  # the main road, two lanes, and tracks from there on
CROWN_PITCH = 11  # pixels between neighbouring trees
SUN = (0.80, 0.60)  # the way shadows fall, (row, col): light from the upper left, as eyes expect it
SUN_FALL = 0.95  # metres a ray comes down for each metre it goes
SHADE = (0.44, 0.49, 0.58)  # red, green, blue left in a shadow: a blue sky still shines there
SHARES = (0.052, 0.066, 0.046, 0.195), (0.058, 0.080, 0.056, 0.220)  # road, water, building, wood
CROPS = (  # red, green, blue; how strongly rows are seen; how strongly the tractor's lines are
    (102, 128, 72, 0.05, 0.16),  # cereal, green
    (134, 150, 90, 0.01, 0.00),  # pasture
    (116, 136, 66, 0.10, 0.00),  # maize
    (174, 168, 108, 0.04, 0.12),  # cereal, ripe
    (194, 176, 134, 0.07, 0.06),  # stubble
    (130, 108, 86, 0.08, 0.00),  # ploughed
    (160, 138, 110, 0.05, 0.08),  # harrowed
)
VERGE, LAWN = (124, 132, 86), (118, 138, 84)
TREES, CONIFERS = (66, 86, 52), (46, 70, 52)
MUD, DEEP, GLINT = (98, 110, 96), (46, 76, 90), (150, 170, 180)
ASPHALT, PAINT, HAZE = (146, 144, 142), (214, 212, 206), (188, 200, 214)
ROOFS = ((158, 92, 74), (142, 77, 63), (106, 113, 127), (84, 88, 98), (204, 207, 212))


@dataclass(frozen=True, slots=True)
class Landscape:
    """A view, what truly stands there, and where the camera saw anything."""

    image: ndarray  # uint8 (3, H, W)
    classes: ndarray  # uint8 (H, W), places in CLASSES
    valid: ndarray  # bool (H, W)


@dataclass(frozen=True, slots=True)
class Ground:
    """How the land is divided, for each pixel, in metres unless it says otherwise."""

    valid: ndarray  # bool: seen by the camera; shares are counted there
    parcel: ndarray  # a number
    across: ndarray  # from the line that was drawn last: rows run beside it
    along: ndarray  # on that line
    edge: ndarray  # to the parcel's boundary
    hedge: ndarray  # to the nearest line of trees
    road: ndarray  # into a road from its edge, negative outside


def paint(height: int, width: int, seed: int) -> Landscape:
    """One place of a region for each seed, with similar shares of each class.
    >>> scene = paint(64, 96, seed=1)
    >>> scene.image.shape, scene.classes.shape, int(scene.image[:, ~scene.valid].max())
    ((3, 64, 96), (64, 96), 0)
    """
    rng = np.random.default_rng(seed)
    beyond = [(0, max(SMALLEST_PLACE - length, 0)) for length in (height, width)]
    valid = np.pad(seen(height, width, rng), beyond, constant_values=True)
    paved, wet, built, wooded = rng.uniform(*SHARES) * np.count_nonzero(valid)
    ground = divide(valid, paved, rng)
    depth = flood(ground, wet, rng)
    roofs, roof_heights = settle(ground, depth, built, rng)
    trees, tree_heights = plant(ground, depth, roofs, wooded, rng)
    layers = (roofs >= 0, trees >= 0, ground.road > 0, depth > 0)
    classes = np.select(layers, (BUILDING, WOOD, ROAD, WATER), FIELD).astype(np.uint8)
    heights = np.select(layers[:2], (roof_heights, tree_heights), 0).astype(np.float32)
    image = photograph(dress(ground, depth, roofs, trees, classes, rng), heights, rng) * valid
    return Landscape(*(part[..., :height, :width].copy() for part in (image, classes, valid)))


def noise(shape: tuple[int, int], wavelength: float, rng: Generator) -> ndarray:
    """Smooth random hills of about unit height: a cubic B-spline over random knots (in pixels)."""
    knots = [int(length / wavelength) + 5 for length in shape]
    surface = rng.standard_normal(knots, dtype=np.float32) / np.float32(0.48)
    for axis, length in enumerate(shape):
        place = np.arange(length, dtype=np.float32) / np.float32(wavelength)
        first = place.astype(int)
        t = (place - first)[:, None] if axis == 0 else place - first
        s = 1 - t
        weights = (s**3, 3 * t**3 - 6 * t**2 + 4, 3 * s**3 - 6 * s**2 + 4, t**3)
        surface = sum(w / 6 * surface.take(first + i, axis) for i, w in enumerate(weights))
    return surface


def box(values: ndarray, radius: int) -> ndarray:
    """Mean over a square of 2 radius + 1 pixels, the border repeated."""
    size = 2 * radius + 1
    for _ in range(2):
        padded = np.pad(values, ((0, 0), (radius + 1, radius)), mode="edge")
        total = np.cumsum(padded, axis=1, dtype=np.float64)
        values = ((total[:, size:] - total[:, :-size]) / size).T
    return values.astype(np.float32)


def level(score: ndarray, allowed: ndarray, count: float) -> float:
    """The score that so many of the allowed pixels reach.
    >>> level(np.arange(10.0), np.arange(10) < 8, count=3)
    5.0
    """
    scores = score[allowed]
    place = min(max(scores.size - int(count), 0), scores.size - 1)
    return float(np.partition(scores, place)[place])


def blend(colour: ndarray, other: tuple[float, ...], weight: ndarray | float) -> ndarray:
    """Mix another colour into an image."""
    return colour + (np.array(other, np.float32)[:, None, None] - colour) * np.float32(weight)


def seen(height: int, width: int, rng: Generator) -> ndarray:
    """Where the camera saw anything: all but a slanted wedge, a twentieth of the scene or so."""
    angle = rng.integers(4) * np.pi / 2 + rng.uniform(0.2, 1.3)
    row, col = np.ogrid[:height, :width]
    reach = row * np.sin(angle) + col * np.cos(angle)
    return reach < level(reach, np.ones_like(reach, bool), rng.uniform(0.036, 0.054) * reach.size)


def divide(valid: ndarray, paved: float, rng: Generator) -> Ground:
    """Halve the largest parcel until all are small; the first lines drawn are roads."""
    bent = np.indices(valid.shape, dtype=np.float32) * np.float32(GSD)
    for axis in bent:  # a straight line on bent land is a country lane
        axis += 9 * noise(valid.shape, 500, rng) + 1.5 * noise(valid.shape, 150, rng)
    south, east = bent.reshape(2, -1)
    far = np.multiply.outer((0, 0, 1e3, 1e3, -1e3), np.ones(valid.shape)).astype(np.float32)
    ground = Ground(valid, np.zeros(valid.shape, np.int32), *far)
    parcels = [(-valid.size, 0, np.arange(valid.size))]
    missing = paved
    while missing > 0 or -parcels[0][0] * GSD**2 > LARGEST_PARCEL:
        number = len(parcels)
        _, old, pixels = heapq.heappop(parcels)
        line = halve(south[pixels], east[pixels], 0.5 if number == 1 else 0.14, rng)
        width = ROAD_WIDTHS[min(number, len(ROAD_WIDTHS)) - 1] if missing > 0 else 0.0
        note(ground, pixels, line, width, rng)
        missing = paved - np.count_nonzero(valid & (ground.road > 0))
        beyond = line[0] > 0
        ground.parcel.ravel()[pixels[beyond]] = number
        for name, part in ((old, pixels[~beyond]), (number, pixels[beyond])):
            heapq.heappush(parcels, (-part.size, name, part))
    return ground


def halve(south: ndarray, east: ndarray, slant: float, rng: Generator) -> Pair:
    """Metres across and along a line that cuts a parcel near the middle of its long side."""
    south, east = south - south.mean(), east - east.mean()
    angle = 0.5 * np.arctan2(2 * (south * east).mean(), (east**2 - south**2).mean())
    angle += rng.uniform(-slant, slant)
    sin, cos = np.float32(np.sin(angle)), np.float32(np.cos(angle))
    across, along = south * sin + east * cos, south * cos - east * sin
    return across - np.float32(rng.uniform(-0.12, 0.12)) * np.ptp(across), along


def note(ground: Ground, pixels: ndarray, line: Pair, width: float, rng: Generator) -> None:
    """Tell the pixels of a parcel how far they are from the line that cuts it."""
    ground.across.ravel()[pixels], ground.along.ravel()[pixels] = across, _ = line
    beside = width / 2 + 4 if width else 0.0
    hedge = abs(abs(across) - beside) if rng.random() < 0.6 else 1e3
    road = width / 2 - abs(across) if width else -1e3
    news = (ground.edge, abs(across) - width / 2), (ground.hedge, hedge), (ground.road, road)
    for surface, metres in news:
        nearer = np.maximum if surface is ground.road else np.minimum
        surface.ravel()[pixels] = nearer(surface.ravel()[pixels], metres)


def flood(ground: Ground, count: float, rng: Generator) -> ndarray:
    """Metres from the bank, positive in the water: a river that shuns roads, and two ponds."""
    shape = ground.valid.shape
    row, col = np.indices(shape, dtype=np.float32) * np.float32(GSD)
    pond = 0.03 * GSD * np.sqrt(shape[0] * shape[1])
    courses = rng.uniform((0, -0.2, 0), (np.pi, 0.2, 2 * np.pi), (16, 3)) * (1, GSD * min(shape), 1)
    road = ground.road[::8, ::8].clip(-20, 0)
    shared = [road[abs(river(row[::8, ::8], col[::8, ::8], c)) < 16].mean() for c in courses]
    depth = 1.5 * noise(shape, 40, rng) - abs(river(row, col, courses[np.argmin(shared)]))
    for _ in range(2):
        lonely = np.minimum(-ground.road, 40) + np.minimum(-depth, 90) + 9 * noise(shape, 90, rng)
        south, east = divmod(int(np.argmax(np.where(ground.valid, lonely, -1e3))), shape[1])
        away = np.hypot(row - south * GSD, (col - east * GSD) * rng.uniform(0.6, 1.4))
        depth = np.maximum(depth, pond - 10 - away + 3 * noise(shape, 50, rng))
    return depth - level(depth, ground.valid & (ground.road <= 0), count)


def river(row: ndarray, col: ndarray, course: ndarray) -> ndarray:
    """Metres across a winding course: its bearing, its shift from the middle, its phase."""
    bearing, shift, phase = course.astype(np.float32)
    south, east = row - row.max() / 2, col - col.max() / 2
    along = south * np.sin(bearing) + east * np.cos(bearing)
    across = south * np.cos(bearing) - east * np.sin(bearing) - shift
    slow, quick = along / 48 + phase, along / 21 + 2 * phase
    slope = 18 / 48 * np.cos(slow) + 6 / 21 * np.cos(quick)
    return (across - 18 * np.sin(slow) - 6 * np.sin(quick)) / np.hypot(1, slope)


def settle(ground: Ground, depth: ndarray, count: float, rng: Generator) -> Pair:
    """Buildings (a number, or -1) and their heights: hamlets that grow along the roads."""
    roofs, heights = np.full(depth.shape, -1, np.int32), np.zeros(depth.shape, np.float32)
    taken = (ground.road > -1.5) | (depth > -5)
    plots = np.argwhere(ground.valid & ~taken & (ground.road > -45) & (ground.road < -4))
    plots = plots[rng.integers(len(plots), size=8000)]
    hamlets = plots[: max(2, depth.size // 400_000)]
    remote = np.hypot(*(plots[:, None] - hamlets).T).min(axis=0) + rng.exponential(40, len(plots))
    for number, (row, col) in enumerate(plots[np.argsort(remote)]):
        if count <= 0 or taken[row, col]:
            continue
        window, height, plot = house(ground.road, row, col, rng)
        if (taken[window] & plot).any():
            continue
        taken[window] |= plot
        roofs[window][height > 0] = number
        heights[window] += height
        count -= np.count_nonzero((height > 0) & ground.valid[window])
    return roofs, heights


def house(road: ndarray, row: int, col: int, rng: Generator) -> tuple[Window, ndarray, ndarray]:
    """A house or barn, square to its road: a window, the roof's height in it, the plot it needs."""
    barn = rng.random() < 0.25
    width, length = rng.uniform((12, 24), (18, 46)) if barn else rng.uniform((8, 11), (11, 18))
    reach = int(length / GSD)
    top, left = max(row - reach, 0), max(col - reach, 0)
    window = np.s_[top : row + reach, left : col + reach]
    down, right = np.gradient(road[max(row - 4, 0) : row + 5, max(col - 4, 0) : col + 5])
    facing = np.arctan2(down.mean(), right.mean()) + rng.integers(2) * np.pi / 2
    facing += rng.normal(0, 0.05)
    south, east = np.indices(road[window].shape) + np.array((top - row, left - col))[:, None, None]
    a = GSD * (south * np.sin(facing) + east * np.cos(facing))
    b = GSD * (south * np.cos(facing) - east * np.sin(facing))
    parts = [(a, b, length, width)]
    if not barn and rng.random() < 0.4:
        parts.append((b - width / 2, a - (length - width) / 2, width, width - 1))
    height = np.max([gable(*part) for part in parts], axis=0)
    plot = np.any([gable(*part[:2], part[2] + 5, part[3] + 5) > 0 for part in parts], axis=0)
    return window, height, plot


def gable(a: ndarray, b: ndarray, length: float, width: float) -> ndarray:
    """Height of a saddle roof whose ridge runs along a; 0 beside the house.
    >>> gable(np.zeros(3), np.array([0.0, 3.9, 4.1]), length=12, width=8).round(1).tolist()
    [7.6, 4.7, 0.0]
    """
    inside = (abs(a) < length / 2) & (abs(b) < width / 2)
    return np.where(inside, 3 + 0.2 * width + 0.75 * (width / 2 - abs(b)), 0)


def plant(ground: Ground, depth: ndarray, roofs: ndarray, count: float, rng: Generator) -> Pair:
    """Trees (a number, or -1) and their heights: hedges, banks, gardens; woods for the rest."""
    cells = tuple(-(-length // CROWN_PITCH) + 2 for length in depth.shape)
    stems = (np.indices(cells) - 1 + rng.uniform(0.1, 0.9, (2, *cells))) * CROWN_PITCH
    radius = CROWN_PITCH * rng.uniform(0.5, 0.85, cells)
    last = np.array(depth.shape)[:, None, None] - 1
    score = rank(ground, depth, roofs, tuple(np.rint(stems).astype(int).clip(0, last)), rng)
    leafage = 0.09 * noise(depth.shape, 4, rng) + 0.09 * noise(depth.shape, 8, rng)
    crowns = np.stack((*stems, radius)).astype(np.float32)
    reached, _ = canopy(crowns, score, 0.0, leafage)
    grown = score >= level(reached, ground.valid & (roofs < 0), count)
    tall = np.where(grown, radius * rng.uniform(0.9, 1.3, cells), -np.inf)
    top, tree = canopy(crowns, tall, 0.6, leafage)
    tree[(tree < 0) & (box(tree >= 0, 4) > 0.6)] = 0  # the gaps within a wood are wood
    return tree, np.maximum(top, 2) + 4 * leafage


def rank(ground: Ground, depth: ndarray, roofs: ndarray, stem: Pair, rng: Generator) -> ndarray:
    """How much a tree is wanted at each stem: 9 for lone ones and rows, -inf where none may be."""
    luck = rng.random(stem[0].shape)
    garden = box(roofs >= 0, 22)[stem] > 0
    chance = np.full(luck.shape, 0.004)
    chance[ground.hedge[stem] < 2.4] = 0.85
    chance[(depth[stem] > -7) & (depth[stem] < -1)] = 0.4
    chance[garden] = 0.16
    parcels = rng.normal(0, 1, ground.parcel.max() + 1)[ground.parcel[stem]]
    woods = parcels + 0.7 * noise(depth.shape, 110, rng)[stem] + 0.3 * luck - 9 * garden
    bare = (ground.road[stem] > -2.2) | (depth[stem] > -1) | (box(roofs >= 0, 4)[stem] > 0)
    return np.where(bare, -np.inf, np.where(luck < chance, 9 + luck, woods))


def canopy(crowns: ndarray, value: ndarray, droop: float, ragged: ndarray) -> Pair:
    """The highest crown over each pixel (-inf without one) and its number (-1)."""
    rows, cols = (length - 2 for length in value.shape)
    blocks = rows, CROWN_PITCH, cols, CROWN_PITCH
    flat, shape = (rows * CROWN_PITCH, cols * CROWN_PITCH), ragged.shape
    row, col = (p.reshape(blocks) for p in np.indices(flat, dtype=np.float32))
    spare = [(0, whole - length) for whole, length in zip(flat, shape, strict=True)]
    ragged = np.pad(ragged, spare).reshape(blocks)
    top, number = np.full(blocks, -np.inf, np.float32), np.full(blocks, -1, np.int32)
    numbers = np.arange(value.size, dtype=np.int32).reshape(value.shape)
    for south, east in product(range(3), repeat=2):  # crowns reach into the next cell, no farther
        cell = np.s_[south : south + rows, None, east : east + cols, None]
        stem_row, stem_col, radius = (part[cell] for part in crowns)
        away = ((row - stem_row) ** 2 + (col - stem_col) ** 2) / radius**2 + ragged
        height = value.astype(np.float32)[cell] * (1 - droop * away.clip(0))
        higher = (away < 1) & (height > top)
        top, number = np.where(higher, height, top), np.where(higher, numbers[cell], number)
    return tuple(part.reshape(flat)[: shape[0], : shape[1]] for part in (top, number))


def dress(
    ground: Ground, depth: ndarray, roofs: ndarray, trees: ndarray, classes: ndarray, rng: Generator
) -> ndarray:
    """The colour of everything in flat light."""
    shape = classes.shape
    garden = (6 * box(box(roofs >= 0, 16), 6) - 0.1 + 0.1 * noise(shape, 20, rng)).clip(0, 0.9)
    colour = blend(crop(ground, rng), LAWN, garden)
    verge = (ground.edge < 1.3 + 0.4 * noise(shape, 12, rng)) | (depth > -3)
    colour = blend(colour, VERGE, 0.8 * verge)
    colour *= 1 + 0.03 * noise(shape, 3, rng) + 0.03 * noise(shape, 9, rng)
    colour = np.where(classes == WATER, lake(depth, rng), colour)
    colour = np.where(classes == ROAD, pavement(ground.road, rng), colour)
    colour = np.where(classes == WOOD, leaves(trees, rng), colour)
    return np.where(classes == BUILDING, tiles(roofs, rng), colour)


def crop(ground: Ground, rng: Generator) -> ndarray:
    """Fields: a crop for each parcel, sown in rows, driven in passes, uneven as the soil is."""
    shape, parcel = ground.parcel.shape, ground.parcel
    count = int(parcel.max()) + 1
    kinds = np.array(CROPS, np.float32)[rng.permutation(np.arange(count) % len(CROPS))]
    tint = kinds[:, :3] * rng.normal(1, 0.05, (count, 1)) * rng.normal(1, 0.02, (count, 3))
    side = np.where((rng.random(count) < 0.5)[parcel], ground.across, ground.along)
    side = np.where(ground.edge < 9, ground.edge, side)  # the headland is worked round the field
    pace = (2 * np.pi / rng.uniform(1.8, 3.4, count)).astype(np.float32)
    rows = kinds[:, 3][parcel] * np.sin(side * pace[parcel]) * (1 + 0.4 * noise(shape, 40, rng))
    lines = kinds[:, 4][parcel] * (abs(abs(side % 24 - 12) - 1) < 0.4)
    passes = 0.02 * np.sin(997 * np.sin(np.floor(side / 6)))
    light = 1 + rows - lines + passes + 0.05 * noise(shape, 90, rng)
    dry = 1 + 0.04 * noise(shape, 50, rng)
    return tint.T.astype(np.float32)[:, parcel] * light * np.stack((dry, np.ones(shape), 2 - dry))


def lake(depth: ndarray, rng: Generator) -> ndarray:
    """Water: muddy at its edge, dark blue-green farther out, with a little glint."""
    colour = blend(np.array(MUD, np.float32)[:, None, None], DEEP, (depth / 5).clip(0, 1))
    colour *= 1 + 0.05 * noise(depth.shape, 60, rng) + 0.02 * noise(depth.shape, 5, rng)
    glint = noise(depth.shape, 2.5, rng) + 0.7 * noise(depth.shape, 50, rng) - 1.6
    return blend(colour, GLINT, 0.3 * glint.clip(0, 1))


def pavement(road: ndarray, rng: Generator) -> ndarray:
    """Asphalt: worn along the wheels, pale lines at its edges and in the middle of a wide road."""
    wear = 0.05 * noise(road.shape, 80, rng) + 0.02 * noise(road.shape, 3, rng)
    colour = np.array(ASPHALT, np.float32)[:, None, None] * (1 + wear + 0.04 * np.cos(2.6 * road))
    return blend(colour, PAINT, 0.7 * (road > 4.2) + 0.35 * ((road > 0.3) & (road < 0.7)))


def leaves(trees: ndarray, rng: Generator) -> ndarray:
    """Wood: each crown its own green, conifers and broad leaves in patches."""
    count = int(trees.max()) + 1
    tint = np.array(TREES) * rng.normal(1, 0.11, (count, 1)) * rng.normal(1, 0.05, (count, 3))
    conifers = (0.4 + 0.6 * noise(trees.shape, 130, rng)).clip(0, 0.9)
    colour = blend(tint.T.astype(np.float32)[:, trees.clip(0)], CONIFERS, conifers)
    return colour * (1 + 0.1 * noise(trees.shape, 3, rng))


def tiles(roofs: ndarray, rng: Generator) -> ndarray:
    """Roofs: red, slate or metal, each a little different."""
    count = int(roofs.max()) + 1
    kinds = np.array(ROOFS, np.float32)[rng.integers(len(ROOFS), size=count)]
    tint = kinds * rng.normal(1, 0.06, (count, 1)) * rng.normal(1, 0.015, (count, 3))
    return tint.T.astype(np.float32)[:, roofs.clip(0)] * (1 + 0.04 * noise(roofs.shape, 3, rng))


def shadow(heights: ndarray) -> ndarray:
    """How much of the sun each pixel lacks, 0 to 1, behind what stands higher."""
    dark = np.zeros(heights.shape, bool)
    for step in range(1, int(heights.max() / GSD / SUN_FALL) + 1):
        row, col = (round(step * part) for part in SUN)
        ray = heights[:-row, : heights.shape[1] - col] - np.float32(step * GSD * SUN_FALL)
        dark[row:, col:] |= ray > heights[row:, col:] + 0.2
    return box(dark, 1)


def photograph(colour: ndarray, heights: ndarray, rng: Generator) -> ndarray:
    """Light and lens: relief, shadow, uneven light, vignette, haze, blur and the sensor's noise."""
    shape = heights.shape
    south, east = np.gradient(0.5 * heights + 0.5 * box(heights, 1))
    relief = (1 + 0.4 * (south * SUN[0] + east * SUN[1])).clip(0.68, 1.25)
    shade = 1 - (1 - np.array(SHADE, np.float32)[:, None, None]) * shadow(heights)
    row, col = (np.linspace(-1, 1, length, dtype=np.float32) for length in shape)
    lens = 1.04 - 0.06 * (row[:, None] ** 2 + col**2) + 0.04 * noise(shape, 700, rng)
    haze = (0.08 + 0.02 * noise(shape, 900, rng)).clip(0, 0.14)
    lit = blend(colour * relief * shade * lens, HAZE, haze)
    soft = np.stack([0.5 * band + 0.5 * box(band, 1) for band in lit])
    soft += 4.0 * rng.standard_normal(lit.shape, dtype=np.float32)
    return soft.clip(1, 255).astype(np.uint8)
