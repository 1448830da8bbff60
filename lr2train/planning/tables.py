"""A cost estimate as tables on a terminal; ``plan.json`` holds the same figures unrounded."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 110  # columns, where the output is no terminal or a narrower one: a figure that is cut is worse than a wrap

_REMEDIES = 4  # that are shown


def console() -> Console:
    """Where tables are printed: stdout."""
    return Console(width=max(_WIDTH, Console().width) if sys.stdout.isatty() else _WIDTH, highlight=False)


def show(result: dict[str, Any]) -> None:
    """Print the result of ``plan`` to stdout."""
    out = console()
    out.print(_facts("model and mesh", _model(result["model"]) + _mesh(result["parallel"])))
    out.print(_memory(result["memory"]))
    out.print(_verdict(result["memory"]))
    out.print(_windows(result["cost"]))
    out.print(_facts("training", _training(result["work"], result["cost"])))
    if result["search"]:
        out.print(_facts("search", _search(result["search"])))
    out.print("[bold]assumptions[/bold]")
    for line in result["assumptions"]:
        out.print(f"  - {line}", markup=False)


def amount(value: float) -> str:
    """A count with k, M, B or T: 8030261248 -> 8.03B."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.2f}{letter}"
    return f"{value:g}"


def flops(value: float) -> str:
    """FLOPs with a prefix: 6.6e15 -> 6.60 PFLOP."""
    for limit, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.2f} {prefix}FLOP"
    return f"{value:.0f} FLOP"


def hours(value: float) -> str:
    """A duration given in hours; below one hour in minutes or seconds."""
    return f"{value:,.1f} h" if value >= 1 else f"{value * 60:.1f} min" if value * 60 >= 1 else f"{value * 3600:.2g} s"


def money(value: float) -> str:
    """US dollars."""
    return f"{value:,.0f} USD" if value >= 10 else f"{value:.2g} USD"


def _facts(title: str, facts: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, value in facts:
        table.add_row(name, value)
    return table


def _model(model: dict[str, Any]) -> list[tuple[str, str]]:
    head = amount(model["head_parameters"]) if model["head_parameters"] else "tied"
    return [
        (
            "parameters",
            f"{amount(model['parameters'])} ({model['parameters']:,}): embedding "
            f"{amount(model['embedding_parameters'])}, head "
            f"{head}, {model['layers']} layers of {amount(model['layer_parameters'])}",
        ),
        ("window", f"{model['original_window_tokens']:,} -> {model['target_window_tokens']:,} tokens"),
    ]


def _mesh(mesh: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            "mesh",
            f"{mesh['gpus']} GPUs on {mesh['nodes']} node{'s' * (mesh['nodes'] > 1)} = dp {mesh['dp']} x sp "
            f"{mesh['sp']}, "
            f"accumulation {mesh['accumulation']}, ZeRO-{mesh['zero_stage']}",
        ),
        ("segment", f"{mesh['segment_tokens']:,} tokens, {mesh['tokens_per_gpu']:,} on each GPU"),
        *((f"attention, {part['window']}", _sent(part)) for part in mesh["attention"]),
    ]


def _sent(part: dict[str, Any]) -> str:
    sent = (
        f"a GPU sends {part['sent_gib']:.2f} GiB a segment, without recomputation"
        if part["sent_gib"]
        else "sends nothing"
    )
    return f"{part['strategy']}: {sent}"


def _memory(memory: dict[str, Any]) -> Table:
    table = Table(title="memory of one GPU in training", title_justify="left", title_style="bold", show_footer=True)
    table.add_column("item", footer="total on the GPU")
    table.add_column("GiB", justify="right", footer=f"{memory['total_gib']:.2f}")
    table.add_column("formula", style="dim", footer=f"of {memory['gpu_gib']:g}; {memory['reserve_gib']:.1f} stay free")
    for item in memory["items"]:
        table.add_row(
            item["name"] + ("" if item["on_gpu"] else " (host memory)"), f"{item['gib']:.2f}", item["formula"]
        )
    return table


def _verdict(memory: dict[str, Any]) -> str:
    host = (
        f" Host memory for what is offloaded: {memory['host_gib_per_node']:.1f} GiB a node."
        if memory["host_gib_per_node"]
        else ""
    )
    disk = f" A checkpoint takes {memory['checkpoint_gib']:.2f} GiB of disk, and {memory['checkpoints_kept']} are kept."
    host += f" {memory['recompute']}."
    if memory["fits"]:
        return (
            f"[bold green]fits[/bold green], {memory['gpu_gib'] - memory['reserve_gib'] - memory['total_gib']:.1f} "
            "GiB to "
            f"spare.{host}{disk}\n"
        )
    limit = memory["gpu_gib"] - memory["reserve_gib"]
    short = f"[bold red]does not fit[/bold red] by {memory['total_gib'] - limit:.1f} GiB"
    return f"{short}: {_remedies(memory, limit)}.{host}{disk}\n"


