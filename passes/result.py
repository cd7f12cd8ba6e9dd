"""What the library gives back: a pruned model, a pruned module, or what an analysis found."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from numpy.typing import NDArray

from liar_opt.frontend.fx_module import FxModel, FxOriginal, trace
from liar_opt.frontend.fx_onnx import export_onnx, symbolic_axes
from liar_opt.frontend.fx_rewrite import cut_graph_module, cut_program
from liar_opt.frontend.genai_config import write_config
from liar_opt.frontend.hf_checkpoint import FieldChange, save_checkpoint, without_cache
from liar_opt.frontend.input_files import Inputs
from liar_opt.frontend.model import Model
from liar_opt.frontend.onnx_model import OnnxModel, OnnxOriginal
from liar_opt.frontend.plain_module import evaluating
from liar_opt.frontend.semi_structured import semi_structured
from liar_opt.frontend.sparse_weights import sparsified
from liar_opt.frontend.vocabulary import cut_words, find_words
from liar_opt.frontend.weight_files import completed, lightened, write_model
from liar_opt.passes.base import Change, State
from liar_opt.passes.cut_module_words import WholeModule, numbered
from liar_opt.passes.cut_vocabulary import ChosenWords
from liar_opt.passes.express_widths import FinalFields
from liar_opt.passes.fit_module import CutModule
from liar_opt.passes.groups import ChannelGroup, Refusal
from liar_opt.passes.open_module import OpenedModule
from liar_opt.passes.quantise_module import QuantisedModule
from liar_opt.passes.quantise_result import QuantisedModel
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.places import Places
from liar_opt.runtime.small_tokenizer import write_beside
from liar_opt.runtime.whole_file import patient_file

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


@dataclass(eq=False)
class Inspection:
    """What an analysis found: groups in execution order and what does not qualify."""

    model: Model
    groups: tuple[ChannelGroup, ...]
    refusals: tuple[Refusal, ...]
    report: dict[str, Any]


@dataclass(eq=False)
class PruneResult:
    """A pruned model and what was done to it.

    Attributes:
        pruned: the pruned model; its weights stay in their files where they are long.
        report: plain data, ready for JSON: options, sizes before and after, groups, refusals, measured differences.
        changes: what the passes did.
        refusals: what did not qualify, and why.
        inputs: what the run read; no result is written there.
        words: those that are left, of a model that takes the ids of a smaller tokenizer.
        sparse_storage: whether ONNX is written with sparse initializers where these are smaller.
    """

    pruned: OnnxModel | OnnxOriginal
    report: dict[str, Any]
    changes: tuple[Change, ...] = field(default_factory=tuple)
    refusals: tuple[Refusal, ...] = field(default_factory=tuple)
    inputs: Inputs = field(default_factory=Inputs)
    words: ChosenWords | None = None
    sparse_storage: bool = False

    @functools.cached_property
    def model(self) -> onnx.ModelProto:
        """The pruned model as an ONNX proto, with all its weights in memory; made when it is first asked for."""
        return completed(*self.pruned.as_written())

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Writes the model, whole or not at all, with GenAI's configuration where the input has one beside it.

        Weights above 2 GiB are written beside it, as ``PATH.data``, or ``PATH.<8 digits>.data`` where there is such a file.

        Raises:
            OptionError: the path is that of a file that the input consists of (its external data, the calibration data),
                exists (without ``force``), is no plain file (links are not followed), or cannot be written.
        """
        path = Path(path)
        source = self.report["model"]["path"]
        check_output(path, Path(source) if source else None, force, self.inputs)
        if self.words is not None and self.words.small is not None:
            write_beside(self.words.small, self.words.kept, path, force)
        # Whoever has asked for the proto may have changed it.
        parts = lightened(self.model) if "model" in vars(self) else self.pruned.as_written()
        parts = self._as_stored(*parts)
        try:
            write_model(*parts, path, keep=[file for file, _ in self.inputs.files()])
        except OSError as err:
            raise OptionError(
                f"'{path}' cannot be written ({err.strerror or err}); free space or give another path; nothing was written"
            ) from err
        small = self.words is not None and self.words.renumbered
        words = {int(i): k for k, i in enumerate(self.words.kept)} if small and self.words is not None else None
        told = source and "after" in self.report
        left = write_config(Path(source), path, self.report["groups"], words) if told else None
        if left is not None:
            self.report["model"]["notes"].append(left)
        return path

    def _as_stored(
        self, light: onnx.ModelProto, arrays: dict[str, NDArray[Any]]
    ) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
        """Returns the parts of a model as they are written, and notes which weights are sparse."""
        if not self.sparse_storage:
            return light, arrays
        light, arrays, sparse = sparsified(light, arrays)
        told = f"{len(sparse)} weights are" if sparse else "no weight is smaller as a sparse initializer, and none is"
        self.report["model"]["notes"].append(f"{told} stored as {'sparse initializers' if sparse else 'one'}")
        return light, arrays


