"""What the files of a run folder have to be, for the verbs that read them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from cloche import files
from cloche.config import Frozen

Count = Annotated[int, Field(ge=0, lt=2**53)]
Size = Annotated[float, Field(ge=0, lt=1e18)]


class Facts(Frozen):
    """What facts.json has to be for the verbs to read it."""

    model_config = ConfigDict(extra="allow")

    source: str
    fingerprint: str
    kind: str
    labels: list[str]
    outputs: Count
    multi: bool
    n: Count
    parts: dict[Literal["train", "validation", "test"], Count]
    left_out: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    device: str
    torch: str
    cloche: str
    threads: Count
    parameters: Count
    flops: Size


class Results(Frozen):
    """What results.json has to be; of what the page alone shows, `write_report` finds out."""

    model_config = ConfigDict(extra="allow")

    part: Literal["train", "validation", "test"]
    headline: Annotated[str, Field(max_length=100)]
    metrics: dict[str, float]
    interval: Annotated[list[float | None], Field(min_length=2, max_length=2)]
    baselines: dict[str, float]
    n: Count
    seed: Count
    seconds: Size
    per_class: dict[Literal["precision", "recall", "f1", "support", "predicted"], list[float]] | None = None
    confusion: list[list[Count]] | None = None
    speed: dict[str, Size]

    @model_validator(mode="after")
    def _one_each(self, info: ValidationInfo) -> "Results":
        k, table, matrix = len((info.context or {"labels": []})["labels"]), self.per_class, self.confusion or []
        if self.headline not in self.metrics or (table and (len(table) < 5 or {len(v) for v in table.values()} != {k})):
            raise ValueError("the figures of each class do not fit")
        if (matrix and {len(matrix), *map(len, matrix)} != {k}) or (self.interval[0] is None) != (self.interval[1] is None):
            raise ValueError("the confusion matrix does not fit")
        return self


class Numbers(Frozen):
    """What the place.json of a checkpoint has to be."""

    place: dict[Literal["step", "epoch", "index"], Count] = Field(min_length=3)
    best_value: Annotated[list[float | None], Field(min_length=2, max_length=2)]
    best_step: Count
    waited: Count
    losses: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    optim: str
    seconds: Size
    events_bytes: Count


def read_facts(path: Path) -> dict[str, Any]:
    return checked(Facts, path / "facts.json")


def checked(kind: type[Frozen], path: Path, context: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON of a run folder, if it is of this kind. Raises: UserError "damaged" naming the field."""
    found = files.read_json(path)
    try:
        kind.model_validate(found, context=context)
    except ValidationError as fault:
        first = fault.errors()[0]
        raise files.damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:200]) from None
    return found
