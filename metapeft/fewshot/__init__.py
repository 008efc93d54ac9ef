"""Learning from a few examples: `adapt(task, shots, …)`, its strategies, and what it chooses between them by."""
