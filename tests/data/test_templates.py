"""Prompts and completions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metapeft.data.rows import Row
from metapeft.data.task import Example
from metapeft.data.templates import check_template, default_template, enumerate_labels, render, text
from metapeft.errors import UserError

LABELS = ("ham", "spam")


def test_few_labels_are_listed_many_are_not() -> None:
    assert render(Row("hi", "ham"), default_template("classification", LABELS), LABELS) == Example(
        "Label: ham or spam\nhi\nLabel:", " ham"
    )
    assert default_template("classification", [str(i) for i in range(10)]).startswith("Label: {labels}\n")
    assert default_template("classification", [str(i) for i in range(11)]) == "{text}\nLabel:"


def test_labels_read_as_a_list() -> None:
    assert enumerate_labels(["a"]) == "a"
    assert enumerate_labels(["a", "b"]) == "a or b"
    assert enumerate_labels(["a", "b", "c"]) == "a, b or c"


@pytest.mark.parametrize(("prompt", "completion"), [("2+2 =", " 4"), ("2+2 = ", "4"), ("2+2\n", "4")])
def test_one_space_between_prompt_and_completion(prompt: str, completion: str) -> None:
    assert render(Row(prompt, "4"), "{text}", ()) == Example(prompt, completion)


def test_conversations_are_left_to_the_chat_template() -> None:
    row = Row((("user", "hi"),), "hello")
    assert render(row, "{text}\nLabel:", ()) == Example((("user", "hi"),), "hello")


def test_braces_in_texts_and_templates_stay() -> None:
    row = Row("{labels} {text} {x}", "y")
    assert render(row, 'JSON {"a": 1}: {text} ->', LABELS).prompt == 'JSON {"a": 1}: {labels} {text} {x} ->'


@pytest.mark.parametrize(("template", "part"), [("no field", "no {text}"), ("{text} {label}", "unknown field {label}")])
def test_wrong_templates_are_refused(template: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        check_template(template)
    assert part in str(caught.value)


def test_how_a_text_ends_is_not_in_a_labels_completion() -> None:
    assert render(Row("free cash \n", "spam"), "Is this {labels}? {text}", LABELS) == Example(
        "Is this ham or spam? free cash", " spam"
    )
    assert render(Row("free cash \n", "spam"), "{text}\n", LABELS) == Example("free cash \n\n", "spam")
    assert render(Row("free cash \n", "spam"), "{text}\nLabel:", LABELS).prompt == "free cash \n\nLabel:"


@given(
    st.text().filter(str.strip),
    st.sampled_from(
        ["{text}", "{text}\nLabel:", "Label: {labels}\n{text}\nLabel:", "{labels}? {text}", "{text} {text}"]
    ),
)
def test_the_text_of_a_row_is_found_again(said: str, template: str) -> None:
    example = render(Row(said, "spam"), template, LABELS)
    if template.endswith("{text}"):
        said = said.rstrip()
    assert text(example, template, LABELS) == (said if template.count("{text}") == 1 else example.prompt)


def test_of_a_conversation_the_text_is_the_last_message() -> None:
    assert text(render(Row((("system", "be brief"), ("user", "hi")), "hello"), "{text}", ()), "", ()) == "hi"
