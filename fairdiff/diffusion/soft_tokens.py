"""Trainable embeddings before the prompt: a textual inversion of several vectors, for each CLIP text encoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fairdiff.diffusion.adapter_files import SOFT_TOKENS_FILE, TOKEN, check_matrices, read_tensors
from fairdiff.diffusion.folder import FAMILIES
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.textual_inversion import XL_KEYS, pool_at_the_end
from fairdiff.errors import FairDiffError


class SoftTokenEmbedding(nn.Module):
    """An embedding table whose ids beyond the vocabulary are trainable rows: soft [N, D]."""

    def __init__(self, base: nn.Embedding, soft: Tensor):
        super().__init__()
        self.base = base
        self.soft = nn.Parameter(soft)

    def forward(self, ids: Tensor) -> Tensor:
        size = self.base.num_embeddings
        if bool((ids < size).all()):  # no graph for texts without soft tokens: the empty prompt has no gradient
            return self.base(ids)
        known = self.base(ids.clamp(max=size - 1))
        new = self.soft[(ids - size).clamp(min=0)]
        return torch.where((ids < size)[..., None], known, new)


class SoftTokens:
    """N trainable embeddings before the prompt, on the conditional branch only (the paper: N = 5).

    They are a multi-vector textual inversion. `prefix` is the text to put before every prompt while the adapter is on.
    They start as the embeddings of `initial_text`, repeated to N (`origin`). Random vectors would get almost no gradient,
    because a model trained on web captions ignores unknown words.
    In Stable Diffusion XL each text encoder has N embeddings of its own (`embeddings`). The second one still pools at the
    end of the prompt (`pool_at_the_end`).
    """

    kind = "soft_tokens"

    def __init__(self, model: DiffusionModel, tokens: int, initial_text: str):
        if model.is_flow:  # T5 reads the prompt too, and the pipelines load no tokens for it
            raise FairDiffError(f"adapter.type: found soft_tokens, allowed with {FAMILIES[model.kind]}: lora")
        readers = [(model.tokenizer, model.text_encoder), (model.tokenizer_2, model.text_encoder_2)]
        readers = [(tokenizer, encoder) for tokenizer, encoder in readers if encoder is not None]
        self.count, self.initial_text = tokens, initial_text
        self.names = [TOKEN] + [f"{TOKEN}_{i}" for i in range(1, tokens)]
        self.keys = [TOKEN] if len(readers) == 1 else list(XL_KEYS)  # tensor names in files
        self.tokenizers = [tokenizer for tokenizer, _ in readers]
        self.tables = [encoder.get_input_embeddings() for _, encoder in readers]
        for tokenizer, table in zip(self.tokenizers, self.tables, strict=True):
            self._add_names(tokenizer, table)
        self.origin = self.words(initial_text, tokens)
        softs = self.words(initial_text, tokens)
        self.embeddings = [SoftTokenEmbedding(table, soft) for table, soft in zip(self.tables, softs, strict=True)]
        for (tokenizer, encoder), embedding in zip(readers, self.embeddings, strict=True):
            encoder.set_input_embeddings(embedding)
            pool_at_the_end(encoder, tokenizer)
        self.enabled = True

    def _add_names(self, tokenizer, table: nn.Embedding) -> None:
        if TOKEN in tokenizer.get_vocab():
            raise FairDiffError(
                f"model.path: its tokenizer already knows {TOKEN}, the token of an adapter that was saved with the model; "
                "allowed: the model without it"
            )
        if tokenizer.add_tokens(self.names) != self.count or len(tokenizer) != table.num_embeddings + self.count:
            raise FairDiffError(
                f"model.path: its tokenizer has {len(tokenizer) - self.count} tokens, its text encoder "
                f"{table.num_embeddings}; allowed with adapter.type=soft_tokens: as many"
            )

    def words(self, text: str, count: int) -> list[Tensor]:
        """Return the embeddings [count, D] of a text's tokens, repeated to `count`, for each text encoder."""
        found = []
        for tokenizer, table in zip(self.tokenizers, self.tables, strict=True):
            known = tokenizer(text, add_special_tokens=False).input_ids
            if not known:
                raise FairDiffError(f"adapter.initial_text: found '{text}', allowed: at least one word")
            found.append(table.weight[[known[i % len(known)] for i in range(count)]].detach().clone())
        return found

    @property
    def prefix(self) -> str:
        return " ".join(self.names) + " " if self.enabled else ""

    def parameters(self) -> list[nn.Parameter]:
        return [embedding.soft for embedding in self.embeddings]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switch the soft tokens off: `prefix` is empty inside."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def rescale(self, scale: float) -> None:
        """Multiply the distance from the initial words by `scale`: 0 gives the words, 1 changes nothing."""
        for soft, words in zip(self.parameters(), self.origin, strict=True):
            soft.data.copy_(torch.lerp(words, soft.data, scale))

    def save(self, folder: Path) -> None:
        """Write `soft_tokens.safetensors`: one tensor [N, D] named by the token, for Stable Diffusion XL one for each of
        XL_KEYS."""
        state = {key: soft.detach().cpu().contiguous() for key, soft in zip(self.keys, self.parameters(), strict=True)}
        save_file(state, folder / SOFT_TOKENS_FILE, {"initial_text": self.initial_text})

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, including the initial words. Raise FairDiffError for another shape or key."""
        state, about = read_tensors(folder / SOFT_TOKENS_FILE)
        check_matrices(folder / SOFT_TOKENS_FILE, state)
        wanted = {key: tuple(soft.shape) for key, soft in zip(self.keys, self.parameters(), strict=True)}
        found = {k: tuple(v.shape) for k, v in state.items()}
        if found != wanted:
            raise FairDiffError(f"{folder / SOFT_TOKENS_FILE}: found {found}, expected {wanted}")
        if empty := [key for key, value in state.items() if not value.any()]:  # zeros would still change images
            raise FairDiffError(
                f"{folder / SOFT_TOKENS_FILE}: {empty[0]} holds nothing but zeros, which no training leaves"
            )
        self.initial_text = about.get("initial_text", self.initial_text)
        self.origin = self.words(self.initial_text, self.count)  # `rescale` measures from there
        for key, soft in zip(self.keys, self.parameters(), strict=True):
            soft.data.copy_(state[key])
