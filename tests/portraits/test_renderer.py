"""The renderer keeps its laws: same draw, same image; looks know no attributes; shards know no workers."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

for package in ("anny", "numba"):
    if find_spec(package) is None:
        pytest.skip(f"the renderer needs `{package}` (pip install fairdiff[build])", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "build_portraits"))

from look import look_for_occupation, neutral_look  # noqa: E402
from make_data import TYPES, Job, plan, write_shard  # noqa: E402
from objects import OBJECTS, draw_object  # noqa: E402
from people import sample_person, sample_shot  # noqa: E402
from raster import interpolate, rasterise, vertex_normals  # noqa: E402
from render import Renderer  # noqa: E402


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer()


def draw(renderer: Renderer, seed: int, classes=(0, 0, 0), occupation: str = "nurse") -> np.ndarray:
    rng = np.random.default_rng(seed)
    person = sample_person(rng, *classes, renderer.local_names)
    return renderer.render(person, sample_shot(rng), look_for_occupation(occupation, rng), rng)


def test_nearer_triangle_wins_and_weights_rebuild_the_pixel():
    xy = np.array([[0, 0], [8, 0], [0, 8], [0, 0], [8, 0], [0, 8]], np.float32)
    depth = np.array([2, 2, 2, 1, 1, 1], np.float32)
    face, bary, nearest = rasterise(xy, depth, np.array([[0, 1, 2], [3, 4, 5]], np.int32), 8)
    hit = face >= 0
    assert set(face[hit]) == {1}
    assert np.all(nearest[hit] == 1)
    pixel = np.flatnonzero(hit)
    tri = np.repeat(np.array([[3, 4, 5]], np.int32), len(pixel), 0)
    at = interpolate(xy, tri, bary[hit])
    np.testing.assert_allclose(at, np.stack([pixel % 8, pixel // 8], 1) + 0.5, atol=1e-4)


def test_normals_of_a_sheet_point_one_way():
    xyz = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32)
    np.testing.assert_allclose(vertex_normals(xyz, np.array([[0, 1, 2, 3]], np.int32)), [[0, 0, 1]] * 4, atol=1e-6)


def test_same_draw_same_picture_other_draw_other_picture(renderer):
    first = draw(renderer, 3)
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, draw(renderer, 3))
    assert np.abs(first.astype(float) - draw(renderer, 4)).mean() > 10


def test_every_class_draws_a_face_in_the_middle_in_its_skin(renderer):
    """Among young and old alike the cheeks of darker palettes come out darker: White > Indian > Black."""
    level = {}
    for race in (0, 1, 2):
        faces = [draw(renderer, seed, (seed % 2, race, seed // 2 % 2), "nurse")[30:42, 26:38] for seed in range(8)]
        level[race] = float(np.mean(faces))
    assert level[0] > level[2] + 20 > level[1] + 40


def test_age_and_gender_move_the_mesh(renderer):
    rng = np.random.default_rng(0)
    person = sample_person(rng, 0, 0, 0, renderer.local_names)
    young = renderer.morph(person)
    for other in (replace(person, years=75.0), replace(person, masculine=1.0)):
        moved = np.linalg.norm(renderer.morph(other) - young, axis=1)
        assert moved.max() > 0.03


def test_an_occupation_has_one_look_for_everyone():
    names = ("carpenter", "tax preparer", "web designer", 17)
    for name in names:
        looks = [look_for_occupation(name, np.random.default_rng(seed)) for seed in range(6)]
        assert len({(k.outfit, k.headwear, k.prop, k.scene) for k in looks}) == 1
        assert np.ptp([k.main_3 for k in looks], axis=0).max() < 0.3
    different = {
        (k.outfit, k.headwear, k.prop, k.scene)
        for k in (look_for_occupation(i, np.random.default_rng(0)) for i in range(100))
    }
    assert len(different) > 95


def test_neutral_looks_carry_no_sign_of_work():
    rng = np.random.default_rng(1)
    looks = [neutral_look(rng) for _ in range(50)]
    assert {k.headwear for k in looks} == {"none"} and {k.prop for k in looks} == {"none"}


def test_objects_are_those_of_the_world_and_differ():
    from fairdiff.portraits import occupations

    assert occupations.OBJECTS == OBJECTS
    pictures = [draw_object(i, np.random.default_rng(0)) for i in range(len(OBJECTS))]
    assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == len(OBJECTS)


def test_shards_depend_on_seed_and_number_only_and_keep_people_whole(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shard(Job(2, 80, 5, tmp_path / name))
    first, second = (np.load(tmp_path / name / "shard_00002.npz") for name in ("a", "b"))
    assert all(np.array_equal(first[key], second[key]) for key in ("image", *TYPES))
    assert not list(tmp_path.glob("*/*.part*"))
    person, split = first["person"], first["split"]
    people = person >= 0
    assert all(len(set(split[person == p])) == 1 for p in set(person[people]))
    assert np.bincount(person[people]).max() == 4
    assert np.array_equal(~people, first["occupation"] == -2) and np.array_equal(~people, first["object"] >= 0)
    years, old = first["age_years"][people], first["age"][people] == 1
    assert ((years[old] >= 58) & (years[old] <= 80)).all() and ((years[~old] >= 18) & (years[~old] <= 40)).all()


def test_plan_covers_every_picture_once(tmp_path):
    assert [job.count for job in plan(1203, 0, tmp_path)] == [500, 500, 203]
