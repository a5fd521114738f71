"""A small z-buffer rasteriser in numba: it finds the triangle visible at each pixel, and the position in it."""

import numpy as np
from numba import njit


@njit(cache=True, fastmath=True)
def rasterise(xy_V2: np.ndarray, depth_V: np.ndarray, tri_T3: np.ndarray, size: int):
    """Return the nearest triangle at every pixel of a size x size image.

    xy in pixels (y downwards), depth grows away from the eye. Returns face_P (int32, -1 where empty),
    bary_P3 (barycentric weights) and depth_P, P = size * size. Both sides of a triangle are drawn.
    """
    face = np.full(size * size, -1, np.int32)
    bary = np.zeros((size * size, 3), np.float32)
    nearest = np.full(size * size, np.float32(1e9), np.float32)
    for t in range(tri_T3.shape[0]):
        i, j, k = tri_T3[t, 0], tri_T3[t, 1], tri_T3[t, 2]
        ax, ay, bx, by, cx, cy = xy_V2[i, 0], xy_V2[i, 1], xy_V2[j, 0], xy_V2[j, 1], xy_V2[k, 0], xy_V2[k, 1]
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if abs(area) < 1e-9:
            continue
        x0, x1 = max(int(np.ceil(min(ax, bx, cx) - 0.5)), 0), min(int(np.floor(max(ax, bx, cx) - 0.5)), size - 1)
        y0, y1 = max(int(np.ceil(min(ay, by, cy) - 0.5)), 0), min(int(np.floor(max(ay, by, cy) - 0.5)), size - 1)
        inverse = np.float32(1.0) / area
        for y in range(y0, y1 + 1):
            for x in range(x0, x1 + 1):
                dx, dy = x + np.float32(0.5) - ax, y + np.float32(0.5) - ay
                w1 = (dx * (cy - ay) - dy * (cx - ax)) * inverse
                w2 = ((bx - ax) * dy - (by - ay) * dx) * inverse
                w0 = 1 - w1 - w2
                if w0 < -1e-4 or w1 < -1e-4 or w2 < -1e-4:
                    continue
                d = w0 * depth_V[i] + w1 * depth_V[j] + w2 * depth_V[k]
                p = y * size + x
                if d < nearest[p]:
                    nearest[p] = d
                    face[p] = t
                    bary[p, 0], bary[p, 1], bary[p, 2] = w0, w1, w2
    return face, bary, nearest


@njit(cache=True, fastmath=True)
def interpolate(value_VC: np.ndarray, tri_P3: np.ndarray, bary_P3: np.ndarray) -> np.ndarray:
    """Return values [P, C] at points given by a triangle's three vertices and barycentric weights."""
    out = np.empty((tri_P3.shape[0], value_VC.shape[1]), np.float32)
    for p in range(tri_P3.shape[0]):
        i, j, k = tri_P3[p, 0], tri_P3[p, 1], tri_P3[p, 2]
        for c in range(value_VC.shape[1]):
            out[p, c] = value_VC[i, c] * bary_P3[p, 0] + value_VC[j, c] * bary_P3[p, 1] + value_VC[k, c] * bary_P3[p, 2]
    return out


@njit(cache=True, fastmath=True)
def lookup(map_HWC: np.ndarray, column_P: np.ndarray, row_P: np.ndarray, wrap: bool) -> np.ndarray:
    """Return bilinear samples [P, C] of a map at fractional pixel positions; wrap: wrap around instead of clamping."""
    height, width, channels = map_HWC.shape
    out = np.empty((column_P.shape[0], channels), np.float32)
    for p in range(column_P.shape[0]):
        x, y = column_P[p], row_P[p]
        if not wrap:
            x, y = min(max(x, 0.0), width - 1.001), min(max(y, 0.0), height - 1.001)
        x0, y0 = int(np.floor(x)), int(np.floor(y))
        fx, fy = x - x0, y - y0
        xa, xb, ya, yb = x0 % width, (x0 + 1) % width, y0 % height, (y0 + 1) % height
        for c in range(channels):
            top = map_HWC[ya, xa, c] * (1 - fx) + map_HWC[ya, xb, c] * fx
            low = map_HWC[yb, xa, c] * (1 - fx) + map_HWC[yb, xb, c] * fx
            out[p, c] = top * (1 - fy) + low * fy
    return out


@njit(cache=True, fastmath=True)
def vertex_normals(xyz_V3: np.ndarray, quad_Q4: np.ndarray) -> np.ndarray:
    """Return area-weighted unit normals [V, 3] of a quad mesh (zero where no quad touches a vertex)."""
    out = np.zeros(xyz_V3.shape, np.float32)
    for q in range(quad_Q4.shape[0]):
        a, b, c, d = quad_Q4[q, 0], quad_Q4[q, 1], quad_Q4[q, 2], quad_Q4[q, 3]
        ux, uy, uz = (xyz_V3[c, 0] - xyz_V3[a, 0], xyz_V3[c, 1] - xyz_V3[a, 1], xyz_V3[c, 2] - xyz_V3[a, 2])
        vx, vy, vz = (xyz_V3[d, 0] - xyz_V3[b, 0], xyz_V3[d, 1] - xyz_V3[b, 1], xyz_V3[d, 2] - xyz_V3[b, 2])
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for i in (a, b, c, d):
            out[i, 0] += nx
            out[i, 1] += ny
            out[i, 2] += nz
    for i in range(out.shape[0]):
        length = np.sqrt(out[i, 0] ** 2 + out[i, 1] ** 2 + out[i, 2] ** 2)
        if length > 1e-9:
            for c in range(3):
                out[i, c] /= length
    return out
