"""Facts about a cluster as typed records, the doctor's findings, and figures as text. Runs on the client.

`actors.py` and `probes.py` fill the records, `checks.py` reads them. The nodes send plain values, which these records
validate: a node may have another launcher or none.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from launcher.rundir.records import Record

Level = Literal["ok", "skipped", "warning", "problem"]

_SHOWN = 4
_SPELLED_OUT = 3


class Finding(Record):
    """One line of the doctor's report."""

    check: str
    """Name of the check: versions, storage, network, ..."""
    level: Level
    """`skipped` was not checked; `problem` makes the command end with exit code 2."""
    found: str
    """Result, with figures and the names of nodes."""
    remedy: str = ""
    """Remedy; empty where none is needed."""


class Disk(Record):
    """The file system under a directory."""

    path: str
    total_bytes: int
    free_bytes: int
    """Bytes that a user without special rights can still write."""


class Gpu(Record):
    """One GPU, as NVML reports it."""

    index: int
    name: str
    memory_bytes: int
    memory_used_bytes: int
    ecc_errors: int | None = None
    """Uncorrected memory errors since the driver was loaded; null where the GPU does not count them."""
    slowed_by: tuple[str, ...] = ()
    """Reasons why its clock is reduced now: heat, power brake, hardware."""


class Node(Record):
    """A live node in Ray's tables."""

    node_id: str
    name: str
    """Name in the report: the host name, with the address where that is not unique."""
    address: str
    is_head: bool
    ray_cpus: float
    ray_gpus: float
    object_store_bytes: int

    @property
    def trains(self) -> bool:
        """Return whether train workers can be placed there; a head with 0 CPUs takes none."""
        return self.ray_cpus > 0 or self.ray_gpus > 0


class Software(Record):
    """The software of a node, or of the command's own environment."""

    python: str
    packages: dict[str, str]
    """Version that an import would find, by name normalised as in PEP 503."""
    launcher_sha256: str | None
    """Hash of the launcher's source files; null without a launcher."""


class NodeFacts(Record):
    """A node's answer about its machine or container."""

    software: Software
    cpus: float
    """CPUs that its processes may use: affinity and container limit."""
    memory_bytes: int | None
    """Memory of the host, or of the container where that is less."""
    memory_free_bytes: int | None
    open_files: int | None
    """Soft limit of open files of a worker process."""
    temp: Disk | None
    """Ray's temporary directory."""
    spill: Disk | None
    """Directory for objects that no longer fit in memory."""
    shm: Disk | None
    """/dev/shm."""
    store_directory: str
    """Directory of Ray's object store; not /dev/shm when that was too small. Empty if unknown."""
    store_used_bytes: int | None
    gpus: tuple[Gpu, ...]
    gpu_error: str
    """Reason why NVML failed; empty if it did not, or without a driver."""
    token_needed: bool | None
    """Whether Ray requires a token there."""


class Imports(Record):
    """Import times of the training libraries in a new process on a node."""

    seconds: dict[str, float]
    """Seconds by library, in the order of import; each without what earlier ones had loaded."""
    errors: dict[str, str]
    """Reason by library that could not be imported."""
    torch_gpus: int | None
    """GPUs that torch sees in the environment Ray was started in; null without torch."""


class Clock(Record):
    """A node's clock compared with the command's."""

    offset_s: float
    """Seconds that the node is ahead."""
    uncertainty_s: float
    """Half of the shortest round trip, which limits the accuracy of the offset."""


class StorageSeen(Record):
    """The access of one node to the storage."""

    wrote: str
    """Reason why it cannot write there; empty if it can."""
    sees: tuple[str, ...] = ()
    """Names of the nodes whose files it read with the right content."""
    disk: Disk | None = None
    """Null on an object store."""


