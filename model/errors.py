"""What can be wrong with a user's input. Every message is one line that names the thing."""

from collections.abc import Sequence


class ModelError(ValueError):
    """Something the user gave cannot be used; `problems` has one sentence for each fault found."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(ModelError):
    """A `config.json` that does not describe a model this package computes exactly."""


class CheckpointError(ModelError):
    """A checkpoint whose files are missing, damaged, unsafe, or do not fit the config."""


class HubError(ModelError):
    """A model that could not be had from the Hub."""


class TokenizerError(ModelError):
    """A tokenizer that is missing or damaged."""


class DeviceError(ModelError):
    """A device or dtype that this machine or installation does not have."""


class ContextError(ModelError):
    """More tokens than the model has positions for."""


class LoadNotice(UserWarning):
    """Something about a checkpoint that loads, which its user should know."""
