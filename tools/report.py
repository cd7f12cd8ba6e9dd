"""Tables from a report: ``PruneResult.report`` or ``Inspection.report`` in, rich renderables out.

A report is plain data (see `passes.report`), so a report that was read back from JSON prints the same tables.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table

from liar_opt.runtime.compare import TOLERANCES
from liar_opt.tools.printable import printable

Report = Mapping[str, Any]
PLAIN_WIDTH = 160
"""Columns where the output is not a terminal."""
SHOWN_NODES = 3
"""Nodes of a refusal that are named where not all are asked for."""


class _Console(Console):
    """Leaves it to the command what a closed pipe means (rich would exit with code 1), and prints what is harmless."""

    def print(self, *objects: Any, **settings: Any) -> None:
        """Prints lines and tables; those of `make_table` see to their cells."""
        super().print(*(printable(o, keep="\n") if isinstance(o, str) else o for o in objects), **settings)

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles the error."""
        raise BrokenPipeError


def make_console(stream: IO[str], width: int | None = None) -> Console:
    """Returns a console that prints text as it is: node names may look like markup."""
    plain = width if width is not None or stream.isatty() else PLAIN_WIDTH
    return _Console(file=stream, width=plain, markup=False, highlight=False, emoji=False)


def before_after(report: Report) -> Table:
    """The table of a finished run: sizes, cost and what the outputs lost."""
    table = make_table("", "dense", "pruned", "change")
    before, after = report["before"], report["after"]
    table.add_row(
        "parameters", f"{before['parameters']:,}", f"{after['parameters']:,}", change(before, after, "parameters")
    )
    if report["groups"]:
        prunable, left = ({"all": report["prunable"][when]} for when in ("before", "after"))
        table.add_row("  of them prunable", f"{prunable['all']:,}", f"{left['all']:,}", change(prunable, left, "all"))
    whole = Counter(g["stand_in"] for g in report["groups"] or () if g.get("stand_in"))
    if whole:
        named = ", ".join(f"{count} by a {form}" for form, count in sorted(whole.items()))
        table.add_row("layers gone whole", "0", f"{whole.total()}", named)
    blocks = report.get("blocks")
    if blocks:
        count, left = {"all": blocks["of"]}, {"all": blocks["of"] - blocks["blocks"]}
        table.add_row("blocks", f"{count['all']:,}", f"{left['all']:,}", change(count, left, "all"))
    experts = report.get("experts")
    if experts:
        count, left = ({"all": sum(layer[when] for layer in experts["layers"])} for when in ("before", "after"))
        table.add_row("experts", f"{count['all']:,}", f"{left['all']:,}", change(count, left, "all"))
        held, left = ({"all": experts[f"parameters_{when}"]} for when in ("before", "after"))
        table.add_row("  parameters of them", f"{held['all']:,}", f"{left['all']:,}", change(held, left, "all"))
    words = report.get("vocabulary")
    if words:
        count, left = {"all": words["words"]}, {"all": words["kept"]}
        table.add_row("words", f"{count['all']:,}", f"{left['all']:,}", change(count, left, "all"))
        held, left = ({"all": words[f"bytes_{when}"]} for when in ("before", "after"))
        table.add_row("  bytes of them", quantity(held["all"], "B"), quantity(left["all"], "B"), change(held, left, "all"))
    zeros = report.get("patterned")
    if zeros:
        table.add_row("  of them zero", "", f"{zeros['share'] * after['parameters']:,.0f}", f"{100 * zeros['share']:.1f} %")
    size = "file_bytes" if "file_bytes" in before and "file_bytes" in after else "bytes"
    name = "bytes on disk" if size == "file_bytes" else "bytes of weights"
    table.add_row(name, quantity(before[size], "B"), quantity(after[size], "B"), change(before, after, size))
    if before.get("flops") and after.get("flops"):
        table.add_row("FLOPs (1)", quantity(before["flops"]), quantity(after["flops"]), change(before, after, "flops"))
    latency = report.get("latency")
    if latency:
        times = (milliseconds(latency[k]) for k in ("dense_seconds", "pruned_seconds"))
        table.add_row(
            "latency (1)",
            *times,
            f"{latency['speedup']:.2f} x faster" if latency["speedup"] >= 1 else f"{1 / latency['speedup']:.2f} x slower",
        )
    for output, difference in report["verification"]["outputs"].items():
        table.add_row(f"cosine of '{output}' (2)", "1.0000", f"{difference['cosine']:.4f}", "")
        table.add_row("  relative RMS difference (2)", "", f"{difference['relative_rms']:.4f}", "")
        if difference.get("changed_top1") is not None:
            table.add_row("  another one is the largest (2)", "", f"{100 * difference['changed_top1']:.2f} %", "")
    evaluation = report.get("evaluation")
    if evaluation:
        table.add_row(evaluation["name"], "1.0000", f"{evaluation['cosine']:.4f}", "")
    return table


