"""What prompts are to a run: their syntax read, the model ready for what they ask for, and their contexts.

`read` refuses what is wrong before anything is computed; `Conditioning.contexts` encodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ldm.checkpoint import Components
from ldm.pipelines.settings import Settings
from ldm.text import encoding
from ldm.text.encoding import Contexts
from ldm.text.prompt import Prompt, PromptError


@dataclass(frozen=True)
class Conditioning:
    """`prompts` begins with the negative prompt."""

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
    """Read the prompts and the negative prompt. Raises ValueError, one line, naming the prompt and the position."""
    layers = components.text_encoder.config.layers
    if settings.clip_skip > layers:
        raise ValueError(f"clip_skip {settings.clip_skip}; the text encoder has {layers} layers, so expected 1 to {layers}")
    negative = _parsed("negative prompt", settings.negative_prompt, settings.prompt_syntax)
    parsed = [_parsed("prompt", prompt, settings.prompt_syntax) for prompt in prompts]
    return Conditioning(components, settings, [negative, *parsed])


def _parsed(what: str, text: str, syntax: str) -> Prompt:
    try:
        prompt = encoding.parse(text, syntax)
    except PromptError as error:
        raise ValueError(f"{what} {_shown(text)}, {error}") from None
    if prompt.swaps:
        raise ValueError(f"{what} {_shown(text)} has a .swap, which the pipelines cannot make; write the words that are wanted")
    return prompt


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."
