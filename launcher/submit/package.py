"""The package of a submitted job: the resolved job file, its code, or a whole working directory. Runs on the client.

The package is one zip file. The same content gives the same bytes, so Ray uploads it once. Read `ray_jobs.py` next.
"""

import glob
import os
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path, PurePosixPath

from launcher.errors import RunError, SpecError
from launcher.spec.job import JobSpec
from launcher.spec.loader import dump_job
from launcher.spec.messages import dotted
from launcher.spec.permissions import find_secrets

JOB_FILE = "launcher-job.yaml"
"""Name of the resolved job file in the package."""

MAX_BYTES = 100 * 2**20
"""Ray's dashboard refuses larger uploads (`dashboard_max_request_body_size`)."""

# Files with keys of people and clouds are never packed; a job that needs one names it in cluster.code.
_PRIVATE = (
    ".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    ".netrc", ".pgpass", ".git-credentials", ".pypirc", ".npmrc", "credentials.json", "service-account*.json",
    "kubeconfig",
)  # fmt: skip
_PRIVATE_FOLDERS = {".aws", ".azure", ".config", ".docker", ".gnupg", ".kaggle", ".kube", ".ray", ".ssh"}
_MOST_FILES = 20_000
# Ray excludes the first four by itself, but only when it packs a directory (2.60, runtime_env/working_dir.py). It sends
# a zip file as it is.
_NEVER = {".git", ".venv", "venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
# The oldest date a zip file can hold. Ray names a package by the SHA-1 of its bytes (2.60, get_uri_for_package): with
# the dates of the files, the same content would be uploaded again.
_EPOCH = (1980, 1, 1, 0, 0, 0)


_KEYS = (
    "which Ray stores with the job for everyone who can see the cluster; remove it, and give the cluster's nodes a "
    "role, or the keys as variables of their own (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
)


@dataclass(frozen=True)
class Package:
    """The files of a package by their path in it, and the job whose file is written into it."""

    job: JobSpec
    files: dict[str, Path]

    @property
    def size_bytes(self) -> int:
        """Return the size of the files; the zip may be smaller."""
        return sum(path.stat().st_size for path in self.files.values())

    def holds(self, pattern: str) -> bool:
        """Return whether the package has a file, any file of a directory, or any below the fixed part of a glob."""
        path = PurePosixPath(os.path.normpath(pattern))
        if glob.has_magic(pattern):
            path = PurePosixPath(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        return any(PurePosixPath(name).is_relative_to(path) for name in self.files)

    def finds(self, location: str) -> bool:
        """Return whether a location of a command exists on the cluster."""
        return _is_global(location) or self.holds(location)

    def largest(self, count: int) -> list[tuple[str, int]]:
        """Return the largest files with their sizes in bytes."""
        sizes = [(name, path.stat().st_size) for name, path in self.files.items()]
        return sorted(sizes, key=lambda entry: -entry[1])[:count]

    def write(self, target: Path) -> None:
        """Write the zip file."""
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            _add(archive, JOB_FILE, dump_job(self.job).encode())
            # Sorted, so that the bytes do not depend on the order in which git or the disk lists the files. Without the
            # user's own JOB_FILE: a zip file can hold a name twice, and Ray would unpack the second one over ours.
            for name in sorted(self.files.keys() - {JOB_FILE}):
                _add(archive, name, self.files[name].read_bytes(), self.files[name].stat().st_mode)


def _add(archive: zipfile.ZipFile, name: str, content: bytes, mode: int = 0o644) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    # 0o100000 marks a regular file (S_IFREG); the upper 16 bits hold the Unix mode.
    info.external_attr = (mode & 0o777 | 0o100000) << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(info, content)


def make_package(job: JobSpec, working_dir: Path | None) -> Package:
    """Return the package that a job needs on the cluster.

    Args:
        job: Job with its overrides.
        working_dir: Directory to pack whole, without what git ignores; None packs only `cluster.code`.

    Raises:
        SpecError: A path of the job file would not exist on the cluster.
        RunError: The working directory cannot be read.
    """
    base = working_dir if working_dir is not None else Path.cwd()
    files: dict[str, Path] = {}
    if working_dir is not None:
        if not working_dir.is_dir():
            raise RunError(f"--working-dir: {working_dir} is not a directory; name the one to pack")
        files |= {name: base / name for name in _unignored(base)}
    problems = []
    for entry in job.cluster.code:
        code, code_problems = _code(base, entry)
        files |= code
        problems += code_problems
    # The driver runs inside the cluster, where the address that this machine uses may not exist.
    cluster = job.cluster.model_copy(update={"address": "auto"})
    package = Package(job.model_copy(update={"cluster": cluster}), files)
    problems += [
        f"{key}: {location} {_missing_reason(location, working_dir)}; {remedy}"
        for key, location, remedy in _missing(package, base)
    ]
    problems += [
        f"{dotted(key)}: {shown} holds {what}, {_KEYS}"
        for key, shown, what in find_secrets(job.model_dump(mode="json"))
    ]
    if problems:
        raise SpecError(tuple(problems))
    return package


def _unignored(base: Path) -> list[str]:
    """Return the files of a directory that neither git nor a .rayignore ignores; all outside of a checkout."""
    # --cached also lists files that were deleted but not committed: `_is_within` drops them below.
    listed = _ls_files(base, "--cached", "--others", "--exclude-standard")
    if listed is None:
        listed = list(_all_files(base))
    else:
        # --cached again: a .rayignore also excludes files that git tracks, unlike a .gitignore.
        ignored = _ls_files(base, "--cached", "--others", "--ignored", "--exclude-per-directory=.rayignore")
        listed = sorted(set(listed) - set(ignored or ()))
    real = base.resolve()
    return [
        name
        for name in listed
        if not _NEVER & set(Path(name).parts) and not _is_private(name) and _is_within(base / name, real)
    ]


def _ls_files(base: Path, *options: str) -> list[str] | None:
    """Return the files of a directory that git lists; None outside of a checkout, or without git."""
    try:
        listed = subprocess.run(["git", "-C", str(base), "ls-files", "-z", *options], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return [name for name in listed.stdout.split("\0") if name] if listed.returncode == 0 else None


def _all_files(folder: Path, base: Path | None = None) -> Iterator[str]:
    """Yield the files below a directory; links are followed only inside the base, each directory once.

    Raises:
        RunError: There are too many to be code.
    """
    real = (base or folder).resolve()
    visited: set[Path] = set()
    count = 0
    for root, directories, names in os.walk(folder, followlinks=True):
        parent = Path(root)
        public = (name for name in directories if name not in _NEVER | _PRIVATE_FOLDERS)
        # Changed in place: os.walk descends into what is left in this very list, with followlinks even in a circle.
        directories[:] = sorted(name for name in public if _must_visit(parent / name, real, visited))
        for name in sorted(names):
            if _is_private(name) or not _is_within(parent / name, real):
                continue
            count += 1
            if count > _MOST_FILES:
                raise RunError(
                    f"{folder}: holds more than {_MOST_FILES} files, too many for code; name those that are needed, "
                    "and keep data on storage that all nodes share"
                )
            yield (parent / name).relative_to(folder).as_posix()


def _must_visit(folder: Path, base: Path, visited: set[Path]) -> bool:
    """Return whether to enter a directory: not by a link out of the base or in a circle, nor twice."""
    real = folder.resolve()
    is_circle = folder.is_symlink() and folder.parent.resolve().is_relative_to(real)
    if real in visited or is_circle or not real.is_relative_to(base):
        return False
    visited.add(real)
    return True


def _is_private(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(_PRIVATE_FOLDERS & set(path.parts)) or any(fnmatch(path.name, pattern) for pattern in _PRIVATE)


def _is_within(path: Path, base: Path) -> bool:
    """Return whether a path is a file below a directory, with links resolved."""
    return path.is_file() and path.resolve().is_relative_to(base)


def _code(base: Path, entry: str) -> tuple[dict[str, Path], list[str]]:
    """Return the files of one entry of `cluster.code`, or its problem."""
    # Normalised before the search for `..`: a/../b stays inside, a/../../b does not.
    path = Path(os.path.normpath(entry))
    if path.is_absolute() or ".." in path.parts:
        remedy = "give a path below the directory you submit from, as it will have the same path on the cluster"
        return {}, [f"cluster.code: {entry} lies outside of {base}; {remedy}"]
    if (base / path).exists() and not (base / path).resolve().is_relative_to(base.resolve()):
        return {}, [f"cluster.code: {entry} is a link out of {base}; put a copy there"]
    if (base / path).is_file():
        return {path.as_posix(): base / path}, []
    if (base / path).is_dir():
        return {(path / name).as_posix(): base / path / name for name in _all_files(base / path, base)}, []
    return {}, [f"cluster.code: {entry} is not in {base}; give an existing file or directory"]


_SHARED = "give a URI or an absolute path on storage that all nodes share"


def _missing(package: Package, base: Path) -> Iterator[tuple[str, str, str]]:
    """Yield key, path and remedy of each relative path that would not exist on the cluster."""
    job = package.job
    if not _is_global(job.output.storage):
        yield "output.storage", job.output.storage, _SHARED
    # Without the index of the location, which the message shows in full.
    inputs = [(".".join(("data", *map(str, key[:-1]))), location) for key, location in job.data.places()]
    inputs += [("data.files_below", location) for location in job.data.files_below]
    if job.model.name and (base / job.model.name).is_dir():  # otherwise a name on the hub
        inputs.append(("model.name", job.model.name))
    for key, location in inputs:
        if not package.finds(location):
            yield key, location, f"{_SHARED}, or name it in cluster.code if it is small"


def _missing_reason(location: str, working_dir: Path | None) -> str:
    if working_dir is not None and _ls_files(
        working_dir, "--others", "--ignored", "--exclude-standard", "--", location
    ):
        return "is ignored by git, so it is not packed with the job"
    return "is a relative path that is not packed with the job"


def _is_global(location: str) -> bool:
    return "://" in location or location.startswith("hub:") or os.path.isabs(location)
