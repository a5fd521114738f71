"""Render an image from a person, a shot and a look: morph, pose, rasterise, shade, compose."""

import numpy as np
from hair import build_hair, hairline
from hats import build_hat, covers_crown, fit_hat
from look import Look
from mesh import BODY, CROWN_CENTRE, EYE, RACES_OF_MESH, Head, load_head, triangles
from outfits import clothe, neckline
from people import Person, Shot
from props import draw_props
from raster import interpolate, lookup, rasterise, vertex_normals
from scenes import draw_scene
from skin import BEARDS, SkinMaps, beard_masks, linear, smooth
from surface import Surface

SIZE, SCALE = 64, 2  # images are rendered at SCALE times their size and averaged down
SHADOW_SIZE = 112
WRAP = np.array([0.40, 0.24, 0.18], np.float32)  # subsurface scattering: light wraps around skin, red most


def unit(v: np.ndarray) -> np.ndarray:
    """Return the vectors scaled to length 1 along the last axis."""
    return v / np.maximum(np.sqrt((v * v).sum(-1, keepdims=True)), 1e-9)


class Renderer:
    """Renders people with one head mesh. It keeps no state between images."""

    def __init__(self, head: Head | None = None) -> None:
        self.head = load_head() if head is None else head
        self.skin = SkinMaps(self.head.lips_HW)
        self.row = {name: i for i, name in enumerate(self.head.names)}
        self.body, self.eyes = self.head.body_quads, self.head.quad_Q4[self.head.part_Q == EYE]
        self.tri_body, self.tri_eyes = triangles(self.body), triangles(self.eyes)
        base = self.head.base_V3
        eye = np.unique(self.eyes)
        self.left, self.right = eye[base[eye, 0] > 0], eye[base[eye, 0] < 0]
        self.chin = int(np.argmin(np.abs(base - [0, 6.16, 1.29]).sum(1)))
        jaw, moustache, chin = beard_masks(np.abs(base[:, 0]), base[:, 1])
        front = smooth(0.5, 0.75, base[:, 2])
        self.beard = {
            "full": np.maximum(jaw, moustache) * front,
            "goatee": np.maximum(chin, moustache) * front,
            "moustache": moustache * front,
        }

    @property
    def local_names(self) -> list[str]:
        """Names of the local targets that a person's face may use."""
        return [n for n in self.head.names if not n.startswith(("macro/", "smile/", "head/head-age"))]

    def weights(self, person: Person, smile: float = 0.0) -> dict[str, float]:
        """Return the strength of every target for a person: MakeHuman's macro rules, local targets, a smile."""
        old = float(np.clip((person.years - 22) / 58, 0, 1.05))
        out = dict(person.local)
        muscle, weight = _three(person.muscle, "muscle"), _three(person.weight, "weight")
        for gender, g in (("female", 1 - person.masculine), ("male", person.masculine)):
            for age, a in (("young", 1 - old), ("old", old)):
                for race, r in zip(RACES_OF_MESH, person.shape_3, strict=True):
                    out[f"macro/{race}-{gender}-{age}"] = g * a * float(r)
                for m, wm in muscle.items():
                    for w, ww in weight.items():
                        out[f"macro/universal-{gender}-{age}-{m}-{w}"] = g * a * wm * ww
        for race, r in zip(RACES_OF_MESH, person.shape_3, strict=True):
            out[f"smile/{race}"] = smile * float(r)
        out["head/head-age-incr"] = 0.75 * person.wear
        return out

    def morph(self, person: Person, smile: float = 0.0) -> np.ndarray:
        """Return the vertices [V, 3] of a person's head."""
        used = [(self.row[n], v) for n, v in self.weights(person, smile).items() if n in self.row and abs(v) > 1e-3]
        rows, values = zip(*used, strict=True)
        moved = np.array(values, np.float32) @ self.head.target_NT[list(rows)]
        return self.head.base_V3 + moved.reshape(-1, 3)

    def render(self, person: Person, shot: Shot, look: Look, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
        """Render an image, uint8 [size, size, 3]. rng: sensor noise only."""
        big = size * SCALE
        xyz = self.morph(person, shot.smile)
        normal = vertex_normals(xyz, self.body)
        xyz = self._dress(person, look, xyz, normal)
        fit = fit_hat(self.head, xyz)
        pressed = fit if covers_crown(look.headwear) else None
        pieces = build_hair(self.head, person, xyz, normal, pressed)
        pieces += build_hat(look.headwear, fit, look.hat_3, look.hat_accent_3)
        camera = _Camera(shot, xyz[self.chin, 1], xyz[:, 1].max(), xyz[np.unique(self.eyes), 2].mean(), big)
        scene = _Scene(self, person, look, xyz, normal, pieces=pieces, camera=camera)
        colour, hit = scene.shade(shot)
        back = np.asarray(draw_scene(look, big), np.float32) / 255
        picture = np.where(hit[:, None], colour, back.reshape(-1, 3)).reshape(big, big, 3)
        picture = draw_props(look, picture, camera.chin_pixel)
        picture = picture.reshape(size, SCALE, size, SCALE, 3).mean((1, 3)) + rng.normal(0, 0.006, (size, size, 3))
        return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)

    def _dress(self, person, look, xyz, normal):
        """Move vertices under cloth and beards off the skin."""
        cloth = 0.055 * smooth(0.0, 0.12, neckline(look.outfit, self.head.base_V3) - self.head.base_V3[:, 1])
        if look.outfit == "hoodie":
            cloth = cloth * (1 + 2.2 * smooth(5.0, 5.3, self.head.base_V3[:, 1]))
        out = cloth
        if person.beard in self.beard:
            out = out + BEARDS[person.beard][3] * self.beard[person.beard]
        return (xyz + normal * out[:, None]).astype(np.float32)


