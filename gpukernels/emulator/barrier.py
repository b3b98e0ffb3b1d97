"""Barriers in shared memory, on which copies in the background are waited for (PTX ISA 8.7, "mbarrier")."""


class Barrier:
    """An mbarrier in shared memory: a phase ends when all have arrived and all bytes have come."""

    def __init__(self, count: int):
        self.count = self.left = count
        self.bytes = 0
        self.phase = 0

    def arrive(self, expected: int = 0) -> None:
        self.left -= 1
        self.bytes += expected
        self._end()

    def come(self, size: int) -> None:
        self.bytes -= size
        self._end()

    def _end(self) -> None:
        if self.left == 0 and self.bytes == 0:
            self.phase += 1
            self.left = self.count