class Transfer(Record):
    """All-reduces of one group."""

    nodes: tuple[str, ...]
    error: str = ""
    """Reason why there was no group or no answer; the figures are 0 then."""
    num_bytes: int = 0
    """Size of the largest message."""
    seconds: float = 0.0
    """Time of the largest message on the slowest rank."""
    latency_s: float = 0.0
    """Median time of a message of 4 bytes."""
    ranks: int = 0

    @property
    def bytes_per_s(self) -> float:
        """Return the bus bandwidth: the rate of the slowest link, independent of the number of ranks."""
        if not self.seconds:
            return 0.0
        # A ring all-reduce sends 2 (n - 1) / n of the message over each link, so this figure compares groups of any
        # size (the bus bandwidth of NVIDIA's nccl-tests).
        return 2 * (self.ranks - 1) / self.ranks * self.num_bytes / self.seconds


class Network(Record):
    """All-reduces over all nodes, and between pairs of them."""

    backend: str
    ring: Transfer
    pairs: tuple[Transfer, ...] = ()
    note: str = ""
    """Reason for this backend, where another was expected."""


class DoctorRecord(Record):
    """The result of an examination: `launcher doctor --json`."""

    address: str
    """Address as Ray was given it; empty for a local Ray of this machine."""
    findings: tuple[Finding, ...]
    nodes: dict[str, NodeFacts] = Field(default_factory=dict)
    """Nodes that answered, by name."""
    imports: dict[str, Imports] = Field(default_factory=dict)
    clocks: dict[str, Clock] = Field(default_factory=dict)
    storage: dict[str, StorageSeen] = Field(default_factory=dict)
    network: Network | None = None
    seconds: float = 0.0

    @property
    def healthy(self) -> bool:
        """Return whether no problem was found; warnings do not count."""
        return all(finding.level != "problem" for finding in self.findings)


def finding(check: str, level: Level, text: str, remedy: str = "") -> Finding:
    """Return a finding from its parts, in their order."""
    return Finding(check=check, level=level, found=text, remedy=remedy)


@dataclass(frozen=True)
class Issue:
    """A problem of one node.

    Args:
        node: Name of the node.
        level: Severity.
        kind: Kind of problem; issues of one kind and level become one finding.
        text: Description with figures.
        remedy: Remedy; `{who}` in it becomes the nodes' names.
    """

    node: str
    level: Level
    kind: str
    text: str
    remedy: str


def group_issues(check: str, issues: Iterable[Issue]) -> list[Finding]:
    """Return one finding per kind of issue: on a cluster of 64 nodes a wrong image is one line, not 64."""
    kinds: dict[tuple[Level, str], list[Issue]] = defaultdict(list)
    for issue in issues:
        kinds[issue.level, issue.kind].append(issue)
    findings: list[Finding] = []
    for (level, _), alike in kinds.items():
        names = some(dict.fromkeys(issue.node for issue in alike))
        if len({issue.text for issue in alike}) == 1:
            text = f"{names}: {alike[0].text}"
        else:
            text = "; ".join(f"{issue.node}: {issue.text}" for issue in alike[:_SPELLED_OUT])
            more = dict.fromkeys(issue.node for issue in alike[_SPELLED_OUT:])
            text += f"; also on {some(more)}" if more else ""
        remedy = alike[0].remedy.replace("{who}", names)
        findings.append(finding(check, level, text, remedy))
    return findings


def some(names: Iterable[str], shown: int = _SHOWN) -> str:
    """Return the first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


def speed(bytes_per_s: float) -> str:
    """Return a rate as networks are sold: MB/s and GB/s of 1000."""
    # From here on, rounding would show 1000 MB/s.
    if bytes_per_s < 999.5e6:
        return f"{bytes_per_s / 1e6:.0f} MB/s" if bytes_per_s >= 10e6 else f"{bytes_per_s / 1e6:.1f} MB/s"
    return f"{bytes_per_s / 1e9:.1f} GB/s"


def span(low: str, high: str) -> str:
    """Return a range of two figures, or one where they read the same."""
    return low if low == high else f"{low} to {high}"


def duration(seconds: float) -> str:
    """Return seconds, or milliseconds where they are few."""
    return f"{seconds:.1f} s" if abs(seconds) >= 1 else f"{seconds * 1000:.1f} ms"