def _three(value: float, noun: str) -> dict[str, float]:
    return {
        f"min{noun}": max(0.0, 1 - 2 * value),
        f"average{noun}": 1 - abs(2 * value - 1),
        f"max{noun}": max(0.0, 2 * value - 1),
    }


class _Camera:
    """A long lens in front of the face. View space has x right, y up, z towards the viewer."""

    def __init__(self, shot: Shot, chin: float, crown: float, eye_z: float, size: int) -> None:
        height = crown - chin
        yaw, pitch, roll = np.radians([shot.yaw, shot.pitch, shot.roll])
        c, s = np.cos, np.sin
        turn = np.array([[c(yaw), 0, s(yaw)], [0, 1, 0], [-s(yaw), 0, c(yaw)]])
        nod = np.array([[1, 0, 0], [0, c(pitch), -s(pitch)], [0, s(pitch), c(pitch)]])
        lean = np.array([[c(roll), -s(roll), 0], [s(roll), c(roll), 0], [0, 0, 1]])
        self.rotation, self.size = (lean @ nod @ turn).astype(np.float32), size
        self.gaze = np.array([-s(yaw) * 0.8, 0, c(yaw)], np.float32)
        self.centre = np.array([0, chin + 0.40 * height, eye_z - 0.6], np.float32)
        self.distance, self.height = 3.2 * height, height
        self.scale = shot.zoom * size * 3.2
        self.middle = 0.485 * size
        self.chin_pixel = self.middle + 0.40 * shot.zoom * size

    def view(self, xyz):
        return (xyz - self.centre) @ self.rotation.T

    def project(self, seen):
        depth = self.distance - seen[:, 2]
        xy = np.stack(
            [self.size / 2 + seen[:, 0] / depth * self.scale, self.middle - seen[:, 1] / depth * self.scale], 1
        )
        return xy.astype(np.float32), depth.astype(np.float32)


