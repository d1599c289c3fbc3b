"""A real multi-node Ray on one machine: every node has its own network, PIDs, mounts and host name.

A thin hand on `../shared/tools/netns_cluster.sh`. Needs root and network namespaces; `why_not` says what is missing.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.support.jobs import write_splits
from tests.support.tiny_models import make_tiny_bert

_ROOT = Path(__file__).resolve().parents[2]
_TOOL = _ROOT.parent / "shared" / "tools" / "netns_cluster.sh"
TOKEN = "a-token-of-the-tests-" + "0" * 24


def why_not() -> str | None:
    """Return why no such cluster can be started on this machine, or None."""
    if not _TOOL.is_file():
        return "needs ../shared/tools/netns_cluster.sh, which is not part of the repository"
    return why_no_nodes("ip", "unshare", "nsenter", "tc")


@cache
def why_no_nodes(*tools: str) -> str | None:
    """Return why these tools can make no nodes with a network and a /tmp of their own, or None."""
    if _ROOT.is_relative_to("/tmp"):
        return "needs a checkout outside of /tmp, which each node has for itself"
    missing = [tool for tool in tools if shutil.which(tool, path=_path()) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    probe = f"rkprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, env={"PATH": _path()})
    if made.returncode:
        return f"needs network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True, env={"PATH": _path()})
    return None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Netns:
    """One cluster: node 0 is the head, nodes 1.. are workers; `/mnt` is shared by all of them.

    Args:
        number: Third octet of its network, 10.231.NUMBER.0/24; clusters of other numbers stay apart.
        settings: Variables RKNET_* of the tool (CPUS, HEAD_CPUS, AUTH, AUTH_TOKEN, ENV, ...), without the prefix.
    """

    number: int
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def shared(self) -> Path:
        """Directory that the nodes see as `/mnt`, seen from here."""
        return Path(f"/var/tmp/rknet-{self.number}/shared")

    @property
    def head_ip(self) -> str:
        return f"10.231.{self.number}.10"

    @property
    def dashboard(self) -> str:
        """Address for `launcher submit --address`, to be used with `outside`."""
        return f"http://{self.head_ip}:8265"

    def tool(self, *words: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
        """Run one verb of the tool; if it fails, its output is in the error."""
        done = subprocess.run(
            ["bash", str(_TOOL), *words], capture_output=True, text=True, env=self._env(), timeout=timeout
        )
        assert done.returncode == 0, f"netns_cluster.sh {' '.join(words)}: {done.stdout}{done.stderr}"
        return done

    def inside(self, node: int, *command: str) -> list[str]:
        """Return the command line that runs `command` in all namespaces of a node."""
        return ["bash", str(_TOOL), "exec", str(node), *command]

    def outside(self, *command: str) -> list[str]:
        """Return the command line that runs `command` on the cluster's network, but on none of its nodes."""
        return ["ip", "netns", "exec", f"rk{self.number}sw", *command]

    def run(self, command: list[str], timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command line of `inside` or `outside` to its end."""
        return subprocess.run(
            command, capture_output=True, text=True, env=self._env() | env, timeout=timeout, cwd="/var/tmp"
        )

    def start(self, command: list[str], **env: str) -> subprocess.Popen[str]:
        """Start such a command line; its standard error is in its output."""
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self._env() | env, cwd="/var/tmp"
        )

    def _env(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RKNET_", "RAY_"))}
        prefix = {f"RKNET_{name}": value for name, value in self.settings.items()}
        return {
            **inherited, "RAY_AUTH_MODE": "disabled", "RKNET_VENV": sys.prefix, "RKNET_ID": str(self.number), **prefix,
            "PATH": f"{sys.prefix}/bin:{_path()}",
        }  # fmt: skip


_ENV = {
    "OMP_NUM_THREADS": "1",
    # A node of two CPUs keeps no idle process for the stream's next window, and each new one imports for seconds.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    # DeepSpeed compiles a kernel for each new home directory, half a minute of both cores.
    "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
}


@contextmanager
def four_nodes(env: dict[str, str], **settings: str) -> Iterator[Netns]:
    """Start a head and three nodes of two CPUs each, on which two train workers of 1.5 never meet; with model and data.

    Args:
        env: Environment variables of all nodes.
        settings: Settings of the tool, as `Netns` has them.
    """
    words = " ".join(f"{key}={value}" for key, value in {**_ENV, **env}.items())
    made = Netns(free_number(), {"CPUS": "2", "ENV": words, **settings})
    made.tool("up", "3")
    try:
        made.tool("wait")
        make_tiny_bert(made.shared / "model")
        write_splits(made.shared / "data", train=400, validation=60, test=40)
        yield made
    finally:
        made.tool("down")


def free_number() -> int:
    """Return a number that no cluster on this machine has."""
    return next(n for n in range(100 + os.getpid() % 100, 255) if not Path(f"/var/tmp/rknet-{n}").exists())
