"""Lightning callbacks: the plugin, the curriculum, the monitors, and what a run leaves behind."""

from lit_sparse.callbacks.checkpoint import RunCheckpoint
from lit_sparse.callbacks.cockpit import Cockpit
from lit_sparse.callbacks.collapse import CollapseMonitor
from lit_sparse.callbacks.collapse_rules import CollapseLimits
from lit_sparse.callbacks.controller import BudgetController
from lit_sparse.callbacks.curriculum import ContextCurriculum
from lit_sparse.callbacks.dense_gap import DenseGapMonitor
from lit_sparse.callbacks.evaluation import LongContextEval
from lit_sparse.callbacks.export import HuggingFaceExport
from lit_sparse.callbacks.finite import FiniteGuard
from lit_sparse.callbacks.progress import SparseProgressBar
from lit_sparse.callbacks.qk_clip import QKClip
from lit_sparse.callbacks.sparse_attention import SparseAttention
from lit_sparse.callbacks.stage_report import StageReport
from lit_sparse.callbacks.step_seed import StepSeed
from lit_sparse.callbacks.throughput import Throughput

__all__ = [
    "BudgetController",
    "Cockpit",
    "CollapseLimits",
    "CollapseMonitor",
    "ContextCurriculum",
    "DenseGapMonitor",
    "FiniteGuard",
    "HuggingFaceExport",
    "LongContextEval",
    "QKClip",
    "RunCheckpoint",
    "SparseAttention",
    "SparseProgressBar",
    "StageReport",
    "StepSeed",
    "Throughput",
]
