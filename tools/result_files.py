"""The files that the command writes: their places are checked before the work, and they appear whole or not at all."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.whole_file import sweep, write_whole
from liar_opt.tools.printable import printable, printable_json

if TYPE_CHECKING:
    from liar_opt.frontend.input_files import Inputs
    from liar_opt.runtime.places import Places


def check_results(output: Path, options: argparse.Namespace, inputs: "Inputs") -> None:
    """Checks all places that will be written to, before the work, and removes what killed runs left there.

    Raises:
        OptionError: one cannot be written, is part of the input, or is another.
    """
    from liar_opt.frontend.genai_config import NAME
    from liar_opt.runtime.places import Places

    if not options.dry_run:
        sweep(output.parent)  # first: it may bring back a folder that was moved aside
    places = Places(inputs.files)
    replace = options.force or options.dry_run
    if getattr(options, "checkpoint", False):
        from liar_opt.frontend.hf_checkpoint import check_folder

        places.folder(output, "output")
        check_folder(output, options.model if options.model.is_dir() else None, replace)
    else:
        places.file(output, "output", replace=replace)
        if getattr(options, "small_tokenizer", False) and options.tokenizer is not None:
            from liar_opt.runtime.small_tokenizer import folder_beside

            folder_beside(output, options.tokenizer, replace)
        config = output.with_name(NAME)
        model: Path | None = getattr(options, "model", None)  # the demo makes its own
        if model is not None and (model.parent / NAME).is_file() and not config.exists():
            places.file(config, "configuration for GenAI", probe=False)
    if getattr(options, "resume", None) is not None:
        places.folder(options.resume, "resume folder")
    check_reports(options, places)


WHAT = {"report": "report", "html": "HTML report"}
"""What messages call the result of an option."""


def check_reports(options: argparse.Namespace, places: "Places") -> None:
    """Earlier reports are replaced; any other file only with --force."""
    from liar_opt.frontend.input_files import REPORTS, began_by

    for option, what in WHAT.items():
        path: Path | None = getattr(options, option, None)
        if path is None:
            continue
        places.file(path, what)
        if path.is_file() and not options.force and not began_by(path, REPORTS[option]):
            raise OptionError(f"{what} '{path}' exists and is no report; give --force to replace it or choose another path")


def write_reports(report: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Writes the reports that were asked for.

    Raises:
        OptionError: one cannot be written.
    """
    if options.report is not None:
        _write_whole(
            printable_json(json.dumps(report, indent=1, ensure_ascii=False)) + "\n", options.report, WHAT["report"]
        )
    if getattr(options, "html", None) is not None:
        from liar_opt.tools.html_report import render

        _write_whole(printable(render(report), keep="\n\t"), options.html, WHAT["html"])


def _write_whole(text: str, path: Path, what: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        OptionError: it cannot be written; nothing is left of it.
    """
    try:
        write_whole(path, text)
    except OSError as err:
        raise OptionError(
            f"{what} '{path}' cannot be written ({err.strerror or err}); free space or choose another path"
        ) from err


def file_bytes(path: Path, weights: int) -> int:
    """Bytes of a model on disk; a file smaller than its weights keeps them beside it, as external data."""
    if not path.is_file():
        return sum(p.stat().st_size for p in path.glob("*.safetensors")) or weights
    size = path.stat().st_size
    return size if size >= weights else size + weights


def sha256(path: Path) -> str:
    """Returns the digest of a file, or of the weights in a folder."""
    import hashlib

    if path.is_dir():  # of a checkpoint: its weights, one file after the other
        return hashlib.sha256("".join(map(sha256, sorted(path.glob("*.safetensors")))).encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
