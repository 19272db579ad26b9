"""Every kind of bad input gets a sentence that names the place and the field."""

import bad_inputs
import pytest


@pytest.mark.parametrize("case", bad_inputs.BAD_INPUTS, ids=lambda case: f"{case.reader}: {case.wrong}")
def test_bad_input_is_told_with_its_place(case, tmp_path):
    said = bad_inputs.tell(case, tmp_path)
    for word in case.words:
        assert word in said


@pytest.mark.parametrize(("template", "words"), [case[1:] for case in bad_inputs.bad_templates()])
def test_templates_that_cannot_be_used_are_told(template, words):
    said = bad_inputs.tell_of_template(template)
    for word in words:
        assert word in said
