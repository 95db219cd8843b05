"""What the command line says: errors in a sentence, warnings without source lines, no advertisements of libraries.

Nothing here imports torch.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = ["plain_reason", "tidy_output"]

_CHATTER = ("💡", "TPU available", "`Trainer.fit` stopped", "Restoring states from", "Loaded model weights")
_CHATTY_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")
_IGNORED = (
    ".*tensorboardX.*",
    ".*smaller than the logging interval.*",
    ".*The dirpath has changed from.*",
    ".*does not have many workers.*",
    ".*module.s. in eval mode at the start.*",
    ".*LeafSpec.*",
    ".*LightningCLI's args parameter is intended.*",
)
_WRAPPING = ("Does not validate against any", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value")


def plain_reason(text: str) -> str:
    """An error's text without what jsonargparse wraps around the reason (every type it tried, the whole config).

    Example:
        >>> from proto_core.cli.messages import plain_reason
        >>> plain_reason('Does not validate against any of the Union subtypes\\nErrors:\\n  - root: found no folder x')
        'root: found no folder x'
    """
    if "Does not validate against any" not in text:
        return text
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    return " ".join(line for line in lines if not line.startswith(_WRAPPING))


def _no_chatter(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_CHATTER)


def _short_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"warning: {message}\n"


class _ToStderr(logging.Handler):
    """Writes to whatever ``sys.stderr`` is now: a progress bar may stand in for it. One process of a node speaks."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(self.format(record) + "\n")


@contextmanager
def tidy_output(progress_of: Sequence[str] = ()) -> Iterator[None]:
    """While a command runs: warnings in a line, no advertisements, and the progress that some packages log.

    Enter it after the command's imports: Lightning sets its own form of warnings when it is imported.

    Args:
        progress_of: loggers whose messages of level INFO are shown on stderr.
    """
    handler = _ToStderr()
    told = [logging.getLogger(name) for name in progress_of]
    levels = [logger.level for logger in told]
    chatty = [logging.getLogger(name) for name in _CHATTY_LOGGERS]
    form = warnings.formatwarning
    with warnings.catch_warnings():
        for message in _IGNORED:
            warnings.filterwarnings("ignore", message=message)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.formatwarning = _short_warning
        for logger in chatty:
            logger.addFilter(_no_chatter)
        for logger in told:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            warnings.formatwarning = form
            for logger in chatty:
                logger.removeFilter(_no_chatter)
            for logger, level in zip(told, levels, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(level)
