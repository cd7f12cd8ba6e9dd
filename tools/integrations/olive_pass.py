"""A pass of Olive (olive-ai): a workflow converts, prunes and quantises, with the options of `liar_opt.prune`.

    python -m liar_opt.tools.integrations.olive_pass > passes.json
    olive run --config workflow.json --package-config passes.json

Olive finds passes in a package file, which replaces its own list: what the first line prints holds both.
"""

# pyright: reportMissingImports=false
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from olive.common.config_utils import ParamCategory, validate_config
from olive.data.config import DataConfig
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler, ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from liar_opt.passes.options import OPTIONS, PruneOptions

NAME = "LiarOptPruning"
CALIBRATION = "texts (.txt, .jsonl, .csv), batches (.npz, a folder of .npy) or a dataset, as --calibration takes it"
REPORT = "liar_opt.report.json"
"""What is written beside the model: the report of the run."""
BESIDE = {"resume", "passes", "dry_run", "allow_pickle", "custom_ops"}
"""Options of the command that a workflow has other ways for, or that should not be said in one."""


def package_config() -> dict[str, Any]:
    """Returns Olive's own list of passes, and this one: what its package file holds."""
    own = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    everywhere = {"supported_providers": ["*"], "supported_accelerators": ["*"], "supported_precisions": ["*"]}
    found = {
        "module_path": f"liar_opt.tools.integrations.olive_pass.{NAME}",
        **everywhere,
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
        "dataset": "dataset_optional",
    }
    return {**own, "passes": {**own["passes"], NAME: found}}


def _taken(name: str) -> Any:
    """Returns the type of an option's value in a workflow."""
    default, kind = getattr(PruneOptions, name), OPTIONS[name].kind
    if isinstance(default, bool):
        return bool
    if name in ("memory", "max_drop", "query_key"):
        return float | str | None
    return str | None if kind in (str, Path) else kind | None


class LiarOptPruning(Pass):  # type: ignore[misc]
    """Removes feed-forward channels and attention heads, repairs what stays, and checks the result.

    An ONNX model gives an ONNX model, a model of Hugging Face a checkpoint.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        params = {
            "calibration": PassConfigParam(type_=str | None, default_value=None, description=CALIBRATION),
            "data_config": PassConfigParam(
                type_=DataConfig | dict | None,
                default_value=None,
                category=ParamCategory.DATA,
                description="data of Olive's own, instead of calibration",
            ),
        }
        for name, what in OPTIONS.items():
            if what.group and name not in BESIDE:
                default = getattr(PruneOptions, name)
                params[name] = PassConfigParam(type_=_taken(name), default_value=default, description=what.help)
        return params

    def _run_for_config(self, model: Any, config: BasePassConfig, output_model_path: str) -> Any:
        import liar_opt

        given = {k: v for k, v in config.model_dump().items() if k in OPTIONS and v != getattr(PruneOptions, k)}
        data: Any = config.calibration if config.data_config is None else _batches(model, config.data_config)
        if isinstance(model, ONNXModelHandler):
            output = Path(resolve_onnx_path(output_model_path, Path(model.model_path).name))
            result = liar_opt.prune(model.model_path, data, **given)
        elif isinstance(model, HfModelHandler):
            output = Path(output_model_path)
            result = liar_opt.prune(model.model_path, data, **given)
        else:
            raise liar_opt.OptionError(f"{NAME} takes ONNX models and those of Hugging Face, not {type(model).__name__}")
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        result.save(output, force=True)
        folder = output if output.is_dir() else output.parent
        report = folder.with_name(f"{folder.name}.json") if output.is_dir() else folder / REPORT
        report.write_text(json.dumps(result.report, indent=1, default=str), encoding="utf-8")
        if isinstance(model, HfModelHandler):
            return HfModelHandler(model_path=str(output), task=model.task, load_kwargs=model.load_kwargs)
        beside = any(path != output and path != report for path in output.parent.iterdir())
        if beside:
            return ONNXModelHandler(model_path=str(output.parent), onnx_file_name=output.name)
        return ONNXModelHandler(model_path=str(output))


def _batches(model: Any, said: Any) -> list[dict[str, np.ndarray]]:
    """Returns what Olive's data is, as batches by name."""
    container = validate_config(said, DataConfig).to_data_container()
    loader = container.create_calibration_dataloader(model_path=str(model.model_path), io_config=model.io_config)
    inputs = (item[0] if isinstance(item, (tuple, list)) else item for item in loader)
    return [{name: np.asarray(value) for name, value in batch.items()} for batch in inputs]


def main() -> int:
    """Prints the package file."""
    print(json.dumps(package_config(), indent=4))
    return 0


if __name__ == "__main__":
    sys.exit(main())
