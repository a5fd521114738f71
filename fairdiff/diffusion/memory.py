"""Plan how many images each part of a training step processes at once on a device with `memory_gb` GB.

    bytes(n) = held + fixed + n * unit,    n = floor((USED * memory_gb * 2^30 - held - fixed) / unit)

held: weights, the adapter's optimiser, and the tensors that a step keeps for the whole batch. fixed and unit are measured for
this model, image size and precision: each part runs with one and with two images, and a tensor counts until it is freed.
Denoiser and decoder run at half the side for this: their memory is proportional to the pixels, because attention stores no
L x L matrix (Dao et al. 2022, arXiv 2205.14135). Results depend on the pieces by rounding only.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairdiff.diffusion.denoise import Guidance
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.sampling import Trajectory, Upstream, replay

USED = 0.8  # planned fraction of the device; CUDA's context, workspaces and fragmentation take the rest
GIB = 2**30
KEPT_IMAGES = 6  # tensors of a batch's image size at one time: the images, three gradients, their sum, and a copy of one
REPLAYED, SAMPLED = 2, 3  # rows replayed and images sampled per decoded image; decoding needs the most memory


@dataclass(frozen=True)
class Pieces:
    """Batch sizes: images sampled, images decoded and given to the frozen networks, (image, step) rows replayed.

    checkpointed: networks with gradient checkpointing (Chen et al. 2016, arXiv 1604.06174), which takes a third more time
    and gives the same gradient. peak: estimated bytes, None if nothing was planned.
    """

    sample: int
    decode: int
    replay: int
    checkpointed: frozenset[str] = frozenset()
    peak: float | None = None

    @classmethod
    def of(cls, micro_batch: int) -> "Pieces":
        """Return pieces for `micro_batch` decoded images, in inverse proportion to the memory that each part needs."""
        return cls(SAMPLED * micro_batch, micro_batch, REPLAYED * micro_batch)

    def apply(self, model: DiffusionModel) -> None:
        """Set a model's batch sizes and gradient checkpointing."""
        model.sample_batch, model.decode_batch = self.sample, self.decode
        for name in ("unet", "vae"):
            _checkpoint(getattr(model, name), name in self.checkpointed)


def _checkpoint(module: nn.Module, on: bool) -> None:
    module.enable_gradient_checkpointing() if on else module.disable_gradient_checkpointing()


@dataclass(frozen=True)
class Need:
    """The memory that one part of a step needs: bytes(n) = fixed + n * unit."""

    fixed: float
    unit: float

    def most(self, room: float) -> int:
        """Return the largest n that fits into `room` bytes, 0 if none does."""
        return max(0, int((room - self.fixed) / self.unit))

    def bytes(self, n: int) -> float:
        return self.fixed + n * self.unit


class _Peak(TorchDispatchMode):
    """Record the peak bytes of the tensors made inside the context; views and in-place results are not counted again."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {s._cdata for s in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self.known:
                self._note(storage, storage._cdata, storage.nbytes())
        return result

    def _note(self, storage, key: int, size: int) -> None:
        def freed(_):
            self.live -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak bytes of the tensors that `run` makes; tensors that exist before do not count."""
    with _Peak() as counter:
        run()
    return counter.peak


def count(run: Callable[[int], object], scale: float = 1.0) -> Need:
    """Return the memory that `run(n)` needs, with the unit multiplied by `scale` (full size over measured size)."""
    one, two = (peak_bytes(lambda n=n: run(n)) for n in (1, 2))
    unit = max(two - one, 1)
    return Need(max(one - unit, 0), scale * unit)


