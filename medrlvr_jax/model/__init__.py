"""What is computed of tokens: the decoder, its attention, log-probs and values, adapters; Hugging Face
weights in and out.
"""
