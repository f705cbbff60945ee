"""What is asked: questions from files and the hub, the order of their options, prompts, and their tokens."""
