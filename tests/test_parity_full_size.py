"""Parity at full size: Stable Diffusion v1 with seeded random weights, written by diffusers, run by both implementations.

An hour, 16 GB of memory, 25 GB of disk: `pytest -m slow -s -n0 tests/test_parity_full_size.py`. Prints every error.

In float64 both must agree to 1e-10. In float32 ours must be no farther from that float64 truth than 1.1 times the peer is.
Peers get float64 sinusoids for the truth only (see `test_parity.py`). One component in one precision is held at a time.
"""

import gc

import pytest
import torch

import ldm
import weights_convert
from ldm.adapters import lora
from ldm.checkpoint import load, load_module
from ldm.models.clip import pool
from ldm.models.safety import SafetyConfig
from ldm.pipelines.autoencoding import decode
from ldm.pipelines.text_to_image import txt2img
from ldm.presets import preset
from tests import lora_files, seeded
from tests.measure import relative_error

pytestmark = [pytest.mark.slow, pytest.mark.reference]

PRECISE, SINGLE = torch.float64, torch.float32
TOLERANCE = 1e-10
ALLOWED = 1.1  # times the peer's own float32 error
TIMESTEPS = (0, 1, 500, 981, 999)
SIZES = ((8, 8), (64, 64), (64, 96))
# Every timestep alone, and every timestep in a batch of three that mixes them.
UNET_CASES = [(size, t) for size in SIZES for t in (*((t,) for t in TIMESTEPS), (0, 500, 999), (981, 1, 500))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vocabulary_folder):
    """The whole model in float32, safety checker included: 5.5 GB."""
    from tests import peers

    path = tmp_path_factory.mktemp("full") / "sd-v1"
    return peers.write_folder(path, preset("sd-v1"), vocabulary_folder, safety=SafetyConfig())


def ours(folder, kind, dtype):
    return load_module(weights_convert.read(folder).components[kind], dtype=dtype)


def compare(build_peer, build_ours, cases: dict) -> None:
    """Run every case, a function of (module, dtype), through both implementations in both precisions, and hold the bounds."""
    from collections import defaultdict

    results = defaultdict(dict)
    for side, build in (("peer", build_peer), ("ours", build_ours)):
        for dtype in (PRECISE, SINGLE):
            module = build(dtype)
            for name, case in cases.items():
                results[name][side, dtype] = case(module, dtype)
            del module
            gc.collect()
    print(f"\n{'case':<40}{'float64':>10}{'ours f32':>11}{'peer f32':>11}{'ratio':>7}")
    failures = []
    for name, result in results.items():
        truth = result["peer", PRECISE]
        agreement = relative_error(result["ours", PRECISE], truth)
        mine, theirs = relative_error(result["ours", SINGLE], truth), relative_error(result["peer", SINGLE], truth)
        print(f"{name:<40}{agreement:>10.1e}{mine:>11.2e}{theirs:>11.2e}{mine / theirs:>7.2f}", flush=True)
        if agreement > TOLERANCE or mine > ALLOWED * theirs:
            failures.append(name)
    assert not failures


def test_text_hidden_states_and_pooled_output(folder):
    from transformers import CLIPTextModel

    tokenizer = load(folder).tokenizer
    ids = tokenizer(["a red cube on top of a blue sphere", "", "word " * 90]).ids

    def hidden(module, dtype):
        return getattr(module(ids), "last_hidden_state", None) if hasattr(module, "dtype") else module(ids)

    def pooled(module, dtype):
        return module(ids).pooler_output if hasattr(module, "dtype") else pool(module(ids), ids, tokenizer.end)

    compare(
        lambda dtype: CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype),
        lambda dtype: ours(folder, "text_encoder", dtype),
        {"text hidden states": hidden, "text pooled": pooled},
    )


def test_image_embedding(folder):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    pixels = seeded.tensor("pixels", 3, 3, 224, 224)

    def embedding(module, dtype):
        if hasattr(module, "image_encoder"):
            return module.image_encoder(pixels.to(dtype))
        return module.visual_projection(module.vision_model(pixels.to(dtype))[1])

    compare(
        lambda dtype: StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker", dtype=dtype),
        lambda dtype: ours(folder, "safety", dtype),
        {"image embedding": embedding},
    )


def test_unet_eps(folder):
    from diffusers import UNet2DConditionModel

    from tests import peers

    def build_peer(dtype):
        module = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
        return peers.exact_timesteps(module) if dtype == PRECISE else module

    def case(size, t):
        x = seeded.tensor(f"x {size}", len(t), 4, *size)
        context = seeded.tensor("context", len(t), 77, 768)

        def eps(module, dtype):
            out = module(x.to(dtype), torch.tensor(t), context.to(dtype))
            return getattr(out, "sample", out)

        return eps

    cases = {f"unet eps {size[0]} x {size[1]}, t = {t}": case(size, t) for size, t in UNET_CASES}
    compare(build_peer, lambda dtype: ours(folder, "unet", dtype), cases)


