"""What a run keeps on disk: files that are whole or absent, the journal, the ring of checkpoints."""
