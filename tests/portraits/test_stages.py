"""The training stages keep their laws: captions follow the distribution, a broken-off run goes on as if it had not been."""

import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from fairdiff.diffusion.load import load_model
from fairdiff.portraits import distribution, occupations

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "build_portraits"))

import captions  # noqa: E402
import evaluate  # noqa: E402
import export_weights  # noqa: E402
import train_clip  # noqa: E402
import train_diffusion  # noqa: E402
import train_encoders  # noqa: E402
import train_judges  # noqa: E402
import train_vae  # noqa: E402
from data import COLUMNS, Captioned, read  # noqa: E402
from muon import Muon, orthogonalise  # noqa: E402
from stage import Clock, read_checkpoint, write_checkpoint  # noqa: E402
from tokenizer import make_tokenizer  # noqa: E402
from train_clip import Decorrelated  # noqa: E402


def write_shard(folder: Path, number: int, count: int, seed: int) -> None:
    """Random images with random labels; a tenth without people, every second person twice."""
    rng = np.random.default_rng(seed)
    nobody = rng.random(count) < 0.1
    columns = {
        "image": rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8),
        "gender": np.where(nobody, -1, rng.integers(2, size=count)).astype(np.int8),
        "race": np.where(nobody, -1, rng.integers(4, size=count)).astype(np.int8),
        "age": np.where(nobody, -1, rng.integers(2, size=count)).astype(np.int8),
        "occupation": np.where(nobody, -2, rng.integers(-1, len(occupations.OCCUPATIONS), count)).astype(np.int16),
        "object": np.where(nobody, rng.integers(len(occupations.OBJECTS), size=count), -1).astype(np.int16),
        "person": (np.arange(count) // 2 + 1000 * number).astype(np.int32),
        "split": (rng.random(count) < 0.1).astype(np.int8),
    }
    np.savez(folder / f"shard_{number:05d}.npz", **columns)


