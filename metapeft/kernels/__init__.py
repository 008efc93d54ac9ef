"""What a CPU computes faster in one piece than as MLX's many small operations."""
