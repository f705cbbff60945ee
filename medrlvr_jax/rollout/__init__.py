"""How responses are drawn: the decoder one token at a time, and the loop around it."""
