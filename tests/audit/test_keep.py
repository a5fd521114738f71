"""Kept images are those that were measured: the same judge gives the same records of them, another judge its own."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from tiny_world import ColourJudge, TinyGenerator, TinyPrompt

from fairdiff.audit.generate import run_audit
from fairdiff.builder.pictures import build_readers, numbers_alone
from fairdiff.pictures import read_pictures

BOTH = {"before": TinyGenerator(1.5), "after": TinyGenerator(0.0)}
NAMED = TinyPrompt('a photo of the face of a nurse, "a woman", a person', "occupation", "nurse", names="gender.female")


def quiet(_):
    pass


@pytest.fixture
def kept(plan, measurer, noise, tmp_path):
    """Return the plan, its records and the folder of its images."""
    plan = dataclasses.replace(plan, keep=True, named=[NAMED])
    return plan, run_audit(plan, BOTH, measurer, noise, tmp_path, quiet), tmp_path / "images"


def read_again(plan, measurer, images, folder) -> pd.DataFrame:
    given = read_pictures(str(images), None)
    assert given.pairing == "pair" and not given.unreadable and given.models == ["before", "after"]
    kinds = [[p for p in given.prompts if (p.people, bool(p.names)) == kind] for kind in [(1, 0), (1, 1), (0, 0)]]
    again = dataclasses.replace(
        plan, prompts=kinds[0], named=kinds[1], without_people=kinds[2], given=given.batches(7), keep=False, latent_shape=()
    )
    return run_audit(again, build_readers(given), measurer, numbers_alone, folder, quiet)


def test_the_same_judge_gives_the_same_records(kept, measurer, tmp_path):
    plan, records, images = kept
    assert len(list(images.rglob("*.png"))) == len(records) == 2 * plan.images_per_model
    again = read_again(plan, measurer, images, tmp_path / "again")
    exact = [c for c in records if records[c].dtype.kind != "f"]
    pd.testing.assert_frame_equal(again[exact], records[exact])
    pd.testing.assert_frame_equal(again, records, rtol=1e-3, atol=2e-3)  # features are kept in half precision
    classes = [c for c in records if c.startswith("p.gender")]
    labels = [rows.loc[rows.found, classes].to_numpy().argmax(1) for rows in (again, records)]
    assert np.array_equal(*labels) and len(labels[0]) > 100


class Contrary(ColourJudge):
    def __call__(self, crop_FCHW):
        return {name: -logits for name, logits in super().__call__(crop_FCHW).items()}


def test_another_judge_reads_the_same_images(kept, measurer, tmp_path):
    plan, records, images = kept
    again = read_again(plan, dataclasses.replace(measurer, judge=Contrary()), images, tmp_path / "again")
    found = records.found
    assert ((again["p.gender.female"] > 0.5) != (records["p.gender.female"] > 0.5))[found].all()
    assert (again[["found", "x0", "x1"]].fillna(0) == records[["found", "x0", "x1"]].fillna(0)).all(axis=None)


def test_what_is_kept_goes_on_and_a_lost_image_is_generated_again(kept, measurer, noise, tmp_path):
    plan, records, images = kept
    generator = TinyGenerator(1.5)
    run_audit(plan, {"before": generator}, measurer, noise, tmp_path, quiet)
    assert generator.calls == 0
    lost = sorted((images / "before").rglob("*.png"))[3]
    lost.unlink()
    again = run_audit(plan, BOTH | {"before": generator}, measurer, noise, tmp_path, quiet)
    assert generator.calls > 0 and lost.exists()
    pd.testing.assert_frame_equal(again, records)


def test_without_the_switch_nothing_is_kept_and_records_are_as_ever(plan, measurer, noise, tmp_path):
    run_audit(plan, BOTH, measurer, noise, tmp_path, quiet)
    assert not (tmp_path / "images").exists()
