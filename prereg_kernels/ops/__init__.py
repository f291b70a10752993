"""The loss on tensors alone: the public functions, their definition, the algorithm, backends."""
