"""Baselines without training: closed forms against descent and brute force, words against their target, plain diffusers."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from fairdiff.diffusion.imports import import_lora
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError
from fairdiff.objective.targets import Target, Targets
from fairdiff.portraits.occupations import MEASURED_WORDS
from fairdiff.prompts import Prompt, fill
from fairdiff.studies import edits, words

PHRASES = {"gender": {"female": "a woman", "male": "a man"}}
HALF = Targets(Target.from_marginals({"gender": [0.5, 0.5]}))
NURSE = Prompt("a photo of the face of a nurse, a person", "occupation", "nurse")
CHEF = Prompt("a photo of the face of a chef, a person", "occupation", "chef")
NAMED = Prompt("a photo of the face of a nurse, a woman", "occupation", "nurse", names="gender.female")
THING = Prompt("a photo of a face", "object", "face", people=False)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_closed_form_of_uce_is_where_descent_on_its_objective_ends():
    width, edited, shift, kept, W = 5, draw(4, 5), draw(4, 5, seed=1), draw(6, 5, seed=2), draw(3, 5, seed=3)
    values, ridge = (edited + shift) @ W.T, 0.3

    def objective(new: torch.Tensor) -> torch.Tensor:
        misses = ((edited @ new.T - values) ** 2).sum() + ((kept @ (new - W).T) ** 2).sum()
        return misses + ridge * ((new - W) ** 2).sum()

    new = W.clone().requires_grad_()
    descent = torch.optim.LBFGS([new], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    descent.step(lambda: (descent.zero_grad(), loss := objective(new), loss.backward())[1])
    found = W @ edits.closed_form(edited, shift, kept, ridge)
    assert torch.allclose(new.detach(), found, atol=1e-6)
    # the same as one least-squares problem with the ridge as further rows
    rows = torch.cat([edited, kept, ridge**0.5 * torch.eye(width).double()])
    right = torch.cat([values, kept @ W.T, ridge**0.5 * W.T])
    assert torch.allclose(torch.linalg.lstsq(rows, right).solution.T, found, atol=1e-9)


def test_an_edit_without_targets_changes_nothing_and_what_is_kept_stays():
    nothing, kept = torch.zeros(0, 5, dtype=torch.float64), draw(3, 5)
    assert torch.equal(edits.closed_form(nothing, nothing, kept), torch.eye(5).double())
    assert torch.allclose(edits.closed_form(draw(4, 5), torch.zeros(4, 5).double(), kept), torch.eye(5).double())
    moved = edits.closed_form(draw(1, 5, seed=4), draw(1, 5, seed=5), 1e4 * kept, 1e-9)
    assert torch.allclose(kept @ moved.T, kept, atol=1e-3)  # as far as they span, at any price
    assert not torch.allclose(moved, torch.eye(5).double(), atol=1e-2)


@pytest.mark.parametrize("classes,shares", [(2, [0.5, 0.5]), (2, [0.8, 0.2]), (4, [0.4, 0.3, 0.2, 0.1])])
def test_a_shift_gives_the_mixture_along_the_classes_and_nothing_elsewhere(classes, shares):
    concept, each, shares = draw(3, 6), draw(classes, 3, 6, seed=1), torch.tensor(shares).double()
    shift = edits.towards_mixture(concept, each, shares)
    for token in range(3):
        apart = each[:, token] - each[:, token].mean(0)
        there = apart @ (concept[token] + shift[token])
        assert torch.allclose(there, apart @ (shares @ each[:, token]), atol=1e-9)
        assert torch.allclose(edits.removing(apart) @ shift[token], torch.zeros(6).double(), atol=1e-9)


def test_the_projection_is_idempotent_symmetric_and_removes_its_directions():
    directions = draw(2, 6)
    P = edits.removing(directions)
    assert torch.allclose(P @ P, P) and torch.allclose(P, P.T)
    assert torch.allclose(P @ directions.T, torch.zeros(6, 2).double())
    rest = torch.linalg.svd(directions).Vh[2:]
    assert torch.allclose(rest @ P.T, rest)  # what has nothing of them stays


def test_the_calibrated_projection_minimises_its_objective_and_in_the_limit_equalises_the_pairs():
    P0, pairs, strength = edits.removing(draw(1, 5)), draw(4, 2, 5, seed=1), 3.0
    P = edits.calibrated(P0, pairs, strength)

    def objective(one: torch.Tensor) -> torch.Tensor:
        gaps = (pairs[:, 0] - pairs[:, 1]) @ one.T
        return ((one - P0) ** 2).sum() + strength * (gaps**2).sum() / len(pairs)

    around = P.clone().requires_grad_()
    objective(around).backward()
    assert around.grad.abs().max() < 1e-9  # convex: the one minimum
    gaps = [((pairs[:, 0] - pairs[:, 1]) @ edits.calibrated(P0, pairs, s).T).norm() for s in (0.0, 1.0, 100.0, 1e12)]
    assert torch.equal(edits.calibrated(P0, pairs, 0.0), P0) and gaps[0] > gaps[1] > gaps[2] and gaps[3] < 1e-6


def test_edits_of_a_model_are_lora_that_diffusers_loads_and_that_changes_what_reads_a_text(tiny_folder, tmp_path):
    model = load_model(tiny_folder)
    prompts = [NURSE, CHEF, NAMED, THING]
    T = edits.uce(model, prompts, HALF, PHRASES, 1.0)
    layers = edits.fold(model, T)
    before = {name: layer.weight.clone() for name, layer in model.unet.named_modules() if name.endswith(edits.READS)}
    assert layers["unet"].keys() == before.keys() and len(before) == 14
    for name, factors in layers["unet"].items():
        wanted = before[name].double() @ (T - torch.eye(16).double())
        assert torch.allclose(factors.delta().double(), wanted, atol=1e-5), name
    edits.save_edit(tmp_path, layers)
    noise = initial_noise(NURSE.text, 0, range(2), model.latent_shape)
    lora = import_lora(model, [tmp_path], [1.0])
    ours = model.generator(3.0, 3)(NURSE.text, noise)
    with lora.off():
        assert not torch.allclose(ours, model.generator(3.0, 3)(NURSE.text, noise), atol=1e-4)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        text = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))
        sample = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        merged = load_model(tiny_folder).unet
        for name, layer in merged.named_modules():
            if name in before:
                layer.weight.data = (layer.weight.double() @ T).float()
        read = [unet(sample, 5, encoder_hidden_states=text).sample for unet in (pipe.unet, merged)]
    assert torch.allclose(*read, atol=1e-5)


def test_uce_of_prompts_is_the_closed_form_of_their_tokens(tiny_model):
    """Each token from the subject's last one on is compared with the prompt that names a person of each class instead."""

    def tokens(text: str, word: str) -> torch.Tensor:
        return edits._words(tiny_model, text)[edits._end(tiny_model, text, word) :]

    own = tokens(NURSE.text, "nurse")
    woman, man = (tokens(f"a photo of the face of a {word}, a person", word) for word in ("woman", "man"))
    length = min(map(len, (own, woman, man)))
    woman, man, first = woman[:length], man[:length], own[:length]
    along = ((woman - man) * ((woman + man) / 2 - first)).sum(1) / ((woman - man) ** 2).sum(1)
    shift = torch.zeros_like(own)
    shift[:length] = 0.7 * along[:, None] * (woman - man)
    named = edits._words(tiny_model, NAMED.text)[edits._end(tiny_model, NAMED.text, "nurse") + 1 :]
    kept = torch.cat([named, edits._words(tiny_model, THING.text)])
    found = edits.uce(tiny_model, [NURSE, NAMED, THING, NURSE], HALF, PHRASES, 0.7)
    assert torch.allclose(found, edits.closed_form(own, shift, kept), atol=1e-9)
    assert not torch.allclose(found, torch.eye(16).double(), atol=1e-2)
    assert torch.allclose(edits.uce(tiny_model, [NURSE, NAMED], HALF, PHRASES, 0.0), torch.eye(16).double())


