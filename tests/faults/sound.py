"""What every reader of somebody's input owes: a result, or a UserError of one short sentence, soon."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from metapeft.errors import MetapeftError, UserError

LONGEST = 1500  # characters of a message, the path in it included
SECONDS = 10.0  # of the processor, for one case, which usually takes milliseconds
EXAMPLES = int(os.environ.get("METAPEFT_FUZZ", "25"))

tried: Counter[str] = Counter()
refused: Counter[str] = Counter()


def sound(name: str, call: Callable[[], Any], kind: type[MetapeftError] = UserError) -> Any:
    """The result of `call`, or None where it refused its input as it should. Any other exception passes."""
    tried[name] += 1
    begin = time.process_time()
    try:
        return call()
    except kind as error:
        refused[name] += 1
        check(str(error))
        return None
    finally:
        taken = time.process_time() - begin
        assert taken < SECONDS, f"{name} took {taken:.1f} s"


def check(message: str) -> None:
    assert message.strip(), "an empty message"
    assert "\n" not in message, message
    assert len(message) < LONGEST, f"{len(message)} characters: {message[:300]}"
    assert "Traceback" not in message
