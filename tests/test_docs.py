"""The runner of the documents itself: it accepts what is true, and it can fail."""

import pytest
from sybil import Document
from sybil.example import SybilFailure

from _docs import PARSERS

BLOCK = "```python\nprint('a  ')\nprint(1 + 1)\n```\n"


def run(tmp_path, text):
    """Execute `text` as a document and return its namespace."""
    path = tmp_path / "page.md"
    path.write_text(text)
    document = Document.parse(str(path), *PARSERS)
    for example in document:
        example.evaluate()
    return document.namespace


@pytest.mark.parametrize("language", ["output", "text"])
def test_true_output_passes(tmp_path, language):
    run(tmp_path, f"{BLOCK}\n```{language}\na\n2\n```\n")


@pytest.mark.parametrize("language", ["output", "text"])
@pytest.mark.parametrize("stated", ["a\n3", "a", "", "a\n2\n2", " a\n2"])
def test_false_output_fails(tmp_path, language, stated):
    with pytest.raises(SybilFailure, match="differ"):
        run(tmp_path, f"{BLOCK}\n```{language}\n{stated}\n```\n")


def test_output_belongs_to_the_block_right_before_it(tmp_path):
    run(tmp_path, f"{BLOCK}\nProse.\n\n```text\nanything\n```\n")
    with pytest.raises(SybilFailure, match="directly before"):
        run(tmp_path, f"{BLOCK}\nProse.\n\n```output\na\n2\n```\n")


def test_blocks_share_a_namespace_and_raise(tmp_path):
    assert run(tmp_path, "```python\nx = 1\n```\n\n```python\nx += 1\n```\n")["x"] == 2
    with pytest.raises(NameError):
        run(tmp_path, "```python\ny\n```\n")


def test_doctest_blocks_are_compared(tmp_path):
    run(tmp_path, "```python\n>>> 1 + 1\n2\n```\n")
    with pytest.raises(SybilFailure, match="Expected"):
        run(tmp_path, "```python\n>>> 1 + 1\n3\n```\n")
