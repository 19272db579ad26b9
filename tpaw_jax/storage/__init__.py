"""What a run keeps on disk.

Read in this order: `files` (atomic writes, locks, corrupted files), `journal` (which stages are finished, with the
checksums of their files), `ring` (the checkpoints of policies and of the training state), `recovery` (what happens to
corrupted files).
"""
