"""What a training step with PRe will cost: FLOPs, time, memory, communication. Nothing is run."""
