"""What the TPU's compiler says of a run, without a TPU: memory, collectives, roofline, hours."""
