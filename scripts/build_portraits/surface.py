"""Geometry in addition to the body: coloured triangle meshes from grids of points, and ellipsoids."""

from dataclasses import dataclass

import numpy as np
from mesh import grid_quads, triangles
from raster import vertex_normals


@dataclass(frozen=True)
class Surface:
    """A mesh: xyz_V3, normal_V3, linear colour_V3, triangles tri_T3, gloss in [0, 1]; hair has strand_V2 (turn, length)."""

    xyz_V3: np.ndarray
    normal_V3: np.ndarray
    colour_V3: np.ndarray
    tri_T3: np.ndarray
    gloss: float = 0.0
    strand_V2: np.ndarray | None = None


def from_grid(xyz_RC3: np.ndarray, colour, gloss: float = 0.0, strand_RC2=None) -> Surface:
    """Return a surface through a grid of points. colour: linear RGB, one for all or one per point [R, C, 3]."""
    rows, columns = xyz_RC3.shape[:2]
    quads, xyz = grid_quads(rows, columns), np.ascontiguousarray(xyz_RC3.reshape(-1, 3), np.float32)
    colours = np.broadcast_to(np.asarray(colour, np.float32), (rows, columns, 3)).reshape(-1, 3)
    strands = None if strand_RC2 is None else strand_RC2.reshape(-1, 2).astype(np.float32)
    return Surface(xyz, vertex_normals(xyz, quads), colours, triangles(quads), gloss, strands)


def ellipsoid(centre, radii, colour, gloss: float = 0.0, steps: int = 12) -> Surface:
    """Return a closed ellipsoid with its axes along x, y and z."""
    p, z = np.meshgrid(np.linspace(0, np.pi, steps), np.linspace(0, 2 * np.pi, 2 * steps), indexing="ij")
    ball = np.stack([np.sin(p) * np.sin(z), np.cos(p), np.sin(p) * np.cos(z)], -1)
    return from_grid(np.asarray(centre) + ball * np.asarray(radii), colour, gloss)