def solved_on(solver: Mapping[str, Any]) -> str:
    """Where it was solved, and how well."""
    said = f"solved on {solver['where']} in {solver['precision']}"
    if "factored" not in solver:
        return said
    return (
        f"{said}: off by {solver['worst_error']:.0e} at the most; {solver['again_in_float64']:,} of "
        f"{solver['factored']:,} matrices needed float64"
    )


def footnotes(report: Report) -> Iterator[str]:
    """What the numbers of :func:`before_after` were measured on, one line each."""
    latency, data, check = report.get("latency"), report.get("calibration"), report["verification"]
    if latency:
        yield f"(1) one batch, {latency['batch']}, on {report['device']}; median of {latency['runs']} runs, taken in turns"
    elif data:
        yield "(1) the first calibration batch; latency was not measured"
    if report.get("experts"):
        yield experts_left(report["experts"])
    if report.get("vocabulary"):
        yield vocabulary_left(report["vocabulary"])
    if report.get("blocks"):
        yield blocks_left_out(report["blocks"])
    if report.get("patterned"):
        yield from pattern_made(report["patterned"])
    if report.get("choice"):
        yield tries_compared(report["choice"])
    if report.get("blocks_compared"):
        yield blocks_compared(report["blocks_compared"])
    if data is None:  # no width was cut
        return
    rows = max((d["rows"] for d in check["outputs"].values()), default=0)
    random = "random inputs, not your data" if data["synthetic"] else data["source"]
    yield f"(2) {rows:,} rows of the calibration batches: {random}"
    if check.get("uneven"):
        others = ", ".join(f"'{name}'" for name in check["uneven"])
        yield f"(2) {others}: the size depends on the data and is another now; compared as far as both go"
    if check.get("not_compared"):
        others = ", ".join(f"'{name}'" for name in check["not_compared"])
        yield f"(2) {others}: holds no numbers or texts here and was not compared"
    if data.get("gap") is not None:
        yield f"calibration: endlessly more samples would take about {100 * data['gap']:.0f} % off the repair's error"
    solver = report.get("solver") or {"where": "host"}
    if solver["where"] != "host":
        yield solved_on(solver)
    if report["groups"]:  # else blocks or experts alone
        yield (
            "exactness: the cut model equals the original with the removed channels masked to "
            f"{check['exact_difference']:.1e} (allowed {TOLERANCES[check['exact_dtype']]:.0e} in {check['exact_dtype']})"
        )
    if report.get("refit"):
        yield refitted(report["refit"])
    if report.get("tune"):
        yield tuned(report["tune"])
    if report.get("kept_scheme"):
        yield scheme_kept(report["kept_scheme"])
    if check.get("attributes"):
        changed = Counter(f"{a['name']} {a['before']} -> {a['after']}" for a in check["attributes"])
        shown = (text if count == 1 else f"{text} ({count} modules)" for text, count in changed.items())
        yield f"configuration and attributes that were set: {', '.join(shown)}"


def refitted(found: Mapping[str, Any]) -> str:
    """One line: how many biases and gains were fitted once more, and what that did on held-back batches."""
    what = f"refitted: biases and gains at {found['refitted']} of {found['sites']} places ({found['parameters']:,} numbers)"
    if not found["kept"]:
        return f"{what}; the outputs are no nearer on held-back batches, so it was undone"
    return (
        f"{what}; relative squared error of the outputs on held-back batches {found['before']:.4f} -> {found['after']:.4f}"
    )


