"""The masked matmul: the public op, the choice of a path, and the ops of the paths."""