class _Scene:
    """Body, eyes, hair and headwear as one triangle mesh with the attributes for shading."""

    def __init__(
        self, renderer: Renderer, person: Person, look: Look, xyz, normal, *, pieces: list[Surface], camera
    ) -> None:
        head = renderer.head
        self.skin, self.person, self.look, self.camera, self.base = renderer.skin, person, look, camera, head.base_V3
        self.azimuth_Z = head.azimuth_Z
        self.eye_centres = xyz[renderer.left].mean(0), xyz[renderer.right].mean(0)
        points, normals = [xyz], [normal]
        tris, kinds, extra = [renderer.tri_body, renderer.tri_eyes], [BODY, EYE], []
        start = len(xyz)
        for i, piece in enumerate(pieces):
            points.append(piece.xyz_V3)
            normals.append(piece.normal_V3)
            tris.append(piece.tri_T3 + start)
            kinds.append(2 + i)
            strand = np.zeros((len(piece.xyz_V3), 2)) if piece.strand_V2 is None else piece.strand_V2
            extra.append(np.concatenate([piece.colour_V3, strand], 1))
            start += len(piece.xyz_V3)
        self.pieces = pieces
        self.view = camera.view(np.concatenate(points)).astype(np.float32)
        self.normal = (np.concatenate(normals) @ camera.rotation.T).astype(np.float32)
        fill = np.zeros((len(xyz), 5), np.float32)
        fill[:, 0] = head.occlusion_V
        self.extra = np.concatenate([fill, *extra]).astype(np.float32)
        self.xyz = xyz
        self.tri = np.concatenate(tris).astype(np.int32)
        self.kind_T = np.repeat(kinds, [len(t) for t in tris])

    def shade(self, shot: Shot):
        """Return the sRGB colour [P, 3] in [0, 1] of every pixel, and which pixels are not background [P]."""
        xy, depth = self.camera.project(self.view)
        face, bary, _ = rasterise(xy, depth, self.tri, self.camera.size)
        hit = face >= 0
        tri, bary, kind = self.tri[face[hit]], bary[hit], self.kind_T[face[hit]]
        attributes = interpolate(np.concatenate([self.view, self.normal, self.extra], 1), tri, bary)
        at, normal, extra = attributes[:, :3], unit(attributes[:, 3:6]), attributes[:, 6:]
        normal = np.where((normal[:, 2:] < -0.05) & (kind[:, None] > EYE), -normal, normal)
        light = _Light(shot, self, at, normal)
        colour = np.zeros((len(tri), 3), np.float32)
        for k in np.unique(kind):
            here = kind == k
            if k == BODY:
                colour[here] = self._body(tri[here], bary[here], extra[here, 0], light, here)
            elif k == EYE:
                colour[here] = self._eye(tri[here], bary[here], light, here)
            else:
                colour[here] = self._piece(self.pieces[k - 2], extra[here], light, here)
        out = np.zeros((len(face), 3), np.float32)
        colour = colour * 1.12
        out[hit] = _srgb(colour / (1 + 0.10 * colour))
        return out, hit

    def _body(self, tri, bary, occlusion, light, here):
        base = interpolate(self.base, tri, bary)
        m = self.skin.at(base)
        albedo = self._scalp(self.skin.albedo(self.person, base, m), base)
        cloth, cover = clothe(self.look.outfit, self.look.main_3, self.look.accent_3, base)
        wrinkle = lookup(self.skin.noise, base[:, 0] * 26, base[:, 1] * 26 + self.look.seed % 251, True)[:, :1]
        cover = cover[:, None]
        albedo = albedo * (1 - cover) + cloth * (1 + 0.045 * wrinkle) * cover
        shine = light.half[here]
        oil = 0.5 + 0.5 * np.clip(m["oil"] + m["lips"], 0, 1)
        specular = (0.05 * shine**12 + 0.08 * shine**45) * oil * light.visible[here] * (1 - 0.9 * cover[:, 0])
        return albedo * light.diffuse(here, occlusion) + specular[:, None]

    def _scalp(self, albedo, base):
        """Darken the skin under close-cropped or thinning hair."""
        if self.person.style == "bald":
            return albedo
        d = base - CROWN_CENTRE
        polar = np.degrees(np.arctan2(np.hypot(d[:, 0], d[:, 2]), d[:, 1]))
        line = np.interp(np.arctan2(d[:, 0], d[:, 2]), self.azimuth_Z, hairline(self.person, self.azimuth_Z))
        amount = 0.85 if self.person.style != "receding" else 0.55
        w = (smooth(2, -4, polar - line) * amount * (base[:, 1] > 6.6) * (np.abs(d[:, 0]) < 0.80))[:, None]
        return albedo * (1 - w) + linear(self.person.hair_3 * 0.9) * w

    def _eye(self, tri, bary, light, here):
        at = interpolate(self.xyz, tri, bary)
        centre = np.where(at[:, :1] > 0, *self.eye_centres)
        out = unit(at - centre)
        angle = np.degrees(np.arccos(np.clip(out @ unit(self.camera.gaze), -1, 1)))
        iris = linear(self.person.iris_3) * (1.2 - 0.6 * smooth(16, 27, angle))[:, None]
        w = smooth(30, 27, angle)[:, None]
        albedo = linear([0.87, 0.85, 0.82]) * (1 - w) + iris * w
        albedo = albedo * (1 - 0.97 * smooth(13, 10, angle))[:, None]
        lid = 0.50 + 0.50 * smooth(0.10, 0.015, at[:, 1] - centre[:, 1])
        glint = 0.8 * light.half[here] ** 90 * light.visible[here]
        return albedo * light.diffuse(here, np.float32(0.6)) * lid[:, None] + glint[:, None]

    def _piece(self, piece: Surface, extra, light, here):
        albedo, shine = extra[:, :3], light.half[here]
        if piece.strand_V2 is None:
            specular = piece.gloss * 0.25 * shine**25 * light.visible[here]
            return albedo * light.diffuse(here, np.float32(0.85)) + specular[:, None]
        streak = lookup(self.skin.noise, extra[:, 3] * 420, extra[:, 4] * 14 + self.person.seed % 199, True)[:, 1:]
        root = 0.80 + 0.20 * smooth(0.0, 0.25, extra[:, 4])[:, None]
        band = np.exp(-(((extra[:, 4] - 0.26) / 0.07) ** 2)) * piece.gloss  # the ring-shaped highlight of smooth hair
        specular = (0.05 * band + 0.03 * piece.gloss * shine**8) * (1 + 0.5 * streak[:, 0]) * light.visible[here]
        tint = 0.35 + 0.65 * albedo / np.maximum(albedo.max(1, keepdims=True), 1e-3)
        matte = albedo * root * (1 + 0.20 * streak) * light.diffuse(here, np.float32(0.75))
        return matte + np.clip(specular, 0, 1)[:, None] * tint