def test_debias_vl_takes_the_classes_out_of_the_texts_it_was_given(tiny_model):
    P = edits.debias_vl(tiny_model, [NURSE, CHEF, THING], PHRASES)

    def gap(prompt: Prompt, by: torch.Tensor) -> float:
        ends = [edits._last(tiny_model, prompt.text.replace("a person", w)) for w in ("a woman", "a man")]
        return float(((ends[0] - ends[1]) @ by.T).norm())

    for prompt in (NURSE, CHEF):
        assert gap(prompt, P) < 0.2 * gap(prompt, torch.eye(16).double())


def test_the_ethical_intervention_says_what_the_measured_template_does():
    wanted = fill(MEASURED_WORDS["ethical intervention"], "nurse")
    rewrite = words.ethical([NURSE, THING], ["gender"])
    noise = torch.zeros(2, 1)
    assert rewrite(NURSE.text, noise) == [wanted] * 2 and rewrite(THING.text, noise) == [THING.text] * 2


def test_random_phrases_have_the_targets_shares_and_are_the_same_in_any_batch():
    prompts = [NURSE, CHEF, NAMED, THING]
    targets = Targets(HALF.common, {CHEF.text: Target.from_marginals({"gender": [0.8, 0.2]})})
    rewrite = words.random_phrases(prompts, targets, PHRASES, seed=0)
    for prompt, share in ((NURSE, 0.5), (CHEF, 0.8)):
        noise = initial_noise(prompt.text, 3, range(4000), (1, 1, 1))
        texts = rewrite(prompt.text, noise)
        woman = prompt.text.replace("a person", "a woman")
        assert abs(texts.count(woman) / 4000 - share) < 3 * np.sqrt(share * (1 - share) / 4000)
        assert set(texts) == {woman, prompt.text.replace("a person", "a man")}
        assert [t for i in range(0, 40, 7) for t in rewrite(prompt.text, noise[i : min(i + 7, 40)])] == texts[:40]
        assert words.random_phrases(prompts, targets, PHRASES, seed=1)(prompt.text, noise[:40]) != texts[:40]
    assert rewrite(NAMED.text, noise[:2]) == [NAMED.text] * 2 and rewrite(THING.text, noise[:2]) == [THING.text] * 2


