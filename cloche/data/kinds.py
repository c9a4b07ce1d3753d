"""The kinds of data by name: `[data] kind`."""

from typing import Any, NamedTuple

from cloche.data.audio import AudioConfig, AudioPrepare
from cloche.data.captions import CaptionsConfig, CaptionsPrepare
from cloche.data.pairs import PairsConfig, PairsPrepare
from cloche.data.prepare import ColumnsConfig, ColumnsPrepare, PicturesConfig, PicturesPrepare
from cloche.data.series import SeriesConfig, SeriesPrepare
from cloche.data.text import TextConfig, TextPrepare
from cloche.words import _


class Kind(NamedTuple):
    config: Any
    prepare: Any
    noun: str  # what its examples are called
    recipe: str  # what a person's own data starts from
    sample: str  # what a person gives `predict`
    ours: tuple[str, ...] = ()  # keys of that recipe that suit only the data it comes with


KINDS = {
    "pictures": Kind(PicturesConfig, PicturesPrepare, _("pictures"), "digits", "my.png"),
    "columns": Kind(ColumnsConfig, ColumnsPrepare, _("rows"), "curve", ""),
    "series": Kind(SeriesConfig, SeriesPrepare, _("points in time"), "airline", "my.csv", ("data.log",)),
    "audio": Kind(AudioConfig, AudioPrepare, _("clips"), "dialtones", "my.wav"),
    "text": Kind(TextConfig, TextPrepare, _("pieces of text"), "pydocs", '"the value of the"'),
    "pairs": Kind(PairsConfig, PairsPrepare, _("pairs"), "dates", '"<iso>March 15, 2024"'),
    "captions": Kind(
        CaptionsConfig, CaptionsPrepare, _("captions"), "digits-diffusion", '"tatu"', ("task.judge", "data.pixels", "data.channels")
    ),
}
DATA = {name: kind.config for name, kind in KINDS.items()}