def test_autoencoder_moments_and_decode(folder):
    from diffusers import AutoencoderKL

    def moments(size):
        images = seeded.tensor(f"images {size}", 1, 3, 8 * size[0], 8 * size[1])

        def case(module, dtype):
            posterior = module.encode(images.to(dtype))
            posterior = getattr(posterior, "latent_dist", posterior)
            return torch.cat([posterior.mean, getattr(posterior, "logvar", getattr(posterior, "log_variance", None))])

        return case

    def decoded(size):
        latents = seeded.tensor(f"latents {size}", 1, 4, *size)

        def case(module, dtype):
            out = module.decode(latents.to(dtype))
            return getattr(out, "sample", out)

        return case

    cases = {f"autoencoder moments {s[0]} x {s[1]}": moments(s) for s in SIZES}
    cases |= {f"autoencoder decode {s[0]} x {s[1]}": decoded(s) for s in SIZES}
    compare(
        lambda dtype: AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype),
        lambda dtype: ours(folder, "autoencoder", dtype),
        cases,
    )


# -- LoRA

COEFFICIENTS = (0.0, 0.5, 1.0)
LORA_TOLERANCE = 1e-5  # of eps and of text states, both sides in float32


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """A file of kohya's, rank 4 and alpha 3, for every projection of every attention of the UNet and the text encoder."""
    from tests import peers

    config = preset("sd-v1")
    with torch.device("meta"):
        modules = {"unet": peers.unet(config.unet), "text_encoder": peers.text_encoder(config.text_encoder)}
    ends = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    layers = {}
    for kind, module in modules.items():
        prefix = "" if kind == "unet" else "text_model."
        for name, layer in module.named_modules():
            if name.endswith(ends):
                layers[prefix + name.removeprefix("text_model.")] = (kind, "", tuple(layer.weight.shape))
    assert len(layers) == 16 * 2 * 4 + 12 * 4
    return lora_files.kohya(tmp_path_factory.mktemp("lora") / "style.safetensors", layers)


def test_a_lora_changes_text_states_and_eps_as_it_changes_diffusers(folder, style):
    """At coefficients 0, 0.5 and 1; in float64, where peers have float64 sinusoids, and in float32, where they have not."""
    from diffusers import StableDiffusionPipeline

    from tests import peers

    x, context = seeded.tensor("x", 2, 4, 32, 32), seeded.tensor("context", 2, 77, 768)
    t, tokenizer = torch.tensor((500, 981)), load(folder).tokenizer
    ids = tokenizer(["a red cube on top of a blue sphere", ""]).ids
    outputs = {}
    for dtype in (PRECISE, SINGLE):
        peer = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None)
        if dtype == PRECISE:
            peers.exact_timesteps(peer.unet)
        peer.load_lora_weights(style, adapter_name="style")
        for coefficient in COEFFICIENTS:
            peer.set_adapters(["style"], [coefficient])
            states = peer.text_encoder(ids).last_hidden_state
            outputs["peer", dtype, coefficient] = states, peer.unet(x.to(dtype), t, context.to(dtype)).sample
        del peer
        gc.collect()
        model = load(folder, dtype=dtype)
        used = lora.read(style, model)
        assert not used.left and len(used.layers) == 176
        for coefficient in COEFFICIENTS:
            for change in (lora.attach, lora.merge):
                made = change(model, [(used, coefficient)])
                states, eps = made.text_encoder(ids), made.unet(x.to(dtype), t, context.to(dtype))
                outputs[change.__name__, dtype, coefficient] = states, eps
                del made
                gc.collect()
        del model
        gc.collect()
    print(f"\n{'LoRA, coefficient':<24}{'':<14}{'float64':>10}{'float32':>10}{'the LoRA does':>15}")
    for coefficient in COEFFICIENTS:
        for i, what in enumerate(("text states", "eps")):
            for way in ("attach", "merge"):
                precise, single = (
                    relative_error(outputs[way, dtype, coefficient][i], outputs["peer", dtype, coefficient][i])
                    for dtype in (PRECISE, SINGLE)
                )
                does = relative_error(outputs[way, PRECISE, coefficient][i], outputs["peer", PRECISE, 0.0][i])
                print(f"{way + ' ' + str(coefficient):<24}{what:<14}{precise:>10.1e}{single:>10.1e}{does:>15.1e}", flush=True)
                assert precise < TOLERANCE and single < LORA_TOLERANCE and (does > 1e-3) == (coefficient > 0)


# -- Part by part


