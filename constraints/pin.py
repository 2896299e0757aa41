"""Write the exact versions that pip resolves for the development environment to constraints/PYTHON_VERSION.txt.

``make pins PYTHON=python3.12`` runs it. Nothing but jointsparse's own metadata is built or installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# Held at one version on every Python: the exporter and the checkpoints follow torch's minor versions.
HELD = ("torch==2.13.0",)


def main() -> None:
    """Resolve with this interpreter's pip and write the file."""
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    command += [f"{here.parent}[dev]", "pip", "setuptools", *HELD]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    pins = sorted(
        f"{package['metadata']['name'].lower()}=={package['metadata']['version'].partition('+')[0]}"
        for package in report["install"]
        if package["metadata"]["name"] != "jointsparse"
    )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    header = f"# The whole development environment on Python {version}; made by `make pins`, do not edit.\n"
    (here / f"{version}.txt").write_text(header + "\n".join(pins) + "\n")


if __name__ == "__main__":
    main()
