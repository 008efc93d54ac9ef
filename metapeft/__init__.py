"""metapeft decides how to fine-tune: it recommends, tunes, trains and registers parameter-efficient adapters on MLX.

    model, tokenizer = metapeft.load("smollm2-135m-instruct", adapter=None)
    metapeft.recommend(task)    metapeft.sweep(task)    metapeft.train(task)
    metapeft.adapt(task, shots=16)    metapeft.train_sequence(tasks)    metapeft.profile(task)    metapeft.monitor()

The names are looked up when they are used: importing metapeft imports nothing else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metapeft.api import adapt, load, monitor, profile, recommend, sweep, train, train_sequence
    from metapeft.errors import MetapeftError, UserError

    __version__: str

__all__ = [
    "MetapeftError",
    "UserError",
    "adapt",
    "load",
    "monitor",
    "profile",
    "recommend",
    "sweep",
    "train",
    "train_sequence",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("metapeft")
    if name not in __all__:
        raise AttributeError(f"module 'metapeft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("metapeft.errors" if name.endswith("Error") else "metapeft.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
