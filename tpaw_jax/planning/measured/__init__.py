"""What a run takes on the devices at hand, with random weights.

Read in this order: `bench` (measured stages), `readings` (their table, and the comparison of two), `tune` (the search
for faster settings).
"""
