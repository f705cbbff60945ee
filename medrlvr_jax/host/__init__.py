"""Errors with a remedy, files that survive a crash, and several processes that run as one program."""
