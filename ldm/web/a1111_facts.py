"""What AUTOMATIC1111's clients ask about before they ask for pictures: samplers, the model, options; and what there is not."""

import json
from typing import Any

from fastapi import APIRouter

from ldm.checkpoint import Components
from ldm.diffusion.conventions import SPACINGS
from ldm.samplers import all_samplers
from ldm.web import form
from ldm.web.images_api import invalid
from ldm.web.jobs import Jobs


def options(components: Components) -> dict[str, Any]:
    """The settings that there are, all of them fixed."""
    return {"sd_model_checkpoint": components.name, "samples_format": "png", "CLIP_stop_at_last_layers": 1}


def check_options(asked: dict[str, Any], components: Components) -> None:
    """Settings may be named with the value that they have. Raises FieldError."""
    fixed = options(components)
    for name, value in asked.items():
        if name not in fixed:
            raise form.FieldError(name, f"{name[:60]} cannot be set here; leave it out")
        if value != fixed[name]:
            raise form.FieldError(name, f"{name} cannot be set here; expected {json.dumps(fixed[name])}, or to leave it out")


def add(routes: APIRouter, jobs: Jobs, limits: form.Limits) -> None:
    @routes.get("/samplers")
    def samplers() -> list[dict[str, Any]]:
        return [
            {"name": module.SPELLINGS[0], "aliases": [name, *module.SPELLINGS[1:]], "options": {}}
            for name, module in all_samplers().items()
        ]

    @routes.get("/schedulers")
    def schedulers() -> list[dict[str, Any]]:
        names = ["automatic", *SPACINGS]
        common = {"aliases": None, "default_rho": -1, "need_inner_model": False}
        return [{"name": name, "label": name.capitalize(), **common} for name in names]

    @routes.get("/sd-models")
    def models() -> list[dict[str, Any]]:
        name, fingerprint = jobs.components.name, jobs.components.fingerprint
        about = {"model_name": name, "hash": fingerprint, "sha256": None, "filename": "", "config": None}
        return [{"title": name, **about}]

    @routes.get("/options")
    def get_options() -> dict[str, Any]:
        return options(jobs.components)

    @routes.post("/options")
    def set_options(asked: dict[str, Any]) -> None:
        """There is one model, and nothing else to set."""
        try:
            check_options(asked, jobs.components)
        except form.FieldError as error:
            raise invalid(error.field, str(error)) from None

    @routes.get("/loras")
    def loras() -> list[dict[str, Any]]:
        return [{"name": name, "alias": name, "path": "", "metadata": {}} for name in form.adapters(limits)]

    @routes.get("/embeddings")
    def embeddings() -> dict[str, Any]:
        return {"loaded": {}, "skipped": {}}

    @routes.get("/scripts")
    def scripts() -> dict[str, list]:
        return {"txt2img": [], "img2img": []}

    @routes.get("/cmd-flags")
    def flags() -> dict[str, Any]:
        return {}

    def nothing_here() -> list[dict[str, Any]]:
        """There is none of these here."""
        return []

    nothing = (
        "sd-vae",
        "upscalers",
        "latent-upscale-modes",
        "hypernetworks",
        "face-restorers",
        "realesrgan-models",
        "prompt-styles",
    )
    for name in nothing:
        routes.add_api_route(f"/{name}", nothing_here, methods=["GET"], name=name)

    @routes.post("/refresh-checkpoints")
    def refresh() -> None:
        """There is one model; nothing to look for."""
