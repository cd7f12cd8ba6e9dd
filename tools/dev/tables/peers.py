"""Measure every other tool and method that can be run here beside liar-opt: same models, same calibration, same parameters.

    python tools/dev/bench.py peers --repositories FOLDER        # hours on 2 cores
    python tools/dev/bench.py peers --only minilm --peers liar-opt onnxsim-wanda --ratios 0.5 --again

Models: a sentiment classifier (accuracy), all-MiniLM-L6-v2 (mean cosine of sentence embeddings) and SmolLM2-135M
(perplexity), see `peer_tasks.py`. Tools: `peer_tools.py`; each runs in a virtual environment of its own under `--venvs`,
made with pip where it is missing, and is driven through files (`peer_files.py`), so that none of its code is here. Code
that no registry has is looked for in `--repositories`, a folder of clones named `owner+name`.

A cell is one tool on one model at one ratio of the prunable parameters (FFN and heads; embeddings apart). It is kept in
`--cells` (JSON) and not measured again, unless by `--again`; what cannot be run is a cell, too, with the reason. With
`--budget` nothing is started after so many seconds. Pruned models stay in `--folder`, and `--latency` times those of the
largest ratio in ONNX Runtime, each in turns with the dense model. `--seed` draws other calibration samples, and `--fold`
takes another classifier, trained without other sentences; cells of several seeds or folds make tables of their own where
the score is a share of samples.

The table goes to `--markdown`. Seconds are those of the tool's own work, without imports, reading and writing; where other
programs kept a core busy meanwhile, they are marked.
"""

import argparse
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.demo_assets import moved_into_place
from liar_opt.tools.dev.harness import (
    NoEnvironmentError,
    Others,
    ahead_of,
    environment,
    measured,
    say,
    setting,
    table,
    wait_for_quiet,
)
from liar_opt.tools.dev.peers.peer_tasks import TASKS, Task
from liar_opt.tools.dev.peers.peer_tools import ENVIRONMENTS, PEERS, PUBLISHED, REPOSITORIES, Peer
from liar_opt.tools.dev.subjects.sentiment import FOLDS

RATIOS = (0.2, 0.35, 0.5)
OURS = "liar-opt"
DENSE = ("dense", 0.0)
"""The cell of the dense model."""
SHORT = 0.05
"""A tool that removed so much less, or more, than it was asked to is no rival at that ratio."""
NEAR = 0.02
"""Within 2 % of liar-opt's score, the faster one is named."""
LIMIT = 800
"""Seconds after which a tool is stopped."""
FINISHED = "finished.json"
"""In the folder of a pruned model: what the tool and its process said. With it there, the model is only scored."""
BUSY = 0.5
"""Cores that other programs keep busy: from there on a time is marked."""


INTRODUCTION = """# liar-opt beside other tools

Printed by the command below. Every tool gets the same model, the same calibration samples and the same number of parameters
to remove (feed-forward and attention; embeddings apart), and runs in a process and an environment of its own; "removed" is
what was found gone afterwards. All results are scored as ONNX files in ONNX Runtime. "(formula, ours)" is the published
rule within liar-opt, where the authors' code does not take the model. Seconds are the tool's own work, without imports,
reading and writing; memory is the peak of the process; latency and cost belong to the largest ratio that the row has. No
tool was trained after pruning."""


# One cell --------------------------------------------------------------------------------------------------------------


class PeerError(Exception):
    """A tool that cannot be run, with the reason: a row of the table."""


