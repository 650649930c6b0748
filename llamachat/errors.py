"""Errors that a user can fix, each with the exit status that the command line ends with.

Every text has three parts: where and what is wrong; what is required and why; how to fix it.
Status 1 is "failed", 2 is "bad usage, configuration or data", 3 "ended at its hours with steps left", 130
"interrupted". Our own bugs are `assert`s, never one of these.
"""

INTERRUPTED = 130
HOURS_ARE_OVER = 3
STATE_IS_KEPT = "The state is kept; the same command resumes."


class LlamachatError(Exception):
    """An error that ends the command; its text says how to fix it."""

    exit_status = 1


class UsageError(LlamachatError):
    """The command line contains unknown values, or values that contradict each other."""

    exit_status = 2


class ConfigError(LlamachatError):
    """The recipe has an unknown key, a wrong value, or values that contradict each other."""

    exit_status = 2


class DataError(LlamachatError):
    """A data file is missing, unreadable, or has invalid records."""

    exit_status = 2


class ChangedError(LlamachatError):
    """A finished step is requested with a configuration or inputs other than those it was run with."""

    exit_status = 2


class ArtifactError(LlamachatError):
    """An artifact is missing, unreadable, incomplete, or of the wrong kind."""


class DivergedError(LlamachatError):
    """Training diverged: the loss is NaN or infinite."""


class DeviceMemoryError(LlamachatError):
    """The device has too little memory for the smallest part of the work."""


class BusyError(LlamachatError):
    """Another running command holds the step."""


class RolloutError(LlamachatError):
    """Sampled answers are not the policy's: the engine's token probabilities differ from the model's."""


class ScoringError(LlamachatError):
    """Answers cannot be scored: a reward model or a reward function returned an invalid score."""


class RewardFunctionError(ScoringError):
    """A user's reward function raised an exception, or did not return a valid score for each answer."""


class ServerError(LlamachatError):
    """A server (of rollouts, of wandb) cannot be reached, or sends an unexpected reply."""


class TokenizerError(LlamachatError):
    """A tokenizer cannot be read, or fails the check of the chat format's token ids."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def kind_word(value: object) -> str:
    """The kind of a decoded JSON value, for an error message: "a list", "a string", "null", ..."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if isinstance(value, bytes):
        return "bytes that are not UTF-8 text"
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
