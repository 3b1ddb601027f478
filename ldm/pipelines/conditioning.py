"""What prompts are to a run: their syntax read, the model with the adapters they ask for, and their contexts.

`read` refuses what is wrong before anything is computed; `Conditioning.contexts` encodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ldm.adapters import lookup, lora, textual_inversion
from ldm.checkpoint import Components
from ldm.pipelines.settings import Settings
from ldm.text import encoding
from ldm.text.encoding import Contexts
from ldm.text.prompt import Prompt, PromptError, take_loras
from ldm.text.tokenizer import Tokenizer
from weights_convert.embedding import read_embedding


@dataclass(frozen=True)
class Conditioning:
    """`components` has the adapters; `prompts` begins with the negative prompt."""

    components: Components
    settings: Settings
    prompts: list[Prompt]

    def contexts(self) -> Contexts:
        """The contexts of all prompts, the negative one's first, and what did not fit."""
        return encoding.encode(
            self.prompts,
            self.components.tokenizer,
            self.components.text_encoder,
            syntax=self.settings.prompt_syntax,
            long_prompt=self.settings.long_prompt,
            clip_skip=self.settings.clip_skip,
        )

    def cut_off(self) -> tuple[str, ...]:
        """Of each prompt the text that does not fit, the negative one's first."""
        return tuple(encoding.cut_off(prompt, self.components.tokenizer, self.settings.long_prompt) for prompt in self.prompts)


def read(components: Components, prompts: Sequence[str], settings: Settings) -> Conditioning:
    """Read the prompts, the negative prompt, and the files of the adapters. Raises ValueError, one line, which names the prompt
    and the position, or the file."""
    layers = components.text_encoder.config.layers
    if settings.clip_skip > layers:
        raise ValueError(f"clip_skip {settings.clip_skip}; the text encoder has {layers} layers, so expected 1 to {layers}")
    negative = _parsed("negative prompt", settings.negative_prompt, settings.prompt_syntax)
    parsed = [_parsed("prompt", prompt, settings.prompt_syntax) for prompt in prompts]
    if negative.loras:
        raise ValueError(
            f"the negative prompt names LoRA {negative.loras[0][0]!r}; it would change both; name it in the prompt"
        )
    for prompt, text in zip(parsed, prompts, strict=True):
        if prompt.loras != parsed[0].loras:
            raise ValueError(
                f"prompts {_shown(prompts[0])} and {_shown(text)} name other LoRAs; make them in calls of their own"
            )
    adapted = _adapted(components, (*settings.loras, *parsed[0].loras), settings)
    for text, prompt in zip((settings.negative_prompt, *prompts), (negative, *parsed), strict=True):
        _check_placeholders(text, prompt, adapted.tokenizer, settings.prompt_syntax)
    return Conditioning(adapted, settings, [negative, *parsed])


def _adapted(components: Components, loras: Sequence[tuple[str, float]], settings: Settings) -> Components:
    """The model with its adapters."""
    if settings.embeddings:
        files = [(lookup.find(name, settings.adapter_folder, "embedding"), word) for name, word in settings.embeddings]
        components = textual_inversion.attach(components, [(read_embedding(file), word) for file, word in files])
    if loras:
        files = [(lookup.find(name, settings.adapter_folder, "LoRA"), coefficient) for name, coefficient in loras]
        components = lora.attach(components, [(lora.read(file, components), coefficient) for file, coefficient in files])
    return components


def _parsed(what: str, text: str, syntax: str) -> Prompt:
    try:
        prompt = encoding.parse(text, syntax)
    except PromptError as error:
        raise ValueError(f"{what} {_shown(text)}, {error}") from None
    if prompt.swaps:
        raise ValueError(f"{what} {_shown(text)} has a .swap, which the pipelines cannot make; write the words that are wanted")
    return prompt


def _check_placeholders(text: str, prompt: Prompt, tokenizer: Tokenizer, syntax: str) -> None:
    """Refuse a placeholder that stands in the text, but which the syntax took apart: `toy+` is more of "toy" to compel."""
    words = take_loras(text)[0].lower()
    read = "\n".join(fragment.text for passage in prompt.passages for fragment in passage.original).lower()
    for placeholder in tokenizer.placeholders:
        if not placeholder.isalnum() and words.count(placeholder) > read.count(placeholder):
            what = f"embedding {placeholder!r}, which the {syntax} syntax reads as something else than a word"
            raise ValueError(f"prompt {_shown(text)} has {what}; give it another name, as in word=file.pt")


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."
