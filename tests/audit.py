"""Look for known vulnerabilities in the versions of constraints.txt: ``python tests/audit.py``.

Exits with 1 if it finds any. If the advisory database cannot be reached, prints this and exits with
0.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT_OF_REACH = (
    "ConnectionError",
    "Connection refused",
    "Max retries",
    "NameResolution",
    "timed out",
)


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--requirement", "constraints.txt", "--no-deps"]
    command += ["--disable-pip", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        if any(word in done.stderr for word in OUT_OF_REACH):
            print("audit: the advisory database cannot be reached; nothing was checked")
            return 0
        print(done.stderr, file=sys.stderr)
        return done.returncode or 1
    found = [
        f"{package['name']} {package['version']}: {problem['id']}, mended in "
        f"{', '.join(problem['fix_versions']) or 'no version yet'}"
        for package in packages
        for problem in package.get("vulns", ())
    ]
    print("\n".join(found) or f"audit: {len(packages)} packages, no known vulnerability")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
