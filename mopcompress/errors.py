"""What can go wrong for a reason the user can mend, one class an exit code.

MopError                      1   (only its children are raised)
├── UsageError                2   a flag has an impossible value
├── QualityGateError         10   it ran, but more fallbacks happened than `--max-fallback` allows
├── DataError                65   bad data, or a corrupt artefact
├── InputNotFoundError       66   a file or folder that was named does not exist
├── UnavailableError         69   a missing extra, a missing wheel, or no network
├── NumericalError           70   a Gram matrix, a loss or an activation is beyond repair
├── OutOfMemoryError         71
├── OutputError              73   the output cannot be created
├── StorageError             74   the disk is full or failed while writing
├── StoppedError             75   stopped on request; run the same command again to go on
├── RefusedError             77   remote code, pickled weights, a path outside the root
└── RecipeError              78   the recipe is invalid, or a resumed run was started with other settings

Every message says *what, where, with what value, and what to do*, in one line (a recipe with several faults:
one line each).
"""


class MopError(Exception):
    """Base of every error that ends a command with one clear line instead of a traceback."""

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
