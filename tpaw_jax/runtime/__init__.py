"""The machine a run uses: host, processes, devices.

Read in this order: `host` (huge pages, prefetching in a thread), `preemption` (signals), `processes` (a pod's processes
as one run), `tpu` (chips, topologies, compiler options), `sharding` (the mesh and how arrays are split over it). The
command line imports `host` before JAX, because a process must restart to get huge pages.
"""
