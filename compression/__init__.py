"""Operators that change a model, and what they are built from."""

from .blocks import DropBlocks
from .exits import EarlyExit, ExitThreshold
from .experts import SplitExperts
from .finetune import Finetune
from .gating import GateChannels, SkipBlocks
from .lottery import LotteryTicket
from .lowrank import LowRank
from .pruning import Prune, iterative
from .qat import Qat
from .quantization import Quantize
from .sharing import Cluster, TuneCodebook
from .sparse_training import GradualPrune, RigL
from .sparsity import Sparsify

__all__ = [
    "Cluster",
    "DropBlocks",
    "EarlyExit",
    "ExitThreshold",
    "Finetune",
    "GateChannels",
    "GradualPrune",
    "LotteryTicket",
    "LowRank",
    "Prune",
    "Qat",
    "Quantize",
    "RigL",
    "SkipBlocks",
    "Sparsify",
    "SplitExperts",
    "TuneCodebook",
    "iterative",
]
