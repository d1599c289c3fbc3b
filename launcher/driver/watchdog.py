"""Detects a worker group that has stopped moving, and names the rank it waits for. Pure; runs on the head (the driver).

`driver/control.py` calls it every half second with the heartbeats that `train/worker_heartbeat.py` sends.
"""

import time
from collections.abc import Callable, Mapping

from launcher.train.worker_heartbeat import Heartbeat

_SILENT_S = 60.0
"""A worker without a heartbeat for this long, while nothing moves, is frozen, cut off, or its node is lost."""
_SLOW_STAGE_FACTOR = 4.0
"""Factor on the limit in slow stages: a slow storage may write a checkpoint or deliver data, and the first step waits
for the first window and compiles."""


class Watchdog:
    """Time since a worker group last moved.

    Args:
        limit_s: Seconds without any movement that count as a hang; None never reports one.
        clock: Clock in seconds; tests replace it.
    """

    def __init__(self, limit_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._last_move = clock()
        self._last_beats: Mapping[int, Heartbeat] = {}
        self._last_counts: Mapping[int, int] = {}
        self._last_heard: dict[int, float] = {}
        self._first_step: int | None = None

    def find_hang(self, beats: Mapping[int, Heartbeat], counts: Mapping[int, int]) -> str | None:
        """Return a sentence about the hang, or None if there is none.

        Args:
            beats: Last heartbeat of each rank.
            counts: Number of heartbeats received from each rank. A worker that stands still sends equal heartbeats;
                a frozen one sends none.
        """
        if self._limit_s is None:
            return None
        # This machine's clock alone: heartbeats carry no time, as the clocks of nodes differ.
        now = self._clock()
        for rank, count in counts.items():
            if count != self._last_counts.get(rank):
                self._last_heard[rank] = now
        self._last_counts = dict(counts)
        # The control actor forgets the heartbeats of an attempt when the next one begins.
        if not beats:
            self._first_step = None
        elif self._first_step is None:
            self._first_step = max(beat.step for beat in beats.values())
        # One rank that moves is enough: in a hang the others cannot pass the next collective, so soon none moves.
        if beats != self._last_beats:
            self._last_move = now
            self._last_beats = dict(beats)
            return None
        still_s = now - self._last_move
        # Reached only while nothing moves. A late heartbeat alone is no hang: the control actor may be busy.
        silent = [rank for rank in beats if now - self._last_heard[rank] >= _SILENT_S]
        limit_s = min(_SILENT_S, self._limit_s) if silent else self._limit_s
        if self._is_slow_stage(beats, bool(silent)):
            limit_s *= _SLOW_STAGE_FACTOR
        # Before the first heartbeat there is nothing to judge: the start of the workers has no limit here.
        if not beats or still_s < limit_s:
            return None
        step = max(beat.step for beat in beats.values())
        return f"nothing has moved for {still_s:.0f} s after step {step}: {self._describe_culprit(beats, silent)}"

    def _is_slow_stage(self, beats: Mapping[int, Heartbeat], has_silent: bool) -> bool:
        stages = {beat.stage for beat in beats.values()}
        # A checkpoint is collective: one rank that writes holds up all others, whatever their stage.
        if "checkpoint" in stages or has_silent:
            return "checkpoint" in stages
        is_first_step = max((beat.step for beat in beats.values()), default=0) == self._first_step
        # Data are slow only if all ranks wait for them. If all wait for communication in the first step, nothing
        # compiles.
        return stages == {"data"} or (is_first_step and stages != {"communication"})

    def _describe_culprit(self, beats: Mapping[int, Heartbeat], silent: list[int]) -> str:
        if silent:
            ranks = ", ".join(f"rank {rank} on {beats[rank].host}" for rank in silent)
            return f"{ranks} has sent no heartbeat for {_SILENT_S:.0f} s or more, the others wait for it"
        busy = [beat for beat in beats.values() if beat.stage != "communication"]
        if not busy:
            return "all ranks wait for each other (communication); check the network between the nodes"
        behind = min(beat.step for beat in busy)
        ranks = ", ".join(f"rank {beat.rank} on {beat.host} ({beat.stage})" for beat in busy if beat.step == behind)
        return f"the others wait for {ranks}" if len(busy) < len(beats) else f"it is {ranks}"
