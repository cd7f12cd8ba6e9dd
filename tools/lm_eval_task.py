"""Tasks of lm-evaluation-harness (Gao et al., EleutherAI) on ONNX decoders, by its own API: ``--task lm-eval:hellaswag``.

The harness asks for log likelihoods of continuations; here they are answered by ONNX Runtime. Its tasks, prompts and
metrics stay its own. It is no dependency: ``pip install lm-eval``.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.bootstrap import LEVEL, mean_of, paired_difference
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.evaluation_feeds import Candidate, EvaluationOptions, Progress
from liar_opt.runtime.signatures import Signature, names, one_line
from liar_opt.runtime.text_batches import pad_texts
from liar_opt.runtime.text_tokenizer import load_tokenizer

PREFIX = "lm-eval:"
LONGEST = 2048
"""Tokens of context and continuation where model and tokenizer say no less."""


def require() -> None:
    """Checks that the harness is installed.

    Raises:
        OptionError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise OptionError("tasks of lm-evaluation-harness need the package lm-eval; install it with: pip install lm-eval")


def evaluate(
    task: str, candidates: Sequence[Candidate], options: EvaluationOptions, progress: Progress
) -> tuple[dict[str, Any], list[dict[str, NDArray[Any]]]]:
    """Runs tasks of the harness; several are separated by commas.

    Returns:
        As :func:`liar_opt.runtime.evaluation.evaluate`; metrics are "task metric", over the documents of a task.

    Raises:
        OptionError: there is no such task, no tokenizer, or the harness cannot run it on these models.
    """
    import lm_eval  # pyright: ignore[reportMissingImports]

    wanted = task.removeprefix(PREFIX).split(",")
    scores: list[dict[str, NDArray[np.float64]]] = []
    for index, candidate in enumerate(candidates):
        model = _language_model(candidate, options)
        try:
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=wanted,
                limit=options.samples,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=options.seed,
                numpy_random_seed=options.seed,
                torch_random_seed=options.seed,
                fewshot_random_seed=options.seed,
            )
        except OptionError:
            raise
        except Exception as err:  # unknown tasks, data sets without a network: the harness has no class for them
            raise OptionError(
                f"lm-evaluation-harness cannot run {names(wanted)} ({one_line(err)}); see lm-eval ls tasks"
            ) from err
        scores.append(_by_metric(found["samples"]))
        progress("evaluate", index + 1, len(candidates))
    if not scores[0]:
        raise OptionError(f"{names(wanted)} gave no metric of single documents; choose tasks of multiple choice")
    figures: dict[str, Any] = {}
    for name, first in scores[0].items():
        reference, *of = [mean_of(values[name]) for values in scores]
        others = [paired_difference(reference, one, len(first), options.resamples, options.seed) for one in of]
        figures[name] = {
            "samples": len(first),
            "unit": "document",
            "values": [float(values[name].mean()) for values in scores],
            "differences": [vars(interval) for interval in others],
        }
    told = f"lm-evaluation-harness {lm_eval.__version__}, {', '.join(wanted)}"
    return {"metrics": figures, "source": told, "level": LEVEL, "resamples": options.resamples, "notes": []}, []


def _by_metric(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, NDArray[np.float64]]:
    """Metrics of single documents that are numbers, by task and name, in the order of the documents."""
    found = {}
    for task, logged in samples.items():
        ordered = sorted(logged, key=lambda sample: int(sample["doc_id"]))
        for metric in ordered[0]["metrics"] if ordered else ():
            values = [sample[metric] for sample in ordered]
            if all(isinstance(value, bool | int | float) for value in values):
                found[f"{task} {metric}"] = np.array(values, np.float64)
    return found


def _language_model(candidate: Candidate, options: EvaluationOptions) -> Any:
    """A model as the harness wants it; its base class is imported with the harness."""
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer

    signature = Signature.read(candidate.inputs, options.mask_input)
    file = Path(options.tokenizer or "") / "tokenizer.json"
    if options.tokenizer is None or not file.is_file():
        raise OptionError("lm-evaluation-harness needs a folder with a tokenizer.json; pass --tokenizer DIR")
    if signature.ids is None:
        raise OptionError(f"model '{candidate.name}' has no token id input, which lm-evaluation-harness needs")
    tokenizer = load_tokenizer(options.tokenizer)
    text_to_ids = Tokenizer.from_file(str(file))
    limits = (options.sequence_length, tokenizer.limit, candidate.positions, signature.length())
    longest = min([LONGEST, *(limit for limit in limits if limit is not None)])

    class OnnxLanguageModel(TemplateLM):  # type: ignore[misc]
        """Log likelihoods of continuations from ONNX Runtime."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.separator if tokenizer.separator is not None else 0

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return list(text_to_ids.encode(string, add_special_tokens=False).ids)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            given = [([*context, *continuation][-longest - 1 :], continuation) for _, context, continuation in requests]
            results: list[tuple[float, bool]] = [(0.0, False)] * len(given)
            ascending = np.argsort([len(ids) for ids, _ in given], kind="stable")
            size = signature.batch or (options.batch_size if signature.mask else 1)
            for start in range(0, len(ascending), size):
                rows = ascending[start : start + size]
                filled = np.resize(rows, signature.batch) if signature.batch else rows
                read = [given[row][0][:-1] for row in filled]
                length = signature.length() or max(map(len, read))
                feed, real = pad_texts([(ids, [0] * len(ids)) for ids in read], length, tokenizer, signature)
                logits = _logits(candidate, feed)
                for place, row in enumerate(rows.tolist()):
                    ids, continuation = given[row]
                    scores = logits[place][real[place]][-len(continuation) :].astype(np.float64)
                    wanted = np.array(ids[-len(continuation) :])
                    peak = scores.max(-1, keepdims=True)
                    likelihoods = scores - peak - np.log(np.exp(scores - peak).sum(-1, keepdims=True))
                    total = float(np.take_along_axis(likelihoods, wanted[:, None], -1).sum())
                    results[row] = (total, bool((scores.argmax(-1) == wanted).all()))
            return results

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise OptionError("tasks that ask for the perplexity of documents are not run here; use --task perplexity")

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise OptionError("tasks that generate text are not run on ONNX graphs; choose tasks of multiple choice")

    return OnnxLanguageModel()


def _logits(candidate: Candidate, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    outputs = candidate.session.outputs
    name = "logits" if "logits" in outputs else outputs[0]
    found: NDArray[Any] = candidate.session.run(feed, [name], arrays=True)[name]
    if found.ndim != 3:
        raise OptionError(f"output '{name}' of model '{candidate.name}' has rank {found.ndim}; logits [b, s, v] are needed")
    return found
