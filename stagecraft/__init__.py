"""Train a language model through all its stages, and measure what each one changed."""

__version__ = "0.1.0"