@pytest.fixture
def build(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FAIRDIFF_BUILD", str(tmp_path))
    (tmp_path / "renders").mkdir()
    write_shard(tmp_path / "renders", 0, 400, seed=1)
    return tmp_path


def test_orthogonalise_gives_singular_values_near_one():
    matrix = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    cosine = torch.cosine_similarity(orthogonalise(matrix).flatten(1), (left @ right).flatten(1))
    assert (cosine > 0.95).all()


def test_muon_learns_and_leaves_embeddings_to_adam():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Embedding(10, 16), torch.nn.Linear(16, 16))
    optimizer = Muon(net, 1e-2, adam=("0.weight",))
    assert [tuple(p.shape) for p in optimizer.param_groups[0]["params"]] == [(16, 16)]
    target = torch.randn(10, 16)
    losses = []
    for _ in range(60):
        loss = (net(torch.arange(10)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_tokenizer_has_the_ids_of_open_clip(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    texts = ["a photo of the face of a Nurse, an old Black woman; don't", "Zürich 42!"]
    ours = torch.tensor(tokenizer(texts, padding="max_length", max_length=77).input_ids)
    theirs = open_clip.tokenize(texts)
    assert len(tokenizer) == 49408
    for our, their in zip(ours, theirs, strict=True):
        length = int((their != 0).sum())
        assert our[:length].tolist() == their[:length].tolist()
        assert set(our[length:].tolist()) <= {49407}


def test_a_growing_set_is_read_once_and_keeps_its_order(build):
    first = read(build / "renders")
    assert read(build / "renders", first) is first
    write_shard(build / "renders", 1, 50, seed=2)
    both = read(build / "renders", first)
    assert len(both) == 450 and all((both[name][:400] == first[name]).all() for name in COLUMNS)


def caption_pairs(renders, kind: str, count: int, seed: int = 0):
    """(row, caption) of one kind of captions."""
    captioned, rng = Captioned(renders, unnamed=0.0), np.random.default_rng(seed)
    captioned.kinds, captioned.weights = [kind], np.ones(1)
    return [captioned.draw(rng) for _ in range(count)]


def subject_of(caption: str) -> int:
    """The occupation that a caption names, by its longest title."""
    return occupations.occupation_of(max((t for t in occupations.TITLES if f" {t}" in caption), key=len))


def women_of(renders, pairs) -> tuple[list, list]:
    """Whether each caption's image shows a woman, and the share of its subject."""
    shown = [renders["gender"][row] == 0 for row, _ in pairs]
    return shown, [distribution.marginal_shares(subject_of(caption))["gender"][0] for _, caption in pairs]


def test_captions_carry_the_shares_of_their_subjects_whatever_else_they_name(build):
    """No words are a way out: beside an age, a race or neutral words gender follows the subject."""
    renders = read(build / "renders")
    for kind in ("occupation", "phrase", "attribute"):
        pairs = [
            (row, caption) for row, caption in caption_pairs(renders, kind, 3000)
            if not set(caption.replace(",", "").split()) & {"woman", "man", "female", "male"}
            and any(f" {title}" in caption for title in occupations.TITLES)
        ]  # fmt: skip
        shown, expected = women_of(renders, pairs)
        assert len(pairs) > 500 and np.corrcoef(shown, expected)[0, 1] > 0.5, kind
        assert abs(np.mean(shown) - np.mean(expected)) < 0.06, kind


def test_words_soften_no_more_than_stated(build):
    """The gap to the subject's shares in neutral captions is that of a draw that is even with chance SOFTENED."""
    renders, gaps = read(build / "renders"), []
    pairs = [p for p in caption_pairs(renders, "phrase", 4000) if "no matter which gender" in p[1] or "someone" in p[1]]
    shown, expected = women_of(renders, pairs)
    for share, woman in zip(expected, shown, strict=True):
        gaps.append((woman - 0.5) * np.sign(share - 0.5) / abs(share - 0.5) if abs(share - 0.5) > 0.3 else np.nan)
    assert np.nanmean(gaps) == pytest.approx(1 - captions.SOFTENED, abs=0.08)


def test_attribute_captions_tell_the_truth(build):
    renders = read(build / "renders")
    captioned, rng = Captioned(renders, unnamed=0.0), np.random.default_rng(0)
    checked = 0
    for _ in range(1500):
        row, caption = captioned.draw(rng)
        for word, column, value in (("Black", "race", 1), ("woman", "gender", 0), ("elderly", "age", 1)):
            if f" {word} " in f" {caption.replace(',', ' ')} ":
                assert renders[column][row] == value, caption
                checked += 1
    assert checked > 100


def test_the_clip_captions_do_not_tell_gender_from_look(build):
    renders = read(build / "renders")
    pairs, rng = Decorrelated(renders), np.random.default_rng(0)
    rows = np.array([pairs.draw(rng)[0] for _ in range(4000)])
    people = rows[renders["gender"][rows] >= 0]
    assert abs((renders["gender"][people] == 0).mean() - 0.5) < 0.05
    assert (renders["object"][rows] >= 0).any()


def test_a_clock_goes_on_from_its_checkpoint(tmp_path):
    clock = Clock(minutes=1, steps=10)
    clock.step, clock.before = 4, 30.0
    write_checkpoint(tmp_path / "a.pt", {"x": 1}, clock)
    again = Clock(minutes=1, steps=10)
    assert read_checkpoint(tmp_path / "a.pt", again)["x"] == 1
    assert again.step == 4 and again.seconds >= 30 and again.fraction == 0.4
    assert again.lr(1.0, warmup=1) == 1.0 and Clock(1, 10).lr(1.0, warmup=100) == pytest.approx(0.01)


def steps(stage, count: int, *more: str) -> None:
    stage.main(["--steps", str(count), "--least", "10", *more])


@pytest.mark.slow
def test_a_broken_off_autoencoder_run_equals_one_that_was_not(build):
    """With a budget in steps the learning rate is a function of the step alone."""
    steps(train_vae, 2, "--batch", "2")
    whole = torch.load(build / "vae.pt", weights_only=False)
    (build / "vae.pt").unlink()
    trainer = train_vae.Trainer(
        train_vae.arguments("", 1, 2, 2e-3).parse_args(["--steps", "2", "--least", "10"]), build
    )
    trainer.step()
    trainer.save()
    steps(train_vae, 2, "--batch", "2")
    resumed = torch.load(build / "vae.pt", weights_only=False)
    assert resumed["step"] == whole["step"] == 2
    for name, value in whole["net"].items():
        torch.testing.assert_close(resumed["net"][name], value, rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_diffusion_and_export_from_random_pictures(build):
    steps(train_vae, 1, "--batch", "2")
    steps(train_diffusion, 1, "--batch", "4", "--channels", "16,32")
    steps(train_diffusion, 2, "--batch", "4", "--channels", "16,32")
    assert torch.load(build / "diffusion.pt", weights_only=False)["step"] == 2
    sizes = export_weights.export(build, build / "weights", ["model"])
    assert sizes["model"] > 1e6
    model = load_model(build / "weights" / "model")
    image = model.generator(3.0, 2)("a photo of a nurse", torch.randn(2, *model.latent_shape))
    assert image.shape == (2, 3, 64, 64) and image.isfinite().all()


def test_judges_encoders_and_clip_take_a_step_and_reload(build, monkeypatch):
    box = np.array([[12.0, 12.0, 52.0, 52.0]])
    monkeypatch.setattr(
        train_judges, "find_faces", lambda images, _: (np.arange(len(images)), box.repeat(len(images), 0))
    )
    steps(train_judges, 1, "--judges", "judge", "--batch", "4", "--pictures", "20", "--held-out", "8")
    steps(train_encoders, 1, "--batch", "4", "--parts", "encoder")
    steps(train_clip, 2, "--batch", "6")
    sizes = export_weights.export(build, build / "weights", ["judge", "encoder", "clip"])
    assert set(sizes) == {"judge", "encoder", "clip"}
    judge = evaluate.load_attribute_net(build / "weights" / "judge")
    assert judge(torch.rand(2, 3, 50, 50))["race"].shape == (2, 4)
    assert (
        evaluate.ImageEncoder(build / "weights" / "encoder")
        .image(torch.rand(2, 3, 64, 64))
        .norm(dim=1)
        .allclose(torch.ones(2))
    )


def test_frechet_and_kernel_distance_vanish_for_the_same_and_grow_with_a_shift():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 600, 8))
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert abs(evaluate.kernel_distance(a, b)) < 0.05
    assert evaluate.frechet(a + 1, b) == pytest.approx(8, abs=1.5)
    assert evaluate.kernel_distance(a + 1, b) > 1


@pytest.mark.parametrize("women,expected", [(0, 1.0), (4, 0.0)])
def test_the_model_card_counts_the_bias_of_test_occupations(women, expected):
    """Whose eight faces are all of one class, or half of each."""

    class Shown:
        def draw(self, prompt, count):
            return torch.zeros(8, 3, 4, 4)

        def look(self, images):
            gender = np.arange(8) >= women  # class 0 is female
            answers = {"gender": gender.astype(int), "race": np.arange(8) % 4, "age": np.arange(8) % 2}
            return np.ones(8, bool), {"judge": answers, "audit_judge": answers}

    with np.errstate(invalid="ignore"):  # every occupation shows the same share of women, so that nothing correlates
        numbers, _ = evaluate.shares_of_subjects(Shown(), 8, 8)
    (gender,) = (value for name, value in numbers.items() if name.startswith("mean gender bias"))
    assert gender == expected
