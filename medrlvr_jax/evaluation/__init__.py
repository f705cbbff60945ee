"""Evaluation of a policy: answers to whole sets, their statistics, comparisons, alarms during training."""
