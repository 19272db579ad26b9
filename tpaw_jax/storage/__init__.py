"""What a run keeps on disk.

Read in this order: `files` (atomic writes, corrupted files), `bucket` (the same on Cloud Storage), `array_files` (.npz
files, and arrays too large for memory), `block_log` (files of arrays that grow), `exchange` (arrays that processes send
each other), `owner` (one process at a time uses a directory), `journal` (which stages are finished, with the checksums
of their files), `ring` (the checkpoints of policies and of the training state), `recovery` (what happens to corrupted
files).
"""
