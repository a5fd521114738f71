"""The prompt set of the embedded model, a `fairdiff.prompts.PromptSet`."""

from pathlib import Path

from fairdiff.portraits import labour, occupations
from fairdiff.prompts import Prompt, fill, takes_whole


class PortraitsPrompts:
    """The families of the embedded model. Only occupations use the user's template. Titles of one occupation are a group."""

    template = occupations.TEMPLATES["occupation"]
    families = ("occupation", "styled", "descriptor", "sport", "trigger")
    attributes = tuple(occupations.CLASSES)

    def takes_template(self, family: str) -> bool:
        return family == "occupation"

    def prompts(self, family: str, split: str, template: str) -> list[Prompt]:
        some = occupations.prompts(family, split)
        if self.takes_template(family) and template != self.template and not takes_whole(template):
            return [Prompt(fill(template, p.subject), p.family, p.subject, p.people, p.group) for p in some]
        return some

    def without_people(self, split: str) -> list[Prompt]:
        return occupations.prompts("object", split)

    def target_file(self, name: str) -> Path | None:
        return labour.FILE if name == "labour" else None
