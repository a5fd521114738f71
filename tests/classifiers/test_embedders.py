"""Face embedders of others: random weights in the files and folders that theirs come in."""

import numpy as np
import pytest
import torch
from facenet_pytorch.models.inception_resnet_v1 import InceptionResnetV1
from facenet_pytorch.models.mtcnn import fixed_image_standardization
from facenet_pytorch.models.utils.detect_face import extract_face
from PIL import Image
from safetensors.torch import save_file
from tiny import CONVNEXT
from tiny_judges import save_dinov2, save_timm, save_vit
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

from classifiers.crop import TEMPLATE_52, crop
from classifiers.embedders import facenet_faces, load_embedder
from classifiers.hub import load_hub_encoder
from classifiers.identity import Bank, FaceEmbedder, save_face_embedder
from classifiers.iresnet import SIDE, IResNet
from classifiers.types import Boxes

PRETRAINED = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 1.0}


def stirred(net: torch.nn.Module) -> torch.nn.Module:
    """The network with running means and variances of its own, so that no normalisation is the identity."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            low = 0.5 if name.endswith("var") else -0.2
            tensor.copy_(low + 0.4 * torch.rand(tensor.shape, generator=generator))
    return net.eval()


@pytest.fixture(scope="module")
def arcface() -> IResNet:
    torch.manual_seed(0)
    return stirred(IResNet([4, 4, 6, 8, 8], [1, 2, 1, 1], 12))


@pytest.fixture(scope="module")
def arcface_file(arcface, tmp_path_factory):
    file = tmp_path_factory.mktemp("arcface") / "backbone.pth"
    torch.save(arcface.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory, arcface_file):
    root = tmp_path_factory.mktemp("embedders")
    torch.manual_seed(0)
    save_face_embedder(FaceEmbedder({**CONVNEXT, "dim": 6}), root / "own")
    return {
        "arcface": arcface_file, "own": root / "own", "hf": save_dinov2(root / "hf"),
        "timm": save_timm(root / "timm", ["a", "b"], **PRETRAINED),
    }  # fmt: skip


def scene() -> tuple[torch.Tensor, Boxes]:
    """Two smooth images, a turned face in the second that leaves the frame."""
    image = F.interpolate(torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(2)), (70, 90), mode="bilinear")
    turn = torch.polar(torch.tensor(0.5), torch.tensor(0.3))
    points = torch.view_as_complex((torch.tensor(TEMPLATE_52) - 0.5) * 112) * turn + complex(60, 40)
    landmark = torch.view_as_real(points)[None]
    return image, Boxes(torch.tensor([1]), torch.tensor([[36.0, 10.0, 84.0, 74.0]]), landmark, (2, 70, 90))


@pytest.mark.parametrize("kind", ["arcface", "own", "hf", "timm"])
def test_the_face_term_reaches_the_pixels_and_agrees_with_finite_differences(kind, folders):
    embedder = load_embedder(folders[kind], 40, 1.3).double()
    image, boxes = scene()
    image = image.double()
    target = embedder(embedder.align(image.flip(-1), boxes)).detach()
    assert target.shape == (1, embedder.config["dim"]) and target.norm().item() == pytest.approx(1)

    def term(pixels):
        return (1 - (embedder(embedder.align(pixels, boxes)) * target).sum(1)).sum()

    pixels = image.clone().requires_grad_()
    (grad,) = torch.autograd.grad(term(pixels), pixels)
    assert grad[0].abs().sum() == 0 and grad[1].abs().sum() > 0
    step = torch.randn(image.shape, dtype=torch.double, generator=torch.Generator().manual_seed(3)) * 1e-6
    with torch.no_grad():
        measured = (term(image + step) - term(image - step)) / 2
    assert measured.item() == pytest.approx((grad * step).sum().item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["arcface", "own", "hf", "timm"])
def test_the_same_face_is_at_distance_0_and_its_own_nearest(kind, folders):
    embedder = load_embedder(folders[kind], 40, 1.3)
    image = F.interpolate(torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(4)), (64, 64))
    whole = torch.tensor([[8.0, 8.0, 56.0, 56.0]]).repeat(5, 1)
    boxes = Boxes(torch.arange(5), whole, None, (5, 64, 64))
    embedding = embedder(embedder.align(image, boxes))
    bank = Bank(embedding)
    torch.testing.assert_close(bank.nearest(embedding), embedding)
    assert (1 - (bank.nearest(embedding) * embedding).sum(1)).abs().max() < 1e-6
    assert embedder(embedder.align(image, Boxes.none(image))).shape == (0, embedder.config["dim"])


def test_arcface_sees_its_five_points_within_a_pixel_of_the_template(folders):
    image, boxes = scene()
    y, x = torch.meshgrid(torch.arange(70) + 0.5, torch.arange(90) + 0.5, indexing="ij")
    faces = load_embedder(folders["arcface"], 40, 1.3).align(torch.stack([x, y]).expand(2, 2, 70, 90), boxes)
    assert faces.shape[-2:] == (SIDE, SIDE)
    # what lies at the template's points came from the landmarks: half a source pixel here is one of the 112
    at = (torch.tensor(TEMPLATE_52) * 2 - 1).view(1, 1, 5, 2)
    came_from = F.grid_sample(faces, at, align_corners=False)[0, :, 0].T
    assert (came_from - boxes.landmark_F52[0]).norm(dim=1).max() < 0.5


def test_arcface_is_the_network_of_the_file_on_rgb_from_minus_1_to_1(arcface, folders):
    face = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    embedding = load_embedder(folders["arcface"], 40, 1.3)(face)
    torch.testing.assert_close(embedding, F.normalize(arcface(face * 2 - 1), dim=1))


def test_a_block_is_the_published_one(arcface):
    """Written out once more from its formula."""
    block, x = arcface.layer2[0], torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))

    def bn(layer, y):
        centred = (y - layer.running_mean[:, None, None]) / (layer.running_var[:, None, None] + 1e-5).sqrt()
        return centred * layer.weight[:, None, None] + layer.bias[:, None, None]

    y = F.conv2d(bn(block.bn1, x), block.conv1.weight, padding=1)
    y = bn(block.bn2, y)
    y = torch.where(y > 0, y, y * block.prelu.weight[:, None, None])
    y = bn(block.bn3, F.conv2d(y, block.conv2.weight, stride=2, padding=1))
    y = y + bn(block.downsample[1], F.conv2d(x, block.downsample[0].weight, stride=2))
    torch.testing.assert_close(block(x), y)


def test_r50_has_the_tensors_of_the_published_r50():
    """insightface counts 43.59 million parameters in its r50."""
    with torch.device("meta"):
        net = IResNet([64, 64, 128, 256, 512], [3, 4, 14, 3], 512)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == 43.59
    assert {"layer3.13.bn3.running_var", "layer1.0.downsample.1.bias", "features.weight"} <= net.state_dict().keys()


def test_facenet_cuts_and_reads_as_its_own_package_does(tmp_path):
    torch.manual_seed(0)
    net = stirred(InceptionResnetV1(classify=True, num_classes=3))  # the released files hold the classes of training
    torch.save(net.state_dict(), tmp_path / "vggface2.pt")
    image, boxes = scene()
    image = (image * 255).round() / 255
    picture = Image.fromarray((image[1] * 255).byte().permute(1, 2, 0).numpy())
    low, high = np.array([33, 8]), np.array([87, 70])  # with the margin whole pixels, for theirs cuts off the rest
    margin = (high - low) * 7 / 160
    box = np.concatenate([low + margin, high - margin]) + 1e-5
    theirs = extract_face(picture, box, 160, 14)
    ours = facenet_faces(image, Boxes(boxes.row_F, torch.tensor(box)[None].float(), None, boxes.size))
    assert (ours[0] * 255 - theirs).abs().mean() < 1  # half a pixel beside: 4.4
    embedder = load_embedder(tmp_path / "vggface2.pt", 40, 1.3)
    pixels = ours.clone().requires_grad_()
    embedding = embedder(pixels)
    net.classify = False
    torch.testing.assert_close(embedding, net(fixed_image_standardization(ours * 255)))
    embedding[0, 0].backward()
    assert pixels.grad.abs().sum() > 0


def test_an_encoder_of_hugging_face_sees_the_crop_of_the_judges(folders):
    image, boxes = scene()
    embedder = load_embedder(folders["hf"], 40, 1.3)
    torch.testing.assert_close(embedder.align(image, boxes), crop(image, boxes, 40, 1.3))
    assert embedder.config != load_embedder(folders["hf"], 40, 1.4).config  # another crop is another embedder


def test_the_feature_of_a_convolutional_encoder_is_one_vector_an_image(folders, tmp_path):
    image = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(7))
    pooled = load_hub_encoder(str(folders["timm"]))
    output = pooled.model.timm_model.forward_features(pooled.pixels(image))
    assert pooled(image).shape == (2, 8) and output.ndim == 4
    torch.testing.assert_close(pooled(image), pooled.model.timm_model.forward_head(output))
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    mean = load_hub_encoder(str(tmp_path))
    torch.testing.assert_close(mean(image), mean.model(mean.pixels(image)).pooler_output.flatten(1))


def changed(arcface, **tensors):
    return {k: t for k, t in (arcface.state_dict() | tensors).items() if t is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": torch.zeros(12, 8 * 64)}, r"fc.weight has shape \[12, 512\], built \[12, 392\]"),  # of 128 pixels
        ({"fc.weight": None}, "has no 'fc.weight', allowed: all tensors of an iresnet"),
        ({"layer3.0.bn2.weight": None}, "key 'layer3.0.bn2.weight' is missing"),
        ({"layer3.0.se.weight": torch.zeros(2)}, "key 'layer3.0.se.weight' is unknown"),
        ({"bn1.bias": torch.full((4,), float("nan"))}, "bn1.bias holds NaN or infinity"),
        ({"layer1.0.prelu.weight": None}, "found tensors such as bn1.bias, allowed: those of arcface_torch"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_embedder_is_one_line(change, message, arcface, tmp_path):
    save_file({k: t.contiguous() for k, t in changed(arcface, **change).items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: {message}") as error:
        load_embedder(tmp_path / "x.safetensors", 40, 1.3)
    assert "\n" not in str(error.value)


class Code:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content", [Code(), torch.zeros(2), {}, {"a": 1}, {3: torch.zeros(2)}])
def test_a_pickle_of_anything_else_is_refused_and_not_run(content, tmp_path, capsys):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt: (cannot read it without running code|holds no flat dict|3 is no name)"):
        load_embedder(tmp_path / "x.pt", 40, 1.3)
    assert not capsys.readouterr().out


def test_places_that_hold_none(tmp_path):
    for name, message in (("x.pth", "x.pth: no such file"), ("nowhere", "found .*nowhere, allowed: a folder or hub id")):
        with pytest.raises(ValueError, match=message):
            load_embedder(tmp_path / name, 40, 1.3)
    (tmp_path / "w600k_r50.onnx").touch()
    with pytest.raises(ValueError, match="w600k_r50.onnx: is an ONNX graph, .*allowed: the PyTorch weights"):
        load_embedder(tmp_path / "w600k_r50.onnx", 40, 1.3)
    save_vit(tmp_path / "half", ["a", "b"])
    (tmp_path / "half" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="half has no readable image processor"):
        load_embedder(tmp_path / "half", 40, 1.3)
