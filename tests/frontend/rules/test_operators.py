"""The operator table: one row for each version, a meaning for each rule, a test for each row, and the page of it all."""

import onnx
import pytest
import torch

from liar_opt.frontend.rules.operators import OPERATORS
from liar_opt.frontend.rules.table import Op, each, table_of
from liar_opt.runtime.errors import InternalError
from liar_opt.tools.dev import operators_page


def test_a_second_row_for_one_version_is_an_error() -> None:
    with pytest.raises(InternalError, match="two rows"):
        table_of({"": [*each("Abs Neg"), Op("Abs")]})
    newest = table_of({"": [Op("Softmax", since=13), Op("Softmax")]})["", "Softmax"]
    assert [op.since for op in newest] == [0, 13]


def test_each_rule_has_one_meaning() -> None:
    listed = [rule for rules in operators_page.MEANINGS.values() for rule in rules]
    used = {op.rule for rows in OPERATORS.values() for op in rows if op.rule is not None}
    assert len(listed) == len(set(listed))
    assert set(listed) == used


def test_the_page_is_what_the_table_says() -> None:
    written, parting = operators_page.PAGE.read_text(encoding="utf-8"), operators_page.RELEASE
    assert written.split(parting)[0] == operators_page.page().split(parting)[0]
    releases = f"{parting} {onnx.__version__}:", f"{operators_page.CORE} {torch.__version__.partition('+')[0]},"
    if all(release in written for release in releases):  # others have other operators
        assert written == operators_page.page()
