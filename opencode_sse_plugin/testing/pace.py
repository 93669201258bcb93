"""How fast a reader takes what it is sent."""

from __future__ import annotations

import anyio

from ..clock import Clock, SystemClock

#: A reader that counts bytes takes them in portions of this many seconds' worth.
_PORTION = 0.1


class Pace:
    """The speed of one reader; what it has not taken stays in the pipe and holds the app back.

    :param bytes_per_second, frames_per_second: at most so much; ``None`` is as fast as the test asks.
    :param stalled: whether it begins stalled. :param clock: whose seconds; the machine's by default.
    """

    def __init__(
        self,
        *,
        bytes_per_second: float | None = None,
        frames_per_second: float | None = None,
        stalled: bool = False,
        clock: Clock | None = None,
    ) -> None:
        for rate in (bytes_per_second, frames_per_second):
            if rate is not None and not rate > 0:
                raise ValueError(
                    f"a pace must be more than 0 a second, not {rate}; a reader that takes none is stalled"
                )
        self._bytes = bytes_per_second
        self._frames = frames_per_second
        self._clock: Clock = clock or SystemClock()
        self._due = 0.0
        self._going = anyio.Event()
        if not stalled:
            self._going.set()

    @property
    def stalled(self) -> bool:
        """Whether nothing is taken until :meth:`resume`."""
        return not self._going.is_set()

    def stall(self) -> None:
        """Take nothing from now on."""
        if not self.stalled:
            self._going = anyio.Event()

    def resume(self) -> None:
        """Go on at the old pace."""
        self._going.set()

    def portion(self, wanted: int) -> int:
        """How many of these bytes may be taken in one go."""
        return wanted if self._bytes is None else min(wanted, max(1, int(self._bytes * _PORTION)))

    async def ready(self) -> None:
        """Wait until the next portion may be taken."""
        while True:
            await self._going.wait()
            rest = self._due - self._clock.now()
            if rest <= 0:
                return
            await self._clock.sleep(rest)

    def taken(self, size: int, frames: int) -> None:
        """So many bytes, and the ends of so many frames, were taken now."""
        cost = 0.0
        if self._bytes is not None:
            cost += size / self._bytes
        if self._frames is not None:
            cost += frames / self._frames
        self._due = max(self._due, self._clock.now()) + cost
