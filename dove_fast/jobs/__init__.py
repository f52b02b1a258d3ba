"""The jobs behind the command line, callable from Python: tokenize, reconstruct, export, summaries."""

from dove_fast.jobs.export import ExportReport, export
from dove_fast.jobs.info import CheckpointSummary, StoreSummary, summarize_checkpoint, summarize_store
from dove_fast.jobs.loading import LoadedModel, load_model
from dove_fast.jobs.progress import Progress
from dove_fast.jobs.queries import read_queries
from dove_fast.jobs.reconstruct import ReconstructReport, reconstruct
from dove_fast.jobs.tokenize import TokenizeOptions, TokenizeReport, tokenize

__all__ = [
    "CheckpointSummary",
    "ExportReport",
    "LoadedModel",
    "Progress",
    "ReconstructReport",
    "StoreSummary",
    "TokenizeOptions",
    "TokenizeReport",
    "export",
    "load_model",
    "read_queries",
    "reconstruct",
    "summarize_checkpoint",
    "summarize_store",
    "tokenize",
]