def tuned(found: Mapping[str, Any]) -> str:
    """One line: what was trained, for how long, and what that did on held-back batches."""
    named = "biases and gains" if found["what"] == "biases" else f"biases, gains and LoRA of rank {found['rank']}"
    what = f"{named} ({found['parameters']:,} numbers, {100 * found['share']:.2g} % of the parameters)"
    distance = {"kl": "KL to the dense outputs", "mse": "relative squared error of the outputs"}[found["loss"]]
    made = f"{found['steps']} steps in {found['seconds']:.0f} s"
    why = f"; ended early: {found['stopped']}" if found["stopped"] else ""
    if not found["kept"]:
        return f"tuned: {what}, {made}; no better on held-back batches, so it was undone{why}"
    return f"tuned: {what}, {made}; {distance} on held-back batches {found['before']:.4f} -> {found['after']:.4f}{why}"


def scheme_kept(kept: Mapping[str, Any]) -> str:
    """One line: the scheme of a model that came quantised, and how exactly the result is written in it."""
    if kept["refused"]:
        return f"scheme: the model came as {kept['came']}; the result stays in floats: {kept['refused']}"
    floats = len(kept["floats"])
    told = f"; {floats} {'node computes' if floats == 1 else 'nodes compute'} in floats now" if floats else ""
    told += f"; {anew}" if (anew := rounded_anew(kept["rounded"])) else ""
    came = "" if kept["came"] == kept["written"] else f"; it came as {kept['came']}"
    return (
        f"scheme kept: {kept['written']}{came}; {kept['unchanged']} of {kept['weights']} weights are the same to the byte, "
        f"{kept['kept']:,} of {kept['grids']:,} scales stayed; it equals the masked original, quantised, to "
        f"{kept['difference']:.1e} (quantising allows {kept['allowed']:.1e}){told}"
    )


def rounded_anew(anew: Mapping[str, Any]) -> str:
    """What rounding with error feedback gained; nothing where no weight was rounded so."""
    if not anew["kept"]:
        return ""
    less = 1.0 - anew["after"] / (anew["before"] or 1.0)
    return (
        f"{anew['kept']} of {anew['weights']} weights of the pruned model are rounded with error feedback, which loses "
        f"{100 * less:.0f} % less on held-back rows"
    )


def experts_left(experts: Mapping[str, Any]) -> str:
    """One line: how many experts are left, by what they were chosen, and how exact the cut is."""
    layers = Counter((layer["after"], layer["before"]) for layer in experts["layers"])
    counted = ", ".join(
        f"{after} of {before} in {f'each of {count} layers' if count > 1 else 'one layer'}"
        for (after, before), count in layers.items()
    )
    by = "their gates" if experts["gates"] else "what they add where they are chosen"
    unseen = sum(layer["unseen"] for layer in experts["layers"])
    told = f"; {unseen} were chosen for no calibration row" if unseen else ""
    return (
        f"experts: {counted} are left, by the {experts['score']} of {by}{told}; the cut model equals the one whose router "
        f"never chooses the others to {experts['exact_difference']:.1e}"
    )


def vocabulary_left(words: Mapping[str, Any]) -> str:
    """One line: which words are left, what others are read as, and how exact that is."""
    share = "" if words["share"] is None else f", {100 * words['share']:.2f} % of the {words['tokens']:,} tokens"
    named = f" ({words['named']})" if words["named"] else ""
    exact = words["exact_difference"]
    told = "" if exact is None else f"; for texts of those that are left the model gives what it gave, to {exact:.1e}"
    return (
        f"vocabulary: {words['kept']:,} of {words['words']:,} words are left{share} of {words['source']}; others are "
        f"read as id {words['unknown']}{named}{told}"
    )


