"""Blocks of threads that run a kernel's PTX, all in step: a register is an array with one element a thread.

Threads that branch apart go on in turns, those that are furthest behind first, and meet again where their ways do.
"""

import numpy as np

from gpukernels.emulator.barrier import Barrier
from gpukernels.emulator.faults import Unsupported
from gpukernels.emulator.memory import UINTS, GlobalMemory, SharedMemory
from gpukernels.emulator.values import Approximate

_SPINS = 64  # so often a group of threads may run the same block, until others get a turn
_ENDLESS = 200_000


class Machine:
    """`blocks` programs of a launch at once."""

    def __init__(
        self, threads: int, programs: range, grid: tuple[int, int, int], parameters: list, memory: GlobalMemory, *,
        shared: int, local: int, seed: int | None,
    ):  # fmt: skip
        """shared, local: bytes of a block and of a thread; the rest as in `execute`."""
        numbers = np.arange(programs.start, programs.stop)
        self.blocks, self.threads = len(numbers), threads
        self.count = self.blocks * threads
        self.parameters = parameters
        self.memory = memory
        self.shared = SharedMemory(self.blocks, shared)
        self.block = np.repeat(np.arange(self.blocks), threads)
        self.who = np.repeat(numbers * threads, threads) + np.tile(np.arange(threads), self.blocks)
        self.epochs = np.zeros(self.count, np.int32)  # barriers that each thread's block has passed
        thread = np.tile(np.arange(threads, dtype=np.uint32), self.blocks)
        at = np.repeat(numbers, threads).astype(np.uint32)
        gx, gy, gz = (np.uint32(each) for each in grid)
        full = lambda value: np.full(self.count, value, np.uint32)  # noqa: E731
        self.special = {
            "%tid.x": thread, "%tid.y": full(0), "%tid.z": full(0), "%laneid": thread % np.uint32(32),
            "%ntid.x": full(threads), "%ntid.y": full(1), "%ntid.z": full(1),
            "%ctaid.x": at % gx, "%ctaid.y": at // gx % gy, "%ctaid.z": at // (gx * gy),
            "%nctaid.x": full(gx), "%nctaid.y": full(gy), "%nctaid.z": full(gz),
            "%clusterid.x": at, "%cluster_ctarank": full(0), "%cluster_ctaid.x": full(0),
        }  # fmt: skip
        self.local = np.full((self.count, -(-local // 8) * 8), 0xFF, np.uint8)
        self.local_views = {size: self.local.reshape(-1).view(kind) for size, kind in UINTS.items()}
        self.barriers: dict[tuple[int, int], Barrier] = {}  # by block and address
        self.pending: list[list] = [[]]  # groups of copies to shared memory that nobody has waited for
        approximate = Approximate(seed)
        self.approximate, self.approximately_divide = approximate.of, approximate.divide
        self.carry = np.zeros(self.count, np.uint64)
        self.registers: list = []

    # Memory, for the threads in `mask` (None: all).

    def load_global(self, addresses, mask, size, count):
        def load(at, who):
            return self.memory.load(at, size, count, self.who[who], self.epochs[who])

        return self._load(load, addresses, mask, size, count)

    def load_shared(self, addresses, mask, size, count):
        def load(at, who):
            return self.shared.load(self.block[who], at, size, count)

        return self._load(load, addresses, mask, size, count)

    def load_local(self, addresses, mask, size, count):
        def load(at, who):
            return self.local_views[size][self._local_places(at, who, size)[:, None] + np.arange(count)]

        return self._load(load, addresses, mask, size, count)

    def _load(self, load, addresses, mask, size, count):
        if mask is None:
            return load(addresses, slice(None)).T.copy()
        found = np.zeros((count, self.count), UINTS[size])
        who = np.flatnonzero(mask)
        if len(who):
            found[:, who] = load(addresses[who], who).T
        return found

    def store_global(self, addresses, mask, *values):
        who = slice(None) if mask is None else np.flatnonzero(mask)
        given = np.stack([each[who] for each in values], 1)
        self.memory.store(addresses[who], given, self.who[who], self.epochs[who])

    def store_shared(self, addresses, mask, *values):
        who = slice(None) if mask is None else np.flatnonzero(mask)
        self.shared.store(self.block[who], addresses[who], np.stack([each[who] for each in values], 1))

    def store_local(self, addresses, mask, *values):
        who = np.arange(self.count) if mask is None else np.flatnonzero(mask)
        size = values[0].dtype.itemsize
        for i, each in enumerate(values):
            self.local_views[size][self._local_places(addresses[who], who, size) + i] = each[who]

    def _local_places(self, addresses, who, size):
        rows = np.arange(self.count)[who]
        return (rows * self.local.shape[1] + addresses.astype(np.int64) % 65536) // size

    def atomic(self, space, operation, signed, addresses, mask, values, new=None):
        """One thread after the other: what was there before. `new`: of a compare-and-swap."""
        kind = np.dtype(f"{'i' if signed else 'u'}{values.dtype.itemsize}")
        old = np.zeros(self.count, values.dtype)
        for i in range(self.count) if mask is None else np.flatnonzero(mask):
            value, swapped = values[i], None if new is None else new[i]
            change = {
                "add": lambda before, value=value: before + value,
                "max": lambda before, value=value: max(before.view(kind), value.view(kind)),
                "min": lambda before, value=value: min(before.view(kind), value.view(kind)),
                "exch": lambda before, value=value: value,
                "cas": lambda before, value=value, swapped=swapped: swapped if before == value else before,
            }
            if operation not in change:
                raise Unsupported(f"atom.{operation}")
            if space == "global":
                old[i] = self.memory.atomic(addresses[i], values.dtype, change[operation])
            else:
                old[i] = self.shared.atomic(self.block[i], addresses[i], values.dtype, change[operation])
        return old

    # Copies that are waited for.

    def copy_async(self, target, source, mask, size, wanted):
        """`cp.async` of `size` bytes: `wanted` are read, the others 0. Until they are waited for: poison."""
        who = np.arange(self.count) if mask is None else np.flatnonzero(mask)
        if not len(who):
            return
        places = self.shared.places(self.block[who], target[who], size)[:, 0]
        flat = self.shared.bytes.reshape(-1, size)
        flat[places] = 0xFF
        read = who if wanted is None else who[wanted[who] > 0]
        data = np.zeros((len(who), size), np.uint8)
        if wanted is not None and not np.isin(wanted[who], (0, size)).all():
            raise Unsupported("cp.async of a part")
        unit = min(size, 8)
        loaded = self.memory.load(source[read], unit, size // unit, self.who[read], self.epochs[read])
        data[np.searchsorted(who, read)] = np.ascontiguousarray(loaded).view(np.uint8).reshape(len(read), size)
        self.pending[-1].append((flat, places, data))

    def commit_copies(self):
        self.pending.append([])

    def wait_copies(self, left, mask):
        # A part of the threads: what others wait for has come too, which is more than a GPU promises.
        done = len(self.pending) - 1 - (left if mask is None else 0)
        for group in self.pending[: max(0, done)]:
            for flat, places, data in group:
                flat[places] = data
        del self.pending[: max(0, done)]

    # Within a warp.

    def lanes(self, x, mask):
        """x (warps, 32), where whole warps run."""
        if mask is not None:
            active = mask.reshape(-1, 32)
            if (active.any(1) != active.all(1)).any():
                raise RuntimeError("an instruction for whole warps runs in a part of one")
        return x.reshape(-1, 32)

    def shuffle(self, kind, x, by, clamp, mask):
        """`shfl.sync` of whole warps: each lane gets another's x, or its own where that is outside of its part."""
        rows, lane = self.lanes(x, mask), np.arange(32)
        by, clamp = (each.reshape(-1, 32).astype(np.int64) for each in (by, clamp))
        segment = clamp >> 8 & 31  # these bits of a lane's number stay as they are
        last = lane & segment | clamp & 31 & ~segment
        at = lane & segment | by & 31 & ~segment
        source = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": at}[kind]
        inside = source >= last if kind == "up" else source <= last
        found = np.take_along_axis(rows, np.where(inside, source, lane), 1)
        return found.reshape(-1), inside.reshape(-1)

    def reduce(self, kind, x, members, mask):
        """`redux.sync` over the lanes whose bits are set in `members`."""
        rows, members = x.reshape(-1, 32), members.reshape(-1, 32)
        inside = (members[:, :1] >> np.arange(32, dtype=np.uint32)) & 1 == 1
        if mask is not None:
            runs = mask.reshape(-1, 32)
            if (inside & ~runs & runs.any(1)[:, None]).any():
                raise RuntimeError("lanes that are to be put together do not run")
        info = np.iinfo(x.dtype)
        nothing, function = {"add": (0, np.add), "max": (info.min, np.maximum), "min": (info.max, np.minimum)}[kind]
        found = function.reduce(np.where(inside, rows, x.dtype.type(nothing)), axis=1, dtype=x.dtype)
        return np.repeat(found, 32)

    def elect(self, mask):
        """`elect.sync`: the first lane of each warp that runs, and whether that is this one."""
        active = np.ones(self.count, bool) if mask is None else mask
        rows = active.reshape(-1, 32)
        leader = np.where(rows.any(1), rows.argmax(1), 0)
        return np.repeat(leader.astype(np.uint32), 32), (self.special["%laneid"] == np.repeat(leader, 32)) & active

    # The whole.

    def run(self, code) -> None:
        """Until every thread has returned."""
        pc = np.zeros(self.count, np.int32)
        waiting = np.zeros(self.count, bool)
        together: int | None = 0
        spins, last = 0, -1
        while True:
            if together is not None:
                here, mask = together, None
            else:
                ready = (pc >= 0) & ~waiting
                if not ready.any():
                    if (pc >= 0).any():
                        raise RuntimeError("threads wait at a barrier that others never reach")
                    return
                places = np.unique(pc[ready])
                places = places[np.argsort(code.ranks[places])]
                here = int(places[0])
                if here == last and spins > _SPINS and len(places) > 1:
                    here = int(places[spins % len(places)])
                mask = ready & (pc == here)
                if mask.all():
                    together = here
                    continue
            if here == last or (spins > _SPINS and mask is not None):
                spins += 1
            else:
                spins = 0
            last = here
            if spins > _ENDLESS:
                raise RuntimeError("threads wait for something that never comes")
            action, target, guard = code.run(here, self, mask)
            if action == "barrier":
                if mask is None:
                    self.epochs = self.epochs + np.int32(1)
                    together = here + 1
                    continue
                pc[mask] = here + 1
                waiting |= mask
                alive = (pc >= 0).reshape(self.blocks, -1)
                arrived = waiting.reshape(self.blocks, -1)
                complete = (arrived == alive).all(1) & arrived.any(1)
                passed = np.repeat(complete, self.threads) & waiting
                waiting &= ~passed
                self.epochs = self.epochs + np.repeat(complete, self.threads).astype(np.int32)
                continue
            if action == "exit":
                target = -1
            if mask is None:
                taken = True if guard is None else bool(guard.all())
                if taken or not guard.any():
                    together = target if taken else here + 1
                    if together < 0:
                        return
                    continue
                pc[:] = here + 1
                pc[guard] = target
                together = None
            else:
                pc[mask] = here + 1
                pc[mask if guard is None else guard] = target
