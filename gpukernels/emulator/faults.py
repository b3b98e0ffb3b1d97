"""What an emulated launch ends with where it is wrong, or beyond what is written down here."""


class MemoryFault(RuntimeError):
    """An access that a GPU would refuse, or worse, not refuse."""


class Race(RuntimeError):
    """Two threads touch the same bytes in an order that nothing decides."""


class Unsupported(RuntimeError):
    """An instruction, or a form of one, that the emulator does not know."""