class ModuleResult(PruneResult):
    """A pruned module and what was done to it.

    Attributes:
        module: the module, smaller; called as before; quantised where a checkpoint was asked to be. Where no attributes
            make its own code fit the cut weights, the traced graph, with the arguments that were traced and no dropout; a
            note in the report says why.
        report: plain data, as for ONNX files; ``verification.attributes`` names the attributes that were changed.
        changes: what the passes did.
        refusals: what did not qualify, and why.
        words: those that are left, where some went: the module's ids are places among them.
        groups: what could be pruned, in execution order.
        fields: what the configuration says of the new widths; None where it cannot.
        folder: where the checkpoint came from, if it did.
        inputs: what the run read; no result is written there.
    """

    def __init__(
        self,
        state: State,
        report: dict[str, Any],
        changes: tuple[Change, ...],
        refusals: tuple[Refusal, ...],
        inputs: Inputs | None = None,
        sparse_storage: bool = False,
    ):
        assert isinstance(state.model, FxModel)
        assert state.model.module is not None
        cut, fields, opened = state.get(CutModule), state.get(FinalFields), state.found(OpenedModule)
        if cut is None or "after" not in report:  # nothing is cut in a dry run
            came = state.as_it_came()
            assert isinstance(came, FxOriginal)
            self.module: torch.nn.Module = came.module
        else:
            small = state.get(QuantisedModule)
            self.module = cut.module if small is None else small.module
        self.report, self.changes, self.refusals, self.sparse_storage = report, changes, refusals, sparse_storage
        self.groups: tuple[ChannelGroup, ...] = state.groups
        self.fields: tuple[FieldChange, ...] | None = None if fields is None else fields.changes
        self.folder: Path | None = opened.folder
        given = inputs or Inputs()
        # of a name of the hub: the folder to which it was fetched
        self.inputs = given if self.folder is None else replace(given, models=(*given.models, self.folder))
        self._model, self._example = state.model, opened.example
        self._quantised = state.get(QuantisedModel)
        self._by_torchao = state.get(QuantisedModule) is not None
        whole = state.get(WholeModule)
        self.words = None if whole is None else state.get(ChosenWords)  # a dry run has chosen words, and cut none
        self._whole = None if whole is None else whole.module
        self._small = self.words.small if self.words is not None and report["vocabulary"]["small_tokenizer"] else None
        if self.words is not None:
            self._example = numbered(numbered(opened.example, self.words, new=False), self.words)

    @functools.cached_property
    def graph_module(self) -> torch.fx.GraphModule:
        """The traced graph, cut: a ``torch.fx.GraphModule`` that is called like the module."""
        if self._whole is not None:
            whole: torch.fx.GraphModule = self.program.graph_module
            return whole
        return cut_graph_module(self._model)

    def semi_structured(self) -> torch.nn.Module:
        """Returns a copy of the module whose 2:4 weights are in the form that torch's kernels for CUDA multiply.

        Raises:
            OptionError: the weights have no such pattern, or the module is not on a CUDA device in half precision.
        """
        done = self.report.get("patterned")
        if done is None or done["pattern"] != "2:4":
            raise OptionError("semi_structured wants weights of which two of each four are zero; prune with pattern '2:4'")
        return semi_structured(self.module, [weight["weight"] for weight in done["weights"]])

    @functools.cached_property
    def program(self) -> ExportedProgram:
        """The traced graph, cut: what ``torch.export.save`` writes."""
        if self._whole is not None:
            with evaluating(self.module), without_cache(self.module):
                return trace(self.module, self._example)
        return cut_program(self._model, self._example)

    @functools.cached_property
    def model(self) -> onnx.ModelProto:
        """The pruned module, exported to ONNX; ids are those that it had, unless a smaller tokenizer was asked for.

        Where the result was quantised, so is this.
        """
        if self._quantised is not None:
            return self._quantised.model.as_given()
        if self._by_torchao:
            raise OptionError("what torchao quantised is a checkpoint, and no ONNX; give checkpoint=False for that")
        axes, words = symbolic_axes(self._model.signature), self.words
        if words is None or self._whole is None or self._small is not None:
            return export_onnx(self.module, self._example, axes)
        whole = OnnxModel.from_proto(export_onnx(self._whole, self._example, axes))
        whole.normalise()
        cut_words(whole, find_words(whole), words.kept, words.unknown)
        whole.graph.cleanup(remove_unused_node_outputs=False).toposort()
        return whole.to_proto()

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Writes the module, whole or not at all: ``.onnx`` and ``.pt2`` files, or a transformers checkpoint folder.

        Raises:
            OptionError: the path is that of a file or folder that the input consists of, exists (without ``force``), is no
                plain file or folder (links are not followed), is a folder that holds what liar-opt did not write, or cannot
                be written; or the configuration of the model cannot say its widths.
        """
        path = Path(path)
        if path.suffix not in (".onnx", ".pt2"):
            Places(self.inputs.files).folder(path, "output")
            small, words = None if self.words is None else self.words.small, self.words
            if words is not None and small is None:
                raise OptionError(
                    "a checkpoint of fewer words needs the tokenizer that gives them; give --tokenizer DIR, or write ONNX"
                )
            write = None if small is None or words is None else functools.partial(small.write, words.kept)
            return save_checkpoint(self.module, path, self.folder, self.fields, self._example, force=force, tokenizer=write)
        check_output(path, None, force, self.inputs)
        if self._by_torchao:
            raise OptionError(f"what was quantised is a checkpoint, and '{path}' is none; give the path of a folder")
        if path.suffix == ".pt2" and self._quantised is not None:
            raise OptionError(f"what was quantised is ONNX, and '{path}' is not; give a path that ends in .onnx")
        if self._small is not None and self.words is not None:
            write_beside(self._small, self.words.kept, path, force)
        try:
            if path.suffix == ".onnx":
                write_model(*self._as_stored(*lightened(self.model)), path, keep=[file for file, _ in self.inputs.files()])
            else:
                import torch

                with patient_file(path) as stream:
                    torch.export.save(self.program, stream)
        except OSError as err:
            raise OptionError(f"'{path}' cannot be written ({err.strerror or err}); nothing was written") from err
        return path


def check_output(path: Path, source: Path | None, force: bool, inputs: Inputs | None = None) -> None:
    """Checks that a result may be written to ``path``.

    Raises:
        OptionError: it is the input or a file of it, exists without ``force``, is a folder, a link or no file, or its
            own folder does not exist.
    """
    known = Inputs(models=(source,)) if inputs is None else inputs
    Places(known.files).file(path, "output", replace=force, probe=False)
