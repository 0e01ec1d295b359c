"""A library in a child process: which Python runs it, the job that goes there, the answer that comes back.

The job folder holds `job.json` and `tokens.safetensors` before, `weights.safetensors` and `facts.json` after. It is the
child's working directory too, so whatever a library leaves lying about goes when the folder goes.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from mopcompress.errors import InputNotFoundError, NumericalError, OutOfMemoryError, UnavailableError

LOG = "log.txt"


@dataclass(frozen=True)
class Backend:
    """A library that can take the place of our own methods."""

    name: str  # of the module and of the package
    worker: str  # the script beside this file that runs in its environment
    methods: tuple[str, ...]
    install: str  # what pip is to be told
    environment: Mapping[str, str] = field(default_factory=dict)


BACKENDS = {
    one.name: one
    for one in (
        Backend(
            "llmcompressor",
            "llmcompressor_worker.py",
            ("magnitude", "wanda", "sparsegpt", "gptq"),
            "'llmcompressor==0.14.*'",
        ),
        Backend(
            "gptqmodel",
            "gptqmodel_worker.py",
            ("gptq",),
            "'gptqmodel==7.6.*'",
            {"GPTQMODEL_CPU_WORKERS": "2"},  # it asks itself for two, and with two cores gives itself one
        ),
    )
}


@dataclass(frozen=True)
class Request:
    """One step of a job: a method with its settings, in our words, and the linears that it goes to, by name.

    Linears stand in the model's order. `sparsity`, when it is a sequence, has one share for each of them.
    """

    method: str
    options: Mapping[str, Any]
    linears: Sequence[str]


@dataclass(frozen=True)
class BackendResult:
    """What a library did, by its own word. `weights` is a file with a tensor for every linear of the job.

    A linear that was rounded has `<name>.scales`, [out, groups], beside it.
    """

    weights: Path
    seconds: float  # of compression, without imports, loading and saving
    process_seconds: float
    peak_bytes: int  # resident, of the whole child
    threads: int
    versions: dict[str, str]
    fallbacks: tuple[str, ...]  # linears for which the library gave up its method, and says so in its log only


def python_for(backend: Backend, named: str | None) -> Path:
    """The interpreter that has the library: the one that was named, else this one.

    Raises `InputNotFoundError` for a name where nothing is, `UnavailableError` when the library is not there.
    """
    if named is None:
        if importlib.util.find_spec(backend.name) is not None:
            return Path(sys.executable)
        raise _absent(backend, "is not installed beside mopcompress")
    python = Path(named).expanduser().absolute()  # a link must stay one: it is how an environment is recognised
    if not python.is_file():
        raise InputNotFoundError(f"--backend-python: no file {python}; name the python of an environment")
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({backend.name!r}) is None)"
    try:
        found = subprocess.run([python, "-I", "-c", probe], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise UnavailableError(f"--backend-python: {python} does not run ({error.strerror}); name a python") from error
    if not found:
        raise _absent(backend, f"is not installed for {python}")
    return python


def run(
    backend: Backend,
    python: Path,
    folder: Path,
    *,
    model: Path,
    requests: Sequence[Request],
    tokens: Int[Tensor, "samples length"],
) -> BackendResult:
    """Have the library compress the linears of the model folder, in a child process; `folder` is an empty one.

    Raises `OutOfMemoryError` when the child was killed, `UnavailableError` when it ended in another way than well.
    """
    save_file({"tokens": tokens.cpu().contiguous()}, folder / "tokens.safetensors")
    steps = [asdict(one) for one in requests]
    (folder / "job.json").write_text(json.dumps({"model": str(model.absolute()), "steps": steps}), encoding="utf-8")
    worker = Path(__file__).with_name(backend.worker)
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with (folder / LOG).open("wb") as log:
        code = _wait(
            subprocess.Popen(
                [python, "-I", worker, folder.absolute()],
                cwd=folder,
                env={**os.environ, **quiet, **backend.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
    if code == -9:  # SIGKILL, which Windows does not name
        raise OutOfMemoryError(f"{backend.name} was killed, probably for want of memory; use fewer calibration samples")
    if code != 0:
        raise UnavailableError(f"{backend.name} failed in {python}: {_last_line(folder / LOG)}")
    return _answer(backend, folder, time.perf_counter() - start)


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The child's exit code; it never outlives us."""
    try:
        return child.wait()
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        child.wait()


def _answer(backend: Backend, folder: Path, process_seconds: float) -> BackendResult:
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        answer = BackendResult(
            weights=folder / "weights.safetensors",
            process_seconds=process_seconds,
            **facts | {"fallbacks": tuple(facts["fallbacks"])},
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise NumericalError(
            f"{backend.name} ended without a whole answer ({error}): {_last_line(folder / LOG)}"
        ) from error
    return answer


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else "it said nothing"


def _absent(backend: Backend, where: str) -> UnavailableError:
    return UnavailableError(
        f"backend {backend.name}: it {where}; make an environment of its own (python -m venv ENV && ENV/bin/pip "
        f"install {backend.install}) and give --backend-python ENV/bin/python"
    )
