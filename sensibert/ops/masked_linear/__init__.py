"""The masked matmul: the public op, which path it takes, and the ops of its paths."""
