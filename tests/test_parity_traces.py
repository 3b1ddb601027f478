"""Traces of diffusers' pipeline beside ours: the same names, nothing wrong in a clean pair, and a fault in theirs found."""

import pytest
import torch

import ldm
from ldm.numerics.diagnosis import diagnose
from ldm.numerics.runs import trace_diffusers, trace_txt2img
from ldm.numerics.traces import Trace
from tests.test_parity_pipelines import load_pipeline, use

pytestmark = pytest.mark.reference
PROMPT, SIZE = "a red cube on top of a blue sphere", {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def model(tiny_diffusers):
    return ldm.load(tiny_diffusers)


@pytest.fixture(scope="module")
def right(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "ours"
    trace_txt2img(model, PROMPT, path, steps=3, seed=1, negative_prompt="dull", convention="diffusers", safety="off", **SIZE)
    return Trace(path)


def traced(folder, path, change=lambda pipeline: None):
    pipeline = use(load_pipeline("StableDiffusionPipeline", folder), "pndm")
    change(pipeline)
    generator = torch.Generator().manual_seed(1)
    trace_diffusers(pipeline, PROMPT, path, num_inference_steps=3, negative_prompt="dull", generator=generator, **SIZE)
    return Trace(path)


def test_a_pipeline_of_diffusers_is_traced_under_our_names_and_nothing_in_it_is_wrong(model, right, tiny_diffusers, tmp_path):
    theirs = traced(tiny_diffusers, tmp_path / "theirs")
    found = diagnose(right, theirs, model)
    assert found.guilty is None and found.comparison.first is None and len(found.comparison.rows) > 1500
    # Ours joins what they do one after another: a block of residual and attention, text and picture as a whole.
    assert all(name.count(".") <= 2 or name.startswith("sampler.") for name in found.comparison.only_a)
    whole, added = (max(row.relative for row in rows) for rows in (found.comparison.rows, found.added.values()))
    print(f"{len(found.comparison.rows)} tensors: whole {whole:.1e}, added {added:.1e}")
    assert added < 3e-6
    worst = max(found.added.values(), key=lambda row: row.relative)
    assert worst.key.name == "unet.time_embedding.linear_1"  # their float32 sinusoids


def eps(pipeline):
    pipeline.unet.down_blocks[0].resnets[1].norm2.eps = 1e-3


def gelu(pipeline):
    pipeline.text_encoder.encoder.layers[1].mlp.activation_fn = torch.nn.GELU()


def transposed(pipeline):
    weight = pipeline.vae.decoder.mid_block.attentions[0].to_q.weight
    weight.data.copy_(weight.data.t().clone())


@pytest.mark.parametrize(
    ("change", "guilty", "known"),
    [
        (eps, "unet.down.1.residual.norm2", "GroupNorm's eps is 0.001"),
        (gelu, "text_encoder.layers.1.mlp.fc2", "the activation is exact gelu"),
        (transposed, "autoencoder.decoder.middle.attention.query", "the weight is transposed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_in_theirs_is_found_and_known(model, right, tiny_diffusers, tmp_path, change, guilty, known):
    found = diagnose(right, traced(tiny_diffusers, tmp_path / "theirs", change), model)
    assert found.guilty.key.name == guilty and known in found.known[0]
