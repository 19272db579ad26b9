"""The machine a run uses: host, processes, devices.

Read in this order: `host` (huge pages, prefetching in a thread), `preemption` (signals), `processes` (a pod's processes
as one run), `tpu` (chips, topologies, compiler options), `sharding` (the mesh and how arrays are split over it). Only
`host` is re-exported: the others import JAX, and the command line must restart with huge pages before that.
"""

from tpaw_jax.runtime.host import Prefetch as Prefetch
from tpaw_jax.runtime.host import restart_with_huge_pages as restart_with_huge_pages