def blocks_left_out(blocks: Mapping[str, Any]) -> str:
    """One line: which blocks went, what stands there, what that lost, and how exact it is."""
    first, last = blocks["first"] + 1, blocks["first"] + blocks["blocks"]
    which = f"block {first}" if first == last else f"blocks {first} to {last}"
    stands = {"map": "a linear map stands there", "fold": "the product before them was changed"}.get(blocks["repair"])
    plain = f"{blocks['error_none']:.4f}"
    lost = f"{plain}" if stands is None else f"{blocks['error']:.4f}, without repair {plain}"
    exact = blocks["exact_difference"]
    told = "" if exact is None else f"; equal to the original without them to {exact:.1e}"
    caches = f"; {len(blocks['caches'])} caches of theirs hold zeros" if blocks["caches"] else ""
    return (
        f"blocks: {which} of {blocks['of']} went; {stands or 'nothing stands there'}; relative squared error of the "
        f"output: {lost}{told}{caches}"
    )


def pattern_made(done: Mapping[str, Any]) -> Iterator[str]:
    """Two lines: which weights have zeros, by what, what that lost in each, and whether it is faster."""
    weights = done["weights"]
    lost = [weight["error"] for weight in weights]
    by = Counter(weight["by"] for weight in weights)
    which = "" if list(by) == [done["solver"]] else f" ({', '.join(f'{name} in {count}' for name, count in by.items())})"
    yield (
        f"pattern: {done['pattern']} in {len(weights)} weights by {done['solver']}{which}: {100 * done['zeros']:.1f} % of "
        f"them is zero; each lost {100 * sum(lost) / len(lost):.2f} % of its output (relative squared error), the worst "
        f"{100 * max(lost):.2f} %"
    )
    if done.get("speed"):
        yield f"pattern: {done['speed']}"


def patterns(report: Report) -> Table:
    """The weights that have a pattern."""
    table = make_table("weight", "shape", "zeros", "solver", "error", left={0, 3})
    for weight in report["patterned"]["weights"]:
        shape = " x ".join(map(str, weight["shape"]))
        table.add_row(
            weight["weight"], shape, percent(weight["zeros"], 1.0), weight["by"], f"{100 * weight['error']:.2f} %"
        )
    return table


def blocks_compared(found: Mapping[str, Any]) -> str:
    """One line: how many blocks were tried beside widths, what each number came to, and which was best."""
    by = "parameters" if found["decided_by"] == "parameters" else "relative squared error of the output"
    shown = []
    for one in found["tried"]:
        value = one["error"] if found["decided_by"] == "error" else one["parameters"]
        told = f"({one['why']})" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        shown.append(f"{one['blocks']}: {told}")
    return f"blocks in one budget with widths, {by} by how many went: {', '.join(shown)}; {found['chosen']} went"


def tries_compared(found: Mapping[str, Any]) -> str:
    """One line: which scores and draws of the samples were tried, what each came to, and which was best."""
    shown, tried = [], found["tried"]
    for one in tried:
        value = f"({one['why']})" if one["error"] is None else f"{one['error']:.4f}"
        shown.append(f"{one['score']}, draw {one['draw']}: {value}")
    best, first = tried[found["chosen"]], tried[0]
    gain = 100 * (1 - best["error"] / first["error"]) if first["error"] else 0.0
    taken = f"{best['score']}, draw {best['draw']} was taken ({gain:.1f} % less)" if found["chosen"] else "the first stays"
    return (
        f"chosen among {' and '.join(found['among'])}, relative squared error of the output on {found['judged']} samples "
        f"that no try has seen: {'; '.join(shown)}; {taken}"
    )


def target_met(report: Report) -> str:
    """One line: what was asked for, and what was measured in this run."""
    target = report["target"]
    kind, asked = target["kind"], target["asked"]
    if kind == "drop":
        gone = f"{100 * target['sparsity']:.0f} % of the prunable parameters removed"
        return f"{asked}: {100 * target['found']:.2f} % lost with {gone}"
    if kind == "latency":
        found = target["found"]
        if report.get("latency"):
            found = report["latency"]["pruned_seconds"] / report["latency"]["dense_seconds"] * target["dense"]
        return f"target {asked}: {target['dense'] / found:.2f} x as fast, asked {target['dense'] / target['wanted']:.2f} x"
    names = {"params": ("parameters", ""), "size": ("file_bytes", "B"), "flops": ("flops", "")}
    key, unit = names[kind]
    small = quantised_bytes(report) if kind == "size" else None
    found = small or report["after"].get(key) or target["found"]
    return f"target {asked}: {quantity(found, unit)}, asked {quantity(target['wanted'], unit)}"