def test_several_attributes_are_drawn_from_their_joint_target():
    joint = Target(("gender", "race"), np.array([[0.6, 0.0], [0.0, 0.4]]))
    phrases = PHRASES | {"race": {"White": "a White person", "Black": "a Black person"}}
    texts = words.random_phrases([NURSE], Targets(joint), phrases, 0)(NURSE.text, draw(300, 1))
    start = "a photo of the face of a nurse"
    assert set(texts) == {f"{start}, a woman, a White person", f"{start}, a man, a Black person"}


def test_images_of_a_random_text_are_those_of_the_text_with_the_same_noise(tiny_model):
    rewrite, generate = words.random_phrases([NURSE], HALF, PHRASES, 0), tiny_model.generator(2.0, 2)
    noise = initial_noise(NURSE.text, 0, range(5), tiny_model.latent_shape)
    texts = rewrite(NURSE.text, noise)
    assert len(set(texts)) == 2
    images = words.with_words(rewrite, generate)(NURSE.text, noise)
    for i, text in enumerate(texts):
        assert torch.allclose(images[i], generate(text, noise[i : i + 1])[0], atol=1e-5)


def test_an_attribute_without_words_is_refused(tiny_model):
    with pytest.raises(FairDiffError, match="attributes.gender.phrases: found none"):
        words.random_phrases([NURSE], HALF, {"gender": {}}, 0)
    with pytest.raises(FairDiffError, match="found no training prompt of people"):
        edits.uce(tiny_model, [THING], HALF, PHRASES, 1.0)
