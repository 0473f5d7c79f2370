"""The algorithm: one idea a file, pure functions on stacks of matrices."""