def corners(report: Report) -> Table:
    """The four corners: dense and pruned, in float and quantised."""
    found = report["quantised"]
    scheme = found["scheme"] + (f", blocks of {found['block']}" if found["block"] else "")
    table = make_table(scheme, "bytes", "latency (1)", "cosine (3)", "relative RMS difference (3)")
    for corner in found["corners"]:
        name = f"{corner['name']}, {found['scheme'] if corner['quantised'] else 'float'}"
        seconds, cosine, rms = (corner[k] for k in ("seconds", "cosine", "relative_rms"))
        row = ["" if seconds is None else milliseconds(seconds)]
        row += ["" if value is None else f"{value:.4f}" for value in (cosine, rms)]
        table.add_row(name, quantity(corner["bytes"], "B"), *row)
    return table


def corner_notes(report: Report) -> Iterator[str]:
    """What the corners were measured on, and what has none."""
    found = report["quantised"]
    if found["output"] is not None:
        yield f"(3) '{found['output']}' beside the dense float model's: {found['rows']:,} rows that were held back"
    if anew := rounded_anew(found["rounded"]):
        yield anew
    if found["dense_refused"]:
        yield f"the quantiser refuses the dense model: {found['dense_refused']}"
    if found["refused"]:
        yield f"the quantiser refuses the pruned model, which stays in float: {found['refused']}"


def quantised_bytes(report: Report) -> int | None:
    """Returns the bytes of the quantised result, where there is one."""
    found = report.get("quantised") or {"corners": ()}
    return next((c["bytes"] for c in found["corners"] if c["quantised"] and c["name"] == "pruned"), None)


def runtime_fit(report: Report) -> str:
    """One line: what was asked for the sake of what runs the result, and whether it is faster where this run measured."""
    fit = report["fitted"]
    told = "; ".join(fit["asked"]) or "any width"
    line = f"for {fit['runtime']}: {told}" if fit["runtime"] else told
    if fit["speedup"] is None:
        return f"{line}; not timed here"
    times = f"{fit['speedup']:.2f} x as fast on {fit['device']} by measurement"
    if fit["faster"]:
        return f"{line}; {times}"
    better = fit["next"]
    if better is None:
        return f"{line}; not faster ({times}), and no narrower width was timed (--target latency= times them)"
    saves = f"{milliseconds(better['seconds'])} by the latency table"
    return f"{line}; not faster ({times}); the next that would be: {better['width']:,} in '{better['group']}', {saves}"


def groups_found(report: Report, explain: bool = False) -> Table:
    """The groups of an inspection, in execution order; with ``explain`` who reads them, where the name does not say it.

    Below the sum are the widths of values and of queries and keys, which hold weights of the heads, and experts, which hold
    widths: they are cut with ``--values``, ``--query-key`` and ``--experts`` alone.
    """
    explain = explain and any(g["consumers"] != [g["name"]] for g in report["groups"])
    columns = ["group", "kind", "count", "block width", "parameters", "share of all"]
    table = make_table(*columns, *(["read by"] if explain else []), left={0, 1, 6})
    everything = report["before"]["parameters"]
    rows = []
    for group in (*report["groups"], *report.get("values", ())):
        queries = group.get("queries_per_block", 1)
        width = f"{group['block_width']}" + (f" ({queries} queries)" if queries > 1 else "")
        row = [group["name"], group["kind"], f"{group['before']:,}", width]
        row += [f"{group['parameters']:,}", percent(group["parameters"], everything)]
        rows.append([*row, *(["\n".join(group["consumers"])] if explain else [])])
    count = len(report["groups"])
    for row in rows[:count]:
        table.add_row(*row)
    prunable = report["prunable_parameters"]
    table.add_section()
    table.add_row("all groups", "", "", "", f"{prunable:,}", percent(prunable, everything))
    if rows[count:]:
        table.add_section()
    for row in rows[count:]:
        table.add_row(*row)
    return table


