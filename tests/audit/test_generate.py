"""Generation: same noise for both models, resumable, independent of the batch size, with errors for invalid input."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from full_disk import full_disk
from PIL import Image
from tiny_world import ColourJudge, TinyGenerator, TinyPrompt

from classifiers.detect import WholeImage
from fairdiff.audit.generate import run_audit
from fairdiff.audit.measure import cosine_to_others
from fairdiff.audit.records import STRIP, RecordStore, load_records, probability_columns, prompt_key
from fairdiff.errors import FairDiffError


def quiet(_):
    pass


@pytest.fixture
def audited(plan, measurer, noise, tmp_path) -> pd.DataFrame:
    return run_audit(
        plan, {"before": TinyGenerator(1.5), "after": TinyGenerator(0.0)}, measurer, noise, tmp_path, quiet
    )


def test_one_row_an_image_with_ground_truth_labels(audited, plan, noise):
    assert len(audited) == 2 * plan.images_per_model == 2 * (3 * 24 + 2 * 6)
    nurse = audited.query("model == 'before' and subject == 'nurse'")
    red = noise(plan.prompts[0].text, 7, range(24), (3, 4, 4)).mean((2, 3)).mul(4)[:, 0].numpy()
    assert nurse.found.all()
    assert ((nurse["p.gender.female"] > 0.5).to_numpy() == (red + 1.5 > 0)).all()
    assert list(nurse.image_index) == list(range(24))
    assert set(nurse.judge_hash) == {"j0"} and set(nurse.model_hash) == {"b0"}
    assert nurse[["x0", "y0", "x1", "y1"]].iloc[0].tolist() == [4, 4, 12, 12]


def test_pictures_without_a_face_have_no_probability_and_are_not_zero(audited, plan):
    objects = audited[~audited.people]
    assert not objects.found.any() and set(objects.prompt_index) == {3, 4}
    assert objects[probability_columns(plan.attributes)].isna().all(axis=None)
    assert objects[["clip_t", "between"]].notna().all(axis=None)


def test_cosines_compare_the_same_noise(audited):
    before, after = (audited[audited.model == m].reset_index() for m in ("before", "after"))
    assert before[["clip_i", "dino"]].isna().all(axis=None)
    same = (before["p.gender.female"] > 0.5) == (after["p.gender.female"] > 0.5)
    # if the adapter changes nothing, the two images are equal: cosine 1 up to fp16
    assert np.allclose(after.dino[same], 1, atol=2e-3) and np.allclose(after.clip_i[~after.people], 1, atol=2e-3)
    assert (after.dino[~same & after.people] < 0.99).all() and (~same).any()


def test_prompts_that_name_a_class_are_generated_beside_the_others_and_change_none(audited, plan, measurer, noise, tmp_path):
    named = [TinyPrompt("a photo of the face of a nurse, a woman", "occupation", "nurse", names="gender.female")]
    more = dataclasses.replace(plan, named=named)
    generators = {"before": TinyGenerator(1.5), "after": TinyGenerator(0.0)}
    records = run_audit(more, generators, measurer, noise, tmp_path / "named", quiet)
    own = records[records.names != ""]
    assert set(own.names) == {"gender.female"} and len(own) == 2 * plan.few_images and own.people.all()
    rest = records[records.names == ""].drop(columns="prompt_index").reset_index(drop=True)
    pd.testing.assert_frame_equal(rest, audited.drop(columns="prompt_index"))
    assert more.images_per_model == plan.images_per_model + plan.few_images


def test_any_batch_size_gives_the_same_records(audited, plan, measurer, noise, tmp_path):
    other = dataclasses.replace(plan, batch_size=24)
    generators = {"before": TinyGenerator(1.5), "after": TinyGenerator(0.0)}
    again = run_audit(other, generators, measurer, noise, tmp_path / "other", quiet)
    pd.testing.assert_frame_equal(audited, again, rtol=1e-3, atol=1e-3)


def test_resumes_where_it_stopped_and_regenerates_what_changed(plan, measurer, noise, tmp_path):
    class Stops(TinyGenerator):
        def __call__(self, prompt, latent):
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().__call__(prompt, latent)

    with pytest.raises(KeyboardInterrupt):
        run_audit(plan, {"before": Stops(1.5)}, measurer, noise, tmp_path, quiet)
    assert len(list((tmp_path / "records" / "before").glob("*.parquet"))) == 1
    seen, rest = [], TinyGenerator(1.5)
    run_audit(plan, {"before": rest}, measurer, noise, tmp_path, seen.append)
    assert rest.calls == 8 and sum(seen) == plan.images_per_model  # nurse's 3 batches were done: 3 + 3 + 1 + 1 left
    after = TinyGenerator(0.0)
    run_audit(plan, {"after": after}, measurer, noise, tmp_path, quiet)
    again = TinyGenerator(0.0)
    records = run_audit(plan, {"before": again, "after": again}, measurer, noise, tmp_path, quiet)
    assert again.calls == 0 and set(records.model) == {"before", "after"}
    retrained = dataclasses.replace(plan, hashes=plan.hashes | {"after": "a1"})
    run_audit(retrained, {"before": again, "after": again}, measurer, noise, tmp_path, quiet)
    assert again.calls == after.calls
    pd.testing.assert_frame_equal(load_records(tmp_path / "records.parquet").drop(columns="model_hash"),
                                  records.drop(columns="model_hash"))  # fmt: skip


def test_more_prompts_reuse_the_old_ones(plan, measurer, noise, tmp_path):
    fewer = dataclasses.replace(plan, prompts=plan.prompts[1:])
    run_audit(fewer, {"before": TinyGenerator(1.5)}, measurer, noise, tmp_path, quiet)
    generator = TinyGenerator(1.5)
    records = run_audit(plan, {"before": generator}, measurer, noise, tmp_path, quiet)
    assert generator.calls == 3
    assert records.drop_duplicates("subject").set_index("subject").prompt_index.to_dict() == {
        "nurse": 0, "pilot": 1, "baker": 2, "teapot": 3, "tree": 4,
    }  # fmt: skip


def test_strips_hold_the_first_pictures(audited, plan, tmp_path):
    path = RecordStore(tmp_path / "records").path("after", plan.prompts[0].text, "png")
    with Image.open(path) as image:
        assert image.size == (STRIP * 16, 16)


def test_bad_input_is_one_clear_error(plan, measurer, noise, tmp_path):
    def audit(plan=plan, generators=None, measurer=measurer):
        return run_audit(plan, generators or {"before": TinyGenerator(0)}, measurer, noise, tmp_path, quiet)

    replace = dataclasses.replace
    with pytest.raises(FairDiffError, match="empty"):
        audit(replace(plan, prompts=[]))
    with pytest.raises(FairDiffError, match="'a tree' occurs twice"):
        audit(replace(plan, without_people=[TinyPrompt("a tree", "object", "tree", people=False)] * 2))
    with pytest.raises(FairDiffError, match="requested race"):
        audit(replace(plan, attributes={"race": ("White", "Black")}))
    with pytest.raises(FairDiffError, match="classes of gender"):
        audit(replace(plan, attributes={"gender": ("male", "female")}))
    with pytest.raises(FairDiffError, match="audit it first"):
        audit(generators={"after": TinyGenerator(0)})
    with pytest.raises(FairDiffError, match="values nan to nan"):
        audit(generators={"before": lambda prompt, latent: torch.full((len(latent), 3, 16, 16), torch.nan)})
    with pytest.raises(FairDiffError, match=r"audit.judge: age: logits that are not finite for \d+ of \d+ faces of 'a"):
        audit(measurer=replace(measurer, judge=HalfBlind()))
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.png"))


class HalfBlind(ColourJudge):
    """A judge whose logits for age are NaN for some faces."""

    def __call__(self, crop_FCHW):
        logits = super().__call__(crop_FCHW)
        return logits | {"age": logits["age"].where(logits["gender"][:, :1] > 0, torch.nan)}


def test_encoders_may_be_absent(plan, measurer, noise, tmp_path):
    bare = dataclasses.replace(measurer, clip=None, encoder=None)
    records = run_audit(plan, {"before": TinyGenerator(1), "after": TinyGenerator(0)}, bare, noise, tmp_path, quiet)
    assert records[["clip_t", "clip_i", "dino", "between"]].isna().all(axis=None) and records.found.any()


def test_a_real_pipeline_and_detector_go_through(plan, measurer, noise, tmp_path, tiny_model):
    """The model is a diffusers model with random weights. The whole image is the face, also for prompts without people."""
    small = dataclasses.replace(
        plan,
        prompts=plan.prompts[:1],
        images_per_prompt=4,
        few_images=2,
        latent_shape=tiny_model.latent_shape,
    )
    whole = dataclasses.replace(measurer, detector=WholeImage())
    generate = tiny_model.generator(2.0, 2)
    records = run_audit(small, {"before": generate, "after": generate}, whole, noise, tmp_path, quiet)
    assert records.found.all() and records.filter(like="p.").notna().all(axis=None)
    assert np.allclose(records[records.model == "after"].dino, 1, atol=2e-3)
    assert not np.allclose(records.between, 1, atol=1e-6)


def test_mean_cosine_to_others_is_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 3))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [rows[i] @ rows[j] for i in range(5) for j in range(i)]
    assert cosine_to_others(rows).mean() == pytest.approx(np.mean(pairs))
    assert np.isnan(cosine_to_others(rows[:1])).all()


def test_unreadable_records_name_the_file(tmp_path):
    (tmp_path / "records.parquet").write_bytes(b"PAR1 cut short")
    for name in ("records.parquet", "absent.parquet"):
        with pytest.raises(FairDiffError, match=name):
            load_records(tmp_path / name)


def test_keys_differ_where_the_words_agree():
    assert prompt_key("a nurse!") != prompt_key("a nurse?")


class Refuses:
    def __call__(self, prompt, noise):
        raise AssertionError("generated again")


def test_runs_share_what_the_model_before_painted(audited, plan, measurer, noise, tmp_path):
    """A second run takes identical records of "before" from the first one, but only while their hashes are the same."""
    plan = dataclasses.replace(plan, shared=tmp_path / "shared")
    first = run_audit(
        plan, {"before": TinyGenerator(1.5), "after": TinyGenerator(0.0)}, measurer, noise, tmp_path / "1", quiet
    )
    second = run_audit(plan, {"before": Refuses(), "after": TinyGenerator(0.0)}, measurer, noise, tmp_path / "2", quiet)
    pd.testing.assert_frame_equal(first, second)
    pd.testing.assert_frame_equal(first, audited)
    other = dataclasses.replace(plan, hashes=plan.hashes | {"before": "b1"})
    with pytest.raises(AssertionError, match="generated again"):
        run_audit(other, {"before": Refuses()}, measurer, noise, tmp_path / "3", quiet)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fewer_rows(path):
    with np.load(path) as file:
        features = {name: file[name][1:] for name in file.files}
    np.savez(path, **features)


def zeros_inside(path):
    """Overwrite a part of the file with zeros, as a power failure may do; its size stays the same."""
    data = bytearray(path.read_bytes())
    data[100:600] = bytes(500)
    path.write_bytes(data)


DAMAGES = [(suffix, damage) for suffix in ("parquet", "npz", "png") for damage in (cut, zeros_inside)]
DAMAGES += [("npz", fewer_rows), *((s, lambda path: path.write_bytes(b"")) for s in ("parquet", "npz", "png"))]


@pytest.mark.parametrize("suffix,damage", DAMAGES)
@pytest.mark.parametrize("model", ["before", "after"])
def test_damaged_records_are_measured_anew_and_that_is_said(
    suffix, damage, model, audited, plan, measurer, noise, tmp_path, capsys
):
    store = RecordStore(tmp_path / "records")
    path = store.path(model, plan.prompts[1].text, suffix)
    damage(path)
    generators = {"before": TinyGenerator(1.5), "after": TinyGenerator(0.0)}
    again = run_audit(plan, generators, measurer, noise, tmp_path, quiet)
    pd.testing.assert_frame_equal(again, audited)
    assert [g.calls for g in generators.values()] == ([3, 0] if model == "before" else [0, 3])  # of one prompt
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {path}: cannot be read (") and line.endswith("generated and measured anew")
    refuse = {"before": Refuses(), "after": Refuses()}
    pd.testing.assert_frame_equal(run_audit(plan, refuse, measurer, noise, tmp_path, quiet), audited)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["parquet", "npz", "png"])
def test_damaged_records_of_the_cache_are_only_made_anew(suffix, audited, plan, measurer, noise, tmp_path):
    plan = dataclasses.replace(plan, shared=tmp_path / "shared")
    run_audit(plan, {"before": TinyGenerator(1.5)}, measurer, noise, tmp_path / "1", quiet)
    cut(RecordStore(tmp_path / "shared").path("before", plan.prompts[1].text, suffix))
    for run, calls in (("2", 3), ("3", 0)):  # the shared folder is complete again
        generator = TinyGenerator(1.5)
        again = run_audit(plan, {"before": generator}, measurer, noise, tmp_path / run, quiet)
        pd.testing.assert_frame_equal(again, audited[audited.model == "before"])
        assert generator.calls == calls


@pytest.mark.parametrize("room", [0, 200, 2000, 5000, 10000])
def test_a_full_disk_ends_an_audit_in_one_line_and_nothing_half_written_counts(
    room, audited, plan, measurer, noise, tmp_path
):
    generators = {"before": TinyGenerator(1.5), "after": TinyGenerator(0.0)}
    with full_disk(room), pytest.raises(FairDiffError, match="cannot be written .*File too large"):
        run_audit(plan, generators, measurer, noise, tmp_path / "full", quiet)
    assert not [path for path in (tmp_path / "full").rglob("*") if ".tmp" in path.name]
    again = run_audit(plan, generators, measurer, noise, tmp_path / "full", quiet)
    pd.testing.assert_frame_equal(again, audited)


def test_a_table_that_is_none_of_records_is_named(audited, tmp_path):
    audited.drop(columns="found").to_parquet(tmp_path / "records.parquet")
    with pytest.raises(FairDiffError, match="records.parquet: not a records table, it has no column found; remove report"):
        load_records(tmp_path / "records.parquet")
