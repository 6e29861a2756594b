"""The newest supported Python is not passed over in silence by ``.ci/run``."""

import shutil
import subprocess

import pytest

from _source import ROOT

SHELL = [path for tool in ("bash", "env", "sed", "sort", "tail", "dirname") if (path := shutil.which(tool))]
RUNS, BROKEN, OLDER = "exit 0", "exit 127", "exit 1"  # what an interpreter answers when it is asked for its version


@pytest.fixture
def newest(tmp_path):
    """Return what `.ci/newest` says where these interpreters are on the PATH, and in the folder of pyenv."""

    def run(on_path=None, in_pyenv=None):
        places = {"bin/python3.13": on_path, "pyenv/versions/3.13.9/bin/python": in_pyenv}
        (tmp_path / "bin").mkdir()
        for tool in SHELL:
            (tmp_path / "bin" / tool.rpartition("/")[2]).symlink_to(tool)
        for place, answer in places.items():
            if answer is not None:
                (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / place).write_text(f"#!{shutil.which('bash')}\n{answer}\n")
                (tmp_path / place).chmod(0o755)
        environment = {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path / "pyenv")}
        done = subprocess.run([ROOT / ".ci/newest"], env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout.strip().removeprefix(f"{tmp_path}/"), done.stderr

    return run


@pytest.mark.parametrize(
    ("on_path", "in_pyenv", "found"),
    [
        (RUNS, None, "bin/python3.13"),
        (BROKEN, RUNS, "pyenv/versions/3.13.9/bin/python"),
        (None, RUNS, "pyenv/versions/3.13.9/bin/python"),
        (None, None, ""),
    ],
)
def test_one_that_runs_is_found(newest, on_path, in_pyenv, found):
    assert newest(on_path, in_pyenv) == (0, found, "")


@pytest.mark.parametrize(("on_path", "in_pyenv"), [(BROKEN, None), (None, BROKEN), (OLDER, BROKEN)])
def test_one_that_does_not_run_is_a_failure(newest, on_path, in_pyenv):
    code, found, error = newest(on_path, in_pyenv)
    assert (code, found) == (1, "") and "does not run" in error


def test_the_run_asks_first():
    """And where there is none, it says so in its last line."""
    text = (ROOT / ".ci/run").read_text()
    assert text.index("newest=$(.ci/newest)") < text.index("make test")
    assert "not on this machine" in text.splitlines()[-2]
