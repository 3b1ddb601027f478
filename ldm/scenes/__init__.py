"""The bundled model's world: `world` (what a scene is, drawn by index), `captions` (what is said of it, and what is true),
`render` (its picture) and `judge` (what a picture shows).
"""
