"""The kinds of data by name: `[data] kind`."""

from typing import Any, NamedTuple

from cloche.data.audio import AudioConfig, AudioPrepare, read_audio
from cloche.data.captions import CaptionsConfig, CaptionsPrepare, read_captions
from cloche.data.pairs import PairsConfig, PairsPrepare, read_pairs
from cloche.data.prepare import ColumnsConfig, ColumnsPrepare, PicturesConfig, PicturesPrepare
from cloche.data.read.folder import read_folder
from cloche.data.series import SeriesConfig, SeriesPrepare, read_series
from cloche.data.text import TextConfig, TextPrepare, read_text
from cloche.words import _


class Kind(NamedTuple):
    config: Any
    prepare: Any
    read: Any  # of a path, and of pixels where the kind has them
    noun: str  # what its examples are called
    recipe: str  # what a person's own data starts from
    sample: str  # what a person gives `predict`
    ours: tuple[str, ...] = ()  # keys of that recipe that suit only the data it comes with


OF_DIGITS = ("task.judge", "data.pixels", "data.channels")

KINDS = {
    "pictures": Kind(PicturesConfig, PicturesPrepare, read_folder, _("pictures"), "digits", "my.png"),
    "columns": Kind(ColumnsConfig, ColumnsPrepare, None, _("rows"), "curve", ""),
    "series": Kind(SeriesConfig, SeriesPrepare, read_series, _("points in time"), "airline", "my.csv", ("data.log",)),
    "audio": Kind(AudioConfig, AudioPrepare, read_audio, _("clips"), "dialtones", "my.wav"),
    "text": Kind(TextConfig, TextPrepare, read_text, _("pieces of text"), "pydocs", '"the value of the"'),
    "pairs": Kind(PairsConfig, PairsPrepare, read_pairs, _("pairs"), "dates", '"<iso>March 15, 2024"'),
    "captions": Kind(CaptionsConfig, CaptionsPrepare, read_captions, _("captions"), "digits-diffusion", '"tatu"', OF_DIGITS),
}
DATA = {name: kind.config for name, kind in KINDS.items()}
