"""The one exception that a person sees: what was wrong, what was found, what to do, and the exit code."""

DONE, FAILED, WRONG_INPUT, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130


class UserError(Exception):
    """A fault told to a person, already in their language.

    Args:
        what: one sentence saying what was wrong.
        found: what was found instead (the value, the file, the size); may be empty.
        do: what to do about it; may be empty.
        code: the exit code: 1 the work failed, 2 the person's input, 75 stopped and the same command goes on.
        name: a stable word for programs, printed by `--json` as "code".
    """

    def __init__(self, what: str, found: str = "", do: str = "", *, code: int = WRONG_INPUT, name: str = "input") -> None:
        super().__init__(what, found, do)
        self.what, self.found, self.do, self.code, self.name = what, found, do, code, name
        self.goes_on = False  # the same command ends a run of which a step is saved; --again would throw it away

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, f"  {self.found}" if self.found else "", f"  {self.do}" if self.do else "") if line)

    def as_dict(self) -> dict[str, str]:
        return {"what": self.what, "found": self.found, "do": self.do, "code": self.name}
