import pytest
import torch
from safetensors.torch import save_file
from tiny import CONVNEXT
from tiny_judges import change_json, change_tensor
from torch.nn import functional as F

from classifiers.identity import Bank, FaceEmbedder, load_bank, load_face_embedder, save_bank, save_face_embedder

CONFIG = {**CONVNEXT, "dim": 6}
OURS = {"about": '{"embedder": "ours"}'}


@pytest.fixture
def bank() -> Bank:
    return Bank(F.normalize(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), dim=1))


def test_embeddings_have_length_one_and_pass_gradients(tmp_path):
    torch.manual_seed(0)
    save_face_embedder(FaceEmbedder(CONFIG), tmp_path)
    net = load_face_embedder(tmp_path)
    aligned = torch.rand(4, 3, 40, 40, requires_grad=True)
    embedding = net(aligned)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))
    embedding[:, 0].sum().backward()
    assert aligned.grad.abs().sum() > 0 and not any(p.requires_grad for p in net.parameters())
    assert net(aligned[:0]).shape == (0, 6)


def test_a_bank_face_finds_itself_and_the_nearest_has_the_largest_cosine(bank):
    torch.testing.assert_close(bank.nearest(bank.embedding_ND), bank.embedding_ND)
    probe = F.normalize(torch.randn(7, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    found = (bank.nearest(probe) * probe).sum(1)
    assert (found[:, None] >= probe @ bank.embedding_ND.T - 1e-6).all()


def test_targets_carry_no_gradient(bank):
    probe = bank.embedding_ND[:3].clone().requires_grad_()
    assert not bank.nearest(probe).requires_grad


def test_a_bank_survives_the_disk_in_half_precision(bank, tmp_path):
    save_bank(bank, tmp_path / "bank.safetensors", "ours")
    loaded = load_bank(tmp_path / "bank.safetensors", 6, "ours")
    torch.testing.assert_close(loaded.embedding_ND, bank.embedding_ND, atol=1e-3, rtol=0)
    torch.testing.assert_close(loaded.embedding_ND.norm(dim=1), torch.ones(20))


def test_a_spoilt_bank_names_the_file(bank, tmp_path):
    file = tmp_path / "bank.safetensors"
    with pytest.raises(ValueError, match="bank.safetensors: no such file"):
        load_bank(file, 6, "ours")
    save_bank(bank, file, "ours")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="bank.safetensors: truncated"):
        load_bank(file, 6, "ours")
    save_face_embedder(FaceEmbedder(CONFIG), tmp_path)
    with pytest.raises(ValueError, match="model.safetensors: .*not a bank"):
        load_bank(tmp_path / "model.safetensors", 6, "ours")


def test_a_bank_of_another_embedder_is_refused(bank, tmp_path):
    file = tmp_path / "bank.safetensors"
    save_bank(bank, file, "theirs")
    with pytest.raises(ValueError, match="bank.safetensors: made by the embedder theirs, this one is ours; allowed: "):
        load_bank(file, 6, "ours")
    change_tensor(file, "embedding", lambda t: t)  # written without a header of ours
    with pytest.raises(ValueError, match="bank.safetensors: made by the embedder of an older version"):
        load_bank(file, 6, "ours")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:0], r"shape \[0, 6\], allowed: .*\[faces, 6\], one face or more"),
        (lambda t: t[:, :5], r"shape \[20, 5\]"),
        (lambda t: t[0], r"shape \[6\]"),
        (lambda t: t.sum(), r"shape \[\]"),
        (lambda t: t * (torch.arange(20) == 7)[:, None] * float("nan"), "embedding holds NaN or infinity"),
        (lambda t: t * (torch.arange(20) != 7)[:, None], "row 7 is all 0"),
        (lambda t: t.to(torch.complex64), "embedding is torch.complex64"),
        (lambda t: (t * 100).to(torch.int8), "embedding is torch.int8"),
    ],
)
def test_a_bank_that_gives_no_direction_to_pull_to_is_one_line(bank, change, message, tmp_path):
    file = tmp_path / "bank.safetensors"
    save_file({"embedding": change(bank.embedding_ND.half()).contiguous()}, file, OURS)
    with pytest.raises(ValueError, match=f"bank.safetensors: .*{message}") as error:
        load_bank(file, 6, "ours")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dim", [0, -1, 2.5, "6", True, None])
def test_an_embedder_of_no_width_is_one_line(dim, tmp_path):
    save_face_embedder(FaceEmbedder(CONFIG), tmp_path)
    change_json(tmp_path / "config.json", dim=dim)
    with pytest.raises(ValueError, match=r"config.json: dim: found .*, allowed: a whole number above 0$"):
        load_face_embedder(tmp_path)
