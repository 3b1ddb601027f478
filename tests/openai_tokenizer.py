"""OpenAI's own tokenizer, where its code is installed, and the texts on which tokenizers are known to differ."""

import importlib.util
from pathlib import Path

# Pieces on which cleaning, splitting or merging go wrong.
PIECES = [
    *("the", "A", " ", "  ", "\t", "\n", "\x85", "\u00a0", "\u2028", "\u200b", "\ufeff", "\x00", "\x1b"),
    *("'s", "'S", "’s", "“x”", "ſ", "'ſ", "'ll", "'LL", "don't", "K", "Å", "İ", "ß", "Σ", "ΣΑΣ", "ﬁ", "Ａ", "１", "½", "²"),
    *("<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "<|", "|>", "&amp;", "&amp;lt;", "&#39;", "&eacute", "schÃ¶n"),
    *("é", "e\u0301", "日本", "한국", "ไทย", "עברית", "😀", "👨‍👩‍👧", "🇩🇪", "@#$", "...", "--", "123", "3.14", "ﷺ", "ǆ"),
]


def load():
    """An instance of OpenAI's SimpleTokenizer, or None where `clip-anytorch` is not installed.

    Its file is loaded alone: the package around it wants torchvision.
    """
    package = importlib.util.find_spec("clip")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / "simple_tokenizer.py"
    spec = importlib.util.spec_from_file_location("clip_simple_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()
