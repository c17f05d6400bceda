"""Install the packages that a file names into .venv/, and show one line of progress: what `make` calls.

    python helpers/book/install.py requirements.txt

It needs the standard library alone. What pip says goes to build/install.log; its end is shown if pip fails.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV, LOG = ROOT / ".venv", ROOT / "build" / "install.log"


def progress(log: str, there: int) -> str:
    """A bar that shows how far pip has come that wrote ``log``, with ``there`` packages in place."""
    found = len(re.findall(r"^Collecting ", log, re.MULTILINE))
    fetched = len(re.findall(r"^ *(?:Downloading|Using cached) \S+(?<!\.metadata) \(", log, re.MULTILINE))
    steps = min(fetched, found) + min(there, found)
    bar = "#" * (30 * steps // (2 * found or 1))
    return f"[{bar:30}] {fetched} of {found} packages fetched, {there} installed"


def main(requirements: str) -> str | None:
    """Install; what went wrong, or None."""
    print(f"Installing {requirements} into .venv/ (PyTorch is large: some minutes)", file=sys.stderr)
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--requirement", requirements]
    with LOG.open("w") as log:
        pip = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while pip.poll() is None:
            time.sleep(0.2)
            if sys.stderr.isatty():
                there = len(list(VENV.glob("lib/python*/site-packages/*.dist-info")))
                print("\r" + progress(LOG.read_text(errors="replace"), there), end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if pip.returncode:
        tail = LOG.read_text(errors="replace").splitlines()[-15:]
        return "\n".join([*tail, f"The installation failed; all that pip said is in {LOG}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
