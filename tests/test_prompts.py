"""Prompts: articles, templates, files, and one-line errors that name the file and the key."""

import ast
from pathlib import Path

import pytest
from tiny import composed

import fairdiff.prompts
from fairdiff.errors import FairDiffError
from fairdiff.plan import make_plan
from fairdiff.prompts import Prompt, fill, read_prompts, with_article


@pytest.mark.parametrize(
    "phrase",
    [
        "a nurse",
        "an accountant",
        "an emergency medical technician",
        "an old Black woman",
        "an Asian man",
        "an Indian person",
        "an elderly person",
        "a university professor",
        "an uninvited person",
        "a user",
        "an umpire",
        "an usher",
        "a utility worker",
        "an honest person",
        "a human resources manager",
        "a housekeeper",
        "an hour-keeper",
        "an X-ray technician",
        "a European person",
        "a one-armed person",
        "an only child",
        "an unimportant person",
    ],
)
def test_article_follows_the_sound(phrase):
    assert with_article(phrase.split(" ", 1)[1]) == phrase


def test_fill_mends_only_the_article_before_the_gap():
    assert fill("a photo of the face of a {}, a person", "actor") == "a photo of the face of an actor, a person"
    assert fill("An {subject} at a desk", "nurse") == "A nurse at a desk"
    assert fill("a {} and a {}", "editor") == "an editor and an editor"
    assert fill("a banana {}", "on ice") == "a banana on ice"


def test_fill_does_not_read_the_subject_as_a_template_or_a_pattern():
    assert fill("a photo of {}", r"a {brace} and \1") == r"a photo of a {brace} and \1"


@pytest.mark.parametrize("template", ["a photo", "", "a {occupation}", "a {} {", "a {0}"])
def test_templates_without_a_plain_gap_are_refused(template):
    with pytest.raises(FairDiffError, match=r"^prompts\.template: .*\{\}") as caught:
        fill(template, "nurse")
    assert "\n" not in str(caught.value)


def test_text_file_with_and_without_template(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("\ufeff# people\n\n  a nurse \r\nan actor\n", encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == ["a nurse", "an actor"]
    path.write_text("nurse\nactor\n")
    assert read_prompts(path, "{}") == read_prompts(path)  # a bare gap takes whole prompts
    assert [p.text for p in read_prompts(path, "a {}")] == ["a nurse", "an actor"]  # one with an article does not
    assert read_prompts(path, "a photo of a {}", "work") == [
        Prompt("a photo of a nurse", "work", "nurse"),
        Prompt("a photo of an actor", "work", "actor"),
    ]


def test_csv_columns(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text('prompt,family\n"a nurse, smiling",work\na tree,\n')
    assert read_prompts(path, family="mine") == [
        Prompt("a nurse, smiling", "work", "a nurse, smiling"),
        Prompt("a tree", "mine", "a tree"),
    ]
    path.write_text("subject,women_pct\nactor,47.7\n")
    assert read_prompts(path, "a {}, a person") == [Prompt("an actor, a person", "custom", "actor")]
    path.write_text("subject,template\nactor,a {}\nnurse,the {}\n")
    assert [prompt.text for prompt in read_prompts(path)] == ["an actor", "the nurse"]
    path.write_text("subject,people,group\nactor,Yes,stage\nteapot,no,\nnurse,,\n")
    assert [(p.subject, p.people, p.group) for p in read_prompts(path, "a {}")] == [
        ("actor", True, "stage"), ("teapot", False, ""), ("nurse", True, "")
    ]  # fmt: skip
    path.write_text("prompt,people,group\na red teapot,no,pots\n")
    assert read_prompts(path) == [Prompt("a red teapot", "custom", "a red teapot", people=False, group="pots")]


def test_own_prompts_reach_training_and_audit(tmp_path):
    (tmp_path / "mine.csv").write_text('prompt,family\n"two nurses, smiling",pair\na chef,\n')
    (tmp_path / "held_out.txt").write_text("astronaut\n")
    config = composed(f"prompts.train={tmp_path / 'mine.csv'}", f"prompts.test={tmp_path / 'held_out.txt'}")
    plan = make_plan(config)
    assert {(p.text, p.family) for p in plan.train} == {("two nurses, smiling", "pair"), ("a chef", "custom")}
    assert [(p.text, p.subject) for p in plan.audit] == [("a photo of the face of an astronaut, a person", "astronaut")]


@pytest.mark.parametrize(
    ("name", "content", "template", "says"),
    [
        ("gone.txt", None, None, "No such file"),
        ("list.json", "[]", None, r"\.txt or \.csv"),
        ("latin.txt", b"caf\xe9", None, "not UTF-8"),
        ("empty.txt", "\n# nothing\n", None, "holds no prompts"),
        ("empty.csv", "prompt\n", None, "holds no prompts"),
        ("blank.csv", "", None, "needs a column prompt or subject"),
        ("columns.csv", "text\na nurse\n", None, r"found \['text'\]"),
        ("bare.csv", "subject\nnurse\n", None, "needs a template"),
        ("cell.csv", "prompt,family\na nurse,x\n ,x\n", None, "line 3: the cell prompt is empty"),
        ("short.csv", "template,subject\na {},nurse\na {}\n", None, "line 3: the cell subject is empty"),
        ("people.csv", "subject,people\nactor,yes\nteapot,none\n", "a {}", "line 3: people: found none, allowed: yes, no"),
        ("twice.txt", "a nurse\na nurse\n", None, "'a nurse' occurs twice"),
        ("gap.txt", "nurse\n", "a photo", "needs a gap"),
    ],
)
def test_bad_files_get_one_line_that_names_them(tmp_path, name, content, template, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FairDiffError, match=says) as caught:
        read_prompts(path, template)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("prompts.")
    assert name == "gap.txt" or str(path) in message


def test_a_folder_is_no_prompt_file(tmp_path):
    folder = tmp_path / "list.txt"
    folder.mkdir()
    with pytest.raises(FairDiffError, match="cannot read"):
        read_prompts(folder)


def test_prompts_import_nothing_heavy():
    tree = ast.parse(Path(fairdiff.prompts.__file__).read_text(encoding="utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert found <= {"re", "dataclasses", "pathlib", "typing", "fairdiff.errors", "fairdiff.files"}
