"""The four networks, each in a file that can be read from top to bottom: `clip`, `autoencoder`, `unet`, `safety`."""
