"""Make the golden references again: `python -m tests.references.make`, from the repository's root, with the extra `reference`.

`golden.safetensors` holds what diffusers and transformers compute with the tiny model in float64, weights and inputs from
`tests/seeded.py`; `tokens.json` what transformers' and OpenAI's tokenizers make of texts that are known to go wrong.
`manifest.json` records the versions of all of them, and fingerprints of the weights, so that a change of the generator
cannot be mistaken for a change of the models. Every tensor carries the name of the input or the layer it comes from.
"""

import importlib.metadata
import json
import random
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from ldm.presets import preset
from tests import openai_tokenizer, peers, seeded
from tests.golden_inputs import SAFETY, TIMESTEPS, ids, images, latents, pixels, x
from weights_convert.tokenizer_files import clip_vocabulary, write_vocabulary

HERE = Path(__file__).parent
PACKAGES = ("torch", "numpy", "diffusers", "transformers", "tokenizers", "safetensors", "clip-anytorch", "ftfy", "regex")


def main() -> None:
    golden, fingerprints = activations()
    save_file({name: tensor.contiguous() for name, tensor in golden.items()}, HERE / "golden.safetensors")
    (HERE / "tokens.json").write_text(json.dumps(tokens(), ensure_ascii=True, indent=0) + "\n")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    manifest = json.loads((HERE / "manifest.json").read_text()) | {"versions": versions, "weights": fingerprints}
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


@torch.inference_mode()
def activations() -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The outputs of every network, and the outputs of each level of the UNet on the way."""
    model = preset("tiny")
    text, unet = peers.text_encoder(model.text_encoder), peers.exact_timesteps(peers.unet(model.unet))
    vae, safety = peers.autoencoder(model.autoencoder), peers.safety_checker(SAFETY)
    networks = {"text_encoder": text, "unet": unet, "autoencoder": vae, "safety": safety}
    for network in networks.values():
        seeded.fill(network).double()
    encoded = text(ids())
    context, golden = (
        encoded.last_hidden_state,
        {"text/hidden": encoded.last_hidden_state, "text/pooled": encoded.pooler_output},
    )
    for t in TIMESTEPS:
        golden[f"unet/eps/{t}"] = unet(x(), torch.tensor(float(t)), context[:2]).sample
    golden |= levels(unet, context)
    posterior = vae.encode(images()).latent_dist
    golden |= {"autoencoder/mean": posterior.mean, "autoencoder/log_variance": posterior.logvar}
    golden["autoencoder/decoded"] = vae.decode(latents()).sample
    golden["image/embedding"] = safety.visual_projection(safety.vision_model(pixels())[1])
    fingerprints = {name: float(sum(p.double().sum() for p in n.state_dict().values())) for name, n in networks.items()}
    return golden, fingerprints


def levels(unet, context: torch.Tensor) -> dict[str, torch.Tensor]:
    """What leaves each down level, the middle and each up level at the first of the timesteps."""
    seen, hooks = {}, []
    for name, blocks in (("down", unet.down_blocks), ("middle", [unet.mid_block]), ("up", unet.up_blocks)):
        for i, block in enumerate(blocks):

            def keep(module, arguments, output, key=f"unet/{name}/{i}"):
                seen[key] = output[0] if isinstance(output, tuple) else output

            hooks.append(block.register_forward_hook(keep))
    unet(x(), torch.tensor(float(TIMESTEPS[0])), context[:2])
    for hook in hooks:
        hook.remove()
    return seen


def tokens() -> list[dict]:
    """Texts with their ids, uncut, by either tokenizer."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder), clip_vocabulary())
        hf = CLIPTokenizer.from_pretrained(folder)
    openai = openai_tokenizer.load()
    draw = random.Random(0)
    texts = [*openai_tokenizer.PIECES, "a photograph of an astronaut riding a horse", "naïve café — “don’t”, it’s 3½ o'clock"]
    texts += ["".join(draw.choices(openai_tokenizer.PIECES, k=draw.randint(2, 12))) for _ in range(300)]
    return [{"text": t, "hf": hf(t, add_special_tokens=False).input_ids, "openai": openai.encode(t)} for t in texts]


if __name__ == "__main__":
    main()
