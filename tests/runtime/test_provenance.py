"""What a run tells of the code it ran with."""

import shutil
import subprocess
import sys
from pathlib import Path

import dmin

TELL = "from dmin.runtime.provenance import git_state; print(git_state())"


def test_the_commit_of_a_project_around_an_installed_dmin_is_not_dmins(tmp_path):
    package = tmp_path / ".venv" / "site-packages" / "dmin"
    shutil.copytree(Path(dmin.__file__).parent / "runtime", package / "runtime")
    (package / "__init__.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    told = subprocess.run(
        [sys.executable, "-c", TELL], cwd=package.parent, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "None"
