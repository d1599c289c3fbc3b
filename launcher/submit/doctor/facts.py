"""What the doctor learns of a cluster, as typed records. Runs on the client.

`probes.py` and `ranks.py` fill them, `judge_*.py` read them. The nodes send plain values, which these records
check: a node need not have this launcher, nor any.
"""

from typing import Literal

from pydantic import Field

from launcher.rundir.records import Record

Level = Literal["ok", "skipped", "warning", "problem"]


class Finding(Record):
    """One line of the doctor's report."""

    check: str
    """What was looked at: versions, storage, network, ..."""
    level: Level
    """`skipped` was not looked at; `problem` makes the command end with exit code 2."""
    found: str
    """What there is, with figures and the names of nodes."""
    remedy: str = ""
    """What to do about it; empty where nothing is to be done."""


class Disk(Record):
    """The file system under a directory."""

    path: str
    total_bytes: int
    free_bytes: int
    """What a user without special rights can still write."""


class Gpu(Record):
    """One GPU, as `nvidia-smi` tells it."""

    index: int
    name: str
    memory_bytes: int
    memory_used_bytes: int
    ecc_errors: int | None = None
    """Uncorrected memory errors since the driver was loaded; null where the GPU does not count them."""
    slowed_by: tuple[str, ...] = ()
    """Why its clock is held down right now: heat, power brake, hardware."""


class Node(Record):
    """What Ray's tables say of a node that is alive."""

    node_id: str
    name: str
    """How the report calls it: the host name, with the address where that is not enough."""
    address: str
    is_head: bool
    ray_cpus: float
    ray_gpus: float
    object_store_bytes: int

    @property
    def trains(self) -> bool:
        """Whether train workers can be placed there; a head with 0 CPUs takes none."""
        return self.ray_cpus > 0 or self.ray_gpus > 0


class Software(Record):
    """What is installed somewhere: on a node, or beside the command."""

    python: str
    packages: dict[str, str]
    """Version by name, normalised as in PEP 503; the one that an import would find."""
    launcher_sha256: str | None
    """Hash of the launcher's source files; null where there is no launcher."""


class NodeFacts(Record):
    """What a node says of itself."""

    software: Software
    cpus: float
    """CPUs that its processes may use: affinity and container limit."""
    memory_bytes: int | None
    """Of the host, or of the container where that is less."""
    memory_free_bytes: int | None
    open_files: int | None
    """Soft limit of open files of a worker process."""
    temp: Disk | None
    """Ray's temporary directory."""
    spill: Disk | None
    """Where Ray puts objects that no longer fit in memory."""
    shm: Disk | None
    """/dev/shm."""
    store_directory: str
    """Where Ray keeps its object store; not /dev/shm when that was too small. Empty where it is not known."""
    store_used_bytes: int | None
    gpus: tuple[Gpu, ...]
    gpu_error: str
    """Why `nvidia-smi` could not be asked; empty where it was, or where there is no such command."""
    token_needed: bool | None
    """Whether Ray asks for a token there."""


class Imports(Record):
    """How long a new process takes to import the training libraries on a node."""

    seconds: dict[str, float]
    """By library, in the order of import; each without what the ones before it had loaded."""
    errors: dict[str, str]
    """Why a library could not be imported."""
    torch_gpus: int | None
    """GPUs that torch sees with the environment Ray was started in; null without torch."""


class Clock(Record):
    """A node's clock against the one of the command."""

    offset_s: float
    """How far it is ahead."""
    uncertainty_s: float
    """Half of the shortest round trip: the offset cannot be known better."""


class StorageSeen(Record):
    """What one node can do with the storage."""

    wrote: str
    """Why it cannot write there; empty where it can."""
    sees: tuple[str, ...] = ()
    """Names of the nodes whose file it read with the right content."""
    disk: Disk | None = None
    """Null on an object store."""


class Transfer(Record):
    """All-reduces of one group."""

    nodes: tuple[str, ...]
    error: str = ""
    """Why there was no group, or no answer; the figures are 0 then."""
    num_bytes: int = 0
    """Of the largest message."""
    seconds: float = 0.0
    """The largest message took, on the slowest rank."""
    latency_s: float = 0.0
    """A message of 4 bytes took, the median of several."""
    ranks: int = 0

    @property
    def bytes_per_s(self) -> float:
        """Bus bandwidth, the figure that does not depend on the number of ranks: what the slowest link carries."""
        if not self.seconds:
            return 0.0
        return 2 * (self.ranks - 1) / self.ranks * self.num_bytes / self.seconds


class Network(Record):
    """All-reduces over all nodes, and between pairs of them."""

    backend: str
    ring: Transfer
    pairs: tuple[Transfer, ...] = ()
    note: str = ""
    """Why this backend, where another was to be expected."""


class DoctorRecord(Record):
    """All that was found: `launcher doctor --json`."""

    address: str
    """As Ray was asked for it; empty for a local Ray of this machine."""
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
        """Whether nothing is in the way of a run; warnings are not."""
        return all(finding.level != "problem" for finding in self.findings)