@dataclass
class Parts:
    """The parts of a step whose memory is measured, on a model with its adapter.

    look: runs the frozen networks on images [n, 3, H, W], with a graph if gradients are enabled. images, steps: images and
    sampler steps of the whole batch, whose latents and images are kept until the gradient is computed; 0 without training.
    """

    model: DiffusionModel
    look: Callable[[Tensor], object]
    images: int = 0
    steps: int = 0
    guidance: Guidance = field(init=False)

    def __post_init__(self):
        with torch.no_grad():
            cond, uncond = self.model.encode_pair("")
        self.guidance = Guidance(cond.requires_grad_(), uncond, 2.0)

    @property
    def half(self) -> tuple[int, int, int]:
        """Shape of latents with about half the side, of which transformers can read whole squares of 2x2."""
        channels, *sides = self.model.latent_shape
        square = self.model.multiple // self.model.pixels
        return channels, *(max(side // 2 // square, 1) * square for side in sides)

    def _latents(self, n: int) -> Tensor:
        return torch.zeros(n, *self.half, device=self.model.unet.device)

    @property
    def held(self) -> int:
        """Bytes of the weights on the model's device and of the tensors that a step keeps for the whole batch.

        T5 is always on the CPU, so it counts only if the model is there too.
        """
        model, channels = self.model, self.half[0]
        with torch.no_grad():
            pixels = 4 * model.decode(self._latents(1)).numel()  # numbers in an image of full size
        latents = self.steps * channels * model.latent_shape[1] * model.latent_shape[2]
        kept = self.images * 4 * (latents + KEPT_IMAGES * pixels)
        networks = (*model.text_encoders, model.unet, model.vae)
        return kept + bytes_of(network for network in networks if network.device == model.unet.device)

    @torch.no_grad()
    def sample(self, n: int) -> None:
        """Sample n images in two sampler steps."""
        replace(self.model, sample_batch=n).sample(self.guidance, self._latents(n), 2)

    def decode(self, n: int) -> None:
        """Decode n images without a graph and, for training, with one."""
        latent = self._latents(n)
        with torch.no_grad():
            self.model.decode(latent)
        if self.images:
            image = self.model.decode(latent.requires_grad_())
            torch.autograd.grad(image, latent, torch.zeros_like(image))

    def replay(self, n: int) -> None:
        """Replay n rows forward and backward, then delete the gradients."""
        chosen, time = torch.zeros(n, 1, dtype=torch.long), torch.full((1,), 500, device=self.model.unet.device)
        trajectory = Trajectory([self._latents(n)], time, self._latents(n))
        replay(
            self.model.unet, trajectory, self.guidance, Upstream(self._latents(n) + 1, torch.ones(1), chosen), micro_batch=n
        )
        for leaf in (self.guidance.cond, *self.model.unet.parameters()):
            leaf.grad = None

    def looked_at(self, n: int) -> None:
        """Run `look` on n images of full size."""
        with torch.no_grad():
            image = self.model.decode(self._latents(1))
        self.look(image.repeat(n, 1, 2, 2))


def plan_pieces(parts: Parts, memory_gb: float, held: float) -> Pieces:
    """Return the largest pieces that fit into `memory_gb` GB. held: bytes in addition to those of `parts`.

    A network is checkpointed only if one row or image does not fit otherwise. If it does not fit even then, the piece is 1
    and `peak` exceeds the budget. The result is identical for the same model, image size, precision and adapter.
    """
    model, held = parts.model, held + parts.held
    room = USED * memory_gb * GIB - held
    smaller = model.latent_shape[1] * model.latent_shape[2] / (parts.half[1] * parts.half[2])
    needs = {"sample": [count(parts.sample, smaller), count(torch.no_grad()(parts.looked_at))]}
    needs |= {"decode": [count(parts.looked_at)], "replay": []}
    checkpointed = set()
    for name, part, run in (("vae", "decode", parts.decode), ("unet", "replay", parts.replay)):
        if part == "replay" and not parts.images:
            continue
        module = getattr(model, name)
        _checkpoint(module, False)
        need = count(run, smaller)
        if parts.images and not need.most(room):
            _checkpoint(module, True)
            need = count(run, smaller)
            checkpointed.add(name)
        needs[part].append(need)
    for name in checkpointed:  # `Pieces.apply` switches it on again
        _checkpoint(getattr(model, name), False)
    sizes = {part: max(1, min((need.most(room) for need in some), default=1)) for part, some in needs.items()}
    peak = held + max(need.bytes(sizes[part]) for part, some in needs.items() for need in some)
    return Pieces(**sizes, checkpointed=frozenset(checkpointed), peak=peak)


def bytes_of(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of all parameters and buffers; shared ones count once."""
    tensors = {t.untyped_storage()._cdata: t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(t.untyped_storage().nbytes() for t in tensors.values())
