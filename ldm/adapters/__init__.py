"""Small files that change a model: LoRA and textual inversion."""
