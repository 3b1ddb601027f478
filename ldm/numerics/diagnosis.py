"""The verdict on two traces: where they first part, who is to blame for it, and what it looks like.

`diagnose(a, b)` takes a for right. With a model, which must have the weights of both, it also tells the error that each part
of b adds from the one that it inherits (`forced.py`), and tries out the well-known causes (`causes.py`).
"""

from dataclasses import dataclass, field

from ldm.checkpoint import Components
from ldm.numerics.causes import causes
from ldm.numerics.compare import Comparison, Difference, compare
from ldm.numerics.forced import forced, stages
from ldm.numerics.terms import recognised
from ldm.numerics.traces import Key, Trace

KINDS = ("text_encoder", "unet", "autoencoder")


@dataclass(frozen=True)
class Diagnosis:
    """comparison: of the whole traces. added: by tensor, what each part adds, where a model was given; it ends with the stage
    that has the guilty part. guilty: the first tensor that is wrong by itself; None if there is none. known: what it looks
    like, in words, the surest first."""

    comparison: Comparison
    added: dict[Key, Difference] = field(default_factory=dict)
    guilty: Difference | None = None
    known: list[str] = field(default_factory=list)


def diagnose(
    a: Trace,
    b: Trace,
    components: Components | None = None,
    *,
    tolerance: float | None = None,
    tolerance_added: float | None = None,
) -> Diagnosis:
    """Compare b with a. tolerance, tolerance_added: relative, of whole tensors and of what parts add; else by their types."""
    comparison = compare(a, b, tolerance)
    if components is None:
        guilty = comparison.first
        return Diagnosis(comparison, {}, guilty, recognised(a, b, guilty.key) if guilty else [])
    places = {key: place for place, key in enumerate(a.keys)}
    added: dict[Key, Difference] = {}
    part: Difference | None = None
    for stage in stages(b):
        rows = forced(components, b, stage, tolerance_added)
        added |= {row.key: row for row in rows}
        part = next((row for row in rows if row.past), None)
        if part is not None:
            break
    # What no part computes: inputs, the sampler's terms, the picture.
    computed = {f"{kind}.{path}" if path else kind for kind in KINDS for path, _ in getattr(components, kind).named_modules()}
    term = next((row for row in comparison.rows if row.past and row.key.name not in computed), None)
    end = len(places)
    if term is not None and (part is None or places.get(term.key, end) < places.get(part.key, end)):
        return Diagnosis(comparison, added, term, recognised(a, b, term.key))
    if part is None:
        return Diagnosis(comparison, added)
    known = [str(cause) for cause in causes(components, b, part)]
    return Diagnosis(comparison, added, part, known + recognised(a, b, part.key))
