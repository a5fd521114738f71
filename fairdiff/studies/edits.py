"""Closed-form baselines: a linear map T of the text embeddings, folded into the weights that read them, W' = W T.

Everything is computed from text embeddings, without an image and without training. The result is LoRA on the cross-attention
keys and values, of the rank of T - I, which any tool for LoRA loads.

UCE: Gandikota et al. 2024 (arXiv 2308.14761). W' minimises sum |W' c - v*|^2 + sum |W' c_p - W c_p|^2 + ridge |W' - W|^2
over edited embeddings c with values v*, and embeddings c_p to keep. Its debiasing variant sets v* = W (c + sum_k alpha_k a_k)
with a_k the embedding of class k. Hence W' - W = W D, D = sum d c^T (sum c c^T + sum c_p c_p^T + ridge I)^-1, with
d = sum_k alpha_k a_k. The paper finds alpha by generating images until they have the wanted shares. Here alpha makes c + d as
near to every class as the target's mixture of the classes is, so that no image is needed. The ridge is of the released code.

debiasVL: Chuang et al. 2023 (arXiv 2302.00070). P = P_0 (I + strength M)^-1, M the mean of (z_i - z_j)(z_i - z_j)^T over
pairs of prompts that differ in the class alone, P_0 the projection that removes the directions between classes. It minimises
|P - P_0|^2 + strength mean |P z_i - P z_j|^2. The released code multiplies the conditional embedding alone, without P_0;
folded into weights P acts on the unconditional one too.

Shapes: N embeddings, D their width, K classes.
"""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from fairdiff.diffusion.adapter_files import save_lora
from fairdiff.diffusion.folder import FAMILIES
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.lora_files import Factors, Layers, settings_of
from fairdiff.errors import FairDiffError
from fairdiff.objective.targets import Targets
from fairdiff.prompts import Prompt, with_article, with_phrase
from fairdiff.studies.words import Phrases, require_phrases

RIDGE = 0.5  # `lamb` of the released code of UCE
STRENGTH = 500.0  # `--lam` of the released code of debiasVL, for embeddings of length 1
READS = ("attn2.to_k", "attn2.to_v")  # the layers that read a text


def closed_form(edited_ND: Tensor, shift_ND: Tensor, kept_ND: Tensor, ridge: float = RIDGE) -> Tensor:
    """T [D, D] of UCE: T c is near c + d for the edited, near c_p for the kept. Without an edited one it is I."""
    width = edited_ND.shape[1]
    gram = edited_ND.T @ edited_ND + kept_ND.T @ kept_ND + ridge * torch.eye(width).to(edited_ND)
    right = torch.linalg.solve(gram, edited_ND.T @ shift_ND)  # gram is symmetric: right^T = sum d c^T gram^-1
    return torch.eye(width).to(edited_ND) + right.T


def removing(directions_ND: Tensor) -> Tensor:
    """P_0 [D, D], the orthogonal projection on what has nothing of these directions."""
    return torch.eye(directions_ND.shape[1]).to(directions_ND) - torch.linalg.pinv(directions_ND) @ directions_ND


def calibrated(projection_DD: Tensor, pairs_N2D: Tensor, strength: float = STRENGTH) -> Tensor:
    """P [D, D] = P_0 (I + strength M)^-1 of debiasVL."""
    gaps_ND = pairs_N2D[:, 0] - pairs_N2D[:, 1]
    spread = gaps_ND.T @ gaps_ND / len(gaps_ND)
    return torch.linalg.solve(torch.eye(len(spread)).to(spread) + strength * spread, projection_DD.T).T


def towards_mixture(concept_LD: Tensor, classes_KLD: Tensor, shares_K: Tensor) -> Tensor:
    """d [L, D], token by token in the span of the classes' differences, so that c + d has there what the mixture has."""
    classes_LKD = classes_KLD.transpose(0, 1)
    mixture_LD = shares_K @ classes_LKD
    apart_LKD = classes_LKD - classes_LKD.mean(1, keepdim=True)
    return (torch.linalg.pinv(apart_LKD) @ (apart_LKD @ (mixture_LD - concept_LD)[..., None]))[..., 0]


def uce(model: DiffusionModel, prompts: Iterable[Prompt], targets: Targets, phrases: Phrases, strength: float) -> Tensor:
    """T [D, D] that moves prompts of people to the target, `strength` times as far as the target, and keeps the others.

    Edited are all tokens from the last one of the subject on, as in the first release: they have read the subject. Kept are
    prompts without people, and in prompts that name a class what has read it.
    """
    require_phrases(phrases)
    edited, shifts, kept, read = [], [], [], cache(lambda text: _words(model, text))
    for prompt in dict.fromkeys(prompts):
        words = read(prompt.text)
        if prompt.names or not prompt.people:
            kept.append(words[_end(model, prompt.text, prompt.subject) + 1 if prompt.names else 0 :])
            continue
        own = words[_end(model, prompt.text, prompt.subject) :]
        shift = torch.zeros_like(own)
        for name, classes in phrases.items():
            shares = torch.tensor(targets.of(prompt.text).marginal(name)).to(own)
            shift += _shift(own, [_from_class(model, read, prompt, phrase) for phrase in classes.values()], shares)
        edited.append(own)
        shifts.append(strength * shift)
    if not edited:
        raise FairDiffError("uce: found no training prompt of people, allowed: one or more")
    return closed_form(torch.cat(edited), torch.cat(shifts), torch.cat([torch.zeros(0, edited[0].shape[1]), *kept]))


