"""What travels with a submitted job: the resolved job file, its code, or a whole working directory. Runs on the client.

The package is one zip file; the same content gives the same bytes, so Ray uploads it once.
"""

import glob
import os
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
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

# Keys of people and clouds, which nobody means to send; a file among them that a job needs is named in cluster.code.
_PRIVATE = (
    ".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    ".netrc", ".pgpass", ".git-credentials", ".pypirc", ".npmrc", "credentials.json", "service-account*.json",
    "kubeconfig",
)  # fmt: skip
_PRIVATE_FOLDERS = {".aws", ".azure", ".config", ".docker", ".gnupg", ".kaggle", ".kube", ".ray", ".ssh"}
_MOST_FILES = 20_000
_NEVER = {".git", ".venv", "venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest date a zip file can hold


_KEYS = (
    "which Ray keeps with the job for all who can see the cluster; take it out, and give the cluster's nodes a role, "
    "or the keys as variables of their own (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
)


@dataclass(frozen=True)
class Package:
    """Files by their path in the package, and the job file that is not one yet."""

    job: JobSpec
    files: dict[str, Path]

    @property
    def size_bytes(self) -> int:
        """Of the files as they are; the zip may be smaller."""
        return sum(path.stat().st_size for path in self.files.values())

    def holds(self, pattern: str) -> bool:
        """Whether a file, anything in a directory, or anything that fits a glob travels along."""
        path = PurePosixPath(os.path.normpath(pattern))
        if glob.has_magic(pattern):
            steady = PurePosixPath(*[part for part in path.parts if not glob.has_magic(part)][: _steady(path)])
            return any(PurePosixPath(name).is_relative_to(steady) for name in self.files)
        return any(PurePosixPath(name).is_relative_to(path) for name in self.files)

    def finds(self, location: str) -> bool:
        """Whether a location of a command means something on the cluster."""
        return _travels_well(location) or self.holds(location)

    def largest(self, count: int) -> list[tuple[str, int]]:
        """The largest files with their sizes in bytes."""
        sizes = [(name, path.stat().st_size) for name, path in self.files.items()]
        return sorted(sizes, key=lambda entry: -entry[1])[:count]

    def write(self, target: Path) -> None:
        """Write the zip file."""
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            _add(archive, JOB_FILE, dump_job(self.job).encode())
            for name in sorted(self.files):
                _add(archive, name, self.files[name].read_bytes(), self.files[name].stat().st_mode)


def _steady(path: PurePosixPath) -> int:
    """How many parts of a pattern come before its first glob."""
    return next(number for number, part in enumerate(path.parts) if glob.has_magic(part))


def _add(archive: zipfile.ZipFile, name: str, content: bytes, mode: int = 0o644) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.external_attr = (mode & 0o777 | 0o100000) << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(info, content)


def make_package(job: JobSpec, working_dir: Path | None) -> Package:
    """What `job` needs on the cluster.

    Args:
        job: the job with its overrides.
        working_dir: a directory that travels whole, but for what git ignores; None ships `cluster.code` alone.

    Raises:
        SpecError: a path of the job file would mean nothing on the cluster.
        RunError: the working directory cannot be read.
    """
    base = working_dir if working_dir is not None else Path.cwd()
    files: dict[str, Path] = {}
    if working_dir is not None:
        if not working_dir.is_dir():
            raise RunError(f"--working-dir: {working_dir} is no directory; name the one that should travel")
        files |= {name: base / name for name in _unignored(base)}
    problems = []
    for entry in job.cluster.code:
        found, problem = _code(base, entry)
        files |= found
        problems += problem
    cluster = job.cluster.model_copy(update={"address": "auto"})
    package = Package(job.model_copy(update={"cluster": cluster}), files)
    problems += [
        f"{key}: {location} {_why_lost(location, working_dir)}; {mend}" for key, location, mend in _lost(package, base)
    ]
    problems += [f"{dotted(key)}: {shown} holds {what}, {_KEYS}" for key, shown, what in find_secrets(job)]
    if problems:
        raise SpecError(tuple(problems))
    return package


def _unignored(base: Path) -> list[str]:
    """Files of a directory without what git, or a .rayignore, ignores; all of them where it is no git checkout."""
    listed = _ls_files(base, "--cached", "--others", "--exclude-standard")
    if listed is None:
        listed = list(_all_files(base))
    else:
        kept_back = _ls_files(base, "--cached", "--others", "--ignored", "--exclude-per-directory=.rayignore")
        listed = sorted(set(listed) - set(kept_back or ()))
    real = base.resolve()
    return [
        name
        for name in listed
        if not _NEVER & set(Path(name).parts) and not _is_private(name) and _is_within(base / name, real)
    ]


def _ls_files(base: Path, *options: str) -> list[str] | None:
    """What git lists of a directory; None where there is no checkout, or no git."""
    try:
        listed = subprocess.run(["git", "-C", str(base), "ls-files", "-z", *options], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return [name for name in listed.stdout.split("\0") if name] if listed.returncode == 0 else None


def _all_files(folder: Path, base: Path | None = None) -> Iterator[str]:
    """Files below a directory; links are followed inside of the base alone, each directory once.

    Raises:
        RunError: There are too many to be code.
    """
    real, seen, count = (base or folder).resolve(), set[Path](), 0
    for root, directories, names in os.walk(folder, followlinks=True):
        here = Path(root)
        kept = (name for name in directories if name not in _NEVER | _PRIVATE_FOLDERS)
        directories[:] = sorted(name for name in kept if _leads_on(here / name, real, seen))
        for name in sorted(names):
            if _is_private(name) or not _is_within(here / name, real):
                continue
            count += 1
            if count > _MOST_FILES:
                raise RunError(
                    f"{folder}: holds more than {_MOST_FILES} files, which is no code; name the files that are needed, "
                    "and keep data on storage that all nodes share"
                )
            yield (here / name).relative_to(folder).as_posix()


def _leads_on(folder: Path, base: Path, seen: set[Path]) -> bool:
    """Return whether a walk goes into a directory: not by a link out of the base or in a circle, nor twice."""
    real = folder.resolve()
    is_circle = folder.is_symlink() and folder.parent.resolve().is_relative_to(real)
    if real in seen or is_circle or not real.is_relative_to(base):
        return False
    seen.add(real)
    return True


def _is_private(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(_PRIVATE_FOLDERS & set(path.parts)) or any(fnmatch(path.name, pattern) for pattern in _PRIVATE)


def _is_within(path: Path, base: Path) -> bool:
    """Return whether it is a file that lies below a directory, when its links are followed."""
    return path.is_file() and path.resolve().is_relative_to(base)


def _code(base: Path, entry: str) -> tuple[dict[str, Path], list[str]]:
    """The files of one entry of `cluster.code`, or what is wrong with it."""
    path = Path(os.path.normpath(entry))
    if path.is_absolute() or ".." in path.parts:
        remedy = "give a path below the directory you submit from, as it will have the same path on the cluster"
        return {}, [f"cluster.code: {entry} lies outside of {base}; {remedy}"]
    if (base / path).exists() and not (base / path).resolve().is_relative_to(base.resolve()):
        return {}, [f"cluster.code: {entry} is a link that leads out of {base}; put a copy there"]
    if (base / path).is_file():
        return {path.as_posix(): base / path}, []
    if (base / path).is_dir():
        return {(path / name).as_posix(): base / path / name for name in _all_files(base / path, base)}, []
    return {}, [f"cluster.code: {entry} is not in {base}; give a file or directory that is there"]


_SPLITS = ("train", "validation", "test")
_SHARED = "give a URI or an absolute path on storage that all nodes share"


def _lost(package: Package, base: Path) -> Iterator[tuple[str, str, str]]:
    """Key, relative path and remedy of what the cluster would look for in vain."""
    job = package.job
    if not _travels_well(job.output.storage):
        yield "output.storage", job.output.storage, _SHARED
    inputs = [(f"data.{name}", where) for name in _SPLITS for where in getattr(job.data, name) or ()]
    inputs += [("data.files_below", where) for where in job.data.files_below]
    if job.model.name and (base / job.model.name).is_dir():  # else it is a name on the hub
        inputs.append(("model.name", job.model.name))
    for key, location in inputs:
        if not _travels_well(location) and not package.holds(location):
            yield key, location, f"{_SHARED}, or name it in cluster.code if it is small"


def _why_lost(location: str, working_dir: Path | None) -> str:
    if working_dir is not None and _ls_files(
        working_dir, "--others", "--ignored", "--exclude-standard", "--", location
    ):
        return "is ignored by git, so it does not travel with the job"
    return "is a relative path that does not travel with the job"


def _travels_well(location: str) -> bool:
    return "://" in location or location.startswith("hub:") or os.path.isabs(location)
