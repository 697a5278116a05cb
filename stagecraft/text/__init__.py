"""Text and tokens: the tokenizer, and how a conversation becomes ids and a mask."""