def debias_vl(model: DiffusionModel, prompts: Iterable[Prompt], phrases: Phrases, strength: float = STRENGTH) -> Tensor:
    """P [D, D] from pairs of the same prompt with two classes in words, at the token that ends a text, of length 1."""
    require_phrases(phrases)
    plain = [p for p in dict.fromkeys(prompts) if p.people and not p.names]
    pairs, directions = [], []
    for name, classes in phrases.items():
        each = [
            torch.stack([_last(model, with_phrase(prompt, words, name).text) for words in classes.values()])
            for prompt in plain
        ]
        directions.append(sum(one - one.mean(0) for one in each) / len(each))
        pairs += [one[[i, j]] for one in each for i in range(len(classes)) for j in range(i)]
    return calibrated(removing(torch.cat(directions)), torch.stack(pairs), strength)


def fold(model: DiffusionModel, map_DD: Tensor) -> Layers:
    """LoRA with W + B A = W T on every layer that reads a text, factors from W (T - I)'s singular values."""
    change = map_DD.double() - torch.eye(len(map_DD), dtype=torch.float64)
    found: dict[str, Factors] = {}
    for name, layer in model.unet.named_modules():
        if not name.endswith(READS):
            continue
        left, size, right = torch.linalg.svd(layer.weight.detach().double().cpu() @ change, full_matrices=False)
        rank = max(1, int((size > 1e-6 * max(float(size[0]), 1e-30)).sum()))
        root = size[:rank].sqrt()
        found[name] = Factors((root[:, None] * right[:rank]).float(), (left[:, :rank] * root).float(), rank)
    return {"unet": found}


def save_edit(folder: Path, layers: Layers, pipeline: type = StableDiffusionPipeline) -> None:
    """`pytorch_lora_weights.safetensors` as `load_lora_weights` reads it."""
    state = {
        part: {f"{name}.lora_A.weight": f.down.contiguous() for name, f in own.items()}
        | {f"{name}.lora_B.weight": f.up.contiguous() for name, f in own.items()}
        for part, own in layers.items()
    }
    save_lora(folder, state, {part: settings_of(own) for part, own in layers.items()}, pipeline)


def require_stable_diffusion(model: DiffusionModel) -> None:
    """FairDiffError for a model whose text is read by other layers, or stands beside pooled embeddings."""
    if model.kind is not StableDiffusionPipeline:
        raise FairDiffError(f"model.path: found {FAMILIES[model.kind]}, allowed here: Stable Diffusion 1.x or 2.x")


@torch.no_grad()
def _words(model: DiffusionModel, text: str) -> Tensor:
    """The embeddings [L, D] of the tokens of a text, float64 so that closed forms are exact."""
    return model.encode(text, model.clip_skip)[0].double().cpu()


def _last(model: DiffusionModel, text: str) -> Tensor:
    """The embedding [D] of the token that ends a text, of length 1."""
    words = _words(model, text)
    place = min(len(model.token_ids([text])[0]), len(words)) - 1
    return torch.nn.functional.normalize(words[place], dim=0)


def _end(model: DiffusionModel, text: str, subject: str) -> int:
    """The place of the last token of a subject in a text."""
    if subject not in text:
        raise FairDiffError(f"prompts.train: the prompt {text!r} does not hold its subject {subject!r}, which edits need")
    return len(model.token_ids([text[: text.rindex(subject) + len(subject)]])[0]) - 2  # without the token that ends it


def _from_class(model: DiffusionModel, read: Callable[[str], Tensor], prompt: Prompt, phrase: str) -> Tensor:
    """Embeddings [.., D] from the class on of the prompt with a person of it in the subject's place."""
    subject, words = with_article(prompt.subject), phrase
    if subject not in prompt.text:
        subject, words = prompt.subject, phrase.split(" ", 1)[-1]
    head, _, tail = prompt.text.rpartition(subject)
    text = f"{head}{words}{tail}"
    return read(text)[_end(model, text, words) :]


def _shift(own_LD: Tensor, classes: list[Tensor], shares_K: Tensor) -> Tensor:
    """`towards_mixture`; tokens that a class's text has not, since its end is cut, stay."""
    length = min(len(own_LD), *(len(one) for one in classes))
    moved = towards_mixture(own_LD[:length], torch.stack([one[:length] for one in classes]), shares_K)
    return torch.nn.functional.pad(moved, (0, 0, 0, len(own_LD) - length))
