"""Stop strings, matched on text."""

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until a stop string is complete; no part of one is ever passed on.

    Text that could still become a stop string is held back. The string that is complete first counts,
    of several the one that began first, however the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """The text that is now safe to show."""
        if not self._stops:
            return text
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.hit = min(found)
            shown, self._held = self._held[:at], ""
            return shown
        return self._release(max(self._overlap(stop) for stop in self._stops))

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return self._release(0)

    def _release(self, keep: int) -> str:
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that `stop` begins with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
