"""`ldm diff A B`: where trace B first parts from trace A, which part is to blame, and what that looks like."""

import argparse
import json
import math
from dataclasses import asdict
from typing import Any

from ldm.cli import options

STATUS = 3  # where they differ
NAMES = 6  # of what only one side has
CALLS = 12  # lines of the table of calls


def add(commands: Any) -> None:
    text = "where a trace first parts from another"
    about = (
        f"{text.capitalize()}, by tensor and call; with --model also what each part of B adds and what it inherits, and what "
        f"well-known cause explains it. Exit status {STATUS} where they differ by more than rounding."
    )
    command = commands.add_parser("diff", help=text, allow_abbrev=False, description=about)
    command.add_argument("a", metavar="A", help="the trace that is right")
    command.add_argument("b", metavar="B", help="the trace that is to be judged")
    command.add_argument(
        "--tolerance", type=float, metavar="R", help="relative difference of tensors (default 1e-4 in float32)"
    )
    command.add_argument(
        "--tolerance-added", type=float, metavar="R", help="of what a part adds (default 3e-6 in float32; needs --model)"
    )
    command.add_argument("--table", action="store_true", help="every tensor, not only the verdict")
    command.add_argument("--json", action="store_true", help="all of it as one JSON object")
    command.add_argument("--plot", metavar="FILE", help="a PNG of differences in the order of execution (extra plot)")
    options.add_model(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    from ldm.numerics import plot
    from ldm.numerics.diagnosis import diagnose
    from ldm.numerics.traces import Trace

    for name in ("tolerance", "tolerance_added"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} {value}; expected a number from 0")
    if args.plot is not None:
        plot.check(args.plot)
    a, b = Trace(args.a), Trace(args.b)
    components = options.load(args) if args.model is not None else None
    found = diagnose(a, b, components, tolerance=args.tolerance, tolerance_added=args.tolerance_added)
    if not found.comparison.rows:
        raise ValueError(f"{args.a} and {args.b} have no tensor of the same name; see docs/traces.md for the names")
    if args.plot is not None:
        plot.plot(found, args.plot)
    if args.json:
        print(json.dumps(_plain(found)))
    else:
        print("\n".join(_verdict(a, b, found, components is not None)))
        if args.table:
            print("\n".join(_table(found)))
    return 0 if found.guilty is None and found.comparison.first is None else STATUS


def _verdict(a: Any, b: Any, found: Any, forced: bool) -> list[str]:
    """One screen."""
    rows, first, guilty = found.comparison.rows, found.comparison.first, found.guilty
    lines = [f"{len(rows)} tensors, {min(a.calls, b.calls)} calls of the network"]
    for side, names in (("A", found.comparison.only_a), ("B", found.comparison.only_b)):
        if names:
            more = f", and {len(names) - NAMES} more" if len(names) > NAMES else ""
            lines.append(f"only in {side}: {', '.join(names[:NAMES])}{more}")
    if a.calls != b.calls:
        lines.append(f"A has {a.calls} calls of the network, B {b.calls}")
    lines += ["", *_calls(rows)]
    if first is None:
        largest = max(rows, key=lambda row: row.relative)
        lines += ["", f"the same, but for rounding; the largest difference is {_sized(largest)}"]
    else:
        lines += ["", f"first past tolerance: {_sized(first)}"]
    if guilty is not None and forced:
        inherited = next((row for row in rows if row.key == guilty.key), None)
        lines.append(f"wrong by itself: {_sized(guilty)}")
        if guilty.key in found.added and inherited is not None:
            lines.append(f"  that is what it makes of B's own inputs; as a whole it is {inherited.relative:.1e} from A")
    elif forced and first is not None:
        lines.append("no part of the model adds more than rounding to what it is given, nor does the sampler: it builds up")
    lines += [f"  {'perhaps: ' if i else 'known: '}{known}" for i, known in enumerate(found.known[:4])]
    if first is not None and not forced:
        lines.append("  with --model, a model of the same weights tells what each part adds, and tries out well-known causes")
    return lines


def _calls(rows: list[Any]) -> list[str]:
    """How the difference grows from call to call."""
    shown: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.key.name in ("unet.x", "unet.conv_out", "sampler.x") and row.key.call is not None:
            shown.setdefault(row.key.call, {})[row.key.name] = row.relative
    if not shown:
        return []
    calls = sorted(shown)
    kept = calls if len(calls) <= CALLS else [*calls[: CALLS - 1], calls[-1]]
    lines = [f"{'call':>6}{'input x':>12}{'output':>12}{'x after':>12}"]
    for call in kept:
        if call == kept[-1] and len(kept) < len(calls):
            lines.append("   ...")
        of = shown[call]
        cells = (f"{of[name]:.1e}" if name in of else "" for name in ("unet.x", "unet.conv_out", "sampler.x"))
        lines.append(f"{call:>6}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def _sized(row: Any) -> str:
    if row.arranged is None:
        return f"{row.key}: another shape, where A has {list(row.shape)}"
    turned = f"; B has it as {row.arranged}" if row.arranged else ""
    measures = f"relative {row.relative:.1e} (tolerance {row.tolerance:.0e}), largest {row.largest:.2e}"
    return f"{row.key}: {measures}, cosine {row.cosine:.7f}, {row.ulp:.3g} ulp{turned}"


def _table(found: Any) -> list[str]:
    width = max(len(str(row.key)) for row in found.comparison.rows) + 2
    head = f"{'tensor':<{width}}{'largest':>10}{'relative':>10}{'cosine':>12}{'ulp':>10}{'added':>10}"
    lines = ["", head]
    for row in found.comparison.rows:
        own = found.added.get(row.key)
        added = f"{own.relative:.1e}" if own else ""
        mark = " *" if row.past or (own is not None and own.past) else ""
        cells = f"{row.largest:>10.1e}{row.relative:>10.1e}{row.cosine:>12.7f}{row.ulp:>10.3g}{added:>10}{mark}"
        lines.append(f"{row.key!s:<{width}}{cells}")
    return lines


def _plain(found: Any) -> dict[str, Any]:
    def plain(row: Any) -> dict[str, Any] | None:
        return None if row is None else {k: _finite(v) for k, v in asdict(row).items()} | {"past": row.past}

    return {
        "first": plain(found.comparison.first),
        "guilty": plain(found.guilty),
        "known": found.known,
        "only_a": found.comparison.only_a,
        "only_b": found.comparison.only_b,
        "rows": [plain(row) for row in found.comparison.rows],
        "added": [plain(row) for row in found.added.values()],
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
