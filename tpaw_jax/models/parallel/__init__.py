"""A model on several devices. All of this runs inside `shard_map`, on one device's shards.

1. `collectives`: parameters are gathered where they are used, and their gradients are reduced.
2. `layer_scan`: the loop over layers, whose backward pass reduces gradients while it computes.
3. `context`: devices that share rows.
4. `exchange`: devices that hold different experts.
"""

from tpaw_jax.models.parallel.collectives import UNSHARDED as UNSHARDED
from tpaw_jax.models.parallel.collectives import Parallel as Parallel
from tpaw_jax.models.parallel.collectives import all_reduce_over_data as all_reduce_over_data
from tpaw_jax.models.parallel.layer_scan import scan_layers as scan_layers
