"""Checks what is in an sdist and a wheel: `python contents.py DIST SOURCE`.

The wheel has the tracked files of titan_cpt/ and nothing else; the sdist has the tracked files except those of
MANIFEST.in. Neither has a large file. Both have the same version, which is the one that git describes.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

LARGEST_BYTES = 1_000_000
NOT_IN_SDIST = ("docs/reproduction/", "findings/", ".ci/")
FOLDERS_OF_RUNS = ("outputs/", "data/", "assets/", ".venv/")


def main(dist: Path, source: Path) -> int:
    """Print every problem; returns the exit status."""
    listed = subprocess.run(["git", "-C", str(source), "ls-files"], capture_output=True, text=True, check=True)
    tracked = set(listed.stdout.splitlines())
    (wheel_path,), (sdist_path,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel_path) as wheel, tarfile.open(sdist_path) as sdist:
        in_wheel = {info.filename: info.file_size for info in wheel.infolist()}
        in_sdist = {member.name.partition("/")[2]: member.size for member in sdist.getmembers() if member.isfile()}
        (metadata,) = [name for name in in_wheel if name.endswith(".dist-info/METADATA")]
        fields = message_from_bytes(wheel.read(metadata))
    package = {name for name in tracked if name.startswith("titan_cpt/")}
    others = {name for name in in_wheel if ".dist-info/" not in name} - package
    expected = {name for name in tracked if not name.startswith(NOT_IN_SDIST)}
    problems = [
        *(f"wheel: lacks {name}" for name in sorted(package - set(in_wheel))),
        *(f"wheel: has {name}" for name in sorted(others)),
        *(f"sdist: lacks {name}" for name in sorted(expected - set(in_sdist))),
        *(f"sdist: has {name}" for name in sorted(in_sdist) if name.startswith((*NOT_IN_SDIST, *FOLDERS_OF_RUNS))),
        *(f"{name}: {size:,} bytes" for name, size in {**in_sdist, **in_wheel}.items() if size > LARGEST_BYTES),
    ]
    version = fields["Version"]
    if not wheel_path.name.startswith(f"titan_cpt-{version}-") or sdist_path.name != f"titan_cpt-{version}.tar.gz":
        problems.append(f"the files are not named after version {version}")
    print(f"version {version}; wheel: {len(in_wheel)} files, {wheel_path.stat().st_size:,} bytes")
    print(f"sdist: {len(in_sdist)} files, {sdist_path.stat().st_size:,} bytes")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
