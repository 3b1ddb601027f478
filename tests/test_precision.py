"""The precision report: errors from a float64 truth, by part, in every type, beside the peers'."""

import functools

import pytest
import torch

import ldm
from ldm.numerics.precision import KINDS, Inputs, Variant, report, tf32, variants


@pytest.fixture(scope="module")
def load():
    def build(dtype):
        model = ldm.build("tiny", seed=0)
        for kind in KINDS:
            getattr(model, kind).to(dtype)
        return model

    return functools.cache(build)


def inputs(components):
    return Inputs.of(components, "a red cube", 500.0, 64, 0)


CHOSEN = [Variant("float64", torch.float64), Variant("float32", torch.float32), Variant("bfloat16", torch.bfloat16)]


def test_errors_are_those_of_each_type(load):
    found = {(one.variant, one.kind): one for one in report(load, inputs, chosen=CHOSEN[1:])}
    assert len(found) == 6
    for kind in ("text_encoder", "unet", "autoencoder"):
        single, half = found["float32", kind], found["bfloat16", kind]
        assert 1e-8 < single.median < 5e-7 < 1e-3 < half.median < 1e-2
        assert single.median <= single.worst.relative < 2e-6 and half.last > 1000 * single.last
        assert [row.key for row in single.added] == [row.key for row in half.added] and len(single.whole) == len(single.added)
    unet = found["float32", "unet"]
    model = load(torch.float32)
    given = inputs(load(torch.float64))
    context = load(torch.float64).text_encoder(given.ids)
    with torch.no_grad():
        truth = load(torch.float64).unet(given.x, 500.0, context)
        eps = model.unet(given.x.float(), 500.0, context.float())
    assert unet.last == pytest.approx(float((eps.double() - truth).abs().max() / truth.abs().max()), rel=0.5)


def test_a_part_that_computes_in_less_is_the_worst(load):
    def around():
        part = load(torch.float32).unet.middle.residual_1.conv1
        hook = part.register_forward_hook(lambda module, args, out: out.bfloat16().float())

        class Removed:
            __enter__ = lambda self: None  # noqa: E731
            __exit__ = lambda self, *_: hook.remove()  # noqa: E731

        return Removed()

    found = [one for one in report(load, inputs, chosen=[Variant("x", torch.float32, around)]) if one.kind == "unet"]
    assert found[0].worst.key.name == "unet.middle.residual_1.conv1" and found[0].worst.relative > 1e-4
    assert sorted(row.relative for row in found[0].added)[-2] < 1e-6


def test_float32_is_not_tf32_unless_a_variant_says_so(load):
    """On a GPU torch rounds convolutions' factors to TF32 unless it is told not to."""
    may = lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)  # noqa: E731
    seen, before = [], may()
    hook = load(torch.float32).unet.register_forward_hook(lambda *_: seen.append(may()))
    chosen = [Variant("float32", torch.float32), Variant("float32, TF32", torch.float32, functools.partial(tf32, True))]
    torch.backends.cudnn.allow_tf32 = True
    try:
        for _ in report(load, inputs, chosen=chosen):
            assert may() == (before[0], True)
    finally:
        torch.backends.cudnn.allow_tf32 = before[1]
        hook.remove()
    assert seen == 2 * [(False, False)] + 2 * [(True, True)]


def test_every_kernel_of_attention_and_every_type_is_a_variant():
    names = [variant.name for variant in variants(torch.device("cpu"))]
    assert {"float32", "bfloat16", "float16", "float32, attention math", "bfloat16, attention flash"} <= set(names)
    assert [name.split(",")[0] for name in names] == sorted((name.split(",")[0] for name in names), key=names.index)


@pytest.mark.reference
def test_the_peers_modules_of_the_same_weights_stand_beside_ours(load):
    from ldm.numerics import peers

    found = {(one.variant, one.kind): one for one in report(load, inputs, peers=peers.builder(load), chosen=CHOSEN[1:2])}
    for kind in ("text_encoder", "unet", "autoencoder"):
        ours, theirs = found["float32", kind], found["float32, diffusers", kind]
        assert theirs.last < 5e-6 and theirs.worst.relative < 1e-5
        assert {row.key for row in theirs.added} >= {row.key for row in ours.added if row.key.name.count(".") > 4}
    assert found["float32, diffusers", "unet"].worst.key.name == "unet.time_embedding.linear_1"