def run_peer(peer: Peer, task: Task, ratio: float, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Prunes one model with one tool, in a process of its own.

    Args:
        peer: the tool.
        task: the model.
        ratio: of the prunable parameters, to remove.
        folder: gets pruned.onnx and report.json.
        options: of the command.

    Returns:
        What the tool reports, with the wall seconds and the peak memory of its whole process.

    Raises:
        PeerError: with what it said last.
    """
    repository = None
    if peer.repository:
        clone, part = REPOSITORIES[peer.repository]
        if options.repositories is None or not (options.repositories / clone).is_dir():
            raise PeerError(f"no clone of github.com/{clone.replace('+', '/')} in --repositories")
        repository = options.repositories / clone / part
    python = sys.executable
    if peer.environment is not None:
        try:
            python = str(environment(peer.environment, ENVIRONMENTS[peer.environment], options.venvs))
        except NoEnvironmentError as err:
            raise PeerError(str(err)) from err
    command = peer.command(task, ratio, folder, repository, options.seed)
    log = folder / "log"
    others = Others()
    with log.open("w", encoding="utf-8") as out:
        used = measured(["timeout", "--foreground", str(LIMIT), python, *command], folder, out)
    if used["code"]:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        errors = [line for line in said if re.match(r"[\w.]*(Error|Exception)\b", line)] or said or ["it said nothing"]
        why = f"stopped after {LIMIT} s" if used["code"] == 124 else errors[-1]
        raise PeerError(peer.reasons.get(used["code"], f"{why[:200]} ..." if len(why) > 200 else why))
    process = {"process_seconds": round(used["wall"], 2), "peak_mib": used["peak"] / 2**20, "busy": others.cores()}
    found = {**peer.read_report(folder), **process}
    (folder / FINISHED).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def make_cell(peer: Peer, task: Task, ratio: float, options: argparse.Namespace) -> dict[str, Any]:
    """Prunes and scores; what cannot be done is said under "error"."""
    if task.name in peer.excuses:
        return {"error": peer.excuses[task.name]}
    folder = options.folder / f"{task.name}-{peer.name}-{ratio}"
    if (folder / FINISHED).is_file() and not options.again:
        found = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            found = run_peer(peer, task, ratio, folder, options)
        except PeerError as err:
            return {"error": str(err)}
    pruned = folder / "pruned.onnx"
    scored = {"score": task.score(pruned), "removed": task.removed(pruned, peer.graph)}
    return {**found, **scored, **right_of(task, pruned), "beside": task.beside(pruned)}


def right_of(task: Task, model: Path) -> dict[str, Any]:
    """Which held-out samples a model is right about, as a cell keeps it; nothing where the score is no share of them."""
    right = task.right(model)
    return {} if right is None else {"right": packed_bits(right), "samples": right.size}


def packed_bits(values: NDArray[np.bool_]) -> str:
    """One bit a sample, as text."""
    return np.packbits(values).tobytes().hex()


def unpacked_bits(cell: Mapping[str, Any]) -> NDArray[np.float64]:
    """What `packed_bits` wrote into a cell, as zeros and ones."""
    packed = np.frombuffer(bytes.fromhex(cell["right"]), np.uint8)
    return np.unpackbits(packed, count=cell["samples"]).astype(np.float64)


# The table -------------------------------------------------------------------------------------------------------------


def better(task: Task, one: float, other: float) -> bool:
    """Whether the first score is better."""
    return one > other if task.higher else one < other


def near(task: Task, one: float, ours: float) -> bool:
    """Whether a score is better than ours, or at most `NEAR` of it worse."""
    return one >= ours * (1 - NEAR) if task.higher else one <= ours * (1 + NEAR)


def comparable(cell: Mapping[str, Any], ratio: float) -> bool:
    """Whether a tool removed about what it was asked to: one that finds little to remove keeps its score by that."""
    return "score" in cell and abs(cell["removed"] - ratio) <= SHORT


def verdicts(task: Task, cells: Mapping[tuple[str, float], Mapping[str, Any]], ratios: Sequence[float]) -> Iterator[str]:
    """For every ratio: who is first, and who is faster within 2 % of liar-opt's score."""
    for ratio in ratios:
        ours = cells.get((OURS, ratio), {})
        if "score" not in ours:
            continue
        rest = {
            peer: cell
            for (peer, of), cell in cells.items()
            if of == ratio and comparable(cell, ratio) and not PEERS[peer].ours
        }
        if not rest:
            yield f"{100 * ratio:.0f} %: no other tool was measured."
            continue
        ahead = [p for p, c in rest.items() if better(task, c["score"], ours["score"])]
        faster = [p for p, c in rest.items() if near(task, c["score"], ours["score"]) and c["seconds"] < ours["seconds"]]
        text = f"{100 * ratio:.0f} %: "
        text += f"liar-opt is behind {', '.join(PEERS[p].label for p in ahead)}" if ahead else "liar-opt is first"
        if faster:
            text += f"; faster within 2 % of its score: {', '.join(PEERS[p].label for p in faster)}"
        yield text + "."


def task_table(task: Task, cells: Mapping[tuple[str, float], Mapping[str, Any]], ratios: Sequence[float]) -> str:
    """Rows: tools; columns: the score at every ratio, and the cost at the last one that was measured."""
    rows, settings, failures = [], [], []
    for peer in PEERS.values():
        own = {ratio: cells[peer.name, ratio] for ratio in ratios if (peer.name, ratio) in cells}
        done = {ratio: cell for ratio, cell in own.items() if "score" in cell}
        if not done:
            why = next((cell["error"] for cell in own.values()), peer.excuses.get(task.name, "not measured yet"))
            failures += [f"- {peer.label}: {why}"] if task.name in peer.tasks else []
            continue
        scores = []
        for ratio in ratios:
            cell = done.get(ratio, {})
            best = [c["score"] for (_, of), c in cells.items() if of == ratio and comparable(c, ratio)]
            text = f"{cell['score']:.{task.digits}f}" if cell else ""
            first = comparable(cell, ratio) and not any(better(task, other, cell["score"]) for other in best)
            scores.append(f"**{text}**" if first else text)
        last = done[max(done)]
        removed = "/".join(f"{100 * cell['removed']:.0f}" for cell in done.values())
        busy = "" if last["busy"] is not None and last["busy"] < BUSY else "~"
        latency = f"{last['latency'][0] / last['latency'][1]:.2f}" if "latency" in last else ""
        cost = [f"{busy}{last['seconds']:.1f} s", f"{last['peak_mib']:,.0f} MiB", latency]
        rows.append([f"{peer.label}", *scores, removed, *cost, last["artefact"]])
        noted = list(dict.fromkeys(cell["note"] for cell in done.values() if cell["note"]))
        settings.append(f"- {peer.label} ({last['tool']}): {'; '.join(noted) or 'defaults'}")
        failures += [f"- {peer.label} at {100 * r:.0f} %: {c['error']}" for r, c in own.items() if "error" in c]
    head = ["tool", *(f"{task.metric} at {100 * r:.0f} %" for r in ratios), "removed, %", "seconds", "peak memory"]
    text = table([*head, "dense / pruned, latency", "what it leaves"], rows)
    text += "\n" + "\n".join(f"- {line}" for line in verdicts(task, cells, ratios)) + "\n"
    text += beside_table(task, cells, max(ratios)) + "\nSettings:\n\n" + "\n".join(settings) + "\n"
    return text + ("\nNot run:\n\n" + "\n".join(failures) + "\n" if failures else "")


def beside_table(task: Task, cells: Mapping[tuple[str, float], Mapping[str, Any]], ratio: float) -> str:
    """What else was measured at one ratio, tool by tool; nothing where there is nothing."""
    found = [(peer.label, cells.get((peer.name, ratio), {})) for peer in PEERS.values()]
    found = [(label, cell) for label, cell in found if cell.get("beside")]
    if not found:
        return ""
    names = list(found[0][1]["beside"])
    rows = [[n, f"{c['score']:.{task.digits}f}", *(f"{c['beside'][k]:.4f}" for k in names)] for n, c in found]
    return f"\nBeside the dense model, at {100 * ratio:.0f} %:\n\n{table(['tool', task.metric, *names], rows)}"


def draws_table(task: Task, store: "Cells") -> str:
    """Means over several draws of the calibration samples, and who is ahead by more than chance; "" of a single draw.

    A difference is that of the shares of draws in which each held-out sample came out right, in points; its interval comes
    of drawing these samples again (`runtime.bootstrap`). A tool has a place where it was measured with every seed.
    """
    cells: dict[int, dict[tuple[str, float], dict[str, Any]]] = {}
    for seed in store.seeds():
        drawn = Cells(store.path, seed, store.fold).all()
        own = {(p, r): c for (t, p, r), c in drawn.items() if t == task.name and "right" in c}
        if own:
            cells[seed] = own
    if len(cells) < 2:
        return ""
    ratios = sorted({ratio for own in cells.values() for _, ratio in own})
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for key in itertools.product(PEERS, ratios):
        every = [own[key] for own in cells.values() if key in own and comparable(own[key], key[1])]
        found |= {key: every} if len(every) == len(cells) else {}
    right = {key: np.mean([unpacked_bits(cell) for cell in every], axis=0) for key, every in found.items()}
    rows = []
    for name in (name for name in PEERS if any((name, ratio) in found for ratio in ratios)):
        row = [PEERS[name].label]
        for ratio in ratios:
            scores, gap = [cell["score"] for cell in found.get((name, ratio), [])], ""
            if scores and name != OURS and (OURS, ratio) in found:
                gap = ahead_of(right[OURS, ratio], right[name, ratio])
            row += [f"{np.mean(scores):.4f} ({np.std(scores, ddof=1):.4f})" if scores else "", gap]
        rows.append(row)
    head = [text for r in ratios for text in (f"{task.metric} at {100 * r:.0f} %", "over liar-opt, points")]
    return (
        f"\nOver {len(cells)} draws of the calibration samples (seeds {', '.join(map(str, cells))}): the mean, in\n"
        "brackets the standard deviation of the draws, and what a tool is ahead of liar-opt, in points, with the 95 %\n"
        f"interval over the held-out samples:\n\n{table(['tool', *head], rows)}"
    )


def folds_table(task: Task, store: "Cells") -> str:
    """Scores over the test parts of several folds together, and who is ahead by more than chance; "" of a single fold.

    Every fold has a model of its own, so that samples of different folds are of different models. A tool has a place where
    it was measured in every fold.
    """
    folds: dict[int, dict[tuple[str, float], dict[str, Any]]] = {}
    dense_cells = []
    for fold in store.folds():
        cells = Cells(store.path, store.seed, fold)
        own = {(p, r): c for (t, p, r), c in cells.all().items() if t == task.name and "right" in c and comparable(c, r)}
        if own:
            folds[fold] = own
            dense_cells.append(cells.dense_cell(task.name))
    if len(folds) < 2:
        return ""
    keys = set.intersection(*(set(own) for own in folds.values()))
    every = {key: [own[key] for own in folds.values()] for key in keys}
    right = {key: np.concatenate([unpacked_bits(cell) for cell in cells]) for key, cells in every.items()}
    measured_dense = all("right" in cell for cell in dense_cells)
    dense = np.concatenate([unpacked_bits(cell) for cell in dense_cells]) if measured_dense else None
    text = ""
    for ratio in sorted({ratio for _, ratio in keys}):
        rows: list[list[str]] = []
        beside: list[str] = []
        for name in (name for name in PEERS if (name, ratio) in keys):
            found, cells_of = right[name, ratio], every[name, ratio]
            beside, sizes = list(cells_of[0]["beside"]), [cell["samples"] for cell in cells_of]
            row = [PEERS[name].label, f"{found.mean():.{task.digits}f}", "" if dense is None else ahead_of(dense, found)]
            row += ["" if name == OURS or (OURS, ratio) not in keys else ahead_of(right[OURS, ratio], found)]
            rows.append(row + [f"{np.average([c['beside'][of] for c in cells_of], weights=sizes):.4f}" for of in beside])
        head = [f"tool, {100 * ratio:.0f} %", task.metric, "over the dense model, points", "over liar-opt, points", *beside]
        text += f"\n{table(head, rows)}"
    said = "" if dense is None else f" Dense: {dense.mean():.{task.digits}f}."
    samples = sum(next(iter(own.values()))["samples"] for own in folds.values())
    return (
        f"\nOver the test parts of {len(folds)} folds (folds {', '.join(map(str, folds))}), each with a dense model and a\n"
        f"calibration set of its own, {samples:,} held-out samples together, with 95 % intervals over them.{said}\n{text}"
    )


def markdown(tasks: Mapping[str, Task], store: "Cells", options: argparse.Namespace) -> str:
    """All tables."""
    given = setting(options.seed)
    parts = [
        f"{INTRODUCTION}\n",
        "`python tools/dev/bench.py peers`"
        + (f" `--seed {options.seed}`" if options.seed else "")
        + (f" `--fold {options.fold}`" if options.fold else "")
        + "\n\n"
        f"Seed {given['seed']}; printed at commit {given['commit']}, {given['date']}; {given['cores']} cores, "
        f"{given['processor']}. "
        f"Times with ~ were\ntaken while other programs kept {BUSY} cores busy or more; they are not to be quoted.\n",
    ]
    for task in tasks.values():
        cells = {(p, r): c for (t, p, r), c in store.all().items() if t == task.name}
        ratios = sorted({ratio for _, ratio in cells})
        if cells:
            dense = store.dense(task)
            parts.append(
                f"### {task.title}\n\n{task.text} Dense: {dense:.{task.digits}f}.\n\n{task_table(task, cells, ratios)}"
                f"{draws_table(task, store)}{folds_table(task, store)}"
            )
    parts.append("### Published, and measured here\n\n" + published_table(tasks, store))
    return "\n".join(parts)


def published_table(tasks: Mapping[str, Task], store: "Cells") -> str:
    """What the authors say of their methods, and what is left of the dense score here, at the largest ratio of each."""
    rows = []
    for name, (claim, source, peers) in PUBLISHED.items():
        here = []
        for peer in peers:
            for task in tasks.values():
                own = {r: c for (t, p, r), c in store.all().items() if (t, p) == (task.name, peer) and "score" in c}
                if own:
                    ratio = max(own)
                    scores = f"{store.dense(task):.{task.digits}f} to {own[ratio]['score']:.{task.digits}f}"
                    here.append(f"{PEERS[peer].label}: {task.name}, {100 * ratio:.0f} %, {task.metric} {scores}")
        if here:
            rows.append([name, f"{claim} ({source})", "; ".join(here)])
    return table(["method", "published, on other models", "measured here"], rows).replace("---:", "---")


# The command -----------------------------------------------------------------------------------------------------------


class Cells:
    """Finished cells of a seed and a fold, by (task, peer, ratio), in a JSON file."""

    def __init__(self, path: Path, seed: int, fold: int = 0) -> None:
        self.path, self.seed, self.fold = path, seed, fold

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        return found

    def seeds(self) -> list[int]:
        """Those that cells of this fold were measured with, ascending."""
        keys = map(json.loads, self._read())
        return sorted({seed for *_, seed, fold in keys if fold == self.fold})

    def folds(self) -> list[int]:
        """Those that have cells of this seed, ascending."""
        keys = map(json.loads, self._read())
        return sorted({fold for *_, seed, fold in keys if seed == self.seed})

    def _key(self, task: str, peer: str, ratio: float) -> str:
        return json.dumps([task, peer, ratio, self.seed, self.fold])

    def all(self) -> dict[tuple[str, str, float], dict[str, Any]]:
        """Those of this seed and fold."""
        split = {tuple(json.loads(key)): cell for key, cell in self._read().items()}
        own = (self.seed, self.fold)
        return {(t, p, r): c for (t, p, r, *of), c in split.items() if tuple(of) == own and p in PEERS}

    def dense(self, task: Task) -> float:
        """The score of a dense model, measured once."""
        if not self.dense_cell(task.name):
            self.put(task.name, *DENSE, {"score": task.score(task.model), **right_of(task, task.model)})
        return float(self.dense_cell(task.name)["score"])

    def dense_cell(self, task: str) -> dict[str, Any]:
        """The cell of a dense model, empty where it was not measured."""
        return dict(self._read().get(self._key(task, *DENSE), {}))

    def put(self, task: str, peer: str, ratio: float, cell: Mapping[str, Any]) -> None:
        """Keeps a cell beside what others have written meanwhile."""
        cells = {**self._read(), self._key(task, peer, ratio): dict(cell)}
        with moved_into_place(self.path) as temporary:
            temporary.write_text(json.dumps(cells, indent=1), encoding="utf-8")


def time_latency(task: Task, store: Cells, options: argparse.Namespace) -> None:
    """Times the pruned models of the largest ratio that is there, each in turns with the dense one."""
    own = {(p, r): c for (t, p, r), c in store.all().items() if t == task.name and "score" in c}
    for peer in dict.fromkeys(p for p, _ in own):
        ratio = max(r for p, r in own if p == peer)
        cell = own[peer, ratio]
        file = options.folder / f"{task.name}-{peer}-{ratio}" / "pruned.onnx"
        if file.is_file() and (options.again or "latency" not in cell) and peer in options.peers:
            cell["latency"] = task.latency(file)
            store.put(task.name, peer, ratio, cell)
            say(f"latency: {task.name}, {peer}: {cell['latency']}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--only", choices=tuple(TASKS), nargs="+", default=list(TASKS), help="these models alone")
    parser.add_argument("--peers", choices=tuple(PEERS), nargs="+", default=list(PEERS), help="these tools alone")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="of the prunable parameters")
    parser.add_argument("--classifier", type=Path, help="folder of `sentiment.py` (default: the cache)")
    parser.add_argument("--repositories", type=Path, help="folder of clones named owner+name")
    parser.add_argument("--venvs", type=Path, default=cache_folder() / "peers", help="folder of virtual environments")
    parser.add_argument("--folder", type=Path, help="where models are made (default: the cache, one for each seed)")
    parser.add_argument("--cells", type=Path, default=cache_folder() / "peer-cells.json", help="finished cells")
    parser.add_argument("--again", action="store_true", help="measure these cells again")
    parser.add_argument("--budget", type=float, default=1e9, help="start nothing after so many seconds")
    parser.add_argument(
        "--wait", type=float, default=0, metavar="SECONDS", help="wait for a quiet machine before every cell"
    )
    parser.add_argument("--latency", action="store_true", help="time the pruned models instead")
    parser.add_argument("--tables", action="store_true", help="measure no cell, print those that are there")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fold", type=int, choices=range(FOLDS), default=0, help="of the classifier's sentences: which are held out"
    )


def main(options: argparse.Namespace) -> int:
    """The command."""
    drawn = (f"-{options.seed}" if options.seed else "") + (f"-fold{options.fold}" if options.fold else "")
    options.folder = options.folder or cache_folder() / f"peer-models{drawn}"
    began = time.perf_counter()
    options.folder.mkdir(parents=True, exist_ok=True)
    store = Cells(options.cells, options.seed, options.fold)
    tasks = {name: make(options) for name, make in TASKS.items() if name in options.only}
    for task in tasks.values():
        if options.latency:
            time_latency(task, store, options)
        if options.latency or options.tables:
            continue
        for peer in (PEERS[name] for name in options.peers):
            for ratio in options.ratios:
                if task.name not in peer.tasks or ((task.name, peer.name, ratio) in store.all() and not options.again):
                    continue
                if time.perf_counter() - began > options.budget:
                    say("the budget is spent; start the command again to go on")
                    return 0
                wait_for_quiet(options.wait)
                cell = make_cell(peer, task, ratio, options)
                store.put(task.name, peer.name, ratio, cell)
                say(f"{task.name}, {peer.name}, {ratio}: { {k: v for k, v in cell.items() if k != 'right'} }")
    text = markdown(tasks, store, options)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    print(text)
    return 0
