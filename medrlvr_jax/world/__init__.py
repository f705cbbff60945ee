"""The embedded world: its table of knowledge, questions, text, tokenizer and base model."""
