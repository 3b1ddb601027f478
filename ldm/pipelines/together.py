"""Several requests for pictures in one batch: what waits in a queue costs less together.

The requests may differ in prompt, negative prompt and seed; they must agree in all that the network's calls depend on. Each
gets its own result, the pictures that it would get alone, up to rounding, and receipts that know nothing of the others.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm.checkpoint import Components
from ldm.diffusion.sampling import AfterStep, keep
from ldm.pipelines.draws import Draws
from ldm.pipelines.result import Result, finish
from ldm.pipelines.run import Batch, Run, check_plain, prepare

OWN = ("prompt", "negative_prompt", "seed", "num_images")  # what requests may differ in


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two requests for text to image, as of `txt2img`, can be made together."""
    first, second = ({name: value for name, value in fields.items() if name not in OWN} for fields in (one, other))
    return first == second


@torch.no_grad()
def txt2img_together(
    components: Components, requests: Sequence[Mapping[str, Any]], *, after_step: AfterStep = keep
) -> list[Result]:
    """A result for each of the requests, the fields of `txt2img`, in one batch. `after_step` sees the images of all, in order.

    Raises ValueError, one line, where a field is out of range, or where they are not `alike`.
    """
    check_plain(components)
    for request in requests[1:]:
        if not alike(requests[0], request):
            raise ValueError("requests that are made together differ in more than prompts and seeds; make them one by one")
    runs = [_prepared(components, request) for request in requests]
    if any(run.habits.one_generator for run in runs):
        raise ValueError(
            f"convention {runs[0].settings.convention} draws for all images of a run at once; make them one by one"
        )
    first = runs[0]
    if any(run.components.adapters != first.components.adapters for run in runs):
        raise ValueError("requests that are made together name different adapters; make them one by one")
    batches = [batch for run in runs for batch in run.batches()]
    seeds = [run.settings.seed + i for run in runs for i in range(len(run.prompts))]
    whole = Batch(
        slice(0, len(seeds)),
        torch.cat([batch.uncond for batch in batches]),
        torch.cat([batch.cond for batch in batches]),
        Draws(seeds, one_generator=False, one_posterior=first.habits.one_posterior),
    )
    x = first.sample(whole, first.grid.noise_scale * first.start(whole, None), first.grid, after_step)
    results = []
    for run, part in zip(runs, x.split([len(run.prompts) for run in runs]), strict=True):
        result = finish(run, [part], "txt2img", run.grid, None)
        receipts = [{**receipt, "batch": len(seeds)} for receipt in result.receipts]
        results.append(dataclasses.replace(result, receipts=receipts))
    return results


def _prepared(components: Components, request: Mapping[str, Any]) -> Run:
    fields = dict(request)
    prompt, size = fields.pop("prompt"), (fields.pop("width", None), fields.pop("height", None))
    return prepare(components, prompt, size, fields)
