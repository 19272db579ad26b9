"""What a run will take: planned with the TPU's compiler but without a TPU, or measured on the devices at hand.

Read in this order: `workload` (what the rounds compute), `lowering` (the programs), `hlo` (bytes that a compiled
program moves), `roofline` (a compiled stage and its predicted time), `expected` (the same counted by hand), `planner`
(the report), `layouts` (the mesh and the row length for a batch); then `measured`.
"""
