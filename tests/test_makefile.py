"""`make install` with a Python that only pretends: what was interrupted is made anew, what was finished is kept."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Stands for `python -m venv DIR` and for the environment's own python, whose pip leaves a file and may be cut off.
PRETENDER = f"""#!{sys.executable}
import os, shutil, signal, sys
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "venv"]:
    os.makedirs(arguments[2] + "/bin", exist_ok=True)
    shutil.copy(__file__, arguments[2] + "/bin/python")
elif arguments[:2] == ["-m", "pip"]:
    open(os.path.dirname(__file__) + "/../half", "a").close()
    if os.environ.get("CUT"):
        os.kill(os.getpid(), signal.SIGKILL)
    open("calls", "a").write("pip\\n")
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, and tools that do nothing."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tools").mkdir()
    for name in ("pretender", "gcc", "g++", "cmake"):
        tool = tmp_path / "tools" / name
        tool.write_text(PRETENDER)
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def install(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Type `make install`."""
    tools = checkout / "tools"
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    return subprocess.run(
        ["make", "install", f"PYTHON={tools / 'pretender'}"],
        cwd=checkout,
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_interrupted_installation_is_made_anew_and_a_finished_one_kept(checkout: Path) -> None:
    assert install(checkout, CUT="1").returncode != 0
    (checkout / ".venv" / "torn").touch()
    again = install(checkout)
    assert again.returncode == 0 and "making .venv anew" in again.stdout
    assert not (checkout / ".venv" / "torn").exists() and (checkout / ".venv" / "half").exists()
    (checkout / ".venv" / "mine").touch()
    assert install(checkout).returncode == 0
    assert (checkout / "calls").read_text() == "pip\n"


def test_changed_requirements_are_installed_into_the_environment_that_is_there(checkout: Path) -> None:
    install(checkout)
    (checkout / ".venv" / "mine").touch()
    later = (checkout / ".venv" / "installed").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    assert install(checkout).returncode == 0
    assert (checkout / ".venv" / "mine").exists() and (checkout / "calls").read_text() == "pip\npip\n"
