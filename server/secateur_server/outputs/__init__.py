"""What a caller gets back.

One file for each kind. A new kind is a file here, and a line in OUTPUTS.
"""

from secateur_proto import pruner_pb2 as pb
from secateur_server.outputs.dense import Dense
from secateur_server.outputs.masks import Masks
from secateur_server.outputs.nothing import Nothing
from secateur_server.outputs.packed import Packed
from secateur_server.outputs.protocol import Output
from secateur_server.outputs.reparametrized import Reparametrized
from secateur_server.outputs.shrunk import Shrunk

OUTPUTS: dict[int, Output] = {
    pb.OUTPUT_UNSPECIFIED: Masks(),
    pb.OUTPUT_MASKS: Masks(),
    pb.OUTPUT_REPARAMETRIZED: Reparametrized(),
    pb.OUTPUT_DENSE: Dense(),
    pb.OUTPUT_NONE: Nothing(),
    pb.OUTPUT_SHRUNK: Shrunk(),
    pb.OUTPUT_PACKED: Packed(),
}
