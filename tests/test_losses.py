"""Properties of the losses: which faces count, which gradients are damped, and that damping never changes a value."""

import torch

from fairdiff.objective.losses import (
    alignment_loss,
    changing,
    damp_gradient,
    intersect,
    preservation_loss,
    realism_loss,
    smallest_factor,
)


def test_faces_without_a_confident_label_have_neither_loss_nor_gradient():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    kept = torch.tensor([True, False, True, False])
    loss = alignment_loss(logits, torch.tensor([0, 1, 2, 0]), kept, torch.tensor([1.0, 2.0, 0.5]))
    loss.sum().backward()
    assert (loss[~kept] == 0).all() and (loss[kept] > 0).all()
    plain = -logits.detach().log_softmax(1)
    assert torch.allclose(
        loss.detach(), torch.stack([plain[0, 0], torch.tensor(0.0), 0.5 * plain[2, 2], torch.tensor(0.0)])
    )
    assert (logits.grad[~kept] == 0).all() and (logits.grad[kept] != 0).all()


def test_preservation_is_zero_for_the_original_and_bounded():
    x = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert torch.allclose(preservation_loss([x, x], [x, x]), torch.zeros(3), atol=1e-6)
    assert torch.allclose(preservation_loss([x], [-x]), torch.full((3,), 2.0))


def test_factors_by_hand_a_missing_label_changes():
    keep = torch.tensor([0.2, 0.6])
    #                      a differs | both stay | b differs | a has no label | b has none | both differ
    labels = torch.tensor([[1, 0, 0, 0, 0, 1], [2, 2, 3, 2, 2, 3]])
    original = torch.tensor([[0] * 6, [2] * 6])
    kept = torch.tensor([[True, True, True, False, True, True], [True, True, True, True, False, True]])
    change = changing(labels, kept, original)
    assert change.int().tolist() == [[1, 0, 0, 1, 0, 1], [0, 0, 1, 0, 1, 1]]
    assert torch.equal(smallest_factor(change, keep), torch.tensor([0.2, 1, 0.6, 0.2, 0.6, 0.2]))


def test_damping_keeps_the_picture_and_scales_the_gradient_inside_the_box_only():
    image = torch.rand(2, 3, 6, 8, requires_grad=True)  # not square: a swap of width and height would show
    box = torch.tensor([[5.0, 1.0, 8.0, 3.0], [3.0, 2.0, 1.0, 5.0]])  # the second is empty
    out = damp_gradient(image, box, torch.tensor([0.25, 0.5]))
    assert torch.equal(out, image)
    out.sum().backward()
    expected = torch.ones(2, 3, 6, 8)
    expected[0, :, 1:3, 5:8] = 0.25
    assert torch.equal(image.grad, expected)


def test_intersection_of_disjoint_boxes_is_empty():
    box = intersect(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[3.0, 3.0, 5.0, 5.0]]))[0]
    assert box[2] <= box[0]
    image = torch.rand(1, 3, 6, 6, requires_grad=True)
    damp_gradient(image, box[None], torch.zeros(1)).sum().backward()
    assert (image.grad == 1).all()


def test_realism_counts_the_mirror():
    e = torch.eye(4)[:2]
    assert torch.allclose(realism_loss(e, e, e), torch.zeros(2))
    assert torch.allclose(realism_loss(e, torch.eye(4)[2:], e), torch.full((2,), 0.5))
