"""
Executed documents: every Python block of a Markdown file runs, and what a block printed can be stated.

The blocks of one file share a namespace. A block fenced as ``output`` has to follow a Python block directly
and to equal what that block printed, trailing whitespace aside. A ``text`` block is held to the same where
it follows a Python block directly, and is prose elsewhere. Nothing is compared where nothing is stated.
"""

import doctest
import io
from contextlib import redirect_stdout
from difflib import ndiff

from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

__all__ = ["PARSERS"]

_run = PythonEvaluator()


def _record(example):
    """Run a Python block; leave what it printed, and where the block ends, on its document."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        _run(example)
    example.document.printed = example.end, printed.getvalue()


def _compare(example, mandatory):
    """Return a description of the difference between a stated and a real output, or None."""
    end, printed = getattr(example.document, "printed", (0, ""))
    if example.document.text[end : example.start].strip(" \n`"):
        return "no Python block that ran stands directly before this output" if mandatory else None
    stated, real = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (example.parsed, printed))
    return None if stated == real else "\n".join(["stated (-) and printed (+) differ:", *ndiff(stated, real)])


class _PythonBlocks(PythonCodeBlockParser):
    def __init__(self):
        super().__init__(doctest_optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        self.codeblock_parser = CodeBlockParser("python", _record)


PARSERS = [
    _PythonBlocks(),
    CodeBlockParser("output", lambda example: _compare(example, mandatory=True)),
    CodeBlockParser("text", lambda example: _compare(example, mandatory=False)),
]
