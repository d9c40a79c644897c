"""Phantom images: 32 x 32 RGB pixels drawn from a scene's parameters by formulas, many at a time.

A scene has objects in some cells of a 4 x 4 grid of sites, each object within its site. The objects of one quadrant
(2 x 2 sites) are alike. Behind them are a texture that belongs to the modality and an outline that belongs to the area,
both faint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medcg_jax.data.phantom.world import CELLS, NUM_BINS, NUM_QUADRANTS, NUM_SECTORS, SECTORS, Draws

SIDE_PX, SITE_PX = 32, 8
SITES_PER_SIDE = SIDE_PX // SITE_PX
NUM_SITES = SITES_PER_SIDE**2
# int[16]: the quadrant of each site; sites go row by row from the top left.
QUADRANT_OF_SITE = np.arange(NUM_SITES) // 8 * 2 + np.arange(NUM_SITES) % SITES_PER_SIDE // 2
SITES_OF_QUADRANT = np.stack([np.flatnonzero(q == QUADRANT_OF_SITE) for q in range(NUM_QUADRANTS)])
# A quadrant has one, two or three objects, with these odds.
MAX_OBJECTS, COUNT_ODDS = 3, (0.3, 0.4, 0.3)
_RADIUS_PX = (1.9, 3.2)
# Light x hue: dark warm, dark cool, bright warm, bright cool.
_COLOURS = np.array([[[0.5, 0.05, 0.05], [0.05, 0.05, 0.55]], [[0.98, 0.85, 0.3], [0.4, 0.9, 0.98]]], np.float32)


@dataclass(frozen=True)
class Scene:
    """What is drawn, apart from noise.

    Attributes:
      modality, area: int[N] places in MODALITIES and AREAS: the texture and the outline.
      values: int[N, 4, 4] of each quadrant's objects, the value (0 or 1) of each property, in the order of PROPERTIES.
      present: bool[N, 16] whether a site has an object.
      pose: float32[N] in [0, 1): the phase of the texture.
      placement, amplitude_bin: int[N, 16] per site. amplitude: float32[N, 16], an object's opacity.
    """

    modality: np.ndarray
    area: np.ndarray
    values: np.ndarray
    present: np.ndarray
    pose: np.ndarray
    placement: np.ndarray
    amplitude_bin: np.ndarray
    amplitude: np.ndarray

    @property
    def sector(self) -> np.ndarray:
        """int[N]: the sector of the pose."""
        return (self.pose * NUM_SECTORS).astype(np.int64)


def draw_scene(draws: Draws, *, modality, area, values, test: bool) -> Scene:
    """A scene per row; pose, placements and amplitudes come from the cells reserved for test, or from the others.

    Args:
      draws: N rows. modality, area, values: as in Scene.
      test: whether the images are for test.
    """
    num, sectors, cells = len(draws), SECTORS[test], CELLS[test]
    pose = (sectors[draws.integer(len(sectors))] + draws.uniform(high=0.999)) / NUM_SECTORS
    placement, amplitude_bin = np.moveaxis(cells[draws.integer(len(cells), NUM_SITES)], -1, 0)
    amplitude = 0.8 + 0.2 * (amplitude_bin + draws.uniform(NUM_SITES)) / NUM_BINS
    count = 1 + (draws.uniform(4)[..., None] >= np.cumsum(COUNT_ODDS)[:-1]).sum(-1)
    # The first `count` of a random order of each quadrant's four sites.
    rank = np.argsort(draws.bits(4, 4), axis=-1)
    present = np.zeros((num, NUM_SITES), bool)
    present[:, SITES_OF_QUADRANT] = rank < count[..., None]
    arrays = (np.asarray(a) for a in (modality, area, values))
    return Scene(*arrays, present, pose.astype(np.float32), placement, amplitude_bin, amplitude.astype(np.float32))


def render(scene: Scene, draws: Draws) -> np.ndarray:
    """uint8[N, 32, 32, 3]: the images; `draws` gives the noise."""
    num = len(draws)
    of_site = scene.values[:, QUADRANT_OF_SITE]
    shape, size, light, hue = np.moveaxis(of_site, -1, 0)
    opacity = STAMPS[shape, size, scene.placement] * (scene.present * scene.amplitude)[..., None, None]
    colours = _COLOURS + np.float32(0.03) * draws.normal(2, 2, 3)
    colour = colours[np.arange(num)[:, None], light, hue]
    grid = (num, SITES_PER_SIDE, SITES_PER_SIDE, SITE_PX, SITE_PX)
    opacity = opacity.reshape(grid).transpose(0, 1, 3, 2, 4).reshape(num, SIDE_PX, SIDE_PX, 1)
    blocks = colour.reshape(num, SITES_PER_SIDE, SITES_PER_SIDE, 3)
    colour = blocks.repeat(SITE_PX, axis=1).repeat(SITE_PX, axis=2)
    ground = _background(scene, draws)[..., None]
    return (np.clip(ground * (1 - opacity) + colour * opacity, 0, 1) * 255 + 0.5).astype(np.uint8)


def object_masks(scene: Scene, quadrant: np.ndarray) -> list[np.ndarray]:
    """bool[count, 32, 32] per row: the pixels of each object in a quadrant, in reading order of the sites.

    quadrant: int[N]. A pixel belongs to an object where the object has at least half of its opacity.
    """
    masks_of = []
    for i, q in enumerate(quadrant.tolist()):
        sites = [site for site in SITES_OF_QUADRANT[q].tolist() if scene.present[i, site]]
        masks = np.zeros((len(sites), SIDE_PX, SIDE_PX), bool)
        shape, size = scene.values[i, q, :2]
        for mask, site in zip(masks, sites, strict=True):
            row, left = divmod(site, SITES_PER_SIDE)
            stamp = STAMPS[shape, size, scene.placement[i, site]]
            mask[row * SITE_PX : (row + 1) * SITE_PX, left * SITE_PX : (left + 1) * SITE_PX] = stamp >= 0.5
        masks_of.append(masks)
    return masks_of


def _stamps() -> np.ndarray:
    """float32[shape, size, placement, 8, 8]: objects of opacity 1, centred on one of the site's four inner pixels."""
    y, x = np.mgrid[:SITE_PX, :SITE_PX].astype(np.float32)
    bank = np.zeros((2, 2, 4, SITE_PX, SITE_PX), np.float32)
    for placement in range(4):
        dx, dy = np.abs(x - 3 - placement % 2), np.abs(y - 3 - placement // 2)
        rho = np.hypot(dx, dy)
        for size, radius in enumerate(_RADIUS_PX):
            arms = (dx == 0) | (dy == 0) | ((dx == dy) & (radius > 2))
            bank[0, size, placement] = np.clip(radius - rho + 0.5, 0, 1)
            bank[1, size, placement] = arms & (rho <= radius + 0.9)
    return bank


STAMPS = _stamps()
_V, _U = np.mgrid[-1 : 1 : SIDE_PX * 1j, -1 : 1 : SIDE_PX * 1j].astype(np.float32)
_R = np.hypot(_U, _V)


def _background(scene: Scene, draws: Draws) -> np.ndarray:
    """float32[N, 32, 32]: grey, with the modality's texture, the area's outline and noise."""
    phase = _field(2 * np.pi * scene.pose)
    level, noise = draws.normal(), draws.normal(SIDE_PX, SIDE_PX)
    textures = (0 * phase, np.sin(12 * _U + 5 * _V + phase), np.sin(14 * _R + phase), 4 * _blur(noise, 3))
    distances = (np.abs(_R - 0.9), np.abs(np.maximum(np.abs(_U), np.abs(_V)) - 0.85), np.abs(np.abs(_U) - 0.6))
    outlines = [np.exp(-((distance / 0.07) ** 2)) for distance in (*distances, np.abs(np.abs(_V) - 0.6))]
    texture = sum(_field(scene.modality == k) * t for k, t in enumerate(textures))
    outline = sum(_field(scene.area == k) * o for k, o in enumerate(outlines))
    return 0.45 + 0.05 * _field(level) + 0.05 * texture + 0.07 * outline + 0.03 * draws.normal(SIDE_PX, SIDE_PX)


def _blur(z: np.ndarray, times: int) -> np.ndarray:
    """A five-point average, `times` over, joined at the edges."""
    for _ in range(times):
        z = (z + np.roll(z, 1, 1) + np.roll(z, -1, 1) + np.roll(z, 1, 2) + np.roll(z, -1, 2)) * np.float32(0.2)
    return z


def _field(values: np.ndarray) -> np.ndarray:
    """float32[N, 1, 1] of float[N]"""
    return np.asarray(values, np.float32)[:, None, None]
