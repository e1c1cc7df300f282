"""The errors of StreamForge, one tree.

    StreamForgeError                  exit code 1
    ├── ConfigurationError            exit code 2: a setting or an argument is wrong
    ├── ContractError                 never retried
    │   ├── DecodeError               this record is a dead letter (reason, detail)
    │   ├── SchemaMismatchError       topic or table disagrees with the contract
    │   └── BreakingChangeError       a contract change that readers would not survive
    ├── SequenceGapError              the venue's sequence has a hole: take a new book snapshot
    ├── CommitError
    │   ├── CommitConflictError       did not land: compare again, then repeat
    │   ├── CommitUnknownError        may have landed: look for the table snapshot id first
    │   ├── FencedError               exit code 3: another owner has this topic-partition
    │   ├── HistoryRolledBackError    the table was moved back by a person: `streamforge reconcile`
    │   └── TopicIdentityError        topic or cluster is not the one the table knows: `streamforge rebind`
    ├── SourceError
    │   ├── RetryableSourceError      worth a retry after `retry_after_s`
    │   ├── PermanentSourceError      a retry cannot help
    │   └── RetentionGapError         offsets below the log start were asked for
    ├── ProcessError                  a process of the platform did not start, or ended
    ├── NotEnoughDataError            a model was asked for and there are too few bars
    └── DataQualityError              a check's result, not a crash

A message says what, where (topic-partition, offset, table snapshot), expected and found, and what to do.
"""

from typing import ClassVar

import msgspec

NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding bytes with msgspec raises: another form or type than was asked for, not UTF-8, nested too deep."""


class StreamForgeError(Exception):
    """The root of every error that StreamForge raises itself."""

    exit_code: ClassVar[int] = 1


class ConfigurationError(StreamForgeError):
    """A setting or an argument is missing or wrong."""

    exit_code = 2


class TableMissingError(ConfigurationError):
    """A table does not exist, or not yet: a writer makes those that it lands in when it starts."""


class ContractError(StreamForgeError):
    """Data and contract disagree, or the contract itself is wrong."""


class DecodeError(ContractError):
    """One record cannot be decoded: it becomes a dead letter and is never retried.

    Args:
        reason: short code that dead letters are counted by, for instance `malformed_json`.
        detail: what was expected and what was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class SchemaMismatchError(ContractError):
    """A topic or table does not have the shape that its contract says."""


class BreakingChangeError(ContractError):
    """A contract change that existing readers or data would not survive."""


class SequenceGapError(StreamForgeError):
    """The venue's own sequence has a hole; state built on it is invalid until a new book snapshot."""


class CommitError(StreamForgeError):
    """A table commit did not end well."""


class CommitConflictError(CommitError):
    """The commit certainly did not land; its metadata was stale."""


class CommitUnknownError(CommitError):
    """The commit may or may not have landed; look for its table snapshot id before anything else."""


class FencedError(CommitError):
    """Another owner has claimed a topic-partition that this process thought its own."""

    exit_code = 3


class HistoryRolledBackError(CommitError):
    """`main` of a table no longer descends from our last commit."""


class TopicIdentityError(CommitError):
    """The topic or the cluster is not the one that the table's positions belong to."""


class SourceError(StreamForgeError):
    """A venue or a broker did not give what was asked for."""


class RetryableSourceError(SourceError):
    """The source may answer later.

    Args:
        message: what happened and where.
        retry_after_s: seconds to wait at least, when the source said so.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PermanentSourceError(SourceError):
    """The source will never answer this request."""


class RetentionGapError(SourceError):
    """Offsets below the start of the log were asked for; what they held is no longer in Kafka."""


class ProcessError(StreamForgeError):
    """A process of the platform did not start, or ended when it should run."""


class NotEnoughDataError(StreamForgeError):
    """Too few bars to train a model or to evaluate it; the message says how many there are and are needed."""


class DataQualityError(StreamForgeError):
    """A data-quality check failed."""
