"""The one exception that users are meant to read."""

import difflib
import pickle
from collections.abc import Iterable


class EditrlError(ValueError):
    """One line that says what was wrong, where it came from and what to do. The CLI prints it and exits with 2."""


class OutageError(EditrlError):
    """Something outside that a run needs stays away. What was done so far is good: save it, stop, and go on later."""


UNREADABLE = (OSError, EOFError, RuntimeError, pickle.UnpicklingError)
"""What `torch.load` raises for a file that it cannot read."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the option nearest to `word`, with its leading space, or `""` when none is near."""
    nearest = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""
