"""How many public names have a type that every checker sees: `make types`, by pyright."""

import json
import os
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parents[1]
LIMIT = 0.95


def main() -> int:
    """Print the score, and where it is too low the names whose types have to be guessed."""
    # Pyright looks into the folders of the `python` on the path, and not behind its links.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "pyright", "--verifytypes", "dmin", "--ignoreexternal"]
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(TOP)}
    done = subprocess.run(
        [*command, "--outputjson"], cwd=TOP, env=environment, capture_output=True, text=True
    )
    if not done.stdout.startswith("{"):
        print(done.stdout + done.stderr, file=sys.stderr)
        return done.returncode or 1
    found = json.loads(done.stdout)["typeCompleteness"]
    score, counts = found["completenessScore"], found["exportedSymbolCounts"]
    if score < LIMIT:
        print(*(each["name"] for each in found["symbols"] if not each["isTypeKnown"]), sep="\n")
    print(f"{score:.1%} of {sum(counts.values())} public names have a known type ({LIMIT:.0%})")
    return int(score < LIMIT)


if __name__ == "__main__":
    sys.exit(main())
