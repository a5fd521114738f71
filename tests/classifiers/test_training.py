import numpy as np
import pytest
import torch
from tiny import CONVNEXT

from classifiers import training
from classifiers.attributes import AttributeNet
from classifiers.data import cut
from classifiers.label_errors import Relaxation
from classifiers.training import FitPlan, augment, blur, fit, jitter_boxes, label_loss, one_cycle, predict

CONFIG = {
    **CONVNEXT,
    "attributes": {"gender": ["female", "male"], "age": ["young", "old"]},
}


def new_net() -> AttributeNet:
    torch.manual_seed(0)
    return AttributeNet(CONFIG)


def pictures(n: int = 96) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Grey noise around a box at the right that is red or blue (gender) and striped or plain (age)."""
    rng = np.random.default_rng(0)
    images = rng.integers(90, 160, (n, 32, 48, 3), dtype=np.uint8)
    gender, age = rng.integers(0, 2, n), rng.integers(0, 2, n)
    images[:, 8:24, 24:40] = 128
    for i in range(n):
        images[i, 8:24, 24:40, 2 * gender[i]] = 230
        images[i, 8:24:4, 24:40] = 20 if age[i] else 128
    boxes = np.tile(np.array([24.0, 8.0, 40.0, 24.0], np.float32), (n, 1))
    return images, {"gender": gender, "age": age}, boxes


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_fit_learns_what_the_boxes_show():
    images, labels, boxes = pictures()
    net = fit(new_net(), images, labels, FitPlan(90, batch=32, lr=1e-2, ema=0.9, expand=1.0), boxes=boxes)
    judged = predict(net, images, boxes, expand=1.0)
    reached = {name: (logits.argmax(1) == labels[name]).mean() for name, logits in judged.items()}
    assert reached["gender"] > 0.95 and reached["age"] > 0.8
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_a_run_cut_off_and_resumed_equals_one_that_was_not(tmp_path):
    images, labels, boxes = pictures(24)

    class Cut(Exception):
        pass

    def cut_off(step: int, loss: float) -> None:
        if step == 5:
            raise Cut

    whole = fit(new_net(), images, labels, FitPlan(8, batch=8), boxes=boxes)
    plan = FitPlan(8, batch=8, checkpoint=tmp_path / "judge.pt", save_every=2)
    with pytest.raises(Cut):
        fit(new_net(), images, labels, plan, progress=cut_off, boxes=boxes)
    steps = []
    resumed = fit(new_net(), images, labels, plan, progress=lambda step, loss: steps.append(step), boxes=boxes)
    assert steps == [5, 6, 7, 8]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    again = fit(new_net(), images, labels, plan, progress=lambda step, loss: pytest.fail("trained again"), boxes=boxes)
    assert torch.equal(again.state_dict()["trunk.head.fc.weight"], whole.state_dict()["trunk.head.fc.weight"])


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    images, labels, boxes = pictures(8)
    file = tmp_path / "judge.pt"
    fit(new_net(), images, labels, FitPlan(1, batch=4, checkpoint=file), boxes=boxes)
    with pytest.raises(ValueError, match="judge.pt: written with seed = 0, now 1"):
        fit(new_net(), images, labels, FitPlan(1, batch=4, seed=1, checkpoint=file), boxes=boxes)
    with pytest.raises(ValueError, match="pictures = 8, now 7"):
        fit(new_net(), images[:7], labels, FitPlan(1, batch=4, checkpoint=file), boxes=boxes)
    torch.save({"step": 1}, file)
    with pytest.raises(ValueError, match="judge.pt: not a checkpoint"):
        fit(new_net(), images, labels, FitPlan(1, batch=4, checkpoint=file), boxes=boxes)


def test_with_epsilon_fit_trains_on_pixels_moved_by_it_to_where_the_loss_rises(monkeypatch):
    images, labels, boxes = pictures(48)
    epsilon, seen, own = 0.02, [], training.attacked

    def noted(net, image_NCHW, size, loss_of):
        moved_NCHW = own(net, image_NCHW, size, loss_of)
        with torch.no_grad():
            seen.append((image_NCHW, moved_NCHW, *(loss_of(net(one)).item() for one in (image_NCHW, moved_NCHW))))
        return moved_NCHW

    monkeypatch.setattr(training, "attacked", noted)
    plan = FitPlan(6, batch=16)
    plain = fit(new_net(), images, labels, plan, boxes=boxes, relaxation=Relaxation())
    assert not seen  # epsilon is 0
    moved = fit(new_net(), images, labels, plan, boxes=boxes, relaxation=Relaxation(epsilon=epsilon))
    assert len(seen) == plan.steps
    for image_NCHW, moved_NCHW, loss, raised in seen:
        by_NCHW = (moved_NCHW - image_NCHW).abs()
        pulled_NCHW = by_NCHW > 0  # a pixel on which no answer depends stays
        torch.testing.assert_close(by_NCHW[pulled_NCHW], torch.full_like(by_NCHW[pulled_NCHW], epsilon), atol=1e-6, rtol=0)
        assert pulled_NCHW.float().mean() > 0.9 and raised > loss
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), moved.parameters(), strict=True))


def test_unlabelled_pictures_take_no_part_in_the_loss():
    logits = {"gender": torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 1.0]])}
    some = label_loss(logits, {"gender": torch.tensor([0, -1, -1])}, 0.0)
    one = label_loss({"gender": logits["gender"][:1]}, {"gender": torch.tensor([0])}, 0.0)
    torch.testing.assert_close(some, one)
    assert label_loss(logits, {"gender": torch.tensor([-1, -1, -1])}, 0.1).item() == 0


def test_predictions_do_not_depend_on_the_batch():
    images, _, boxes = pictures(10)
    net = new_net().eval()
    whole, parts = predict(net, images, boxes), predict(net, images, boxes, batch=3)
    np.testing.assert_allclose(whole["age"], parts["age"], atol=1e-5)


def test_augmented_crops_stay_pictures_of_the_same_face_and_repeat_with_the_seed():
    images, _, _ = pictures(64)
    crops = cut(images[:, :, 16:48], None, 32)
    first = augment(crops, torch.Generator().manual_seed(5))
    assert torch.equal(first, augment(crops, torch.Generator().manual_seed(5)))
    assert first.shape == crops.shape and first.min() >= 0 and first.max() <= 1
    change = (first - crops).abs().mean((1, 2, 3))
    assert (change > 0.005).all() and change.mean() < 0.2


def test_jitter_moves_boxes_a_little_and_without_bias():
    images, _, boxes = pictures(8)
    rows = np.arange(8).repeat(200)
    out = jitter_boxes(images, boxes, rows, 1.5, torch.Generator().manual_seed(0))
    side, centre = out[:, 2:] - out[:, :2], (out[:, 2:] + out[:, :2]) / 2
    np.testing.assert_allclose(side[:, 0], side[:, 1], rtol=1e-4)
    assert abs(np.log(side / (16 * 1.5))).max() < 0.141
    assert abs(centre - [32, 16]).max() < 16 * 0.081
    np.testing.assert_allclose(centre.mean(0), [32, 16], atol=0.1)
    whole = jitter_boxes(images, None, rows, 1.5, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(((whole[:, 2:] + whole[:, :2]) / 2).mean(0), [24, 16], atol=0.2)


def test_blur_keeps_flat_pictures_and_takes_variance_from_others():
    flat = torch.full((8, 3, 16, 16), 0.3)
    torch.testing.assert_close(blur(flat, torch.Generator().manual_seed(0)), flat)
    noise = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ratio = blur(noise, torch.Generator().manual_seed(0)).var((1, 2, 3)) / noise.var((1, 2, 3))
    assert ratio.min() < 0.1 and 0.25 < (ratio > 0.999).float().mean() < 0.6


def test_one_cycle_starts_low_peaks_at_one_and_ends_at_zero():
    factors = [one_cycle(i / 1000) for i in range(1001)]
    assert 0 < factors[0] < 0.05 and max(factors) == pytest.approx(1, abs=1e-3) and factors[-1] == pytest.approx(0)
    assert max(abs(a - b) for a, b in zip(factors, factors[1:], strict=False)) < 0.02
