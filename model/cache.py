"""The key-value cache: one tensor for keys and one for values, allocated once and never moved."""

from typing import Any

from model.device import Device


class Cache:
    """Keys and values of every layer and row, and how many of them are in use.

    `keys` and `values` are (L, B, Hkv, S, D): a head's keys lie together, which is what reading them
    costs. `lengths` is (B,) int32 on the device, the tokens of a step counted while it runs; a row of
    length 0 is not in use. `extent` is an upper bound of the lengths that the host knows without asking.
    """

    def __init__(
        self,
        device: Device,
        *,
        layers: int,
        rows: int,
        capacity: int,
        heads: int,
        kv_heads: int,
        width: int,
        dtype: Any,
    ):
        shape = (layers, rows, kv_heads, capacity, width)
        self.keys = device.zeros(shape, dtype)
        self.values = device.zeros(shape, dtype)
        self.lengths = device.indices([0] * rows)
        self.arrivals = device.zeros((rows, heads), "int32")  # what the programs of a step count in
        self.extent = capacity
        self._behind = device.indices(range(-capacity, 0))

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def rows(self, start: int, stop: int, extent: int | None = None) -> "Cache":
        """A view of some rows, up to `extent` keys; what is written through it is here too."""
        view = object.__new__(Cache)
        view.keys, view.values = self.keys[:, start:stop], self.values[:, start:stop]
        view.lengths, view.arrivals = self.lengths[start:stop], self.arrivals[start:stop]
        view.extent = self.capacity if extent is None else extent
        view._behind = self._behind
        return view

    def layer(self, layer: int) -> tuple[Any, Any]:
        """A layer's keys and values, (B, extent, Hkv, D)."""
        return tuple(store[layer, :, :, : self.extent].swapaxes(1, 2) for store in (self.keys, self.values))

    def newest(self, count: int) -> Any:
        """Where the last `count` tokens of each row stand, (B, count); below 0 where a row has fewer."""
        return self.lengths[:, None] + self._behind[self.capacity - count :]

    def hold(self, row: int, length: int) -> None:
        """Says how many tokens row `row` holds."""
        # A slice is filled by the device; an element would be copied to it, for which the host waits.
        self.lengths[row : row + 1] = length

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` keys and values of row `source` over those of row `target`."""
        self.keys[:, target, :, :tokens] = self.keys[:, source, :, :tokens]
        self.values[:, target, :, :tokens] = self.values[:, source, :, :tokens]
