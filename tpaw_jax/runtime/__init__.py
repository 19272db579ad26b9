"""The machine: processes of a pod, mesh and sharding tables, preemption, host threads, TPU generations."""