def _remedies(memory: dict[str, Any], limit: float) -> str:
    fitting, closest = memory["remedies"], memory["closest"]
    if fitting:
        more = f"; {len(fitting) - _REMEDIES} more in plan.json" if len(fitting) > _REMEDIES else ""
        return "; ".join(_fitting(one, limit) for one in fitting[:_REMEDIES]) + more
    if not closest:
        return "no setting is known to lower it"
    return f"no tried setting is enough, and {closest['settings']} misses by {closest['total_gib'] - limit:.1f} GiB"


def _fitting(one: dict[str, Any], limit: float) -> str:
    host = f", with {one['host_gib_per_node']:.0f} GiB of host memory a node" if one["host_gib_per_node"] else ""
    return f"{one['settings']} fits ({one['total_gib']:.1f} of {limit:.1f} GiB{host})"


def _windows(cost: dict[str, Any]) -> Table:
    table = Table(title="training FLOPs (forward and backward)", title_justify="left", title_style="bold")
    for name in (
        "window",
        "longest span",
        "share of segments",
        "FLOPs a token",
        "attention",
        "recomputed",
        "tokens/s/GPU",
    ):
        table.add_column(name, justify="left" if name == "window" else "right")
    for part in cost["parts"]:
        again = part["recomputed_flops_per_token"] / part["flops_per_token"]
        figures = (
            f"{part['span_tokens']:,}",
            f"{part['share']:.1%}",
            flops(part["flops_per_token"]),
            f"{part['attention_share']:.0%}",
            f"{again:.0%}",
            f"{part['tokens_per_s_per_gpu']:,.0f}",
        )
        table.add_row(part["window"], *figures)
    return table


def _training(work: dict[str, Any], cost: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        (
            "one step",
            f"{work['segments_per_step']} segments = {amount(work['tokens_per_step'])} tokens, "
            f"{hours(cost['step_s'] / 3600)}",
        ),
        (
            "speed",
            f"{cost['tokens_per_s_per_gpu']:,.0f} tokens/s/GPU; recomputation adds {cost['recompute_share']:.0%}, "
            "which is not "
            "counted as useful",
        ),
    ]
    if cost["original_share"]:
        facts.append(("distillation", f"the original model's pass adds {cost['original_share']:.1%}, counted below"))
    if cost["held_out_share"]:
        facts.append(("held-out loss", f"adds {cost['held_out_share']:.1%} of the time, which is not counted below"))
    if work["steps"] is None:
        return [
            *facts,
            (
                "steps",
                "unknown: set optim.steps, data.short_tokens and data.long_tokens, or data.path to a prepared corpus",
            ),
        ]
    return [
        (
            "steps",
            f"{work['steps']:,} (from {work['origin']}) = {work['segments']:,} segments = {amount(work['tokens'])} "
            "tokens, "
            f"{work['short_share']:.0%} short",
        ),
        *facts,
        (
            "time",
            f"[bold]{hours(cost['hours'])}[/bold] = {hours(cost['gpu_hours'])} of one GPU, "
            f"{flops(cost['total_flops'])}",
        ),
        ("price", f"[bold]{money(cost['price_usd'])}[/bold]"),
    ]


def _search(search: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("one document", f"{flops(search['flops_per_document'])}, {search['gpu_gib']:.1f} GiB on one GPU"),
        ("document-forwards", f"{search['document_forwards']:,} at most, {hours(search['busy_gpu_hours'])} of one GPU"),
        ("time", f"[bold]{_on(search)}[/bold]; {search['busy_share']:.0%} of the GPUs' time is used"),
    ]
    if search["one_node"]["gpus"] < search["gpus"]:
        facts.append(("on one node", _on(search["one_node"])))
    if not search["fits"]:
        remedy = f": set {search['remedy']}" if search["remedy"] else ""
        facts.append(("memory", f"[bold red]does not fit one GPU[/bold red]{remedy}"))
    return facts


def _on(cost: dict[str, Any]) -> str:
    gpus = f"{cost['gpus']} GPU{'s' * (cost['gpus'] > 1)}"
    return f"{hours(cost['hours'])} on {gpus}, {money(cost['price_usd'])}: {cost['depth']:,} forwards in sequence"
