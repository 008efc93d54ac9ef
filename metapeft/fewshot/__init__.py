"""Learning from a few examples: `adapt(task, shots, …)`, its strategies, and what it chooses between them by."""

STRATEGIES = (  # all that `metapeft.fewshot.strategies` can make; which are open depends on the library and the shots
    "context",
    "tuned context",
    "cold lora",
    "cold prefix",
    "reptile lora",
    "reptile prefix",
    "nearest lora",
    "mix lora",
    "nearest prefix",
)
