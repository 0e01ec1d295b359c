"""Commands on finished folders: `export`, `export-adapter`, `verify` and `report`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mopcompress.cli.app import app
from mopcompress.cli.command import Common, command
from mopcompress.cli.options import DRY_RUN, OUTPUT, VERBOSITY
from mopcompress.cli.output import print_facts, print_json
from mopcompress.entrypoints import preflight


class Format(StrEnum):
    """Formats that `export` writes."""

    dense = "dense"
    gptq = "gptq"
    compressed_tensors = "compressed-tensors"
    sparse = "sparse"


@command(app, OUTPUT, DRY_RUN, VERBOSITY)
def export(
    common: Common,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A compressed model, or an earlier export of one.")],
    format: Annotated[
        Format,
        typer.Option(help="dense: loads everywhere; sparse: ours; gptq, compressed-tensors: what `quantize` made."),
    ],
) -> None:
    """Write a model in another format, without rounding anything; read it back and compare all of it."""
    output_dir = common.load().run.output_dir
    name = f"{Path(folder).expanduser().absolute().name}-{format.value}"
    target = Path(output_dir).expanduser() if output_dir else Path("runs") / name
    preflight.check_model(folder)
    preflight.check_creatable(target)
    if common.dry_run:
        plan = {"folder": folder, "format": format.value, "output": str(target)}
        (print_json if common.json else print_facts)(plan)
        return
    with common.working() as progress:
        from mopcompress.entrypoints.export import export as write

        facts = write(folder, format.value, target, resume=common.resume, progress=progress)
    if common.json:
        print_json({"output": str(target), **{name: facts[name] for name in facts if name not in {"tensors", "files"}}})
        return
    sizes = {"weights": _sizes(facts["source_bytes"], facts["model_bytes"])}
    if facts["matrices_dense_bytes"]:
        sizes["compressed_matrices"] = _sizes(facts["matrices_dense_bytes"], facts["matrices_bytes"])
    equal = f"{len(facts['tensors'])}, read back and equal"
    print_facts({"format": format.value, **sizes, "tensors": equal, "output": str(target)})


@command(app, OUTPUT, DRY_RUN, VERBOSITY)
def export_adapter(
    common: Common,
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="What `recover` wrote for input, prefix, lora, eora or ia3.")
    ],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model it was trained on, if that has moved.")
    ] = None,
) -> None:
    """Write an adapter as PEFT does, for `PeftModel.from_pretrained` on the same model."""
    output_dir = common.load().run.output_dir
    name = f"{adapter.expanduser().absolute().name}-peft"
    target = Path(output_dir).expanduser() if output_dir else Path("runs") / name
    preflight.check_creatable(target)
    if model is not None:
        preflight.check_model(model)
    if common.dry_run:
        plan = {"adapter": str(adapter), "format": "peft", "output": str(target)}
        (print_json if common.json else print_facts)(plan)
        return
    with common.working() as progress:
        from mopcompress.entrypoints.export import export_adapter as write

        facts = write(adapter.expanduser(), model, target, resume=common.resume, progress=progress)
    if common.json:
        print_json({"output": str(target), **{name: facts[name] for name in facts if name != "files"}})
    else:
        print_facts({"arm": facts["arm"], "base": facts["base"], "output": str(target)})


@command(app, VERBOSITY)
def verify(
    common: Common, folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished model, adapter or export.")]
) -> None:
    """Compare every file of a finished folder with its hash, and open and decode every tensor."""
    with common.working() as progress:
        from mopcompress.entrypoints.verify import verify as verify_folder

        facts = verify_folder(folder.expanduser(), progress=progress)
    if common.json:
        print_json(facts)
    else:
        typer.echo(
            f"{folder} is intact: {facts['files']} files and {facts['tensors']} tensors are as they were written"
        )


def _sizes(before: int, after: int) -> str:
    return f"{before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after ({before / after:.2f} times smaller)"


@command(app, VERBOSITY)
def report(
    common: Common, runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Folders of benches.")]
) -> None:
    """Write report.json, report.md and report.html of finished or stopped runs again."""
    from mopcompress.report import write_report  # matplotlib takes a second to load

    paths = {str(run): [str(path) for path in write_report(run)] for run in runs}
    if common.json:
        print_json({"reports": paths})
    else:
        typer.echo("\n".join(path for reports in paths.values() for path in reports))
