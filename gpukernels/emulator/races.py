"""Who touched which bytes of global memory in a launch, and whether they may have done so at the same time.

Threads of a block are kept apart by barriers. Blocks are not, unless by atomics: a kernel that has some is trusted
to use them between its blocks. To write what is there already is no race.
"""

import numpy as np

from gpukernels.emulator.faults import Race

_NOBODY, _SEVERAL = -1, -2


class Accesses:
    """The last thread that wrote and read each byte, and how many barriers its block had passed."""

    def __init__(self, size: int, threads: int):
        self._threads = threads  # of a block
        self._writer, self._reader, self._readers_block = (np.full(size, _NOBODY, np.int32) for _ in range(3))
        self._written, self._read = (np.zeros(size, np.int32) for _ in range(2))
        self.between_blocks = True  # whether blocks are looked at too

    def read(self, places, who, epochs) -> None:
        """places (threads, bytes); who: threads of the launch; epochs: barriers that their blocks have passed."""
        who, epochs = who[:, None], epochs[:, None]
        block = who // self._threads
        writer = self._writer[places]
        other = (writer != _NOBODY) & (writer != who)
        if other.any():
            self._same_block(other & (writer // self._threads == block) & (self._written[places] == epochs), "written")
            self._other_block(other & (writer // self._threads != block), "written")
        blocks = self._readers_block[places]
        alone = (blocks == _NOBODY) | (blocks == block)
        fresh = (blocks == _NOBODY) | alone & (self._read[places] < epochs) | (self._reader[places] == who)
        self._reader[places] = np.where(fresh, who, _SEVERAL)
        self._readers_block[places] = np.where(alone, block, _SEVERAL)
        # Of several in this call the last stands there now.
        if (self._reader[places] != np.where(fresh, who, _SEVERAL)).any():
            clash = self._reader[places] != who
            self._reader[places[clash]] = _SEVERAL
        if (self._readers_block[places] != np.where(alone, block, _SEVERAL)).any():
            clash = self._readers_block[places] != block
            self._readers_block[places[clash]] = _SEVERAL
        self._read[places] = np.broadcast_to(epochs, places.shape)

    def write(self, places, who, epochs, changes) -> None:
        """As `read`; changes (threads, bytes): whether what is written is not there yet."""
        who, epochs = who[:, None], epochs[:, None]
        block = who // self._threads
        writer = self._writer[places]
        other = changes & (writer != _NOBODY) & (writer != who)
        if other.any():
            self._same_block(other & (writer // self._threads == block) & (self._written[places] == epochs), "written")
            self._other_block(other & (writer // self._threads != block), "written")
        blocks, reader = self._readers_block[places], self._reader[places]
        other = changes & (blocks != _NOBODY) & (reader != who)
        if other.any():
            self._same_block(other & (blocks == block) & (self._read[places] == epochs), "read")
            self._other_block(other & (blocks != block), "read")
        self._writer[places] = np.broadcast_to(who, places.shape)
        self._written[places] = np.broadcast_to(epochs, places.shape)
        self._readers_block[places] = _NOBODY

    def _same_block(self, fault, what: str) -> None:
        if fault.any():
            raise Race(f"another thread has {what} these bytes, and no barrier is between them")

    def _other_block(self, fault, what: str) -> None:
        if self.between_blocks and fault.any():
            raise Race(f"another block has {what} these bytes, and nothing says which comes first")
