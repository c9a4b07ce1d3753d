"""The nets by name: `[net] kind`."""

from cloche.nets.cnn import CnnConfig
from cloche.nets.mlp import MlpConfig

NETS = {"cnn": CnnConfig, "mlp": MlpConfig}
