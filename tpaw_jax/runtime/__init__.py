"""The machine a run uses: host, processes, devices.

Read in this order: `host` (huge pages, prefetching in a thread), `preemption` (signals), `processes` (a pod's processes
as one run), `heartbeat` and `supervisor` (a host that fails ends the run on all), `tpu` (chips, topologies, compiler
options), `sharding` (the mesh and how arrays are split over it). The command line imports `host` and `supervisor`
before JAX: a process must restart to get huge pages, and a supervisor must outlive JAX.
"""
