"""The forward process: how noise was added in training, which every sampler undoes."""
