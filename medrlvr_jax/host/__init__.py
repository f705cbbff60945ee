"""What the machine gives: errors in words, files that a crash cannot break, several processes as one program."""
