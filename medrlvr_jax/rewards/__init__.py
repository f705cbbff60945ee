"""What a completion is worth: the rule, or a user's own function; and which of the paper's six stages it shows."""
