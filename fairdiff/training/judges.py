"""Check before training that the training judge and the audit judge use the same classes.

If two labels were swapped in one of them, training would go in the opposite direction of the audited target.
"""

from collections.abc import Sequence

import torch

from classifiers.agreement import Agreement, agreement
from classifiers.types import Classifier
from fairdiff import fingerprint
from fairdiff.errors import FairDiffError
from fairdiff.prompts import Prompt
from fairdiff.training.step import Trainee

PROMPTS, IMAGES = 8, 24  # the first prompts, and the reference images of all of them: as many as in a training step


@torch.no_grad()
def compare_judges(trainee: Trainee, audit_judge: Classifier, prompts: Sequence[Prompt], steps: int) -> list[str]:
    """Return one line with the share of faces in reference images on which both judges agree; [] if they are the same.

    steps: sampler steps. Several processes share the prompts. Raises FairDiffError if the labels of one judge agree much
    better with the other's after renaming classes. The stored reference images and random states are left as they are.
    """
    judge = trainee.perception.classifier
    if judge.config == audit_judge.config and fingerprint.of_frozen(judge) == fingerprint.of_frozen(audit_judge):
        return []
    texts = list(dict.fromkeys(prompt.text for prompt in prompts if prompt.people))[:PROMPTS]
    names = trainee.objective.target.attributes
    found: dict[str, list[list[torch.Tensor]]] = {name: [[], []] for name in names}
    for text in trainee.world.share(texts):
        images = trainee.originals.generate(text, list(range(-(-IMAGES // len(texts)))), steps)
        seen = trainee.perception.classify_faces(images)
        for logits, which in ((seen.logits, 0), (audit_judge(seen.faces.crop_FCHW), 1)):
            for name in names:
                found[name][which].append(logits[name].float().softmax(1).cpu())
    everybody = trainee.world.gather(found)
    results = {}
    for name in names:
        both = (torch.cat([part for some in everybody for part in some[name][which]]) for which in (0, 1))
        results[name] = agreement(*(logits.numpy() for logits in both))
    for name, result in results.items():
        if result.at_odds:
            raise FairDiffError(_at_odds(name, result, judge.attributes[name]))
    faces = next(iter(results.values())).faces
    if not faces:
        return ["judges: training judge and audit judge were not compared, the first reference images show no face"]
    shares = ", ".join(f"{100 * result.share:.0f} % ({name})" for name, result in results.items())
    return [f"judges: training judge and audit judge agree on {shares} of {faces} faces of reference images"]


def _at_odds(name: str, result: Agreement, classes: tuple[str, ...]) -> str:
    pairs = [f"{classes[i]} as {classes[j]}" for i, j in result.renamed]
    return (
        f"judge, audit.judge: they agree on {100 * result.share:.0f} % of {result.faces} faces ({name}), and on "
        f"{100 * result.best_share:.0f} % with {', '.join(pairs)}; allowed: judges whose classes mean the same, see their "
        "mapping, or the order of the classes in config.json"
    )
