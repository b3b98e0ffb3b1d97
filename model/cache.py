"""The key-value cache: one tensor for keys and one for values, allocated once and never moved."""

from typing import Any

from model.device import Device


class Cache:
    """Keys and values of every layer and row, and how many of them are in use.

    `keys` and `values` are (L, B, Hkv, S, D): a head's keys lie together, which is what reading them
    costs. `lengths` is (B,) int32 on the device. `extent` is an upper bound of the lengths that the
    host knows without asking.
    """

    def __init__(self, device: Device, *, layers: int, rows: int, capacity: int, heads: int, width: int, dtype: Any):
        shape = (layers, rows, heads, capacity, width)
        self.keys = device.zeros(shape, dtype)
        self.values = device.zeros(shape, dtype)
        self.lengths = device.indices([0] * rows)
        self.extent = 0
        self.positions: Any = None
        self._steps = device.indices(range(capacity))
        self._rows = device.indices(range(rows))[:, None]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def rows(self, start: int, stop: int) -> "Cache":
        """A view of some rows; what it appends is here too."""
        view = object.__new__(Cache)
        view.keys, view.values = self.keys[:, start:stop], self.values[:, start:stop]
        view.lengths = self.lengths[start:stop]
        view.extent, view.positions = self.extent, None
        view._steps, view._rows = self._steps, self._rows[: stop - start]
        return view

    def advance(self, new: int, extent: int) -> Any:
        """Counts `new` tokens more in every row; returns their positions, (B, new).

        `extent` is what the longest row then has, as the host knows it.
        """
        self.lengths += new
        self.extent = extent
        self.positions = self.lengths[:, None] - new + self._steps[:new]
        return self.positions

    def append(self, layer: int, k: Any, v: Any) -> tuple[Any, Any]:
        """Writes (B, T, Hkv, D) at the positions of `advance`; returns all of the layer, (B, S, Hkv, D)."""
        one, tail = len(self.lengths) == 1, slice(self.extent - k.shape[1], self.extent)
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            if one:  # its place is known to the host, and a slice is ten times faster than an index
                store[:, :, tail] = new.swapaxes(1, 2)
            else:
                store[self._rows, :, self.positions] = new
        return tuple(store[layer, :, :, : self.extent].swapaxes(1, 2) for store in (self.keys, self.values))

    def move(self, source: int, target: int) -> None:
        """Copies row `source` over row `target`."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]
        self.lengths[target] = self.lengths[source]
