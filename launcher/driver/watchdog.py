"""Whether all workers stand still, and for whom they wait. Pure; the driver looks at it every half second."""

import time
from collections.abc import Callable, Mapping

from launcher.train.worker_heartbeat import Heartbeat

_SILENT_S = 60.0
"""A worker that has not been heard of for so long, while nothing moves, is gone: frozen, cut off, or its node is."""
_PATIENCE = 4.0
"""So many times longer than otherwise: a slow storage may take a checkpoint or deliver data, and the first step waits
for the first window, and compiles."""


class Watchdog:
    """Remembers when something moved last.

    Args:
        limit_s: seconds of standing still that are a hang; None for ever.
        clock: seconds.
    """

    def __init__(self, limit_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._moved = clock()
        self._seen: Mapping[int, Heartbeat] = {}
        self._heard: dict[int, float] = {}
        self._first: int | None = None
        self._counts: Mapping[int, int] = {}

    def hang(self, beats: Mapping[int, Heartbeat], counts: Mapping[int, int]) -> str | None:
        """What to say of a hang; None while there is none.

        Args:
            beats: the last of each rank.
            counts: how many came from each rank so far.
        """
        if self._limit_s is None:
            return None
        now = self._clock()
        for rank, count in counts.items():
            if count != self._counts.get(rank):
                self._heard[rank] = now
        self._counts = dict(counts)
        if self._first is None and beats:
            self._first = max(beat.step for beat in beats.values())
        if beats != self._seen:
            self._moved, self._seen = now, dict(beats)
            return None
        still = now - self._moved
        silent = [rank for rank in beats if now - self._heard[rank] >= _SILENT_S]
        limit_s = min(_SILENT_S, self._limit_s) if silent else self._limit_s
        limit_s *= _PATIENCE if self._may_take_long(beats, bool(silent)) else 1.0
        if not beats or still < limit_s:
            return None
        step = max(beat.step for beat in beats.values())
        return f"nothing has moved for {still:.0f} s after step {step}: {self._culprit(beats, silent)}"

    def _may_take_long(self, beats: Mapping[int, Heartbeat], frozen: bool) -> bool:
        stages = {beat.stage for beat in beats.values()}
        if "checkpoint" in stages or frozen:
            return "checkpoint" in stages
        begins = max((beat.step for beat in beats.values()), default=0) == self._first
        return stages == {"data"} or (begins and stages != {"communication"})

    def _culprit(self, beats: Mapping[int, Heartbeat], silent: list[int]) -> str:
        if silent:
            who = ", ".join(f"rank {rank} on {beats[rank].host}" for rank in silent)
            return f"{who} has not been heard of for {_SILENT_S:.0f} s or more, the others wait for it"
        busy = [beat for beat in beats.values() if beat.stage != "communication"]
        if not busy:
            return "all ranks wait for each other (communication); look at the network between the nodes"
        behind = min(beat.step for beat in busy)
        who = ", ".join(f"rank {beat.rank} on {beat.host} ({beat.stage})" for beat in busy if beat.step == behind)
        return f"the others wait for {who}" if len(busy) < len(beats) else f"it is {who}"
