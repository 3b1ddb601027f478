"""The approximations of `ldm.fast`: what they compute, that they start anew with each picture, and that receipts name them."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import ldm
from ldm import images
from ldm.checkpoint import REQUIRED
from ldm.fast.accelerate import accelerate
from ldm.fast.deep_cache import CachedUNet
from ldm.fast.plan import Plan
from ldm.fast.token_merging import MOST, Merging, multiplied, scattered
from ldm.fast.unet import FastUNet
from tests import seeded
from tests.measure import relative_error

PROMPT = "a red cube on top of a blue sphere"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tiny():
    model = ldm.build("tiny", seed=0, dtype=torch.float64)
    for kind in REQUIRED:
        seeded.fill(getattr(model, kind))
    return model


def given(seed=0, b=2, size=(16, 16)):
    return seeded.tensor("x", b, 4, *size, seed=seed).double(), seeded.tensor("context", 2, 77, 32, seed=seed).double()


@pytest.mark.parametrize("depth", range(1, 7))
@pytest.mark.parametrize("b", [1, 2])
def test_a_cached_call_about_the_same_latents_is_the_whole_call(tiny, depth, b):
    """What is not computed anew is then what it was: every other tensor must have found its way."""
    fast = FastUNet(tiny.unet, Plan(dtype=torch.float64))
    assert depth <= len(fast.up)
    cached, (x, context) = CachedUNet(fast, every=2, depth=depth), given(b=b)
    contexts = cached.project_context(context)
    truth = fast.denoise(x, fast.embed_time(500.0), contexts)
    for _ in range(3):
        assert relative_error(cached.denoise(x, cached.embed_time(500.0), contexts), truth) < 1e-12


def test_the_deep_part_is_computed_at_every_third_call_of_a_run(tiny):
    fast = FastUNet(tiny.unet, Plan(dtype=torch.float64))
    cached, (x, context), whole = CachedUNet(fast, every=3), given(), []
    fast.attention.register_forward_hook(lambda *_: whole.append(True))
    contexts, computed = cached.project_context(context), []
    for call, t in enumerate((900.0, 800.0, 700.0, 600.0, 500.0)):
        found, before = cached.denoise(x / (call + 1), cached.embed_time(t), contexts), len(whole)
        computed.append(before > sum(computed))
        apart = relative_error(found, fast.denoise(x / (call + 1), fast.embed_time(t), contexts))
        assert apart < 1e-12 if call % 3 == 0 else 1e-6 < apart < 1
        whole.pop()
    assert computed == [True, False, False, True, False]


def test_another_prompt_or_another_size_is_another_run(tiny):
    fast = FastUNet(tiny.unet, Plan(dtype=torch.float64))
    cached = CachedUNet(fast, every=100)
    for seed, size in ((0, (16, 16)), (1, (16, 16)), (1, (16, 24)), (0, (16, 16))):
        x, context = given(seed, size=size)
        assert relative_error(cached(x, 500.0, context), fast(x, 500.0, context)) < 1e-12
    x, context = given()
    contexts = cached.project_context(context)
    for size in ((8, 8), (16, 16)):  # under one list of contexts
        part = x[..., : size[0], : size[1]].contiguous()
        found = cached.denoise(part, cached.embed_time(1.0), contexts)
        assert relative_error(found, fast.denoise(part, fast.embed_time(1.0), contexts)) < 1e-12


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 1), (2, 2)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, MOST])
def test_tokens_are_merged_as_the_paper_says(height, width, share):
    """Against the definition, token by token."""
    n, c = height * width, 5
    tokens = seeded.tensor("tokens", 2, n, c).double()
    merging, x = Merging(tokens, height, share), seeded.tensor("x", 2, n, c, seed=1).double()
    merged = merging.merge(x)
    back = merging.unmerge(merged)
    destinations = [i for i in range(n) if i // width % 2 == 0 and i % width % 2 == 0]
    others = [i for i in range(n) if i not in destinations]
    count = min(int(share * n), len(others))
    assert merged.shape == (2, n - count, c) and back.shape == x.shape
    for b in range(2):
        alike = {i: [F.cosine_similarity(tokens[b, i], tokens[b, j], dim=0) for j in destinations] for i in others}
        chosen = sorted(others, key=lambda i: -max(alike[i]))[:count]
        into = {i: destinations[max(range(len(destinations)), key=alike[i].__getitem__)] for i in chosen}
        for j in destinations:
            mean = torch.stack([x[b, j], *(x[b, i] for i in chosen if into[i] == j)]).mean(0)
            for i in (j, *(i for i in chosen if into[i] == j)):
                torch.testing.assert_close(back[b, i], mean)
        for i in set(others) - set(chosen):
            assert torch.equal(back[b, i], x[b, i])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (5, 1), (2, 2), (3, 8), (8, 3), (6, 6), (7, 9)])
def test_what_merges_into_what_is_known_without_asking_a_device(height, width):
    """Nothing has a shape that depends on numbers, which a GPU would have to tell, and a CUDA graph cannot."""
    n = height * width
    others = torch.ones(height, width, dtype=torch.bool)
    others[::2, ::2] = False
    alike = torch.tensor([1.0, 0.0]).expand(2, n, 2)  # so that their order is that of the map
    merging = Merging(alike, height, 0.0)
    assert torch.equal(merging.destinations, torch.arange(n).view(height, width)[~others])
    assert torch.equal(merging.kept, torch.arange(n).view(height, width)[others].expand(2, -1))
    with FakeTensorMode():
        tokens = torch.empty(2, n, 5)
        merging = Merging(tokens, height, 0.5)
        assert merging.unmerge(merging.merge(tokens)).shape == tokens.shape


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-14), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_means_by_a_product_are_means(dtype, error):
    """Of rows whose sum float16 would not hold, too."""
    own, merged = (1000 + seeded.tensor(name, 2, rows, 7).to(dtype) for name, rows in (("own", 6), ("merged", 300)))
    into = torch.arange(300).remainder(4).where(torch.arange(300) > 250, 0).repeat(2, 1)  # nothing goes into the last two
    found = multiplied(own, merged, into)
    assert found.dtype == dtype and relative_error(found, scattered(own.double(), merged.double(), into)) < error
    assert torch.equal(found[:, 4:], own[:, 4:])


def test_merging_is_of_the_largest_maps_and_of_nothing_where_it_is_none(tiny):
    x, context = given()
    fast, none, half = (FastUNet(tiny.unet, Plan(dtype=torch.float64, merge_tokens=share)) for share in (0.0, 1e-9, 0.5))
    truth = fast(x, 500.0, context)
    assert relative_error(none(x, 500.0, context), truth) < 1e-12
    assert 1e-6 < relative_error(half(x, 500.0, context), truth) < 1
    shares = [block.attention.merge_tokens for block in (*half.down, *half.up) if block.attention is not None]
    assert shares[0] == shares[-1] == 0.5 and half.attention.merge_tokens == 0 and 0 in shares


def test_pictures_are_near_the_exact_ones_the_same_again_and_their_receipts_say_so():
    model = ldm.load()
    exact = accelerate(model)
    fast = accelerate(model, cache_steps=2, merge_tokens=0.25)
    fields = {"steps": 20, "seed": 3}
    truth = ldm.txt2img(exact, PROMPT, **fields)
    first = ldm.txt2img(fast, PROMPT, **fields)
    ldm.txt2img(fast, "a green cone left of a purple cylinder", steps=3)
    again = ldm.txt2img(fast, PROMPT, **fields)
    assert torch.equal(first.latents, again.latents) and ldm.replay(fast, first.receipts[0]).same
    told = first.receipts[0]["acceleration"]
    assert (told["cache_steps"], told["merge_tokens"]) == (2, 0.25) and "cache_steps" not in truth.receipts[0]["acceleration"]
    other = ldm.txt2img(exact, PROMPT, steps=20, seed=4)
    assert 0 < (first.latents - truth.latents).norm() < 0.3 * (other.latents - truth.latents).norm()
    assert images.difference(first.images[0], truth.images[0])[0] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_steps": 0}, "cache_steps 0; expected a whole number from 1"),
        ({"cache_steps": 2.0}, r"cache_steps 2\.0; expected a whole number"),
        ({"merge_tokens": 0.8}, r"merge_tokens 0\.8; expected a share from 0, which is exact, to 0\.75"),
        ({"merge_tokens": "half"}, "merge_tokens 'half'; expected a share"),
        ({"compile": True}, "compile is for a GPU, and the model is on cpu"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        accelerate(ldm.build("tiny", seed=0), **options)


@pytest.mark.slow
def test_compiled_the_network_is_the_same(tiny, monkeypatch):
    """As on a GPU: weights unpacked, no kernels of ours."""
    from ldm.fast import packing

    monkeypatch.setattr(packing, "possible", lambda *_: False)
    fast = FastUNet(tiny.unet, Plan(dtype=torch.float64, winograd="none", kernels=False))
    x, context = given()
    contexts, truth = fast.project_context(context), fast(x, 500.0, context)
    compiled = torch.compile(fast.denoise, dynamic=False, fullgraph=True)
    assert relative_error(compiled(x, fast.embed_time(500.0), contexts), truth) < 1e-12
