"""Actors on named nodes, asked all at once and for a limited time. Runs on the client.

A node that does not answer is an answer as well: whoever asks gets the others' answers, and why these are missing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any  # actor classes and handles, and the plain values they send; Ray types neither

from launcher.submit.doctor.facts import Node


@contextmanager
def by_value() -> Iterator[None]:
    """Send the code of probes instead of its name: the nodes' own launcher, if there is one, is not asked."""
    from ray import cloudpickle

    from launcher import errors, formatting
    from launcher.rundir import uri
    from launcher.submit.doctor import host, probes, ranks

    modules = (host, probes, ranks, uri, errors, formatting)  # the last three for `open_uri`
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


class ProbeGroup:
    """Actors of one class, each pinned to its node and without CPUs, so that a head with 0 CPUs has one too.

    Args:
        actor: their class; has a method `ready`.
        gpus: that each one holds.
        threads: calls that one of them answers at the same time.
    """

    def __init__(self, actor: type, gpus: float = 0.0, threads: int = 1) -> None:
        self._actor, self._gpus, self._threads = actor, gpus, threads
        self._places: dict[str, Node] = {}
        self._handles: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        """Why a member's latest answer is missing."""

    @property
    def names(self) -> list[str]:
        """The members, in the order they were added; those that were never ready are none."""
        return list(self._handles)

    def add(self, name: str, node: Node) -> None:
        """Start a member on a node; `muster` waits for it."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        self._places[name] = node
        self._handles[name] = (
            ray.remote(self._actor)
            .options(
                num_cpus=0,
                num_gpus=self._gpus,
                scheduling_strategy=place,
                max_concurrency=self._threads,
                max_restarts=0,
            )
            .remote()
        )

    def muster(self, timeout_s: float) -> list[str]:
        """Wait until the members are ready, and let go of those that are not; their names."""
        ready = self.ask({name: () for name in self.names}, "ready", timeout_s)
        absent = [name for name in self.names if name not in ready]
        for name in absent:
            self._kill(name)
        return absent

    def ask(self, calls: Mapping[str, tuple[Any, ...]], method: str, timeout_s: float) -> dict[str, Any]:
        """Call a method of members with arguments of their own; the answers that came in time, by name."""
        import ray

        refs = {
            name: getattr(self._handles[name], method).remote(*arguments)
            for name, arguments in calls.items()
            if name in self._handles
        }
        done, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s) if refs else ([], [])
        answers: dict[str, Any] = {}
        for name, ref in refs.items():
            if ref not in done:
                self.errors[name] = f"no answer within {timeout_s:.0f} s"
                continue
            try:
                answers[name] = ray.get(ref)
            except Exception as error:  # noqa: BLE001  # process border: whatever happened there is to be told
                self.errors[name] = _reason(error)
        return answers

    def ask_all(self, method: str, *arguments: Any, timeout_s: float) -> dict[str, Any]:
        """Call a method of all members with the same arguments."""
        return self.ask(dict.fromkeys(self.names, arguments), method, timeout_s)

    def restart(self, timeout_s: float) -> list[str]:
        """The same members in new processes; the names of those that are not ready."""
        members = {name: self._places[name] for name in self.names}
        self.dismiss()
        for name, node in members.items():
            self.add(name, node)
        return self.muster(timeout_s)

    def dismiss(self) -> None:
        """End all members."""
        for name in self.names:
            self._kill(name)

    def _kill(self, name: str) -> None:
        import ray

        ray.kill(self._handles.pop(name))


def _reason(error: Exception) -> str:
    """The last line of what went wrong there, short."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}"[:300]
