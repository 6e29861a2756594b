"""Write ``api.md``: every public module, its names and their purpose, taken from the docstrings."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import brainstate

HEAD = """# API

Every public name and its purpose, written by `make docs` from the docstrings, where signatures, parameters
and examples are (`help(brainstate.State)`)."""


def public_modules():
    """Return the package and its public modules by name, in order."""
    found = {brainstate.__name__: brainstate}
    for info in pkgutil.walk_packages(brainstate.__path__, "brainstate."):
        if not any(part.startswith("_") for part in info.name.split(".")):
            found[info.name] = importlib.import_module(info.name)
    return dict(sorted(found.items()))


def purpose(thing):
    """Return the first paragraph of a docstring on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def page():
    """Return the whole page."""
    sections = [HEAD]
    for name, module in public_modules().items():
        names = [f"- `{export}`: {purpose(getattr(module, export))}" for export in module.__all__]
        sections.append("\n".join([f"## `{name}`", "", purpose(module), "", *names]))
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page())
