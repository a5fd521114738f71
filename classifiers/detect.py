"""Face detectors: MTCNN (default), the whole image, insightface. Each finds the largest face, without gradient.

MTCNN: Zhang et al., "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional Networks", 2016. The
three nets and their weights come from facenet-pytorch 2.5.3; the cascade around them is written for batches of small
images. Shapes: N candidates in the whole batch; `row_N` is the image of each.
"""

from itertools import pairwise
from pathlib import Path

import torch
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from classifiers.types import Boxes

PYRAMID = 0.709  # MTCNN's factor: each level has half the area of the one before
CHUNK = 64  # images at a time, which bounds memory and the quadratic part of the suppression
PIECE = 64  # windows at a time: their activations fit into the processor's cache (2.7 times as fast as 320 at once)


class MTCNNDetector(nn.Module):
    """Find the largest face of each image by MTCNN.

    input_size: shorter side to which images are resized for detection (None: not resized). min_face: smallest face in
    pixels *at that size*. thresholds: least scores of the three nets.
    """

    def __init__(
        self,
        input_size: int | None = 80,
        min_face: float = 24.0,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
    ):
        super().__init__()
        self.input_size, self.min_face, self.thresholds = input_size, min_face, thresholds
        self.pnet, self.rnet, self.onet = PNet(), RNet(), ONet()
        # max pooling is 4 times as fast on a CPU when the channels come last
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, image_BCHW: Tensor) -> Boxes:
        """Return boxes and landmarks in pixels of `image_BCHW`; an image without a face has no row."""
        batch, _, height, width = image_BCHW.shape
        factor = 1.0 if self.input_size is None else self.input_size / min(height, width)
        size = round(height * factor), round(width * factor)
        rows, boxes, landmarks, counts = [], [], [], []
        for start in range(0, batch, CHUNK):
            image = image_BCHW[start : start + CHUNK].float()
            if size != (height, width):
                image = F.interpolate(image, size, mode="bilinear", antialias=True)
            row_N, box_N4, landmark_N52 = self.cascade((image * 255 - 127.5) / 128)
            keep_F = largest(row_N, box_N4)
            rows.append(row_N[keep_F] + start)
            boxes.append(box_N4[keep_F])
            landmarks.append(landmark_N52[keep_F])
            counts.append(torch.bincount(row_N)[row_N[keep_F]])
        back = torch.tensor([width / size[1], height / size[0]], device=image_BCHW.device)
        box_F4, landmark_F52 = torch.cat(boxes) * back.repeat(2), torch.cat(landmarks) * back
        return Boxes(torch.cat(rows), box_F4, landmark_F52, (batch, height, width), torch.cat(counts))

    def cascade(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return row_N, box_N4 and landmark_N52 of all faces in a batch with values in [-1, 1], in pixels of this batch."""
        row_N, box_N4 = self.propose(image_BCHW)
        if not len(row_N):
            return row_N, box_N4, box_N4.new_zeros(0, 5, 2)

        shift_N4, prob_N2 = refine(self.rnet, image_BCHW, row_N, box_N4, 24)
        keep = prob_N2[:, 1] > self.thresholds[1]
        row_N, box_N4, shift_N4, score_N = row_N[keep], box_N4[keep], shift_N4[keep], prob_N2[keep, 1]
        keep = suppress(row_N, box_N4, score_N, 0.7)
        row_N, box_N4 = row_N[keep], square(move(box_N4[keep], shift_N4[keep]))
        if not len(row_N):
            return row_N, box_N4, box_N4.new_zeros(0, 5, 2)

        shift_N4, point_N10, prob_N2 = refine(self.onet, image_BCHW, row_N, box_N4, 48)
        keep = prob_N2[:, 1] > self.thresholds[2]
        row_N, box_N4, shift_N4, score_N = row_N[keep], box_N4[keep], shift_N4[keep], prob_N2[keep, 1]
        side_N2 = box_N4[:, 2:] - box_N4[:, :2]
        # the net returns x of the five points, then y, as fractions of the window
        point_N52 = point_N10[keep].unflatten(1, (2, 5)).transpose(1, 2)
        landmark_N52 = box_N4[:, None, :2] + point_N52 * side_N2[:, None]
        box_N4 = move(box_N4, shift_N4)
        keep = suppress_nested(row_N, box_N4, score_N, 0.7)
        return row_N[keep], box_N4[keep], landmark_N52[keep]

    def propose(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Run the first net over an image pyramid: 12 px windows at every second pixel, at scales 12/min_face * .709^k."""
        height, width = image_BCHW.shape[-2:]
        scale = 12 / self.min_face
        rows, boxes, shifts, scores = [image_BCHW.new_zeros(0, dtype=torch.long)], [], [], []
        while min(height, width) * scale >= 12:
            size = int(height * scale + 1), int(width * scale + 1)
            level = F.interpolate(image_BCHW, size, mode="area").contiguous(memory_format=torch.channels_last)
            shift_B4hw, prob_B2hw = self.pnet(level)
            row_N, y_N, x_N = torch.nonzero(prob_B2hw[:, 1] >= self.thresholds[0], as_tuple=True)
            score_N = prob_B2hw[row_N, 1, y_N, x_N]
            corner_N2 = torch.stack([x_N, y_N], 1) * 2.0
            unit = image_BCHW.new_tensor([width / size[1], height / size[0]]).repeat(2)
            box_N4 = torch.cat([corner_N2, corner_N2 + 12], 1) * unit
            keep = suppress(row_N, box_N4, score_N, 0.5)
            rows.append(row_N[keep])
            boxes.append(box_N4[keep])
            shifts.append(shift_B4hw[row_N, :, y_N, x_N][keep])
            scores.append(score_N[keep])
            scale *= PYRAMID
        if not boxes:
            return rows[0], image_BCHW.new_zeros(0, 4)
        row_N, box_N4, score_N = torch.cat(rows), torch.cat(boxes), torch.cat(scores)
        keep = suppress(row_N, box_N4, score_N, 0.7)
        return row_N[keep], square(move(box_N4[keep], torch.cat(shifts)[keep]))


class WholeImage:
    """Return the whole image as the box of one face, for aligned portraits; crop it with `expand=1`."""

    def __call__(self, image_BCHW: Tensor) -> Boxes:
        batch, _, height, width = image_BCHW.shape
        box_4 = torch.tensor([0.0, 0.0, width, height], device=image_BCHW.device)
        row_F = torch.arange(batch, device=image_BCHW.device)
        return Boxes(row_F, box_4.repeat(batch, 1), None, (batch, height, width), torch.ones_like(row_F))


class InsightFaceDetector:
    """Run insightface's detector, one image at a time; its models (`root/models/<name>/*.onnx`) are non-commercial."""

    def __init__(self, root: Path, name: str = "buffalo_l", input_size: int = 640):
        from insightface.app import FaceAnalysis  # slow to import

        folder = Path(root) / "models" / name
        self.files = sorted(folder.glob("*.onnx"))
        if not self.files:
            raise ValueError(f"{folder}: no insightface models (*.onnx) here")
        try:
            self.app = FaceAnalysis(name=name, root=str(root), allowed_modules=["detection"])
        except Exception as error:  # AssertionError without a detector, onnxruntime's types for an invalid file
            words = " ".join(str(error).split())[:200] or "no detector among them"
            raise ValueError(f"{folder}: insightface cannot read these models ({words})") from error
        self.app.prepare(ctx_id=-1, det_size=(input_size, input_size))

    @torch.no_grad()
    def __call__(self, image_BCHW: Tensor) -> Boxes:
        batch, _, height, width = image_BCHW.shape
        rows, boxes, landmarks, counts = [], [], [], []
        bgr_BHWC = (image_BCHW.flip(1) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        for row, picture in enumerate(bgr_BHWC):
            faces = self.app.get(picture)
            if faces:
                face = max(faces, key=lambda f: (f.bbox[2] - f.bbox[0]) * (f.bbox[3] - f.bbox[1]))
                rows.append(row)
                boxes.append(torch.from_numpy(face.bbox).float())
                landmarks.append(torch.from_numpy(face.kps).float())
                counts.append(len(faces))
        device = image_BCHW.device
        box_F4 = torch.stack(boxes) if boxes else torch.zeros(0, 4)
        landmark_F52 = torch.stack(landmarks) if boxes else torch.zeros(0, 5, 2)
        row_F, count_F = (torch.tensor(some, dtype=torch.long, device=device) for some in (rows, counts))
        return Boxes(row_F, box_F4.to(device), landmark_F52.to(device), (batch, height, width), count_F)


def refine(net: nn.Module, image_BCHW: Tensor, row_N: Tensor, box_N4: Tensor, size: int) -> list[Tensor]:
    """Return a net's outputs, [N, ...] each, on area-averaged windows of `size` pixels; mid-grey (0) outside the frame."""
    place_N5 = torch.cat([row_N[:, None].to(box_N4), box_N4], 1)
    pieces = [
        net(roi_align(image_BCHW, piece, size, aligned=True).contiguous(memory_format=torch.channels_last))
        for piece in place_N5.split(PIECE)
    ]
    return [torch.cat(output) for output in zip(*pieces, strict=True)]


def move(box_N4: Tensor, shift_N4: Tensor) -> Tensor:
    """Shift each corner by a predicted fraction of the box's width or height."""
    return box_N4 + shift_N4 * (box_N4[:, 2:] - box_N4[:, :2]).repeat(1, 2)


def square(box_N4: Tensor) -> Tensor:
    """Return squares about the same centres with the longer side."""
    centre_N2 = (box_N4[:, :2] + box_N4[:, 2:]) / 2
    half_N1 = (box_N4[:, 2:] - box_N4[:, :2]).amax(1, keepdim=True) / 2
    return torch.cat([centre_N2 - half_N1, centre_N2 + half_N1], 1)


def suppress(row_N: Tensor, box_N4: Tensor, score_N: Tensor, overlap: float) -> Tensor:
    """Return the indices kept by non-maximum suppression (intersection over union) in each image, best score first.

    Boxes of different images are separated by a shift. It is in double precision, because in single precision it would
    round the boxes by an amount that depends on the batch.
    """
    if not len(row_N):
        return row_N
    box_N4 = box_N4.double()
    stride = box_N4.max() - box_N4.min() + 1
    return nms(box_N4 + row_N[:, None] * stride, score_N.double(), overlap)


def suppress_nested(row_N: Tensor, box_N4: Tensor, score_N: Tensor, overlap: float) -> Tensor:
    """Suppress by intersection over the *smaller* area, which removes a box inside a better one; quadratic in N."""
    order_N = torch.argsort(score_N, descending=True, stable=True)
    row_N, box_N4 = row_N[order_N], box_N4[order_N]
    low_NN2 = torch.maximum(box_N4[:, None, :2], box_N4[None, :, :2])
    high_NN2 = torch.minimum(box_N4[:, None, 2:], box_N4[None, :, 2:])
    area_N = (box_N4[:, 2:] - box_N4[:, :2]).prod(1)
    shared_NN = (high_NN2 - low_NN2).clamp(min=0).prod(2) / torch.minimum(area_N[:, None], area_N[None])
    rival_NN = ((shared_NN > overlap) & (row_N[:, None] == row_N[None])).cpu().numpy()
    keep = []
    for i in range(len(row_N)):
        if not rival_NN[i, keep].any():
            keep.append(i)
    return order_N[keep]


def largest(row_N: Tensor, box_N4: Tensor) -> Tensor:
    """Return the index of the largest box of each image that has one, in ascending order of images."""
    area_N = (box_N4[:, 2:] - box_N4[:, :2]).prod(1)
    order_N = torch.argsort(area_N, descending=True, stable=True)
    order_N = order_N[torch.argsort(row_N[order_N], stable=True)]
    row_N = row_N[order_N].tolist()
    first = [0] * bool(row_N) + [i + 1 for i, (a, b) in enumerate(pairwise(row_N)) if a != b]
    return order_N[first]
