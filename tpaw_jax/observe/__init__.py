"""What a run reports while it plays.

Read in this order: `metrics` (metrics.jsonl and TensorBoard), `tables` (progress bars, the table of rounds),
`profiling` (seconds per stage, traces, compile times), `health` (warnings of divergence).
"""
