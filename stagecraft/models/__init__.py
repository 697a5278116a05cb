"""The decoder, its heads and its sampler."""
