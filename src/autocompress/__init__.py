"""Multi-objective search for compressed neural networks, scored on real hardware.

    import autocompress as ac
    study = ac.run_search("digits-cnn", "digits", target="x86/openvino", trials=20)
    study.best(size="<=30%").export("bundle")

Names load on first use: importing this package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "run_search": "search.run",
    "as_objective": "search.adapters",
    "AutoSampler": "search.auto",
    "make_sampler": "search.samplers",
    "SearchConfig": "search.config",
    "Study": "studies.study",
    "Point": "studies.point",
    "Prune": "compression.pruning",
    "Quantize": "compression.quantization",
    "Finetune": "compression.finetune",
    "DropBlocks": "compression.blocks",
    "EarlyExit": "compression.exits",
    "ExitThreshold": "compression.exits",
    "GateChannels": "compression.gating",
    "SkipBlocks": "compression.gating",
    "LotteryTicket": "compression.lottery",
    "LowRank": "compression.lowrank",
    "iterative": "compression.pruning",
    "Qat": "compression.qat",
    "Cluster": "compression.sharing",
    "SplitExperts": "compression.experts",
    "save_compressed": "compression.coding",
    "load_compressed": "compression.coding",
    "load_into": "compression.coding",
    "TuneCodebook": "compression.sharing",
    "GradualPrune": "compression.sparse_training",
    "RigL": "compression.sparse_training",
    "Sparsify": "compression.sparsity",
    "Data": "core.types",
    "Split": "core.types",
    "Task": "core.types",
    "Candidate": "core.types",
    "Evaluation": "core.types",
    "Measurement": "core.types",
    "Plan": "core.types",
    "Objective": "evaluators.objectives",
    "AutocompressError": "core.errors",
    "InputError": "core.errors",
    "load_data": "tasks.data",
    "load_task": "tasks.models",
    "stock_space": "spaces.stock",
}

__all__ = [*_NAMES]

if TYPE_CHECKING:
    from .compression.blocks import DropBlocks as DropBlocks
    from .compression.coding import load_compressed as load_compressed
    from .compression.coding import load_into as load_into
    from .compression.coding import save_compressed as save_compressed
    from .compression.exits import EarlyExit as EarlyExit
    from .compression.exits import ExitThreshold as ExitThreshold
    from .compression.experts import SplitExperts as SplitExperts
    from .compression.finetune import Finetune as Finetune
    from .compression.gating import GateChannels as GateChannels
    from .compression.gating import SkipBlocks as SkipBlocks
    from .compression.lottery import LotteryTicket as LotteryTicket
    from .compression.lowrank import LowRank as LowRank
    from .compression.pruning import Prune as Prune
    from .compression.pruning import iterative as iterative
    from .compression.qat import Qat as Qat
    from .compression.quantization import Quantize as Quantize
    from .compression.sharing import Cluster as Cluster
    from .compression.sharing import TuneCodebook as TuneCodebook
    from .compression.sparse_training import GradualPrune as GradualPrune
    from .compression.sparse_training import RigL as RigL
    from .compression.sparsity import Sparsify as Sparsify
    from .core.errors import AutocompressError as AutocompressError
    from .core.errors import InputError as InputError
    from .core.types import Candidate as Candidate
    from .core.types import Data as Data
    from .core.types import Evaluation as Evaluation
    from .core.types import Measurement as Measurement
    from .core.types import Plan as Plan
    from .core.types import Split as Split
    from .core.types import Task as Task
    from .evaluators.objectives import Objective as Objective
    from .search.adapters import as_objective as as_objective
    from .search.config import SearchConfig as SearchConfig
    from .search.run import run_search as run_search
    from .spaces.stock import stock_space as stock_space
    from .studies.point import Point as Point
    from .studies.study import Study as Study
    from .tasks.data import load_data as load_data
    from .tasks.models import load_task as load_task


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'autocompress' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*_NAMES, "__version__"]