def test_no_part_of_the_peers_adds_more_than_rounding(tmp_path):
    """A trace of diffusers' modules, 7 GB, and each of our parts on the numbers in it. The sinusoids are theirs alone."""
    import shutil

    from ldm.numerics import peers
    from ldm.numerics.forced import added
    from ldm.numerics.traces import Trace, TraceWriter
    from ldm.numerics.tracing import Tracer

    model = ldm.build("sd-v1", seed=0)
    theirs = peers.builder(lambda dtype: model)(SINGLE)
    x, ids = seeded.tensor("x", 2, 4, 64, 64), model.tokenizer(["", "a red cube on top of a blue sphere"]).ids
    with TraceWriter(tmp_path / "theirs") as writer, Tracer(writer, theirs):
        context = theirs["text_encoder"](ids).last_hidden_state
        theirs["unet"](x, torch.tensor(981), context)
        theirs["autoencoder"].decode(x[:1])
    rows = sorted(added(model, Trace(tmp_path / "theirs")), key=lambda row: -row.relative)
    shutil.rmtree(tmp_path / "theirs")
    print(f"\n{len(rows)} parts; the most added: " + ", ".join(f"{row.key.name} {row.relative:.1e}" for row in rows[:3]))
    assert len(rows) > 700 and not any(row.past for row in rows)
    assert rows[0].key.name == "unet.time_embedding.linear_1" and rows[1].relative < 1e-6


# -- From text to pixels

PIXEL_TOLERANCE = 1e-4  # of the picture before it is rounded, both sides in float32


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import StableDiffusionPipeline

    made = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    yield made
    del made
    gc.collect()


@pytest.fixture(scope="module")
def components(folder):
    return load(folder)


@pytest.mark.parametrize("steps", [3, 25])
@pytest.mark.parametrize("sampler", ["pndm", "ddim", "euler"])
def test_the_picture_of_a_prompt_is_diffusers(pipeline, components, sampler, steps):
    """512 x 512, guidance 7.5, a negative prompt; the convention is diffusers', the seed the same."""
    from tests.test_parity_pipelines import use

    prompt, shared = "a red cube on top of a blue sphere", {"negative_prompt": "blurry, dark", "guidance_scale": 7.5}
    generator = torch.Generator().manual_seed(1234)
    use(pipeline, sampler)
    latents = pipeline(prompt, num_inference_steps=steps, generator=generator, output_type="latent", **shared).images
    expected = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    result = txt2img(components, prompt, steps=steps, seed=1234, sampler=sampler, convention="diffusers", **shared)
    found = decode(components.autoencoder, result.latents)
    error, apart = relative_error(found, expected), relative_error(result.latents, latents)
    print(f"\n{sampler}, {steps} steps: latents {apart:.1e}, pixels {error:.1e}", flush=True)
    assert found.shape == (1, 3, 512, 512) and error < PIXEL_TOLERANCE


# -- The same weights through CompVis's single file


@pytest.fixture(scope="module")
def single_file(folder, tmp_path_factory):
    """EMA-only: one set of UNet weights, under the plain names."""
    path = tmp_path_factory.mktemp("compvis") / "sd-v1.ckpt"
    weights_convert.write(weights_convert.read(folder), path, "compvis")
    return path


def assert_same_weights(found, folder, change=lambda tensor: tensor, kinds=("text_encoder", "unet", "autoencoder")):
    truth = weights_convert.read(folder)
    for kind in kinds:
        for name, tensor in found.components[kind].tensors.items():
            assert torch.equal(tensor, change(truth.components[kind].tensors[name])), f"{kind} {name}"


def test_an_ema_only_file_holds_the_same_weights_and_gives_the_same_eps(folder, single_file):
    assert_same_weights(weights_convert.read(single_file), folder)
    x, context = seeded.tensor("x", 1, 4, 8, 8), seeded.tensor("context", 1, 77, 768)
    expected = ours(folder, "unet", SINGLE)(x, 981, context)
    assert torch.equal(load(single_file).unet(x, 981, context), expected)


def test_a_half_precision_file_holds_the_same_weights_rounded(folder, tmp_path):
    weights_convert.write(weights_convert.read(folder), tmp_path / "half.safetensors", "compvis", "float16")
    assert_same_weights(weights_convert.read(tmp_path / "half.safetensors"), folder, torch.Tensor.half)


def test_a_full_file_gives_its_ema_or_its_raw_weights(folder, single_file, tmp_path):
    """The averages hold the folder's weights, the raw ones twice as much, so that they cannot be mistaken."""
    prefix = "model.diffusion_model."
    state = torch.load(single_file, mmap=True, weights_only=True)["state_dict"]
    averages = {
        "model_ema.diffusion_model" + name.removeprefix(prefix).replace(".", ""): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    raw = {name: 2 * tensor if name.startswith(prefix) else tensor for name, tensor in state.items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000, dtype=torch.int32)}
    torch.save({"state_dict": {**raw, **averages, **counters}, "global_step": 470000}, tmp_path / "full.ckpt")
    del raw
    assert_same_weights(weights_convert.read(tmp_path / "full.ckpt", weights="ema"), folder)
    assert_same_weights(weights_convert.read(tmp_path / "full.ckpt", weights="raw"), folder, lambda t: 2 * t, ("unet",))
