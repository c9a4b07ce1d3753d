"""The nets by name: `[net] kind`."""

from cloche.nets.cnn import CnnConfig
from cloche.nets.gpt import GptConfig
from cloche.nets.mlp import MlpConfig
from cloche.nets.resnet import ResnetConfig
from cloche.nets.rnn import RnnConfig
from cloche.nets.seq2seq import Seq2seqConfig
from cloche.nets.textenc import TextencConfig
from cloche.nets.transformer import TransformerConfig
from cloche.nets.unet import UnetConfig

NETS = {
    "cnn": CnnConfig,
    "mlp": MlpConfig,
    "resnet": ResnetConfig,
    "rnn": RnnConfig,
    "lstm": RnnConfig,
    "gru": RnnConfig,
    "seq2seq": Seq2seqConfig,
    "transformer": TransformerConfig,
    "gpt": GptConfig,
    "textenc": TextencConfig,
    "unet": UnetConfig,
}