class _Light:
    """A key light with a shadow map, a fill light from the other side, and light from above and below."""

    def __init__(self, shot: Shot, scene: _Scene, at, normal) -> None:
        az, el = np.radians([shot.azimuth, shot.elevation])
        self.key = np.array([np.sin(az) * np.cos(el), np.sin(el), np.cos(az) * np.cos(el)], np.float32)
        fill = unit(np.array([-np.sin(az), 0.1, 0.8], np.float32))
        tone = shot.strength * np.array([1 + shot.warmth, 1, 1 - shot.warmth], np.float32)
        self.visible = self._unshadowed(scene, at, normal)
        cosine = (normal @ self.key)[:, None]
        lit = np.clip((cosine + WRAP) / (1 + WRAP), 0, 1) ** 1.15 * (0.30 + 0.70 * self.visible[:, None])
        filled = np.clip(normal @ fill * 0.7 + 0.3, 0, 1)[:, None] * np.array([0.19, 0.195, 0.20], np.float32)
        self.direct = 0.72 * tone * lit + filled
        self.sky = (0.13 + 0.16 * (0.5 + 0.5 * normal[:, 1]))[:, None]
        self.half = np.clip(normal @ unit(self.key + np.array([0, 0, 1], np.float32)), 0, 1)

    def diffuse(self, here, occlusion):
        """Return the light [n, 3] that arrives at the points `here`."""
        return self.direct[here] + self.sky[here] * np.reshape(occlusion, (-1, 1))

    def _unshadowed(self, scene, at, normal):
        across = unit(np.cross(self.key, [0, 1, 0.01])).astype(np.float32)
        up = np.cross(across, self.key).astype(np.float32)
        scale = SHADOW_SIZE / (2.8 * scene.camera.height)

        def project(points):
            xy = np.stack([points @ across, points @ up], 1) * scale + SHADOW_SIZE / 2
            return xy.astype(np.float32), -(points @ self.key)

        xy, depth = project(scene.view)
        _, _, nearest = rasterise(xy, depth.astype(np.float32), scene.tri, SHADOW_SIZE)
        xy, depth = project(at + normal * 0.03)
        x, y = (np.clip(c - 0.5, 0, SHADOW_SIZE - 2) for c in xy.T)
        x0, y0, seen = x.astype(int), y.astype(int), 0.0
        grid, fx, fy = nearest.reshape(SHADOW_SIZE, SHADOW_SIZE), x - x.astype(int), y - y.astype(int)
        for dy, wy in ((0, 1 - fy), (1, fy)):
            for dx, wx in ((0, 1 - fx), (1, fx)):
                seen = seen + wx * wy * smooth(0.14, 0.05, depth - grid[y0 + dy, x0 + dx])
        return seen.astype(np.float32)


def _srgb(linear_light):
    c = np.clip(linear_light, 0, 1)
    return np.where(c <= 0.0031308, c * 12.92, 1.055 * np.maximum(c, 1e-8) ** (1 / 2.4) - 0.055)