def groups_pruned(report: Report) -> Table:
    """The groups of a run, or of a dry run: widths, and the error of each consumer without and with repair."""
    errors = any(g.get("repairs") for g in report["groups"])
    columns = [
        "group",
        "kind",
        "before",
        "after",
        "kept",
        *(["error: none", "error: bias", "error: repair", "ridge"] if errors else []),
    ]
    table = make_table(*columns, left={0, 1})
    for group in report["groups"]:
        after = f"{group['after']:,}" + (f" ({group['stand_in']})" if group.get("stand_in") else "")
        head = [group["name"], group["kind"], f"{group['before']:,}", after]
        head.append(percent(group["after"], group["before"]))
        table.add_row(*head, *_errors(next(iter(group.get("repairs", [])), None), errors))
        for repair in group.get("repairs", [])[1:]:
            table.add_row(f"  {repair['node']}", "", "", "", "", *_errors(repair, errors))
    return table


def _errors(repair: Mapping[str, Any] | None, shown: bool) -> list[str]:
    if not shown or repair is None:
        return []
    ridge = "" if repair["ridge"] is None else f"{repair['ridge']:.0e}" + (" raised" if repair["ridge_raised"] else "")
    return [f"{100 * repair[f'error_{k}']:.2f} %" for k in ("none", "bias", "repair")] + [ridge or repair["repair"]]


def refusals(report: Report, explain: bool = False) -> Table:
    """What does not qualify, and why; all nodes with ``explain``."""
    table = make_table("not pruned, because", "width", "read by", left={0, 2})
    for refusal in report["refusals"]:
        nodes = list(refusal["nodes"])
        shown = (
            nodes
            if explain or len(nodes) <= SHOWN_NODES
            else [*nodes[:SHOWN_NODES], f"and {len(nodes) - SHOWN_NODES} more"]
        )
        table.add_row(refusal["reason"], f"{refusal['size']:,}" if refusal["size"] else "", "\n".join(shown))
    return table


def refusals_counted(report: Report) -> str:
    """One line instead of the table."""
    count = len(report["refusals"])
    return f"{count} {'kind' if count == 1 else 'kinds'} of dimensions left alone; --explain says which and why"


def seconds(measured: Mapping[str, float]) -> Table:
    """Where the time went."""
    table = make_table("pass", "seconds", left={0})
    for name, value in measured.items():
        if name != "total":
            table.add_row(name, f"{value:.2f}")
    if "total" in measured:
        table.add_section()
        table.add_row("total", f"{measured['total']:.2f}")
    return table


def change(before: Mapping[str, float], after: Mapping[str, float], key: str) -> str:
    """Returns the relative change of one number, in percent."""
    return f"{100 * (after[key] - before[key]) / before[key]:+.1f} %" if before[key] else ""


def percent(part: float, whole: float) -> str:
    """Returns a share in percent."""
    return f"{100 * part / whole:.1f} %" if whole else ""


def quantity(value: float, unit: str = "") -> str:
    """Returns a number with a decimal prefix, three digits or more."""
    prefix = ""
    for larger in ("k", "M", "G", "T", "P"):
        if abs(value) < 1000:
            break
        value, prefix = value / 1000, larger
    return f"{value:.0f} {unit}".rstrip() if not prefix else f"{value:.1f} {prefix}{unit}"


def milliseconds(value: float) -> str:
    """Returns seconds as milliseconds."""
    return f"{1000 * value:.2f} ms"


class _Table(Table):
    """A table whose cells have nothing in them that a terminal would obey; their lines stay."""

    def add_row(self, *cells: Any, **settings: Any) -> None:
        """Adds a row of texts."""
        super().add_row(*(printable(c, keep="\n") if isinstance(c, str) else c for c in cells), **settings)


def make_table(*columns: str, left: Set[int] = frozenset({0})) -> Table:
    """Returns an empty table in the style of all; ``left`` are the columns that are aligned so."""
    table = _Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(map(printable, columns)):
        table.add_column(column, justify="left" if index in left else "right", overflow="fold", no_wrap=index not in left)
    return table
