"""A stand-in for SLURM with real nodes: each has its own network, host name and /tmp; `srun` starts tasks on them.

Run as a program it is one of the commands (`srun`, `scontrol`, `squeue`) that the batch script calls. It does what the
script relies on: a step on some of the nodes, SIGTERM to `srun` ends its tasks. Needs root and network namespaces.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_COMMANDS = ("srun", "scontrol", "squeue")
_ENTER = """\
mount --bind "$1/tmp" /tmp && mount -t tmpfs -o size=10g tmpfs /dev/shm && mount --bind "$2" /etc/hosts
mount --bind /dev/null /etc/resolv.conf
hostname "$3" && shift 3 && exec "$@"
"""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Allocation:
    """Nodes on a bridge of their own, which leads nowhere else.

    Args:
        folder: Directory, not below /tmp, which each node has for itself.
        name: Short name, with which those of the namespaces begin.
        cpus: Number of CPUs that the job has on each node.
    """

    folder: Path
    name: str
    cpus: tuple[int, ...]

    @property
    def nodes(self) -> int:
        return len(self.cpus)

    def make(self) -> None:
        """Make the nodes and the commands."""
        switch = f"{self.name}sw"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "addr", "add", "10.232.0.1/24", "dev", "br0")
        _ip("-n", switch, "link", "set", "br0", "up")
        for node in range(self.nodes):
            space = self.space(node)
            _ip("netns", "add", space)
            _ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{node}", "netns", switch)
            _ip("-n", switch, "link", "set", f"p{node}", "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"10.232.0.{10 + node}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "route", "add", "default", "via", "10.232.0.1")
            (self.folder / f"node{node}/tmp").mkdir(parents=True)
        names = [f"10.232.0.{10 + node} {self.name}-{node}" for node in range(self.nodes)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        (self.folder / "bin").mkdir()
        for command in _COMMANDS:
            path = self.folder / "bin" / command
            path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {self.folder} {command} "$@"\n')
            path.chmod(0o755)
        (self.folder / "allocation").write_text(" ".join([self.name, *map(str, self.cpus)]))

    def space(self, node: int) -> str:
        """Return the name of a node's network namespace."""
        return f"{self.name}n{node}"

    def on(self, node: int, *command: str) -> list[str]:
        """Return the command line that runs `command` on a node; its process is the command's."""
        enter = ["unshare", "--mount", "--uts", "sh", "-c", _ENTER, "sh", str(self.folder / f"node{node}")]
        named = [str(self.folder / "hosts"), f"{self.name}-{node}"]
        counted = ["env", f"SLURM_CPUS_ON_NODE={self.cpus[node]}"]
        return ["ip", "netns", "exec", self.space(node), *enter, *named, *counted, *command]

    def processes(self) -> list[int]:
        """Return the ids of all processes on all nodes."""
        outputs = (_ip("netns", "pids", self.space(node)) for node in range(self.nodes))
        return [int(pid) for pids in outputs for pid in pids.split()]

    def take_down(self) -> None:
        """End whatever still runs on the nodes, then remove the nodes."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        for space in [*(self.space(node) for node in range(self.nodes)), f"{self.name}sw"]:
            _ip("netns", "del", space)
        shutil.rmtree(self.folder)

    def called(self) -> list[str]:
        """Return the arguments of each call of `scontrol`."""
        path = self.folder / "scontrol"
        return path.read_text().splitlines() if path.exists() else []


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, env={"PATH": _path()})
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


def srun(allocation: Allocation, words: list[str]) -> int:
    """Run one task on each node of the step, until all have ended; return the worst exit code."""
    options = [word for word in words[: next(i for i, word in enumerate(words) if not word.startswith("--"))]]
    options_by_name = dict(word.removeprefix("--").split("=", 1) for word in options if "=" in word)
    first = int(options_by_name.get("relative", 0))
    command = words[len(options) :]
    tasks = [
        subprocess.Popen(allocation.on(node, *command), start_new_session=True)
        for node in range(first, first + int(options_by_name["nodes"]))
    ]

    def end(number: int, frame: object) -> None:
        for task in tasks:
            task.terminate()
        until = time.monotonic() + 4
        while any(task.poll() is None for task in tasks) and time.monotonic() < until:
            time.sleep(0.1)
        for task in tasks:
            task.kill()

    signal.signal(signal.SIGTERM, end)
    return max(abs(task.wait()) for task in tasks)


def main() -> int:
    """Run one of the commands."""
    folder, command, *words = sys.argv[1:]
    name, *cpus = (Path(folder) / "allocation").read_text().split()
    allocation = Allocation(Path(folder), name, tuple(map(int, cpus)))
    if command == "srun":
        return srun(allocation, words)
    if command == "squeue":
        print("RUNNING")
    if command == "scontrol":
        with (allocation.folder / "scontrol").open("a") as file:
            print(*words, file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
