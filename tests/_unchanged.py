"""What every failure must leave behind: the States as they were, and no scope open."""

from contextlib import contextmanager

from brainstate import State

_CONTENT = {"x": 1.0}
_PROBE = State(_CONTENT)


def assert_no_scope() -> None:
    """An open scope lends a container out as a copy; without one the State hands out its own."""
    assert _PROBE.value is _CONTENT


@contextmanager
def unchanged(*states):
    """Every State still holds the very same object afterwards, and no scope stayed open."""
    before = [s.value for s in states]
    try:
        yield
    finally:
        assert_no_scope()
        for state, value in zip(states, before, strict=True):
            assert state.value is value, f"{state!r} changed"
