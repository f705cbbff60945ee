"""What a policy can do: answers over whole sets, what they show by statistics, and what goes wrong
meanwhile.
"""
