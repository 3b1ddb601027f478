"""From a prompt to pictures: `text_to_image`, `image_to_image` and `inpaint`, functions over loaded components.

Each reads as the algorithm does. What they share is beside them: `settings` (every field, its default and range), `habits`
(where implementations differ), `draws` (which random numbers, in which order), `sources` (what a run starts from),
`autoencoding` (in tiles if need be), `run` (prompt, grid and guided model, made ready) and `result` (pictures and receipts).
"""
