"""Finding the first wrong number."""
