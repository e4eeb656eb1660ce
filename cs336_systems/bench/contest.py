"""Several implementations measured in one case, of which any may fall out without harm to the others.

Times that are to be compared belong into one record, taken in turn. But one implementation may run out of memory, not
take the inputs, or have a fault: then its part of the record says so, and the rest are measured as if it were not
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cs336_systems.bench.allocator import available_bytes, is_out_of_memory, release_free_memory
from cs336_systems.bench.records import Measurement, Status
from cs336_systems.bench.sweep import AVAILABLE, OutOfMemory, impersonal
from cs336_systems.errors import UserError, first_line


class Contender:
    """One implementation of a case: what it was seen to do, and why it ceased to take part."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device
        self.status: Status = "ok"
        self.reason: str | None = None
        self.values: dict[str, Any] = {}

    def attempt(self, action: Callable[[], object]) -> None:
        """Run `action` if nothing went wrong so far; an exception ends this contender's part.

        A UserError is about what it does not take ("skipped"); out of memory is an answer ("oom").
        """
        if self.status != "ok":
            return
        try:
            action()
            return
        except UserError as error:
            self.status, reason = "skipped", str(error)
        except Exception as error:
            if isinstance(error, OutOfMemory) or is_out_of_memory(error):
                self.status, reason = "oom", str(error).strip().partition("\n")[0]
            else:
                self.status, reason = "failed", first_line(error)
        # Only now that the exception is gone is what its frames held free.
        self.reason = impersonal(reason)
        self.let_go()
        release_free_memory(self.device)

    def let_go(self) -> None:
        """Drop what is held between actions; called where the contender falls out."""

    def report(self) -> dict[str, Any]:
        """Its part of a record's values."""
        return {"status": self.status, "reason": self.reason, **self.values}


def measurement_of(contenders: Sequence[Contender], samples: Mapping[str, Sequence[float]]) -> Measurement:
    """The record of a contest: values by contender, and `samples`, named `<contender> <what>`, of those still in.

    Where memory did not suffice for one, it says how much there was: with more, the case is worth another try.
    """
    values: dict[str, Any] = {contender.name: contender.report() for contender in contenders}
    if any(contender.status == "oom" for contender in contenders):
        release_free_memory(contenders[0].device)  # as the next run will, before it compares
        values[AVAILABLE] = available_bytes(contenders[0].device)
    out = tuple(f"{contender.name} " for contender in contenders if contender.status != "ok")
    kept = {name: list(times) for name, times in samples.items() if not name.startswith(out)}
    return Measurement(samples=kept, values=values)
