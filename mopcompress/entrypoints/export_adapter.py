"""`export-adapter`: an adapter that PEFT has too, as a folder that PEFT loads."""

from pathlib import Path
from typing import Any

from mopcompress.environment import choose_device, provenance
from mopcompress.errors import InputNotFoundError, OutputError, UsageError
from mopcompress.models.model_loading import load_model, resolve_model, weights_hash
from mopcompress.progress import Progress, silent
from mopcompress.recover.peft_export import check_arm, write_peft
from mopcompress.recover.save_and_load import config_for, load_adapter
from mopcompress.storage import artifacts

KIND = "PEFT adapter"


def export_adapter(
    adapter: Path, model: str | None, target: Path, *, resume: str = "auto", progress: Progress = silent
) -> dict[str, Any]:
    """Write `adapter` as PEFT would into `target`; returns the manifest.

    Without a `model` it is the one that the adapter's manifest names. Raises `DataError` when the adapter is damaged,
    belongs to another model, or is of an arm that PEFT does not have.
    """
    made = artifacts.read_manifest(adapter)
    if made is None:
        raise InputNotFoundError(f"adapter {adapter}: not finished; name a folder that `mopcompress recover` wrote")
    check_arm(str(made.get("arm")))
    artifacts.verify(adapter)
    source = {"folder": str(adapter), "sha256": artifacts.fingerprint(made["files"])}
    if target.exists() or resume == "required":
        if model is not None:  # what is there may be whole, and of another model than the one that is asked for
            config_for(adapter, base_sha256=weights_hash(resolve_model(model)))
        return _finished(target, source, resume, progress)
    name = model or made.get("base", {}).get("folder")
    if name is None:
        raise UsageError(f"--model: not given, and {adapter} does not say which it was trained on; name its folder")
    base = resolve_model(name, progress=progress.message)
    network = load_model(base, device=choose_device("cpu"))
    loaded, config = load_adapter(adapter, network, base_sha256=weights_hash(base))
    facts = {"kind": KIND, "arm": config.arm, "source": source, "base": str(base), **provenance(network.device)}
    with artifacts.publish(target, facts) as scratch:
        write_peft(loaded, config, network, str(base), scratch)
    return facts


def _finished(target: Path, source: dict[str, str], resume: str, progress: Progress) -> dict[str, Any]:
    """The manifest of `target` if it is this very export. Raises `OutputError` when it is something else."""
    if not target.exists():
        raise InputNotFoundError(f"--resume required: nothing finished in {target}; name its folder, or use auto")
    if resume == "never":
        raise OutputError(f"output {target} exists already and --resume is never; remove it or name another")
    manifest = artifacts.read_manifest(target) if target.is_dir() else None
    if manifest is None or (manifest.get("kind"), manifest.get("source", {}).get("sha256")) != (KIND, source["sha256"]):
        raise OutputError(f"output {target} exists already and is another thing; name another --output-dir")
    artifacts.verify(target)
    progress.message(f"done already: {target}")
    return manifest
