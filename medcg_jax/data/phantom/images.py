"""Phantom and neutral images: 32 x 32 RGB pixels drawn from a scene's parameters by formulas, many at a time.

A scene is a grey picture of an area with objects in some cells of a 4 x 4 grid of sites (each object within one site):
up to three lesions, all alike, and one of the area's own landmarks. A modality turns the grey picture into pixels. A
neutral image has objects on a random texture in random colours, either polarity; it belongs to no area or modality.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medcg_jax.data.phantom.world import AREAS, CELLS, MODALITIES, NUM_BINS, NUM_SECTORS, SECTORS, SHAPES, Draws

SIDE_PX, SITE_PX = 32, 8
NUM_SITES = (SIDE_PX // SITE_PX) ** 2
SIZES = ("small", "large")
MAX_LESIONS = 3
# Shapes of lesions in phantoms.
LESION_SHAPES = (SHAPES.index("disc"), SHAPES.index("star"))
# Of the neutral images, those that are easiest to read, and those with a faint object that does not count.
PLAIN_FRAC, DISTRACTOR_FRAC = 0.4, 0.5
_RADIUS_PX = (1.9, 3.2)
_LESION, _LANDMARK, _NEUTRAL = 0.5, 0.2, 0.5
# Where a group's own draws begin: above anything the scene itself draws.
_GROUP_SLOT = 1 << 20

# Area -> shape, size and possible sites of its landmark (row * 4 + column); lesions keep off these sites.
LANDMARKS = {
    "brain": ("square", "large", (5, 6)),
    "liver": ("disc", "large", (2, 3)),
    "breast": ("ring", "small", (9, 10)),
    "bone": ("disc", "small", (1, 13)),
    "colon": ("ring", "small", (5, 10)),
    "lung": ("ring", "large", (8, 11)),
    "eye": ("disc", "large", (6, 7)),
    "skin": ("square", "small", (0, 15)),
}


@dataclass(frozen=True)
class Scene:
    """What is drawn, apart from noise. The last of the O objects is the landmark (absent in neutral images).

    Attributes:
      modality, area: int[N] places in MODALITIES and AREAS; -1 in neutral images.
      count, shape, size: int[N] of the lesions; shape and size are places in SHAPES and SIZES.
      pose: float32[N] in [0, 1), a position on a circle: where the area lies and how its texture falls.
      site, placement, amplitude_bin: int[N, O] per object. amplitude: float32[N, O], about 1.
    """

    modality: np.ndarray
    area: np.ndarray
    count: np.ndarray
    shape: np.ndarray
    size: np.ndarray
    pose: np.ndarray
    site: np.ndarray
    placement: np.ndarray
    amplitude_bin: np.ndarray
    amplitude: np.ndarray

    @property
    def sector(self) -> np.ndarray:
        """int[N]: the sector of the pose."""
        return (self.pose * NUM_SECTORS).astype(np.int64)


def draw_scene(draws: Draws, *, modality, area, count, shape, size, test: bool) -> Scene:
    """A scene per row; pose, placements and amplitudes come from the cells reserved for test, or from the others.

    Args:
      draws: N rows. modality, area, count, shape, size: int[N] as in Scene.
      test: whether the images are for test.
    """
    num_objects = MAX_LESIONS + 1
    sectors, cells = SECTORS[test], CELLS[test]
    pose = (sectors[draws.integer(len(sectors))] + draws.uniform(high=0.999)) / NUM_SECTORS
    placement, amplitude_bin = np.moveaxis(cells[draws.integer(len(cells), num_objects)], -1, 0)
    amplitude = 0.85 + 0.3 * (amplitude_bin + draws.uniform(num_objects)) / NUM_BINS
    order, choice = draws.order(NUM_SITES), draws.integer(2)
    site = order[:, :num_objects].copy()
    for index, name in enumerate(AREAS):
        rows = np.flatnonzero(np.asarray(area) == index)
        sites = LANDMARKS[name][2]
        free = order[rows]
        free = free[~np.isin(free, sites)].reshape(len(rows), NUM_SITES - len(sites))
        site[rows, :MAX_LESIONS] = free[:, :MAX_LESIONS]
        site[rows, MAX_LESIONS] = np.asarray(sites)[choice[rows]]
    arrays = (np.asarray(a) for a in (modality, area, count, shape, size))
    return Scene(*arrays, pose.astype(np.float32), site, placement, amplitude_bin, amplitude.astype(np.float32))


def render(scene: Scene, draws: Draws) -> np.ndarray:
    """uint8[N, 32, 32, 3]: the images of phantoms and neutral scenes alike; `draws` gives textures and noise."""
    out = np.zeros((len(draws), SIDE_PX, SIDE_PX, 3), np.float32)
    objects = _objects(scene)
    groups = scene.modality * len(AREAS) + scene.area
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        group_draws = draws.take(rows, _GROUP_SLOT)
        if scene.area[rows[0]] < 0:
            out[rows] = _neutral(group_draws, objects[rows], scene.pose[rows])
            continue
        grey = _area(AREAS[scene.area[rows[0]]], group_draws, scene.pose[rows]) + objects[rows]
        out[rows] = _modality(MODALITIES[scene.modality[rows[0]]], group_draws, np.clip(grey, 0, 1))
    return (np.clip(out, 0, 1) * 255 + 0.5).astype(np.uint8)


def lesion_masks(scene: Scene) -> list[np.ndarray]:
    """bool[count, 32, 32] per phantom of a scene, any task's: the pixels of each lesion, in reading order of the sites.

    A pixel belongs to a lesion when it has at least half of its brightness.
    """
    side = SIDE_PX // SITE_PX
    masks_of = []
    for i, count in enumerate(scene.count):
        masks = np.zeros((count, SIDE_PX, SIDE_PX), bool)
        for mask, column in zip(masks, np.argsort(scene.site[i, :count]), strict=True):
            row, left = divmod(int(scene.site[i, column]), side)
            stamp = STAMPS[scene.shape[i], scene.size[i], scene.placement[i, column]]
            mask[row * SITE_PX : (row + 1) * SITE_PX, left * SITE_PX : (left + 1) * SITE_PX] = stamp >= 0.5
        masks_of.append(masks)
    return masks_of


def _stamps() -> np.ndarray:
    """float32[shape, size, placement, 8, 8]: objects of amplitude 1, centred on one of the site's four inner pixels."""
    y, x = np.mgrid[:SITE_PX, :SITE_PX].astype(np.float32)
    bank = np.zeros((len(SHAPES), len(SIZES), 4, SITE_PX, SITE_PX), np.float32)
    for placement in range(4):
        dx, dy = np.abs(x - 3 - placement % 2), np.abs(y - 3 - placement // 2)
        rho = np.hypot(dx, dy)
        for size, radius in enumerate(_RADIUS_PX):
            arms = (dx == 0) | (dy == 0) | ((dx == dy) & (radius > 2))
            bank[0, size, placement] = np.clip(radius - rho + 0.5, 0, 1)
            bank[1, size, placement] = arms & (rho <= radius + 0.9)
            bank[2, size, placement] = np.clip(1.1 - np.abs(rho - radius + 0.3), 0, 1)
            bank[3, size, placement] = np.clip(radius - np.maximum(dx, dy) + 0.3, 0, 1)
    return bank


STAMPS = _stamps()
_V, _U = np.mgrid[-1 : 1 : SIDE_PX * 1j, -1 : 1 : SIDE_PX * 1j].astype(np.float32)
_R = np.hypot(_U, _V)


def _objects(scene: Scene) -> np.ndarray:
    """float32[N, 32, 32]: lesions and landmarks alone."""
    side = SIDE_PX // SITE_PX
    canvas = np.zeros((len(scene.pose), side, side, SITE_PX, SITE_PX), np.float32)

    def put(rows, column, shape, size, strength):
        site = scene.site[rows, column]
        stamp = STAMPS[shape, size, scene.placement[rows, column]]
        height = (strength * scene.amplitude[rows, column]).astype(np.float32)
        canvas[rows, site // side, site % side] += stamp * height[:, None, None]

    lesion = np.where(scene.area < 0, _NEUTRAL, _LESION)
    for column in range(MAX_LESIONS):
        rows = np.flatnonzero(scene.count > column)
        put(rows, column, scene.shape[rows], scene.size[rows], lesion[rows])
    rows = np.flatnonzero((scene.area < 0) & (scene.pose < DISTRACTOR_FRAC))
    bits = scene.placement[rows, 0] + 4 * scene.amplitude_bin[rows, 0]
    put(rows, MAX_LESIONS, bits % len(SHAPES), bits // len(SHAPES) % len(SIZES), _LANDMARK)
    for index, name in enumerate(AREAS):
        rows = np.flatnonzero(scene.area == index)
        shape, size, _ = LANDMARKS[name]
        put(rows, MAX_LESIONS, SHAPES.index(shape), SIZES.index(size), _LANDMARK)
    return canvas.transpose(0, 1, 3, 2, 4).reshape(len(canvas), SIDE_PX, SIDE_PX)


def _blur(z: np.ndarray, times: int) -> np.ndarray:
    """A five-point average, `times` over, joined at the edges."""
    for _ in range(times):
        z = (z + np.roll(z, 1, 1) + np.roll(z, -1, 1) + np.roll(z, 1, 2) + np.roll(z, -1, 2)) * np.float32(0.2)
    return z


def _field(values: np.ndarray) -> np.ndarray:
    """float32[N, 1, 1] of float[N]"""
    return np.asarray(values, np.float32)[:, None, None]


def _soft(signed: np.ndarray) -> np.ndarray:
    """1 inside (positive), 0 outside, with an edge of about two pixels."""
    return np.clip(signed * 8 + 0.5, 0, 1)


def _area(name: str, draws: Draws, pose: np.ndarray) -> np.ndarray:
    """float32[N, 32, 32]: the normal structures of an area, in about 0.15 to 0.55."""
    angle = _field(2 * np.pi * pose)
    u, v = _U + 0.08 * np.cos(angle), _V + 0.08 * np.sin(angle)
    r = np.hypot(u, v)
    a, b = _field(draws.uniform(low=0.7, high=1.2)), _field(draws.uniform(low=0.7, high=1.2))
    base = _field(draws.uniform(low=0.15, high=0.25))
    if name == "lung":
        fields = _soft(0.95 - np.hypot((np.abs(u) - 0.5) / 0.5, v / 1.05))
        ribs = np.maximum(np.sin(11 * (v + 0.35 * np.abs(u)) + angle), 0) ** 2
        return base + 0.22 - 0.18 * fields + 0.13 * a * ribs * fields
    if name == "brain":
        skull = np.exp(-(((r - 0.92) / 0.07) ** 2))
        ventricles = np.exp(-(((np.abs(u) - 0.16) / 0.1) ** 2) - (v / 0.32) ** 2)
        return base + 0.12 * _soft(0.9 - r) + 0.25 * a * skull - 0.13 * b * ventricles
    if name == "liver":
        outline = _soft(0.95 - np.hypot(u * 0.95 - 0.05, v * 1.15 + 0.2 * u))
        vessels = _blur(draws.normal(SIDE_PX, SIDE_PX), 3) > 0.42
        return base + 0.2 * outline + 0.12 * a * vessels * outline
    if name == "bone":
        width = 0.55 + 0.15 * v**2
        shaft = _soft(width - np.abs(u))
        return base + 0.12 * shaft + 0.22 * a * np.exp(-(((np.abs(u) - width) / 0.07) ** 2))
    if name == "breast":
        outline = _soft(1.0 - np.hypot((u + 1) / 1.85, v / 0.98))
        return base + 0.14 * outline * (1 + 1.1 * a * _blur(draws.normal(SIDE_PX, SIDE_PX), 4))
    if name == "eye":
        bend = draws.uniform(2, low=-0.5, high=0.5)
        lines = sum(
            np.exp(-(((v - side * 0.45 - _field(k) * u * np.abs(u)) / 0.06) ** 2)) for side, k in zip((-1, 1), bend.T)
        )
        return base + 0.18 * _soft(0.98 - r) + 0.14 * a * lines
    if name == "skin":
        slope, phase = _field(draws.uniform(low=-0.6, high=0.6)), _field(draws.uniform(high=6.28))
        hairs = np.maximum(np.sin(9 * (u + slope * v) + phase), 0) ** 12
        return base + 0.14 + 0.2 * a * hairs
    folds = np.sin(13 * np.hypot(u * 1.1, v) - angle)
    return base + 0.1 + 0.1 * a * folds


def _modality(name: str, draws: Draws, x: np.ndarray) -> np.ndarray:
    """float32[N, 32, 32, 3]: what the modality makes of the grey picture x, which lies in 0 to 1."""
    z = draws.normal(SIDE_PX, SIDE_PX)
    phase = _field(draws.uniform(high=2 * np.pi))
    if name == "ct":
        return _colours(draws, 0.72 - 0.9 * (x - 0.2) + 0.09 * np.sin(24 * _R + phase) + 0.03 * z)
    if name == "xray":
        return _colours(draws, 0.95 - 0.85 * x - 0.12 * _R + 0.03 * z)
    if name == "mri":
        ramp = np.cos(phase) * _U + np.sin(phase) * _V
        return _colours(draws, x**0.8 * (1 + 0.55 * ramp) + 0.05 * z)
    if name == "ultrasound":
        return _colours(draws, 0.95 * _blur(x, 1) * (1 + 0.55 * _blur(z, 1)) + 0.02 * z - 0.1 * np.abs(_U) * (1 - _V))
    if name == "oct":
        bands = 0.13 * np.sin(22 * _V + 2 * _U + phase)
        return _colours(draws, x + bands + 0.05 * z, (0.05, 0.25, 0.75), (0.65, 0.9, 0.2))
    if name == "photo":
        return _colours(draws, x - 0.2 * (1 - _R) + 0.03 * z, (0.95, 0.72, 0.55), (0.35, 0.12, 0.15))
    if name == "microscopy":
        return _colours(draws, 0.85 * x + 0.4 * _blur(z, 2) + 0.03 * z, (0.95, 0.82, 0.92), (0.35, 0.1, 0.55))
    debris = 0.16 * (_blur(z, 1) > 0.55)
    return _colours(draws, x + debris + 0.03 * z, (0.75, 0.25, 0.22), (0.55, 0.85, 0.5))


def _colours(draws: Draws, y: np.ndarray, low=(0, 0, 0), high=(1, 1, 1)) -> np.ndarray:
    """float32[N, 32, 32, 3]: y in 0 to 1 on the line between two colours, each image a little off."""
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    jitter = 0.02 * draws.normal(3) if low.any() else 0.02 * draws.normal(1)
    return low + (high - low) * np.clip(y, 0, 1)[..., None] + jitter[:, None, None, :]


def _neutral(draws: Draws, objects: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """float32[N, 32, 32, 3]: objects on a texture (none, grating, rings or noise) in grey or two random colours."""
    z = draws.normal(SIDE_PX, SIDE_PX)
    phase, turn = _field(2 * np.pi * pose), _field(draws.uniform(high=2 * np.pi))
    along = np.cos(turn) * _U + np.sin(turn) * _V
    frequency = _field(draws.uniform(low=5, high=25))
    blurred = np.where(_field(draws.integer(2)), _blur(z, 2), _blur(z, 4) * 1.6)
    textures = (0 * z, np.sin(frequency * along + phase), np.sin(frequency * _R + phase), 4 * blurred)
    kind = _field(draws.integer(len(textures)))
    texture = sum((kind == k) * t for k, t in enumerate(textures))
    level, strength, noise = (
        _field(draws.uniform(low=lo, high=hi)) for lo, hi in ((0.12, 0.4), (0, 0.12), (0.01, 0.06))
    )
    ramp = _field(draws.uniform(low=-0.4, high=0.5)) * along
    # Texture, noise and shading grow with the difficulty; the plainest are bright on dark. They teach shapes first.
    hard = _field(draws.uniform())
    strength, noise, ramp = strength * hard, 0.01 + noise * hard, ramp * hard
    y = (level + strength * texture + objects) * (1 + ramp) + noise * z
    # Half are grey, bright on dark or dark on bright; the others run between two distant colours.
    ends = draws.uniform(2, 3)
    near = np.abs(ends[:, 1] - ends[:, 0]).sum(-1) < 0.9
    ends[near, 1] = 1 - ends[near, 0] + (ends[near, 0] - 0.5) * 0.2
    plain = hard.ravel() < PLAIN_FRAC
    grey = (draws.integer(2) == 0) | (plain)
    dark = np.where(plain, 1, draws.integer(2))
    ends[grey] = np.where(dark[grey, None, None] == 1, [[[0.05], [0.95]]], [[[0.95], [0.05]]])
    y = np.clip(y, 0, 1)[..., None]
    return ends[:, None, None, 0] + (ends[:, 1] - ends[:, 0])[:, None, None] * y
