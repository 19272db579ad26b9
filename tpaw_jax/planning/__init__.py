"""Plan a run with the TPU's compiler but without a TPU: memory, collectives, predicted hours.

Read in this order: `workload` (what the rounds compute), `lowering` (the programs), `hlo` (bytes that a compiled
program moves), `roofline` (a compiled stage and its predicted time), `expected` (the same counted by hand), `planner`
(the report).
"""
