"""What can be wrong with a user's input. Every message is one line that names the thing."""

from collections.abc import Sequence


class ModelError(ValueError):
    """Something the user gave cannot be used; `problems` has one sentence for each fault found."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [printable(each) for each in ([problems] if isinstance(problems, str) else problems)]
        super().__init__("\n".join(self.problems))


class ConfigError(ModelError):
    """A `config.json` that does not describe a model this package computes exactly."""


class CheckpointError(ModelError):
    """A checkpoint whose files are missing, damaged, unsafe, or do not fit the config."""


class HubError(ModelError):
    """A model that could not be had from the Hub."""


class RepositoryError(HubError):
    """A repository on the Hub that answered, and does not hold a model that could be loaded."""


class TokenizerError(ModelError):
    """A tokenizer that is missing or damaged."""


class DeviceError(ModelError):
    """A device or dtype that this machine or installation does not have."""


class ContextError(ModelError):
    """More tokens than the model has positions for."""


class OutOfMemoryError(ModelError):
    """More memory than is free: refused before it was asked for, or found out while it was used."""


class DataError(ModelError):
    """Training data that cannot be read, or that has nothing to train on."""


class TrainingError(ModelError):
    """A run of fine-tuning that cannot start, cannot be resumed, or has come to nothing."""


class LoadNotice(UserWarning):
    """Something about a checkpoint that loads, which its user should know."""


def printable(text: str) -> str:
    """`text` in one line of bounded length: a file's names may hold line ends, or a terminal's commands."""
    if len(text) > 900:
        text = f"{text[:500]} ... {text[-300:]}"
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def overflow_notice(name: str, count: int, dtype: str) -> str:
    """What is said of a weight that was cast."""
    return f"{name}: {count} values are too large for {dtype} and became infinite"
