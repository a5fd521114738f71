"""A model card from audit.json: the README.md of an adapter's folder, in the format of the Hugging Face hub.

All numbers come from the audit (`wording.comparison`), except the confusion counts of the training judge.
"""

import numpy as np
from huggingface_hub import ModelCard, ModelCardData

from fairdiff.audit.headline import changes, headline
from fairdiff.audit.wording import (
    attribute_order,
    comparison,
    interval,
    last_model,
    not_measured,
    number,
    signed,
)

EMBEDDED = "embedded Portraits model"  # in adapter.json and audit.json
LICENCES = {  # of base models, from their cards on the hub
    EMBEDDED: "apache-2.0",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
}
LOADED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # pipelines that fairdiff.load_adapter takes
XL_TOKENS = """from safetensors.torch import load_file

tokens = load_file("soft_tokens.safetensors")
first, second = (pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)
for name, (tokenizer, encoder) in {"clip_l": first, "clip_g": second}.items():
    pipe.load_textual_inversion(tokens[name], token="<fairdiff>", tokenizer=tokenizer, text_encoder=encoder)
pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id  # else it pools at the last token"""
MEANING = (
    "Classes are *perceived presentation*, as a classifier reads it from an image. They are never anybody's identity. Nobody "
    "in a generated image has a gender, race or age to be right or wrong about, and a few classes are coarse."
)
ETHICS = """- The target is a value judgement of whoever trained this adapter. State it wherever the adapter is used.
- Shares say nothing about dignity, pose, dress or stereotypes.
- Do not use it to guess who somebody is, or to label people.
- An adapter can be fair at one guidance scale and unfair at another: use the settings below."""
Confusion = dict[str, np.ndarray]  # attribute -> counts [K, K], rows: true class


def model_card(
    audit: dict, about: dict, training_judge: str, training_confusion: Confusion, hub: str | None = None
) -> str:
    """Return the text of the card. about: adapter.json. hub: the base model's name on the hub, None if it has none."""
    base = hub or about["base_model"]
    data = ModelCardData(
        base_model=hub,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["fairness", "fairdiff", about["type"].replace("_", "-")],
        **_licence(base),
    )
    entries = last_model(audit)["attributes"]
    own = {name: np.array(e["corrected"]["confusion"]) for name, e in entries.items() if "corrected" in e}
    classes = [f"- **{name}**: {', '.join(classes)}" for name, classes in about["classes"].items()]
    parts = [
        f"---\n{data.to_yaml()}\n---\n# {about['type'].replace('_', ' ')} towards {'; '.join(about['target'])}",
        " ".join([headline(audit) + ".", *changes(audit)]),
        f"Trained with FairDiff on the base model `{about['base_model']}`.",
        "## Target and classes\n\nTarget: " + "; ".join(about["target"]) + ".\n\n" + "\n".join(classes) + f"\n\n{MEANING}",
        "## Before and after\n\n" + _results(audit),
        "## Judges\n\n" + _judge("Training judge", training_judge, training_confusion, audit["attributes"]),
        _judge("Audit judge", audit["judge"]["path"], own, audit["attributes"]),
        "## How to load\n\n" + _loading(about),
        "## Not measured\n\n" + "\n".join(f"- {line}" for line in not_measured(audit)),
        f"## Ethics\n\n{ETHICS}",
        f"## Licence\n\n{_licence_in_words(base)}",
    ]
    return ModelCard("\n\n".join(parts) + "\n").content


def _licence(base: str) -> dict[str, str]:
    return {"license": LICENCES[base]} if base in LICENCES else {"license": "other", "license_name": "of-the-base-model"}


def _licence_in_words(base: str) -> str:
    known = LICENCES.get(base)
    return f"That of the base model: {known}." if known else f"That of the base model, which is unknown here: see `{base}`."


def _results(audit: dict) -> str:
    """Return the rows of `comparison` as a Markdown table, with its explanation."""
    lines = ["| | before | after | change | noise floor |", "|---|---|---|---|---|"]
    for group in comparison(audit).values():
        for row in group:
            form = row["format"]
            cells = [" ".join((form(row[key][0]), interval(row[key][1], form))).strip() for key in ("before", "after")]
            cells.append(" ".join((signed(row["change"][0], form), interval(row["change"][1], form))).strip())
            lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['verdict'] or number(row['floor'])} |")
    untargeted = [n for n in attribute_order(audit) if not last_model(audit)["attributes"][n]["target"]["requested"]]
    without = f" No target was set for {', '.join(untargeted)}: its change is drift." if untargeted else ""
    return (
        f"{audit['prompts']} prompts × {audit['images_per_prompt']} images, same noise before and after. [Brackets] are "
        "95 % intervals; with an asterisk they hold for these prompts only, which are too few for others. Bias is the gap "
        f"between the shares of two classes: 0 is parity. D is the distance to the target, with noise removed.{without} The "
        "noise floor is the value for a perfectly fair (or on-target) generator.\n\n" + "\n".join(lines)
    )


def _judge(title: str, name: str, confusion: Confusion, attributes: dict[str, list[str]]) -> str:
    """Return the Markdown of a judge and its confusion counts on labelled faces, {} if they are unknown."""
    text = [f"**{title}**: {name}."]
    if not confusion:
        text[0] += " Its errors on labelled faces are unknown here."
    for attribute, counts in confusion.items():
        classes = attributes.get(attribute, list(map(str, range(len(counts)))))
        table = [f"| {attribute}, true ↓ judged → | {' | '.join(classes)} |", "|---" * (len(classes) + 1) + "|"]
        table += [f"| {c} | {' | '.join(str(int(n)) for n in row)} |" for c, row in zip(classes, counts, strict=True)]
        text.append("\n".join(table))
    return "\n\n".join(text)


def _loading(about: dict) -> str:
    settings = f"guidance_scale={about['guidance']:g}, num_inference_steps={about['sampler_steps']}"
    settings += f", negative_prompt={about['negative_prompt']!r}" if about["negative_prompt"] else ""
    settings += "".join(f", {key}={about[key]}" for key in ("height", "width", "clip_skip") if about.get(key))
    where = '"soft_tokens.safetensors"' if about["type"] == "soft_tokens" else '"."'
    load = f"pipe.{about['load_with']}({where})"
    load = XL_TOKENS if about["type"] == "soft_tokens" and about.get("pipeline") == LOADED[1] else load
    ours = """```python
adapter = fairdiff.load_adapter(pipe, ".")  # this folder; sets the solver of the audit
pipe(adapter.prefix + prompt, **adapter.settings)
```

"""
    ours = ours if about.get("pipeline", LOADED[0]) in LOADED else ""
    return f"""{ours}In plain diffusers, with {about["scheduler"]} ({about["spacing"]}, final sigmas {about["final_sigmas"]}):

```python
{load}
pipe({about["prompt_prefix"]!r} + prompt, {settings})
```"""
