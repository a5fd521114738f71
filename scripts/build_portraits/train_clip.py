"""Train the small CLIP (open_clip format) that measures CLIP-T and CLIP-I.

Its captions describe what is visible and are decorrelated from gender, race and age. Subject and cell are drawn
independently, so an image's score for "a nurse" depends on the look and not on the person's attributes.
Loss: symmetric softmax cross-entropy over the batch (Radford et al. 2021); pairs with equal captions are positives.
"""

import json
import warnings
from pathlib import Path

import captions
import numpy as np
import open_clip
import torch
from data import Renders, wait_for
from muon import Muon
from safetensors.torch import load_file, save_file
from stage import Average, Clock, arguments, build_folder, log, read_checkpoint, write_checkpoint
from torch import Tensor
from torch.nn import functional as F

from fairdiff.portraits import occupations, weights

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 96, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 48, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}


def make_clip() -> open_clip.CLIP:
    return open_clip.CLIP(
        CONFIG["embed_dim"],
        open_clip.CLIPVisionCfg(**CONFIG["vision_cfg"]),
        open_clip.CLIPTextCfg(**CONFIG["text_cfg"]),
    )


class Decorrelated:
    """Draws (row, plain caption) with independent look and cell; all objects and all looks are equally likely."""

    def __init__(self, renders: Renders) -> None:
        self.renders = renders
        self.objects = [rows for i in range(len(occupations.OBJECTS)) if len(rows := renders.of_object(i))]
        people = renders.rows(0, people=True)
        self.looks = np.unique(renders["occupation"][people])

    def draw(self, rng: np.random.Generator) -> tuple[int, str]:
        if self.objects and rng.random() < 0.12:
            rows = self.objects[rng.integers(len(self.objects))]
            row = int(rows[rng.integers(len(rows))])
            return row, captions.plain_caption(rng, occupations.OBJECTS[self.renders["object"][row]])
        look = int(self.looks[rng.integers(len(self.looks))])
        cell = tuple(map(int, rng.integers((2, 4, 2))))
        rows = self.renders.of(look, cell)
        rows = rows if len(rows) else self.renders.of(None, cell)
        row = int(rows[rng.integers(len(rows))])
        look = int(self.renders["occupation"][row])
        titles = occupations.titles(look) if look >= 0 else ("",)
        subject = titles[rng.integers(len(titles))]
        return row, captions.plain_caption(rng, subject, captions.Person(*cell))


def augment(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Mirror, shift by up to four pixels, blur and add noise, because generated images are softer than renders."""
    image = image.flip(-1) if rng.random() < 0.5 else image
    dx, dy = rng.integers(-4, 5, 2)
    image = F.pad(image, (4, 4, 4, 4), mode="replicate")[..., 4 + dy : 68 + dy, 4 + dx : 68 + dx]
    kind = rng.integers(3)
    if kind == 0:
        image = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
    elif kind == 1:
        image = F.interpolate(F.interpolate(image, scale_factor=0.5, mode="area"), scale_factor=2, mode="bilinear")
    return image + torch.randn_like(image) * 0.1 * rng.random()


def contrastive(image_BD: Tensor, text_BD: Tensor, scale: Tensor, captions: list[str]) -> Tensor:
    """Return the symmetric cross-entropy; pairs with the same caption share the target probability."""
    same = torch.tensor([[a == b for b in captions] for a in captions], dtype=torch.float32)
    target = same / same.sum(1, keepdim=True)
    logits = scale * image_BD @ text_BD.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def export_clip(folder: Path, out: Path) -> None:
    """Write open_clip_config.json and fp16 weights that `open_clip.create_model("local-dir:<out>")` loads."""
    state = torch.load(folder / "clip.pt", weights_only=True)
    halves = {k: v.half().contiguous() for k, v in (state["net"] | state["average"]).items() if k != "attn_mask"}
    out.mkdir(parents=True, exist_ok=True)
    (out / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}, indent=1), encoding="utf-8"
    )
    save_file(halves, out / "open_clip_model.safetensors")


class Trainer:
    """The training state, the data and the training step."""

    def __init__(self, args, folder: Path) -> None:
        torch.manual_seed(args.seed)
        self.args, self.folder, self.clock = args, folder, Clock(args.minutes, args.steps)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
        self.clip = make_clip()
        if args.shipped:  # the image side stays fixed: features of reference images depend on it
            self.clip.visual.requires_grad_(False)
        self.optimizer = Muon(self.clip, args.lr, adam=("embedding", "logit_scale"))
        self.average = Average(self.clip, 0.998)
        self.renders = wait_for(folder / "renders", args.least)
        self.pairs = Decorrelated(self.renders)
        state = read_checkpoint(folder / "clip.pt", self.clock)
        if args.shipped and not state:
            self.clip.load_state_dict(load_file(weights("clip") / "open_clip_model.safetensors"))
            self.average = Average(self.clip, 0.998)
        if state:
            self.clip.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.values, self.average.count = state["average"], state["count"]

    def step(self) -> float:
        rng = np.random.default_rng((self.args.seed, self.clock.step))
        rows, captions = zip(*(self.pairs.draw(rng) for _ in range(self.args.batch)), strict=True)
        image = augment(self.renders.pictures(np.array(rows)), rng)
        unique = sorted(set(captions))
        text = self.clip.encode_text(self.tokenizer(unique), normalize=True)
        text = text[torch.tensor([unique.index(c) for c in captions])]
        scale = self.clip.logit_scale.exp().clamp(max=50)
        loss = contrastive(self.clip.encode_image(image, normalize=True), text, scale, list(captions))
        self.optimizer.set_lr(self.clock.lr(self.args.lr))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.clip.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()
        self.clock.step += 1
        return loss.item()

    def save(self) -> None:
        state = {
            "net": self.clip.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
            "count": self.average.count,
        }
        write_checkpoint(self.folder / "clip.pt", state, self.clock)

    @torch.no_grad()
    def accuracy(self, subjects: int = 64) -> float:
        """Return the top-1 accuracy on held-out images in choosing the look among `subjects` looks."""
        rows = self.renders.rows(1, people=True)
        rows = rows[(self.renders["occupation"][rows] >= 0) & (self.renders["occupation"][rows] < subjects)][:256]
        if not len(rows):
            return float("nan")
        clip = make_clip().eval()
        clip.load_state_dict(self.average.state())
        names = [f"a photo of the face of a {name}" for name in occupations.OCCUPATIONS[:subjects]]
        image = clip.encode_image(self.renders.pictures(rows), normalize=True)
        best = (image @ clip.encode_text(self.tokenizer(names), normalize=True).T).argmax(1).numpy()
        return float((best == self.renders["occupation"][rows]).mean())


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__.splitlines()[0], minutes=10, batch=128, lr=2e-3)
    parser.add_argument("--shipped", action="store_true", help="teach the weights that the package carries words alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    trainer, smooth = Trainer(args, build_folder()), None
    while trainer.clock.fraction < 1:
        loss = trainer.step()
        smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
        if trainer.clock.step % 50 == 0:
            log("clip", trainer.clock, loss=smooth)
        if trainer.clock.save_due():
            trainer.save()
            log("clip", trainer.clock, look_accuracy=trainer.accuracy())
    trainer.save()
    log("clip", trainer.clock, look_accuracy=trainer.accuracy())


if __name__ == "__main__":
    main()
