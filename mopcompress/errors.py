"""The errors that a user can mend, one class per exit code.

MopError                      1   (only its children are raised)
├── UsageError                2   a flag has an impossible value
├── QualityGateError         10   the run ended, but with more fallbacks than `max_fallback_fraction` allows
├── DataError                65   bad data, or a corrupt artifact
├── InputNotFoundError       66   a file or folder that was named does not exist
├── UnavailableError         69   a missing extra, a missing wheel, or no network
├── NumericalError           70   a Gram matrix, a loss or an activation is beyond repair
├── OutOfMemoryError         71   the memory of the device is too small
├── OutputError              73   the output cannot be created
├── StorageError             74   the disk is full or failed while writing
├── StoppedError             75   stopped on request; the same command resumes
├── RefusedError             77   remote code, pickled weights, a path outside the root
└── RecipeError              78   the recipe is invalid, or a resumed run was started with other settings

Every message says *what, where, with what value, and what to do*, in one line (a recipe with several faults:
one line each).
"""


class MopError(Exception):
    """Base of every error that ends a command with one clear line instead of a traceback.

    The message says what is wrong, where, with what value, and what to do. `exit_code` is the status that the command
    line ends with; every child has its own.

    Example:
        >>> from pathlib import Path
        >>> import mopcompress
        >>> try:
        ...     mopcompress.load_recipe(Path("missing.yaml"))
        ... except mopcompress.MopError as error:
        ...     print(type(error).__name__, error.exit_code)
        InputNotFoundError 66
    """

    exit_code = 1


class UsageError(MopError):
    exit_code = 2


class QualityGateError(MopError):
    exit_code = 10


class DataError(MopError):
    exit_code = 65


class InputNotFoundError(MopError):
    exit_code = 66


class UnavailableError(MopError):
    exit_code = 69


class NumericalError(MopError):
    exit_code = 70


class OutOfMemoryError(MopError):
    exit_code = 71


class OutputError(MopError):
    exit_code = 73


class StorageError(MopError):
    exit_code = 74


class StoppedError(MopError):
    exit_code = 75


class RefusedError(MopError):
    exit_code = 77


class RecipeError(MopError):
    exit_code = 78
