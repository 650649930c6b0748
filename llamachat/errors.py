"""Errors that a user can fix, each with the exit status that the command line ends with.

Every text has three parts: where and what was found; what is required and why; what to do.
Status 1 is "failed", 2 is "bad usage, configuration or data", 3 "ended at its hours with steps left", 130 "interrupted".
Our own bugs are `assert`s, never one of these.
"""

INTERRUPTED = 130
HOURS_ARE_OVER = 3
STATE_IS_KEPT = "State is kept; the same command continues."


class LlamachatError(Exception):
    """An error that ends the command; its text says how to fix it."""

    exit_status = 1


class UsageError(LlamachatError):
    """The command line asks for something that does not exist or does not go together."""

    exit_status = 2


class ConfigError(LlamachatError):
    """The recipe holds an unknown key, a wrong value, or values that contradict each other."""

    exit_status = 2


class DataError(LlamachatError):
    """A data file is missing, unreadable, or holds records that break the rules."""

    exit_status = 2


class ChangedError(LlamachatError):
    """A finished step is requested with another configuration or other inputs than it was run with."""

    exit_status = 2


class ArtifactError(LlamachatError):
    """An artifact is missing, unreadable, incomplete, or of the wrong kind."""


class DivergedError(LlamachatError):
    """Training has left the numbers that a computer can hold: its loss is infinite or not a number."""


class DeviceMemoryError(LlamachatError):
    """The device's memory does not hold the smallest part that the work can be cut into."""


class BusyError(LlamachatError):
    """Another living command holds the step."""


class RolloutError(LlamachatError):
    """Sampled answers are not the policy's: the engine gives their tokens other probabilities than the model does."""


class ScoringError(LlamachatError):
    """Answers cannot be scored: a reward model or a reward function gave something that is no score."""


class RewardFunctionError(ScoringError):
    """A user's reward function raised, or gave something that is no score for each answer."""


class ServerError(LlamachatError):
    """A server (of rollouts, of wandb) cannot be reached, or answers what it was not asked."""


class TokenizerError(LlamachatError):
    """A tokenizer cannot be read, or cannot be proved to give the ids of the chat format."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def kind_word(value: object) -> str:
    """What a decoded JSON value is, for an error message: "a list", "a string", "null", ..."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if isinstance(value, bytes):
        return "bytes that are no UTF-8 text"
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
