"""An update over several prompts: the mean of gradients without skipped steps, and its norm over all parameters."""

from types import SimpleNamespace

import pytest
import torch

from fairdiff.distributed import ALONE
from fairdiff.errors import FairDiffError
from fairdiff.training.step import Batch, StepResult
from fairdiff.training.update import gather

NAN = float("nan")


def batches(*prompts):
    return [Batch(prompt, [0], 2, 0, torch.Generator()) for prompt in prompts]


def update_of(gradients, results=None):
    """The update over prompts whose steps leave these gradients in three parameters (None: no gradient)."""
    parameters = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    trainee = SimpleNamespace(adapter=SimpleNamespace(parameters=lambda: parameters), world=ALONE)
    results = results or {}

    def step(_, batch):
        for parameter, values in zip(parameters, gradients[batch.prompt], strict=True):
            parameter.grad = None if values is None else torch.tensor(values)
        return results.get(batch.prompt, StepResult({"align": 1.0}, {"gender": [0.75, 0.25]}, 4, 3))

    return gather(trainee, batches(*gradients), step), [p.grad for p in parameters]


def test_what_is_left_is_the_mean_and_its_norm_is_that_over_all_parameters():
    update, grads = update_of({"a": ([6.0, 0.0], [0.0], None), "b": ([0.0, 0.0], [8.0], None)})
    assert update.norm == pytest.approx(5.0) and not update.skipped and grads[2] is None
    assert torch.allclose(torch.cat(grads[:2]), torch.tensor([3.0, 0.0, 4.0]), atol=1e-5)


def test_a_prompt_that_went_wrong_is_left_out_of_the_mean_and_named():
    good = ([2.0, 0.0], [1.0], [0.0])
    gradients = {"a": good, "nan": ([NAN, 0.0], [0.0], [0.0]), "b": good}
    update, grads = update_of(gradients)
    assert [prompt for prompt, _ in update.good] == ["a", "b"]
    assert torch.equal(torch.cat(grads), torch.tensor([2.0, 0.0, 1.0, 0.0]))
    assert [prompt for prompt, _ in update.skipped] == ["nan"]


def test_a_prompt_without_a_confident_label_counts_by_its_other_terms():
    nobody = StepResult({"align": 0.0, "image": 0.5}, {}, 0, 0)
    update, grads = update_of({"a": ([2.0, 0.0], [1.0], [0.0]), "b": ([4.0, 0.0], [0.0], None)}, results={"b": nobody})
    assert torch.equal(torch.cat(grads), torch.tensor([3.0, 0.0, 0.5, 0.0])) and update.aligned and update.people
    assert update.row()["loss.image"] == 0.5 and update.row()["loss.align"] == 0.5
    alone, _ = update_of({"b": ([0.0, 0.0], [0.0], None)}, results={"b": nobody})  # originals are what they were
    assert alone.good and not alone.aligned


def test_a_prompt_that_names_a_class_is_no_part_of_the_bias():
    named = StepResult({"align": 0.1, "image": 0.5}, {"gender": [1.0, 0.0]}, 4, 4, named=True, grad_share={"align": 1.0})
    good = ([2.0, 0.0], [1.0], [0.0])
    row = update_of({"a": good, "b": good}, results={"b": named})[0].row()
    assert row["bias.gender"] == 0.5 and row["loss.align"] == 1.0 and row["loss.named"] == 0.1 and "loss.image" not in row


def test_without_any_good_prompt_nothing_is_to_be_applied():
    update, grads = update_of({"nan": ([NAN, 0.0], [0.0], [0.0])})
    assert not update.good and grads == [None, None, None]


def test_zero_is_an_error():
    with pytest.raises(FairDiffError, match="exactly zero"):
        update_of({"a": ([0.0, 0.0], [0.0], None)})


def test_the_row_sums_counts_and_averages_the_rest_over_prompts():
    good = ([2.0, 0.0], [1.0], [0.0])
    other = StepResult({"align": 2.0, "image": 0.5}, {"gender": [0.5, 0.5]}, 6, 5)
    update, _ = update_of({"a": good, "b": good}, results={"b": other})
    row = update.row()
    assert (row["prompts"], row["faces"], row["kept"]) == (["a", "b"], 10, 8)
    assert row["loss.align"] == 1.5 and row["loss.image"] == 0.5  # a term is averaged over the prompts that have it
    assert row["bias.gender"] == 0.25  # opposite prompts do not cancel: each has its own bias
